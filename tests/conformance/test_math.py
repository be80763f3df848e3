"""math-verify's own cases and GSM8K's golds through the reward."""

import json
import os
from decimal import Decimal
from pathlib import Path

import pytest
from rlpost_rewards.math import math

from rlpost.reward import recorded
from rlpost.types import Task

DATA = Path(os.environ.get("RLPOST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def rows(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} under {DATA}; set RLPOST_DATA")
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def value(answer, reply, meta=None):
    task = Task(id="x", messages=(), answer=answer, meta=meta or {})
    return math(task, recorded(task, reply)).value


def test_math_verifys_own_cases_get_its_verdict(record_property):
    cases = rows("math_verify/cases.jsonl")
    wrong = [c for c in cases if value(c["gold"], c["pred"], c) != c["expected"]]
    record_property("figure", ("math cases", "99%", len(cases) - len(wrong), len(cases)))
    assert len(cases) >= 120
    assert len(wrong) <= 0.01 * len(cases), wrong


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_gsm8k_gold_is_itself_and_no_other(part, record_property):
    golds = accepted = 0
    for row in rows(f"gsm8k/{part}.jsonl"):
        solution, _, gold = row["answer"].rpartition("####")
        gold = gold.strip()
        golds += 1
        assert value(row["answer"], row["answer"]) == 1.0, row
        assert value(row["answer"], f"So it is **{gold}**.") == 1.0, row
        for step in (1, -1):
            off = f"{Decimal(gold.replace(',', '')) + step:,}"
            for reply in (off, f"{solution}#### {off}", f"\\boxed{{{off}}}", f"It is ${off}."):
                accepted += value(row["answer"], reply) > 0.0
                assert not accepted, (row, reply)
    record_property("figure", ("GSM8K golds against themselves", "100%", golds, golds))
    record_property("figure", ("GSM8K golds off by one", "0 accepted", 8 * golds, 8 * golds))
