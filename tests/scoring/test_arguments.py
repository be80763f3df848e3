"""A wrong argument is told before anything is scored."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from rlpost.errors import PluginError
from rlpost.reward import RewardSpec
from rlpost.scoring.arguments import check_arguments, fits


def reward(
    task,
    rollout,
    *,
    labels: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    depth: int = 1,
    form: Literal["a", "b"] = "a",
    anything: "NotAName" = None,  # noqa: F821
):
    return 1.0


def typed(task: Any, rollout: Any, *, labels: Sequence[str], depth: int = 1):
    return 1.0


def check(function, **arguments):
    check_arguments(RewardSpec(use="r", name="r", arguments=arguments), function)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (["a"], Sequence[str], True),
        ("a", Sequence[str], False),
        ([1], Sequence[str], False),
        (5, Sequence[str] | None, False),
        (None, Sequence[str] | None, True),
        ({"a": 1}, Mapping[str, float], True),
        ({"a": "x"}, Mapping[str, float], False),
        (1, float, True),
        (1.5, int, False),
        (True, int, False),
        (True, bool, True),
        ("c", Literal["a", "b"], False),
        ({"x": [1]}, dict[str, Any], True),
        ([[1, 2]], list[tuple[int, ...]], True),
        ("anything", object, True),
        ("x", complex, True),
    ],
)
def test_a_value_fits_its_annotation_or_not(value, hint, expected):
    assert fits(value, hint) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs the argument 'labels'; write labels = …"),
        ({"labels": 5}, r"'labels' of the reward 'r' cannot be 5; it is Sequence\[str\]"),
        ({"labels": ["a"], "depth": "2"}, 'cannot be "2"; it is int'),
        ({"labels": ["a"], "dpth": 2}, "no argument 'dpth'; did you mean 'depth'"),
        ({"labels": ["a"], "zzz": 2}, "it takes labels, depth"),
    ],
)
def test_each_mistake_is_one_line_with_its_cure(arguments, message):
    with pytest.raises(PluginError, match=message):
        check(typed, **arguments)


def test_annotations_that_cannot_be_read_are_left_alone():
    check(reward, labels=5)
    with pytest.raises(PluginError, match="no argument 'label'"):
        check(reward, label=5)


def test_a_function_without_task_and_rollout_is_refused():
    with pytest.raises(PluginError, match="does not take"):
        check(lambda text: 1.0)
    check(lambda *everything, **more: 1.0, x=1)
