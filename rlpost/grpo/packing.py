"""Groups and advantages in, micro-batches out: sequences laid end to end under a token budget.

No sequence is cut, and the same input gives the same micro-batches in the same order. Rollouts
that teach nothing (no advantage, or truncated where truncated replies are masked) are left out:
they would cost a forward pass and move no weight.
"""

from collections.abc import Sequence

import torch

from rlpost.types import Group, MicroBatch, Trajectory


def pack(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float | None]],
    *,
    tokens: int,
    padded: bool = False,
    mask_truncated: bool = False,
) -> list[MicroBatch]:
    """Micro-batches that cost at most `tokens` tokens each; a costlier sequence gets its own.

    What costs is what the learner computes. Without padding that is every token once, a prompt
    that neighbours share once for all of them. With `padded` it is the number of sequences times
    the longest one, and sequences are sorted by length, longest first (ties in order), so that
    little of it is padding; the sum of gradients does not depend on the order. Tensors are on the
    CPU: int64, and float32 except `advantages` in float64.
    """
    sequences: list[tuple[Trajectory, float]] = []
    for group, values in zip(groups, advantages, strict=True):
        for rollout, value in zip(group.rollouts, values, strict=True):
            trajectory = rollout.trajectory
            if value is None or trajectory is None or not any(trajectory.loss_mask):
                continue
            if mask_truncated and rollout.stop_reason == "length":
                continue
            sequences.append((trajectory, value))
    if padded:
        sequences.sort(key=lambda pair: -len(pair[0].token_ids))
    lengths = [len(trajectory.token_ids) for trajectory, _ in sequences]
    shared = [0] * len(lengths) if padded else _shared([trajectory for trajectory, _ in sequences])
    parts = split(lengths, tokens, padded=padded, shared=shared)
    return [lay([sequences[i] for i in part]) for part in parts]


def split(
    lengths: Sequence[int], tokens: int, *, padded: bool, shared: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of `lengths` in order, cut into parts that cost at most `tokens` each (a single
    longer sequence is a part of its own). `shared` tokens of each are free behind its
    predecessor."""
    free = shared or [0] * len(lengths)
    parts: list[list[int]] = []
    total = longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        total += length - free[index]
        cost = longest * (len(parts[-1]) + 1) if parts and padded else total
        if not parts or cost > tokens:
            parts.append([])
            longest = total = length
        parts[-1].append(index)
    return parts


def prompt_length(loss_mask: Sequence[int]) -> int:
    """Tokens before the first trained one; all of them if none is trained."""
    return next((i for i, trained in enumerate(loss_mask) if trained), len(loss_mask))


def _shared(trajectories: Sequence[Trajectory]) -> list[int]:
    """For each, the length of its prompt if it is its predecessor's too, else 0."""
    heads = [tuple(t.token_ids[: prompt_length(t.loss_mask)]) for t in trajectories]
    pairs = zip(heads[:1] + heads, heads, strict=False)
    return [len(head) if i and head == previous else 0 for i, (previous, head) in enumerate(pairs)]


def lay(sequences: Sequence[tuple[Trajectory, float]]) -> MicroBatch:
    """One micro-batch of these trajectories with their advantages, in this order."""
    lengths = [len(trajectory.token_ids) for trajectory, _ in sequences]
    mask_T = _flat([t.loss_mask for t, _ in sequences], torch.int64)
    values_N = torch.tensor([value for _, value in sequences], dtype=torch.float64)
    return MicroBatch(
        token_ids=_flat([t.token_ids for t, _ in sequences], torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        starts=torch.tensor([0, *lengths]).cumsum(0),
        loss_mask=mask_T,
        advantages=values_N.repeat_interleave(torch.tensor(lengths)) * mask_T,
        logprobs=_flat([t.logprobs for t, _ in sequences], torch.float32),
    )


def _flat(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.as_tensor(row, dtype=dtype) for row in rows])
