"""The leaderboard's rules, one oddity at a time, with the verdicts of its own program."""

import pytest
from rlpost_rewards.call_formats import Call
from rlpost_rewards.call_rules import RULES, GoldCall, argument_is_right, call_is_right

OFFICIAL, EXACT = RULES["bfcl"], RULES["exact"]


@pytest.mark.parametrize(
    ("schema", "accepted", "value", "verdict"),
    [
        ({"type": "integer"}, [5], 5, True),
        ({"type": "integer"}, [5], 5.0, False),
        ({"type": "integer"}, [5], "5", False),
        ({"type": "integer"}, [1], True, False),
        ({"type": "float"}, [5], 5, True),
        ({"type": "float"}, [5.0], 5, True),
        ({"type": "number"}, [5.0], 5, True),
        ({"type": "float"}, [1], True, False),
        ({"type": "boolean"}, [True], 1, False),
        ({"type": "integer"}, ["n"], "n", True),  # gold names a variable
        ({"type": "integer"}, ["n"], "N", False),  # which is compared as it is
        ({"type": "any"}, ["data set"], "Dataset", True),
        ({"type": "any"}, [5], 5, True),
        ({"type": "string"}, ["New York, NY"], "new york ny", True),
        ({"type": "string"}, ["it's"], 'it"s', True),
        ({"type": "string"}, ["a+b"], "ab", False),
        ({"type": "string"}, ["x", ""], "", True),
        ({"type": "string"}, ["x"], "", False),
        ({"type": "array", "items": {"type": "float"}}, [[1, 2]], [1, 2], True),
        ({"type": "array", "items": {"type": "float"}}, [[1, 2]], [1.0, 2.0], True),
        ({"type": "array", "items": {"type": "float"}}, [[1.0, 2.0]], [1, 2], False),
        ({"type": "array", "items": {"type": "string"}}, [["A b", "c"]], ["ab", "C"], True),
        ({"type": "array", "items": {"type": "string"}}, [["a", "b"]], ["b", "a"], False),
        ({"type": "array", "items": {"type": "string"}}, [["a"], ""], [], True),
        ({"type": "array", "items": {"type": "string"}}, [["a"]], "a", False),
        ({"type": "tuple", "items": {"type": "float"}}, [[4.5, 2.25]], [4.5, 2.25], True),
        ({"type": "dict"}, [{"a": ["X y"], "b": [1, ""]}], {"a": "xy"}, True),
        ({"type": "dict"}, [{"a": ["x"], "b": [1, ""]}], {"a": "x", "b": 2}, False),
        ({"type": "dict"}, [{"a": ["x"], "b": [1]}], {"a": "x"}, False),
        ({"type": "dict"}, [{"a": ["x"]}], {"a": "x", "c": 1}, False),
        ({"type": "dict"}, [{"a": [["x y"]]}], {"a": ["xy"]}, False),  # one level only
        ({"type": "array", "items": {"type": "dict"}}, [[{"a": ["x"]}]], [{"a": "X"}], True),
        ({"type": "array", "items": {"type": "dict"}}, [[{"a": ["x"]}]], [], False),
    ],
)
def test_the_official_verdict_on_one_argument(schema, accepted, value, verdict):
    assert argument_is_right(value, accepted, schema, OFFICIAL) is verdict


@pytest.mark.parametrize(
    ("schema", "accepted", "value", "verdict"),
    [
        ({"type": "string"}, ["acct-12"], "acct12", False),
        ({"type": "string"}, ["Paid"], "paid", False),
        ({"type": "array", "items": {"type": "string"}}, [["a b"]], ["ab"], False),
        ({"type": "dict"}, [{"a": [1]}], {"a": True}, False),
        ({"type": "dict"}, [{"a": {"b": {"c": [1, 2]}}}], {"a": {"b": {"c": [1, 2]}}}, True),
        ({"type": "dict"}, [{"a": [{"b": [1, 2]}]}], {"a": {"b": 2}}, True),
        ({"type": "dict"}, [{"a": [{"b": [1, 2]}]}], {"a": {"b": 3}}, False),
        (None, [5], 5, True),
        (None, [5], "5", False),
    ],
)
def test_the_exact_verdict_on_one_argument(schema, accepted, value, verdict):
    assert argument_is_right(value, accepted, schema, EXACT) is verdict


TOOLS = {
    "f": {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}
}
GOLD = GoldCall(name="f", arguments={"a": [1], "b": [2, ""]})


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        ({"a": 1}, True),
        ({"a": 1, "b": 2}, True),
        ({"a": 1, "b": 3}, False),
        ({"b": 2}, False),
        ({"a": 1, "c": 2}, False),
        ({}, False),
    ],
)
def test_arguments_may_be_left_out_only_where_gold_says_so(arguments, verdict):
    assert call_is_right(Call(name="f", arguments=arguments), GOLD, TOOLS, OFFICIAL) is verdict


def test_an_argument_that_only_gold_knows_is_wrong():
    gold = GoldCall(name="f", arguments={"a": [1], "zone": ["x", ""]})
    call = Call(name="f", arguments={"a": 1, "zone": "x"})
    assert not call_is_right(call, gold, TOOLS, OFFICIAL)
    assert call_is_right(call, gold, {}, OFFICIAL)  # without tools gold alone decides


def test_what_the_tool_requires_may_not_be_left_out_whatever_gold_says():
    gold = GoldCall(name="f", arguments={"a": [1, ""]})
    assert not call_is_right(Call(name="f", arguments={}), gold, TOOLS, OFFICIAL)
