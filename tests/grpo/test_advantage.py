import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpost.grpo.advantage import advantages, group_relative, usefulness
from rlpost.types import Group, Rollout, Score, Task

TASK = Task(id="t", messages=[])


def group(*values, parts=None):
    """A group with these scores; None is a rollout whose judge failed."""
    parts = parts or [{} for _ in values]
    scores = [
        None if value is None else Score(value=value, parts=part)
        for value, part in zip(values, parts, strict=True)
    ]
    return Group(id=0, task=TASK, rollouts=[Rollout(task=TASK, reply="", score=s) for s in scores])


def test_advantage_is_the_distance_from_the_group_mean():
    rewards_G = torch.tensor([0.0, 0.5, 1.0, 0.5])
    assert group_relative(rewards_G).tolist() == [-0.5, 0.0, 0.5, 0.0]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = [0.1, 0.4, 0.9]
    found = group_relative(torch.tensor(rewards, dtype=torch.float64), leave_one_out=True)
    assert found.tolist() == pytest.approx([0.1 - 0.65, 0.4 - 0.5, 0.9 - 0.25])


def test_dividing_by_the_group_deviation_gives_unit_variance():
    values_G = group_relative(torch.tensor([0.1, 0.2, 0.3, 0.8]), divide_by_std="group")
    assert values_G.std().item() == pytest.approx(1.0, abs=1e-3)


def test_batch_scale_keeps_the_proportion_between_groups():
    easy, hard = group(0.9, 1.0), group(0.0, 1.0)
    (a, _), (b, _) = advantages([easy, hard], scale="batch")
    assert b / a == pytest.approx(10.0)


def test_equal_rewards_give_no_advantage():
    assert advantages([group(0.3, 0.3, 0.3)]) == [[None, None, None]]


def test_unscored_rollouts_get_none_and_do_not_move_the_mean():
    with_failure = advantages([group(0.0, None, 1.0)], scale="none")
    assert with_failure == [[-0.5, None, 0.5]]


def test_one_scored_rollout_has_nothing_to_be_compared_with():
    assert advantages([group(1.0, None)]) == [[None, None]]
    assert usefulness(group(1.0, None)) == "unscored"


@pytest.mark.parametrize(
    ("values", "word"),
    [((0.9, 0.91), "all_good"), ((0.1, 0.11), "all_bad"), ((0.1, 0.13), "useful")],
)
def test_useless_groups_are_told_apart_because_they_need_opposite_cures(values, word):
    assert usefulness(group(*values), min_spread=0.02) == word


def test_no_spread_is_useless_even_without_a_threshold():
    assert usefulness(group(0.5, 0.5), min_spread=0.0) == "all_good"


def test_decoupled_parts_count_by_rank_not_by_size():
    parts = [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.01}]
    summed = group(0.0, 0.505, parts=parts)
    scaled = [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]
    other = group(0.0, 1.0, parts=scaled)
    (x,), (y,) = (
        [row[1] for row in advantages([g], parts="decoupled", scale="group")]
        for g in (summed, other)
    )
    assert x == pytest.approx(y, rel=0.02)  # the small part was normalised to the size of the large


def test_decoupled_parts_follow_the_published_formula():
    parts = [{"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]
    groups = [group(0.5, 0.5, 1.0, parts=parts), group(0.2, 0.9, 0.4, parts=parts[::-1])]
    found = advantages(groups, parts="decoupled", scale="batch", weights={"a": 2.0, "b": 1.0})
    expected = []
    for g in groups:  # GDPO: each part normalised in its group, summed, then over the batch
        rows = []
        for name, weight in (("a", 2.0), ("b", 1.0)):
            part = torch.tensor([r.score.parts[name] for r in g.rollouts], dtype=torch.float64)
            rows.append(weight * (part - part.mean()) / (part.std() + 1e-4))
        expected.append(sum(rows))
    flat = torch.cat(expected)
    flat = (flat - flat.mean()) / (flat.std() + 1e-4)
    assert [v for row in found for v in row] == pytest.approx(flat.tolist())


def test_a_shut_gate_counts_in_decoupled_parts_too():
    parts = [{"a": 1.0, "open": 0.0}, {"a": 0.5, "open": 1.0}, {"a": 0.0, "open": 1.0}]
    g = group(0.0, 0.5, 0.0, parts=parts)
    (gated,) = advantages([g], parts="decoupled", weights={"a": 1.0}, gates=["open"])
    (plain,) = advantages([g], parts="decoupled", weights={"a": 1.0})
    assert gated[1] > 0 > gated[0] == gated[2]
    assert plain[0] > plain[1]


def test_a_weight_for_a_part_that_no_reward_gives_is_named():
    with pytest.raises(ValueError, match="no part 'c'"):
        advantages([group(0.0, 1.0)], parts="decoupled", weights={"c": 1.0})


@given(st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_advantages_of_a_group_sum_to_zero(values):
    for loo in (False, True):
        found = group_relative(torch.tensor(values), leave_one_out=loo)
        assert found.dtype == torch.float64
        assert found.sum().item() == pytest.approx(0.0, abs=1e-9)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=8))
def test_no_advantage_is_ever_nan(values):
    for scale in ("batch", "group", "none"):
        for row in advantages([group(*values)], scale=scale):
            assert len(row) == len(values)
            assert all(value is None or math.isfinite(value) for value in row)
