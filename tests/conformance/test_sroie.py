"""Every receipt of SROIE against its own gold, printed otherwise, and with one field wrong."""

import datetime
import json
import os
from pathlib import Path

import pytest
from rlpost_rewards.dates import read_date
from rlpost_rewards.extraction import extraction, metrics

from rlpost.reward import recorded
from rlpost.types import Rollout, Task

DATA = Path(os.environ.get("RLPOST_DATA") or Path(__file__).parents[2] / "../shared/data") / "sroie"
FIELDS = {"company": "text", "date": "date", "address": "text", "total": "amount"}
ARGUMENTS = {"fields": FIELDS, "day_first": True}
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="no SROIE rows: RLPOST_DATA names a folder that has sroie/"
)


def tasks() -> list[Task]:
    lines = [*(DATA / "train.jsonl").open(), *(DATA / "dev.jsonl").open()]
    rows = [json.loads(line) for line in lines]
    return [
        Task(id=f"{n}", messages=[], answer={name: row[name] for name in FIELDS})
        for n, row in enumerate(rows)
    ]


def judged(task: Task, reply: dict):
    return extraction(task, recorded(task, json.dumps(reply)), **ARGUMENTS)


def test_every_gold_is_right_against_itself():
    for task in tasks():
        score = judged(task, task.answer)
        assert score.value == 1.0, task
        assert set(score.parts.values()) == {1.0}, task


def test_every_date_and_total_can_be_read():
    unread = [t.answer["date"] for t in tasks() if not read_date(t.answer["date"], day_first=True)]
    assert unread == []


def test_other_prints_are_right_by_type_and_wrong_as_strings():
    for task in tasks():
        date = datetime.date.fromisoformat(read_date(task.answer["date"], day_first=True))
        total = task.answer["total"].replace("RM", "").replace(",", "").strip()
        reply = {
            "company": task.answer["company"].lower().replace(" ", "  ") + " .",
            "date": date.strftime("%d %B, %Y"),
            "address": task.answer["address"].title().replace(",", " "),
            "total": f"MYR {total}",
        }
        score = judged(task, reply)
        assert score.value == 1.0, (task.answer, reply)
        assert sum(v for k, v in score.parts.items() if k.startswith("exact.")) == 0.0


def test_a_wrong_date_or_total_is_worth_nothing():
    for task in tasks():
        day = datetime.date.fromisoformat(read_date(task.answer["date"], day_first=True))
        later = (day + datetime.timedelta(days=1)).isoformat()
        total = float(task.answer["total"].replace("RM", "").replace(",", ""))
        score = judged(task, {**task.answer, "date": later, "total": f"{total * 10:.2f}"})
        assert (score.parts["typed.date"], score.parts["typed.total"]) == (0.0, 0.0)
        assert score.value == 0.5


def test_another_receipts_fields_are_worth_little():
    rows = tasks()
    values = [
        judged(task, other.answer).value
        for task, other in zip(rows, rows[7:], strict=False)
        if not any(task.answer[name] == other.answer[name] for name in FIELDS)
    ]
    assert len(values) > 300
    assert sum(values) / len(values) < 0.1


def test_micro_f1_is_that_of_a_plain_count():
    """SROIE's rule written out: 2 · equal / (gold + given), over the entities that gold has."""
    rows = tasks()[:200]
    replies, equal, given = [], 0, 0
    for number, task in enumerate(rows):
        reply = dict(task.answer)
        if number % 3 == 0:
            reply["total"] = "1.23"
        if number % 4 == 0:
            del reply["company"]
        if number % 5 == 0:
            reply["date"] = ""
        if number % 7 == 0:
            reply["address"] = reply["address"].lower()
        text = "not JSON" if number % 11 == 0 else json.dumps(reply)
        kept = {} if number % 11 == 0 else {k: v for k, v in reply.items() if v}
        given += len(kept)
        equal += sum(task.answer[name] == value for name, value in kept.items())
        replies.append(Rollout(task=task, reply=text))
    figures = metrics(rows, replies, **ARGUMENTS)
    assert figures["exact_f1"] == pytest.approx(2 * equal / (4 * len(rows) + given))
    assert figures["valid"] == pytest.approx(1 - len(range(0, 200, 11)) / 200)
    assert figures["exact_f1"] < figures["typed_f1"] < 1.0  # lower case costs only the exact one
    assert 0.0 < figures["whole_row"] < 0.5
