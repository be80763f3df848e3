"""A documented reward with its test, as `rlpost init --reward` writes them."""

from string import Template

_REWARD = Template('''"""How good is a reply? $name(task, rollout) -> 0 (worthless) to 1 (perfect).

In the job:

    [[reward]]
    use = "$name:$name"
    tolerance = 0.0          # keyword arguments come from here

What you have: task.answer (the gold of the row), task.meta (its other columns), task.messages (the
prompt), rollout.reply (the text to judge), rollout.stop_reason ("length" if it was cut off).

What holds for a good reward: every right reply scores above every wrong one; half-right lies
between, or the policy has nothing to climb; the parts you return are shown, not summed: keep form
and content apart, for form alone is what a policy games first. Raise for a row you cannot judge: a
failure of the judge is not the reply's fault, and rlpost tells the two apart. The time limit is
[scoring] deadline.
"""

import json

from rlpost.types import Rollout, Score, Task


def $name(task: Task, rollout: Rollout, *, tolerance: float = 0.0) -> Score:
    """The share of the gold's fields that the reply has right; numbers may be `tolerance` apart.

    A gold that is no object counts as one field called "answer".
    """
    gold = task.answer if isinstance(task.answer, dict) else {"answer": task.answer}
    try:
        reply = json.loads(rollout.reply)
    except (ValueError, RecursionError):
        return Score(value=0.0, parts={"parses": 0.0}, reason="not_json")
    if not isinstance(reply, dict):
        return Score(value=0.0, parts={"parses": 1.0}, reason="not_an_object")
    right = {name: float(equal(reply.get(name), value, tolerance)) for name, value in gold.items()}
    value = sum(right.values()) / len(right)
    return Score(
        value=value,
        parts={"parses": 1.0, **right},
        reason="ok" if value == 1.0 else "wrong_values",
    )


def equal(found: object, gold: object, tolerance: float) -> bool:
    """Numbers within the tolerance, text without case and outer space, everything else exactly."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (found, gold))
    if numbers:
        return abs(found - gold) <= tolerance
    if isinstance(found, str) and isinstance(gold, str):
        return found.strip().casefold() == gold.strip().casefold()
    return type(found) is type(gold) and found == gold
''')

_TEST = Template('''"""Run with: python -m pytest test_$name.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from $name import $name  # noqa: E402

from rlpost.reward import recorded  # noqa: E402
from rlpost.types import Task  # noqa: E402

TASK = Task(
    id="1",
    messages=[{"role": "user", "content": "TEA 2 x 3.10 TOTAL 6.20"}],
    answer={"item": "tea", "total": 6.2},
)
# worst to best: what must hold of a reward is its order
REPLIES = [
    "The total is 6.20.",
    '{"item": "coffee", "total": 1.0}',
    '{"item": "tea", "total": 1.0}',
    '{"item": "TEA", "total": 6.2}',
]


def value(reply, **arguments):
    return $name(TASK, recorded(TASK, reply), **arguments).value


def test_a_better_reply_never_scores_less():
    values = [value(reply) for reply in REPLIES]
    assert values == sorted(values)


def test_the_right_reply_scores_one_and_text_without_json_zero():
    assert value(REPLIES[-1]) == 1.0
    assert value(REPLIES[0]) == 0.0


def test_numbers_may_differ_by_the_tolerance():
    reply = '{"item": "tea", "total": 6.25}'
    assert value(reply, tolerance=0.1) > value(reply)
''')


def files(name: str) -> dict[str, str]:
    """{file name: text} of a reward called `name` and of its test."""
    return {
        f"{name}.py": _REWARD.substitute(name=name),
        f"test_{name}.py": _TEST.substitute(name=name),
    }
