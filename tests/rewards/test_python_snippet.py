import traceback

import pytest
from rlpost_rewards.python import python

from rlpost.errors import JobError
from rlpost.reward import recorded
from rlpost.types import Score, Task


def scored(source, reply="4", answer="4"):
    task = Task(id="7", messages=(), answer=answer)
    return python(task, recorded(task, reply), source=source)


def test_the_snippets_score_is_the_reward():
    source = """
        import math

        def score(task, rollout):
            return math.exp(-abs(float(task.answer) - float(rollout.reply)))
        """
    assert scored(source) == 1.0
    assert 0 < scored(source, reply="5") < 1


def test_a_snippet_may_return_parts():
    source = (
        "def score(task, rollout):\n    return Score(value=0.5, parts={'a': 1.0}, reason='half')"
    )
    assert scored(source) == Score(value=0.5, parts={"a": 1.0}, reason="half")


def test_a_snippet_is_run_once():
    source = (
        "calls = []\ndef score(task, rollout):\n    calls.append(1)\n    return len(calls) / 10"
    )
    assert [scored(source), scored(source)] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1\ndef score(task rollout): pass", "not Python.*line 2"),
        ("\n\nimport nothing_of_that_name", "ModuleNotFoundError.*line 3"),
        ("def grade(task, rollout): return 1", "defines no score"),
        ("async def score(task, rollout): return 1", "score is async"),
        (3, "source is not a text"),
    ],
)
def test_a_bad_snippet_is_the_jobs_mistake(source, problem):
    with pytest.raises(JobError, match=problem):
        scored(source)


def test_a_failing_snippet_shows_its_own_line():
    with pytest.raises(ZeroDivisionError) as failure:
        scored("def score(task, rollout):\n    return 1 / 0")
    assert "return 1 / 0" in "".join(traceback.format_exception(failure.value))
