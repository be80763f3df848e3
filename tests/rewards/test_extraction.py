"""The extraction reward: format, validity and correctness apart, and no way around them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.extraction import extraction, metrics, micro_f1
from rlpost_rewards.field_types import read_fields

from rlpost.errors import JobError, RowError
from rlpost.reward import as_score, recorded
from rlpost.types import Rollout, Task

FIELDS = {"company": "text", "date": "date", "address": "text", "total": "amount"}
GOLD = {
    "company": "INDAH GIFT & HOME DECO",
    "date": "19/10/2018",
    "address": "27, JALAN DEDAP 13, TAMAN JOHOR JAYA",
    "total": "60.30",
}
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in FIELDS},
    "required": list(FIELDS),
    "additionalProperties": False,
}
LINES = {
    "total": "amount",
    "items": {"type": "list", "fields": {"name": "text", "amount": "amount"}},
}
RULE = "total == sum(items.amount)"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "x"]), inner)
    ),
    max_leaves=8,
)


def judged(reply, *, answer=GOLD, schema=None, **arguments):
    task = Task(id="1", messages=[], answer=answer, schema=schema)
    text = reply if isinstance(reply, str) else json.dumps(reply)
    arguments = {"fields": FIELDS, "day_first": True, **arguments}
    return extraction(task, recorded(task, text), **arguments)


def test_gold_is_worth_one_in_every_part():
    score = judged(GOLD, schema=SCHEMA)
    assert score.value == 1.0
    assert score.reason == "ok"
    assert set(score.parts) == {
        "parses",
        "valid",
        *(f"exact.{name}" for name in FIELDS),
        *(f"typed.{name}" for name in FIELDS),
    }
    assert set(score.parts.values()) == {1.0}


def test_another_print_is_right_by_type_and_wrong_as_text():
    score = judged(
        {**GOLD, "date": "2018-10-19", "total": 60.3, "company": "Indah Gift, Home Deco"}
    )
    assert score.value == 1.0
    assert (score.parts["exact.date"], score.parts["exact.total"]) == (0.0, 0.0)


def test_the_value_is_the_mean_of_typed():
    score = judged({**GOLD, "date": "20/10/2018"})
    assert score.value == 0.75
    assert score.reason == "wrong_values"


def test_a_field_may_weigh_more_than_others():
    fields = {**FIELDS, "total": {"type": "amount", "weight": 5}}
    assert judged({**GOLD, "total": "1.00"}, fields=fields).value == pytest.approx(3 / 8)
    assert judged(GOLD, fields=fields).value == 1.0


def test_credit_can_be_given_for_exact_strings():
    reply = {**GOLD, "date": "2018-10-19", "total": "1.00"}
    assert judged(reply).value == 0.75
    assert judged(reply, credit="exact").value == 0.5
    assert judged(reply, credit="both").value == 0.625


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        ("The total is 60.30", "not_json"),
        (json.dumps(GOLD)[:-1], "not_json"),
        ('{"total": NaN}', "not_finite"),
        ('{"total": "60.30", "total": "60.30"}', "duplicate_key"),
        ("[" * 5000, "too_deep"),
        ("<think></think>x", "not_json"),
        ("<think>" + json.dumps(GOLD), "open_thinking"),
        ('"' + "x" * 10_000_000 + '"', "too_long"),
    ],
)
def test_what_is_not_strict_json_is_worth_nothing(reply, reason):
    score = judged(reply)
    assert (score.value, score.reason, score.parts["parses"]) == (0.0, reason, 0.0)


def test_json_that_is_no_object_parses_and_is_worth_nothing():
    score = judged([GOLD])
    assert (score.value, score.reason, score.parts["parses"]) == (0.0, "not_an_object", 1.0)


def test_thinking_and_one_fence_are_stripped_or_punished():
    reply = f"<think>two of them</think>\n```json\n{json.dumps(GOLD)}\n```"
    assert judged(reply).value == 1.0
    assert judged(reply, thinking="punish").value == 0.0
    assert judged(reply, fence="punish").value == 0.0


def test_the_schema_is_a_gate():
    score = judged({**GOLD, "total": 60.3}, schema=SCHEMA)
    assert (score.value, score.parts["valid"], score.parts["typed.total"]) == (0.0, 0.0, 1.0)
    assert score.reason == "type"


def test_surplus_keys_cost_precision():
    score = judged({**GOLD, "currency": "RM"})
    assert (score.value, score.reason) == (0.8, "extra_keys")
    assert judged({**GOLD, **{f"k{n}": n for n in range(96)}}).value == 0.04


def test_surplus_is_what_neither_job_nor_gold_asks_for():
    assert judged({**GOLD, "phone": "1"}, answer={**GOLD, "phone": "2"}).value == 1.0


@pytest.mark.parametrize(
    "reply",
    [{}, dict.fromkeys(FIELDS), dict.fromkeys(FIELDS, ""), SCHEMA, FIELDS, {"x": GOLD}],
)
def test_degenerate_replies_are_worth_nothing(reply):
    assert judged(reply).value < 0.1
    assert judged(reply, answer={"total": "60.30", "date": None}).value < 0.1


def test_absent_gold_wants_an_absent_value():
    answer = {**GOLD, "date": None}
    assert judged({**GOLD, "date": None}, answer=answer).value == 1.0
    assert judged({k: v for k, v in GOLD.items() if k != "date"}, answer=answer).value == 1.0
    assert judged(GOLD, answer=answer).value == 0.75


def test_a_rule_counts_like_a_field_where_gold_keeps_it():
    answer = {
        "total": "6.00",
        "items": [{"name": "a", "amount": "2.00"}, {"name": "b", "amount": "4"}],
    }
    right = judged(answer, answer=answer, fields=LINES, rules=[RULE])
    assert (right.value, right.parts["rule.1"]) == (1.0, 1.0)
    broken = judged({**answer, "total": "7.00"}, answer=answer, fields=LINES, rules=[RULE])
    assert broken.parts["rule.1"] == 0.0
    assert broken.value == pytest.approx(0.5 * 2 / 3)


def test_a_rule_that_gold_breaks_is_not_counted():
    answer = {"total": "6.05", "items": [{"name": "a", "amount": "6.04"}]}
    score = judged(answer, answer=answer, fields=LINES, rules=[RULE])
    assert score.value == 1.0
    assert "rule.1" not in score.parts


def test_a_rule_on_fields_without_gold_judges_the_reply_alone():
    fields, rules = {"total": "amount"}, ["total == net + tax"]
    answer = {"total": "6.00"}
    kept = judged({"total": 6, "net": 5, "tax": 1}, answer=answer, fields=fields, rules=rules)
    broken = judged({"total": 6, "net": 5, "tax": 2}, answer=answer, fields=fields, rules=rules)
    assert (kept.value, broken.value) == (1.0, 0.5)


def test_numbers_that_only_agree_with_each_other_are_worth_little():
    answer = {"total": "6.00", "items": [{"name": "a", "amount": "6.00"}]}
    invented = {"total": "1", "items": [{"name": "z", "amount": "1"}]}
    assert judged(invented, answer=answer, fields=LINES, rules=[RULE]).value == 0.0


def test_without_fields_the_schema_names_the_types_and_else_the_gold():
    schema = {"properties": {"day": {"type": "string", "format": "date"}}}
    by_schema = judged(
        {"day": "1 May 2018"}, answer={"day": "2018-05-01"}, schema=schema, fields=None
    )
    by_gold = judged({"day": "1 May 2018"}, answer={"day": "2018-05-01"}, fields=None)
    assert by_schema.value == 1.0
    assert by_gold.value < 0.5


def test_an_answer_may_be_json_text():
    assert judged(GOLD, answer=json.dumps(GOLD)).value == 1.0


@pytest.mark.parametrize("answer", [None, 5, "not JSON", ["a"]])
def test_a_row_without_an_answer_is_the_rows_mistake(answer):
    with pytest.raises(RowError, match="row 1"):
        judged(GOLD, answer=answer)


@pytest.mark.parametrize(
    "arguments",
    [{"fields": {"a": "b"}}, {"credit": "half"}, {"rules": ["total"]}, {"thinking": "keep"}],
)
def test_bad_arguments_are_the_jobs_mistake(arguments):
    with pytest.raises(JobError, match="extraction"):
        judged(GOLD, **arguments)


def test_an_unusable_schema_is_the_rows_mistake():
    with pytest.raises(RowError, match="schema"):
        judged(GOLD, schema={"$ref": "http://example.com/schema.json"})


def test_micro_f1_counts_entities_of_gold_only():
    fields = read_fields({"a": "text", "b": "amount"})
    rows = [
        (fields, {"a": "x", "b": "1.0"}, {"a": "x", "b": "1.00"}),
        (fields, {"a": "x", "b": None}, {"a": "y", "b": "5"}),
        (fields, {"a": "x"}, {}),
    ]
    assert micro_f1(rows, kind="exact") == pytest.approx(2 * 1 / (4 + 3))
    assert micro_f1(rows, kind="typed") == pytest.approx(2 * 2 / (4 + 3))
    assert micro_f1([]) == 0.0


def test_metrics_take_the_rewards_arguments():
    task = Task(id="1", messages=[], answer=GOLD)
    replies = [json.dumps(GOLD), json.dumps({**GOLD, "date": "2018-10-19"}), "x"]
    rollouts = [Rollout(task=task, reply=reply) for reply in replies]
    arguments = {"fields": FIELDS, "day_first": True, "rules": [], "credit": "both"}
    figures = extraction.metrics([task] * 3, rollouts, **arguments)
    assert extraction.metrics is metrics
    assert figures == {
        "exact_f1": pytest.approx(2 * 7 / (12 + 8)),
        "typed_f1": pytest.approx(2 * 8 / (12 + 8)),
        "valid": pytest.approx(2 / 3),
        "whole_row": pytest.approx(2 / 3),
    }


@given(st.text(max_size=200) | JSON.map(json.dumps), st.booleans())
def test_any_reply_has_a_finite_score_below_golds(reply, with_schema):
    score = as_score(judged(reply, schema=SCHEMA if with_schema else None))
    assert 0.0 <= score.value <= 1.0
    assert all(0.0 <= part <= 1.0 for part in score.parts.values())
    assert (score.value == 1.0) == (score.reason == "ok")
    if score.parts["valid"] == 0.0:
        assert score.value == 0.0


@given(st.sets(st.sampled_from(sorted(FIELDS))))
def test_every_field_that_goes_wrong_costs_a_share(wrong):
    score = judged({name: "0" if name in wrong else value for name, value in GOLD.items()})
    assert score.value == pytest.approx(1 - len(wrong) / 4)
