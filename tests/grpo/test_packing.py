import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpost.grpo.packing import pack, split
from rlpost.types import Group, Rollout, Task, Trajectory

TASK = Task(id="t", messages=[])


def rollout(length, *, first=0, stop="stop", prompt=1):
    mask = [0] * prompt + [1] * (length - prompt)
    return Rollout(
        task=TASK,
        reply="",
        stop_reason=stop,
        trajectory=Trajectory(
            token_ids=list(range(first, first + length)),
            loss_mask=mask,
            logprobs=[-0.5 * m for m in mask],
            policy_version=0,
        ),
    )


def groups(*rollouts):
    return [Group(id=0, task=TASK, rollouts=rollouts)]


def lengths(batch):
    return torch.as_tensor(batch.starts).diff().tolist()


def test_sequences_lie_end_to_end_with_positions_that_start_again():
    (batch,) = pack(groups(rollout(3), rollout(2, first=10)), [[1.0, -2.0]], tokens=100)
    assert batch.token_ids.tolist() == [0, 1, 2, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.starts.tolist() == [0, 3, 5]
    assert batch.loss_mask.tolist() == [0, 1, 1, 0, 1]
    assert batch.advantages.tolist() == [0.0, 1.0, 1.0, 0.0, -2.0]
    assert batch.logprobs.tolist() == [0.0, -0.5, -0.5, 0.0, -0.5]


def test_rollouts_without_advantage_cost_no_forward_pass():
    (batch,) = pack(groups(rollout(3), rollout(4)), [[None, 0.5]], tokens=100)
    assert lengths(batch) == [4]


def test_nothing_to_learn_gives_no_micro_batch():
    assert pack(groups(rollout(3)), [[None]], tokens=100) == []
    assert pack([], [], tokens=100) == []


def test_truncated_replies_are_trained_unless_masking_is_asked_for():
    given_groups = groups(rollout(3), rollout(4, stop="length"))
    assert lengths(pack(given_groups, [[1.0, -1.0]], tokens=100)[0]) == [3, 4]
    masked = pack(given_groups, [[1.0, -1.0]], tokens=100, mask_truncated=True)
    assert lengths(masked[0]) == [3]


def test_a_sequence_longer_than_the_budget_is_alone_and_whole():
    batches = pack(groups(rollout(3), rollout(50), rollout(3)), [[1.0] * 3], tokens=10)
    assert [lengths(b) for b in batches] == [[3], [50], [3]]


def test_a_prompt_that_neighbours_share_is_counted_once():
    """16 + 3 x 4 tokens are computed, though the sequences have 60."""
    same = groups(*(rollout(20, prompt=16) for _ in range(3)))
    assert [lengths(b) for b in pack(same, [[1.0] * 3], tokens=28)] == [[20, 20, 20]]
    assert [lengths(b) for b in pack(same, [[1.0] * 3], tokens=27)] == [[20, 20], [20]]
    assert len(pack(same, [[1.0] * 3], tokens=28, padded=True)) == 3


def test_a_prompt_is_shared_by_neighbours_only_and_whole():
    other = rollout(20, prompt=16, first=5)
    mixed = groups(rollout(20, prompt=16), other, rollout(20, prompt=15))
    assert len(pack(mixed, [[1.0] * 3], tokens=59)) == 2


def test_padding_is_counted_and_kept_small_by_sorting():
    batches = pack(
        groups(rollout(3), rollout(9), rollout(4), rollout(9)), [[1.0] * 4], tokens=18, padded=True
    )
    assert [lengths(b) for b in batches] == [[9, 9], [4, 3]]


def test_without_padding_the_order_is_that_of_the_groups():
    different = [rollout(3, first=10), rollout(9, first=20), rollout(4, first=30)]
    batches = pack(groups(*different), [[1.0] * 3], tokens=12)
    assert [lengths(b) for b in batches] == [[3, 9], [4]]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100), st.booleans())
def test_every_sequence_is_in_one_part_within_the_budget(sizes, tokens, padded):
    parts = split(sizes, tokens, padded=padded)
    assert [index for part in parts for index in part] == list(range(len(sizes)))
    for part in parts:
        row = [sizes[index] for index in part]
        cost = max(row) * len(row) if padded else sum(row)
        assert cost <= tokens or len(row) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.booleans())
def test_no_two_neighbouring_parts_would_have_fitted_together(sizes, tokens, padded):
    parts = split(sizes, tokens, padded=padded)
    for left, right in itertools.pairwise(parts):
        row = [sizes[index] for index in left] + [sizes[right[0]]]
        cost = max(row) * len(row) if padded else sum(row)
        assert cost > tokens
