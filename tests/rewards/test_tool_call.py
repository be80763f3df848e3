"""The tool-call reward: right is 1, anything else at most a half, and in the right order."""

import copy
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.tool_call import MOST_PARTIAL, tool_call

from rlpost.errors import JobError, RowError
from rlpost.reward import as_score, recorded
from rlpost.types import Rollout, Task

WORDS = ("acct-12", "New York", "a", "x y", "5", "true")
VALUES = {
    "integer": st.integers(-9, 9),
    "float": st.integers(-9, 9) | st.floats(-9, 9, width=16),
    "boolean": st.booleans(),
    "string": st.sampled_from(WORDS),
}
NAMES = ("book", "math.area", "find_it")


@st.composite
def cases(draw):
    """A task of one to three gold calls, its minimal right calls and its full ones."""
    tools, golds, minimal, full = {}, [], [], []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(NAMES))
        kinds = tools.setdefault(
            name,
            {
                f"p{n}": draw(st.sampled_from(sorted(VALUES)))
                for n in range(draw(st.integers(1, 4)))
            },
        )
        arguments, least, most = {}, {}, {}
        for number, (key, kind) in enumerate(kinds.items()):
            accepted = draw(st.lists(VALUES[kind], min_size=1, max_size=3))
            most[key] = draw(st.sampled_from(accepted))
            if number and draw(st.booleans()):
                arguments[key] = [*accepted, ""]
            else:
                arguments[key] = accepted
                least[key] = accepted[0]
        golds.append({"name": name, "arguments": arguments})
        minimal.append({"name": name, "arguments": least})
        full.append({"name": name, "arguments": most})
    described = [
        {"type": "function",
         "function": {"name": n, "parameters": {"type": "dict", "required": ["p0"],
                      "properties": {k: {"type": t} for k, t in kinds.items()}}}}
        for n, kinds in tools.items()
    ]  # fmt: skip
    task = Task(id="1", messages=[], tools=described, answer={"calls": golds})
    return task, minimal, full


def written(calls) -> str:
    return "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)


def judged(task: Task, calls, **arguments):
    reply = calls if isinstance(calls, str) else written(calls)
    return tool_call(task, recorded(task, reply), **arguments)


def value(task: Task, calls, **arguments) -> float:
    return as_score(judged(task, calls, **arguments)).value


rules = pytest.mark.parametrize("rules", ["exact", "bfcl"])


@rules
@given(case=cases())
def test_minimal_full_and_reversed_are_all_right(rules, case):
    task, minimal, full = case
    assert value(task, minimal, rules=rules) == 1.0
    assert value(task, full, rules=rules) == 1.0
    assert value(task, full[::-1], rules=rules) == 1.0


@rules
@given(case=cases(), at=st.integers(0, 2))
def test_an_extra_argument_is_below_the_minimal_call(rules, case, at):
    task, minimal, _ = case
    extra = copy.deepcopy(minimal)
    extra[at % len(extra)]["arguments"]["invented"] = 1
    assert value(task, extra, rules=rules) <= MOST_PARTIAL < value(task, minimal, rules=rules)


@rules
@given(case=cases(), seed=st.integers(0, 10**6))
def test_every_right_reply_is_above_every_wrong_one(rules, case, seed):
    task, _, full = case
    score = judged(task, spoiled(random.Random(seed), full), rules=rules)
    assert score.value == 1.0 or score.value <= MOST_PARTIAL
    assert (score.value == 1.0) == (score.parts["valid"] == 1.0) == (score.reason == "ok")
    assert score.value == 1.0 or score.value == pytest.approx(MOST_PARTIAL * score.parts["matched"])


def spoiled(dice: random.Random, calls: list) -> list:
    calls = copy.deepcopy(calls)
    call = dice.choice(calls)
    key = dice.choice([*call["arguments"], "p0"])
    how = dice.randrange(6)
    if how == 0:
        call["arguments"][key] = dice.choice([None, "zzz", [], {}, 77, 7.5, True])
    elif how == 1:
        call["arguments"].pop(key, None)
    elif how == 2:
        call["name"] = dice.choice(["nothing", *NAMES])
    elif how == 3:
        calls.append(copy.deepcopy(call))
    elif how == 4:
        calls.remove(call)
    else:
        call["arguments"] = {k: str(v) for k, v in call["arguments"].items()}
    return calls


@given(case=cases(), text=st.text(max_size=60))
def test_any_text_has_a_finite_score(case, text):
    task, minimal, _ = case
    for reply in (
        text,
        written(minimal)[: len(text)],
        written(minimal) + text,
        f"<tool_call>{text}",
    ):
        score = as_score(judged(task, reply))
        assert 0.0 <= score.value <= 1.0
        assert set(score.parts) == {"decodes", "valid", "matched"}


@given(case=cases())
def test_nothing_decoded_is_worth_nothing(case):
    task, minimal, _ = case
    for reply in ("", "I cannot.", written(minimal)[:-3] if len(minimal) == 1 else "<tool_call>"):
        assert value(task, reply) == 0.0


TOOL = {
    "name": "geo.route",
    "parameters": {
        "type": "object",
        "properties": {
            "to": {"type": "string"},
            "stops": {"type": "array", "items": {"type": "string"}},
            "car": {
                "type": "object",
                "properties": {"tags": {"type": "array"}, "fuel": {"type": "string"}},
            },
            "km": {"type": ["number", "null"]},
        },
        "required": ["to"],
    },
}


def route(arguments: dict, given: dict, *, order: str = "any", **more) -> float:
    answer = {"calls": [{"name": "geo.route", "arguments": arguments}], "order": order}
    task = Task(id="1", messages=[], tools=[TOOL], answer=answer)
    return value(task, [{"name": "geo.route", "arguments": given}], **more)


def test_exact_takes_strings_as_they_are_and_bfcl_folds_them():
    assert route({"to": ["acct-12"]}, {"to": "acct12"}) <= MOST_PARTIAL
    assert route({"to": ["acct-12"]}, {"to": "acct12"}, rules="bfcl") == 1.0
    assert route({"to": ["acct-12"]}, {"to": "acct-12"}) == 1.0


def test_nested_objects_may_be_plain_values_or_accepted_ones_per_key():
    car = {"tags": ["a", "b"], "fuel": "gas"}
    assert route({"to": ["x"], "car": [car]}, {"to": "x", "car": car}) == 1.0
    assert route({"to": ["x"], "car": [car]}, {"to": "x", "car": {**car, "fuel": "gaz"}}) <= 0.5
    per_key = {"tags": [["a"], ["b"]], "fuel": ["gas", ""]}
    assert route({"to": ["x"], "car": [per_key]}, {"to": "x", "car": {"tags": ["b"]}}) == 1.0
    assert route({"to": ["x"], "car": [per_key]}, {"to": "x", "car": {"fuel": "gas"}}) <= 0.5


def test_a_plain_list_is_no_list_of_alternatives():
    gold = {"tags": ["a", "b"], "fuel": ["gas"]}
    assert (
        route({"to": ["x"], "car": [gold]}, {"to": "x", "car": {"tags": "a", "fuel": "gas"}}) <= 0.5
    )


def test_several_types_are_several_types():
    assert route({"to": ["x"], "km": [5.0]}, {"to": "x", "km": 5}) == 1.0
    for right in (5, 5.0, None):
        assert route({"to": ["x"], "km": [5, None]}, {"to": "x", "km": right}) == 1.0
    assert route({"to": ["x"], "km": [5, None]}, {"to": "x", "km": "5"}) <= 0.5


def test_dots_may_be_written_as_underscores():
    task = Task(
        id="1",
        messages=[],
        tools=[TOOL],
        answer={"calls": [{"name": "geo.route", "arguments": {"to": ["x"]}}]},
    )
    assert value(task, [{"name": "geo_route", "arguments": {"to": "x"}}]) == 1.0
    both = [TOOL, {**TOOL, "name": "geo_route"}]
    task = Task(id="1", messages=[], tools=both, answer=task.answer)
    assert value(task, [{"name": "geo_route", "arguments": {"to": "x"}}]) == 0.0


def test_fixed_order_is_kept():
    calls = [{"name": "geo.route", "arguments": {"to": [to]}} for to in "ab"]
    given_calls = [{"name": "geo.route", "arguments": {"to": to}} for to in "ab"]
    for order, reversed_value in (("fixed", MOST_PARTIAL), ("any", 1.0)):
        task = Task(id="1", messages=[], tools=[TOOL], answer={"calls": calls, "order": order})
        assert value(task, given_calls) == 1.0
        assert value(task, given_calls[::-1]) == reversed_value
    task = Task(id="1", messages=[], tools=[TOOL], answer={"calls": calls, "order": "fixed"})
    assert judged(task, given_calls[::-1]).reason == "wrong_order"


def test_openai_messages_are_read():
    task = Task(
        id="1",
        messages=[],
        tools=[TOOL],
        answer={"calls": [{"name": "geo.route", "arguments": {"to": ["x"]}}]},
    )
    call = {"type": "function", "function": {"name": "geo_route", "arguments": '{"to": "x"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert tool_call(task, Rollout(task=task, reply="", messages=[message])).value == 1.0
    silent = Task(id="1", messages=[], tools=[TOOL], answer={"calls": []})
    score = tool_call(silent, Rollout(task=silent, reply="I do not know.", messages=[message]))
    assert (score.value, score.reason) == (0.0, "unneeded_call")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (written([{"name": "geo.route", "arguments": {"to": "y"}}]), "wrong_arguments"),
        (written([{"name": "geo.rout", "arguments": {"to": "x"}}]), "wrong_name"),
        (written([{"name": "geo.route", "arguments": {"to": "x"}}] * 2), "wrong_count"),
        (written([{"name": "geo.route", "arguments": {"to": "x"}}]) + "<tool_call>", "broken_call"),
        ("<tool_call>", "broken_call"),
        ("I cannot.", "no_call"),
        ("<think>", "open_thinking"),
        ("x" * 2_000_000, "too_long"),
    ],
)
def test_the_reason_says_what_went_wrong(reply, reason):
    task = Task(
        id="1",
        messages=[],
        tools=[TOOL],
        answer={"calls": [{"name": "geo.route", "arguments": {"to": ["x"]}}]},
    )
    assert judged(task, reply).reason == reason


def test_a_broken_call_costs_what_a_wrong_one_does():
    answer = {"calls": [{"name": "geo.route", "arguments": {"to": ["x"]}}]}
    task = Task(id="1", messages=[], tools=[TOOL], answer=answer)
    whole = written([{"name": "geo.route", "arguments": {"to": "x"}}])
    assert judged(task, whole + "<tool_call>").parts["matched"] == pytest.approx(4 / 5)
    assert judged(task, whole + "<tool_call>").parts["decodes"] == 0.5


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("None of the tools can do that.", 1.0),
        ("", 0.0),
        ("?!", 0.0),
        ('{"answer": null}', 0.0),
        ('[{"lorem', 0.0),
        ("[Note] No tool fits.", 1.0),
        ("geo.route(to='x')", 0.0),
        ('{"name": "geo.route", "argu', 0.0),
        ("<tool_call>", 0.0),
        (written([{"name": "geo.route", "arguments": {}}]), 0.0),
        ("<think>No.</think>", 0.0),
        ("<think>geo.route(to='x')?</think>No tool can.", 1.0),
    ],
)
def test_where_no_call_is_right_only_words_are(reply, right):
    task = Task(id="1", messages=[], tools=[TOOL], answer={"calls": []})
    assert value(task, reply) == right


def test_a_flood_of_calls_is_cheap_and_worth_little():
    answer = {"calls": [{"name": "geo.route", "arguments": {"to": [str(n)]}} for n in range(8)]}
    task = Task(id="1", messages=[], tools=[TOOL], answer=answer)
    flood = [{"name": "geo.route", "arguments": {"to": str(n)}} for n in range(9000)]
    assert value(task, flood) < 0.05


@pytest.mark.parametrize(
    ("answer", "tools"),
    [
        (None, []), ({}, []), ({"calls": 5}, []), ({"calls": [{"name": "f", "arguments": 5}]}, []),
        ({"calls": [{}]}, []), ({"calls": [], "order": "some"}, []),
        ({"calls": []}, [{"type": "function"}]),
    ],
)  # fmt: skip
def test_a_row_without_calls_or_tools_is_the_rows_mistake(answer, tools):
    with pytest.raises(RowError, match="row 1"):
        judged(Task(id="1", messages=[], tools=tools, answer=answer), "x")


@pytest.mark.parametrize("arguments", [{"format": "xml"}, {"rules": "bfl"}, {"fence": "keep"}])
def test_bad_arguments_are_the_jobs_mistake(arguments):
    with pytest.raises(JobError, match="tool_call"):
        judged(Task(id="1", messages=[], answer={"calls": []}), "x", **arguments)
