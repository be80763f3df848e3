"""The official JSON Schema test suite through the reward, with its remotes and formats off."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from rlpost_rewards.json_schema import json_schema

from rlpost.reward import recorded
from rlpost.types import Task

DATA = Path(os.environ.get("RLPOST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
CASES = DATA / "json_schema_suite" / "cases.jsonl"
REMOTES = DATA / "json_schema_suite" / "remotes.json"
pytestmark = pytest.mark.skipif(
    not CASES.exists(), reason=f"no json_schema_suite under {DATA}; set RLPOST_DATA"
)


def groups():
    return [json.loads(line) for line in CASES.open(encoding="utf-8")]


@cache
def remotes():
    return json.loads(REMOTES.read_text(encoding="utf-8"))


def test_every_verdict_is_the_suites(record_property):
    wrong, total = [], 0
    for group in groups():
        task = Task(id="x", messages=(), schema=group["schema"], meta={"draft": group["draft"]})
        for test in group["tests"]:
            total += 1
            score = json_schema(task, recorded(task, json.dumps(test["data"])), remotes=remotes())
            if (score.value == 1.0) != test["valid"] or score.parts["parses"] != 1.0:
                wrong.append((group["draft"], group["file"], test["description"], score))
            assert (score.parts["leaves"] == 1.0) == (score.value == 1.0)
    name = "official JSON Schema suite, with remotes, formats off"
    target = "all but custom metaschemas"
    record_property("figure", (name, target, total - len(wrong), total))
    assert total > 600
    assert not wrong


def test_a_metaschema_of_the_suites_own_turns_validation_off():
    name = "http://localhost:1234/draft2020-12/metaschema-no-validation.json"
    schema = {"$schema": name, "properties": {"bad": False, "number": {"minimum": 10}}}
    task = Task(id="x", messages=(), schema=schema)
    assert json_schema(task, recorded(task, '{"number": 1}'), remotes=remotes()).value == 1.0
    assert json_schema(task, recorded(task, '{"bad": 1}'), remotes=remotes()).value < 1.0
