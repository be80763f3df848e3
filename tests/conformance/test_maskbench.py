"""MaskBench's generated documents through the reward, formats asserted."""

import json
import os
from pathlib import Path

import pytest
from rlpost_rewards.json_schema import json_schema

from rlpost.reward import recorded
from rlpost.types import Task

DATA = Path(os.environ.get("RLPOST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
CASES = DATA / "maskbench" / "cases.jsonl"
pytestmark = pytest.mark.skipif(
    not CASES.exists(), reason=f"no maskbench under {DATA}; set RLPOST_DATA"
)


def test_nearly_every_verdict_is_maskbenchs(record_property):
    wrong, total = [], 0
    for line in CASES.open(encoding="utf-8"):
        case = json.loads(line)
        task = Task(id=case["id"], messages=(), schema=case["schema"])
        for test in case["tests"]:
            total += 1
            score = json_schema(task, recorded(task, json.dumps(test["data"])), formats=True)
            if (score.value == 1.0) != test["valid"]:
                wrong.append((case["id"], test["description"], score))
            assert test["valid"] or 0.0 <= score.value <= 0.5
    record_property("figure", ("maskbench, formats on", "99.7%", total - len(wrong), total))
    assert total > 2_000
    assert len(wrong) <= 0.003 * total, wrong
