"""Synthetic receipts: exact labels, the same everywhere, many layouts."""

import hashlib
import json
import random
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlpost_envs.receipt_layouts import DATE_STYLES, LAYOUTS, print_date
from rlpost_envs.receipt_words import GOODS
from rlpost_envs.receipts import DEFAULT_FIELDS, FIELDS, Receipts, draw_receipt

from rlpost.env import Env
from rlpost.errors import JobError, RowError

EVERY = [layout.name for layout in LAYOUTS]


def text_of(task):
    return task.messages[0]["content"]


def test_receipts_is_an_environment_whose_episode_asks_once_and_is_done():
    env = Receipts(count=1)
    (task,) = env.tasks()
    episode = env.episode(task)
    assert isinstance(env, Env)
    assert episode.start() == task.messages
    assert episode.step("{}").done


def test_one_seed_gives_the_same_receipts_on_every_machine():
    told = json.dumps([[text_of(t), t.answer] for t in Receipts(count=200, seed=3).tasks()])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "6349f156403c1930"


def test_the_global_generator_is_neither_read_nor_moved():
    random.seed(5)
    before = random.getstate()
    first = Receipts(count=20, seed=1).tasks()
    assert random.getstate() == before
    random.seed(6)
    assert Receipts(count=20, seed=1).tasks() == first


def test_other_seeds_give_other_receipts():
    texts = [{text_of(t) for t in Receipts(count=300, seed=seed).tasks()} for seed in (1, 2)]
    assert not texts[0] & texts[1]


def test_no_receipt_of_a_thousand_comes_twice():
    texts = [text_of(task) for task in Receipts(count=1000, seed=9).tasks()]
    assert len(set(texts)) == 1000


def test_more_receipts_of_a_seed_keep_the_layouts_of_the_first():
    few, many = Receipts(count=40, seed=1, per_vendor=4), Receipts(count=80, seed=1, per_vendor=8)
    assert few.tasks() == many.tasks()[:40]


def test_every_layout_comes_about_equally_often():
    drawn = [task.meta["layout"] for task in Receipts(count=1600, seed=4).tasks()]
    assert set(drawn) == set(EVERY) and len(EVERY) >= 12
    assert all(60 < drawn.count(name) < 150 for name in EVERY)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), index=st.integers(0, 10**6))
def test_gold_is_valid_by_its_schema_and_stands_on_the_page(seed, index):
    receipt = draw_receipt(seed, index, with_address=True)
    assert set(receipt.values) == set(FIELDS)
    for field in ("company", "invoice", "address"):
        assert receipt.values[field] in receipt.text
    assert receipt.printed["date"] in receipt.text
    assert f"{receipt.values['total']:.2f}" in receipt.text


def test_answers_satisfy_the_schema_of_their_task():
    for task in Receipts(count=100, seed=5, fields=list(FIELDS)).tasks():
        jsonschema.validate(task.answer, task.schema)


def test_the_schema_refuses_printed_dates_texts_for_totals_and_other_keys():
    (task,) = Receipts(count=1, seed=5).tasks()
    for wrong in (
        {**task.answer, "date": "14/03/2025"},
        {**task.answer, "total": "12.50"},
        {**task.answer, "shop": "x"},
        {k: v for k, v in task.answer.items() if k != "invoice"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, task.schema)


@pytest.mark.parametrize("style", DATE_STYLES)
def test_a_printed_date_of_any_style_tells_the_day(style):
    printed = print_date(2025, 3, 14, style)
    assert printed == style
    assert print_date(2026, 12, 2, style) != print_date(2026, 2, 12, style)


@pytest.mark.parametrize("layout", LAYOUTS, ids=EVERY)
def test_the_amounts_of_a_layout_add_up(layout):
    for index in range(50):
        shown = draw_receipt(8, index, layouts=[layout]).printed
        cents = {n: round(100 * float(shown[n])) for n in ("subtotal", "tax", "discount", "total")}
        assert cents["total"] == cents["subtotal"] + cents["tax"] - cents["discount"] > 0
        change = round(
            100 * (float(shown["cash"]) - float(shown["total"]) - float(shown["change"]))
        )
        assert change == 0 <= float(shown["change"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=EVERY)
def test_item_lines_add_up_to_the_subtotal(layout):
    for index in range(20):
        receipt = draw_receipt(8, index, layouts=[layout])
        lines = [line for line in receipt.text.split("\n") if any(good in line for good in GOODS)]
        amounts = [re.search(r"\d+\.\d\d", line)[0] for line in lines]
        assert sum(round(100 * float(amount)) for amount in amounts) == round(
            100 * float(receipt.printed["subtotal"])
        ), receipt.text


def test_a_second_date_is_later_than_the_receipts_own():
    for index in range(300):
        receipt = draw_receipt(2, index)
        assert receipt.other_date > receipt.values["date"]


def test_vendors_come_back_so_that_a_split_by_vendor_means_something():
    tasks = Receipts(count=400, seed=1, per_vendor=4).tasks()
    vendors = {task.meta["vendor"] for task in tasks}
    assert 60 <= len(vendors) <= 100
    addresses = {}
    for index in range(400):
        shown = draw_receipt(1, index, vendors=100).printed
        addresses.setdefault(shown["company"], set()).add(shown["address"])
    assert all(len(found) == 1 for found in addresses.values())


def test_asking_for_the_address_prints_it_on_every_page():
    for task in Receipts(count=200, seed=6, fields=["address", "total"]).tasks():
        assert task.answer["address"] in text_of(task)


def test_default_fields_are_asked_for_with_their_forms():
    (task,) = Receipts(count=1).tasks()
    assert "company, date (YYYY-MM-DD), invoice, total (number)" in text_of(task)
    assert tuple(task.answer) == DEFAULT_FIELDS


def test_chosen_layouts_are_the_only_ones_drawn():
    tasks = Receipts(count=50, layouts=["till", "fuel"]).tasks()
    assert {task.meta["layout"] for task in tasks} == {"till", "fuel"}


def test_a_prompt_file_replaces_the_prompt(tmp_path):
    file = tmp_path / "prompt.md"
    file.write_text("{text}\n{{JSON}} with {fields}!\n")
    (task,) = Receipts(count=1, fields=["total"], prompt=str(file)).tasks()
    assert text_of(task).endswith("\n{JSON} with total (number)!")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 0}, "environment.count is 0"),
        ({"count": "many"}, "environment.count is 'many'"),
        ({"layouts": ["tilt"]}, "environment.layouts has no 'tilt'; known are counter, slip"),
        ({"layouts": "till"}, "write a list of names"),
        ({"fields": ["price"]}, "environment.fields has no 'price'"),
        ({"fields": []}, "write a list of names"),
        ({"prompt": "absent.md"}, "there is no file absent.md"),
    ],
)
def test_a_wrong_argument_is_named_with_its_cure(arguments, words):
    with pytest.raises(JobError, match=re.escape(words)):
        Receipts(**arguments)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("no place", JobError, "lacks {text}"),
        ("{text} {total}", JobError, "{total}, which this environment does not have"),
        ("{text}\n{", RowError, "line 2"),
    ],
)
def test_a_wrong_prompt_file_is_named_with_its_cure(tmp_path, prompt, error, words):
    file = tmp_path / "prompt.md"
    file.write_text(prompt)
    with pytest.raises(error, match=re.escape(words)):
        Receipts(count=1, prompt=str(file))
