"""Scores of a group in, advantages out: how much better than its siblings a rollout did.

What is left out of the textbook: no critic and no per-token credit; every token of a rollout
carries the rollout's advantage. Everything is computed in float64, so the same scores give the
same bits anywhere.

Sources: group mean with group deviation, GRPO (arXiv 2402.03300); no deviation, Dr. GRPO
(2503.20783); the deviation of the batch, Lite PPO (2508.08221); leave-one-out, RLOO (2402.14740);
parts normalised one by one, GDPO (2601.05242). The formulas agree with TRL 1.16's `scale_rewards`
and `normalize_then_sum`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from rlpost.types import Group, Rollout

Scale = Literal["batch", "group", "none"]
Usefulness = Literal["useful", "all_good", "all_bad", "unscored"]

EPSILON = 1e-4  # TRL's: a deviation near zero must not blow an advantage up


def group_relative(
    rewards_G: torch.Tensor,
    *,
    divide_by_std: Scale = "none",
    leave_one_out: bool = False,
    batch_std: float | None = None,
) -> torch.Tensor:
    """Advantages [G], float64, of the rewards [G] of one group; NaN rewards (unscored) stay NaN
    and count nowhere. `leave_one_out` compares with the mean of the others. The deviation is the
    unbiased one, of the group or `batch_std` of the whole update. Fewer than two rewards give NaN:
    there is no sibling.
    """
    rewards_G = rewards_G.to(torch.float64)
    scored = ~rewards_G.isnan()
    count = int(scored.sum())
    if count < 2:
        return torch.full_like(rewards_G, math.nan)
    values = rewards_G[scored]
    centred_G = rewards_G - values.mean()
    if leave_one_out:  # r - mean of the others = (r - mean of all) * n / (n - 1)
        centred_G = centred_G * count / (count - 1)
    if divide_by_std == "none":
        return centred_G
    if divide_by_std == "group":
        batch_std = float(values.std())
    if batch_std is None:
        raise ValueError('divide_by_std="batch" needs batch_std')
    return torch.div(centred_G, batch_std + EPSILON)


def usefulness(group: Group, *, min_spread: float = 0.02) -> Usefulness:
    """Whether a group carries a gradient, and if not, which cure it needs: `all_good` (mean score
    0.5 or more: the task is too easy), `all_bad` (too hard), `unscored` (fewer than two
    scores)."""
    values = group.values
    if len(values) < 2:
        return "unscored"
    if group.spread >= min_spread and group.spread > 0:
        return "useful"
    return "all_good" if sum(values) / len(values) >= 0.5 else "all_bad"


def advantages(
    groups: Sequence[Group],
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Scale = "batch",
    min_spread: float = 0.02,
    parts: Literal["sum", "decoupled"] = "sum",
    weights: Mapping[str, float] | None = None,
    gates: Sequence[str] = (),
) -> list[list[float | None]]:
    """One advantage a rollout, in the order of `groups` and their rollouts.

    None where nothing may be learned: the rollout has no score, or its group is not useful (see
    `usefulness`). With `scale="batch"` the deviation is that of all scores given, useful or not.
    `parts="decoupled"` normalises each of `Score.parts` named in `weights` (default: every reward
    of the job, weight 1) within its group by that group's deviation, adds them with their weights,
    and with `scale="batch"` normalises the sums over the useful groups once more, as GDPO does.
    There, too, nothing counts unless every part named in `gates` is 1: the others are 0 before they
    are normalised.
    """
    loo = baseline == "leave_one_out"
    useful = [usefulness(group, min_spread=min_spread) == "useful" for group in groups]
    if parts == "decoupled":
        raw = _decoupled(groups, useful, loo=loo, scale=scale, weights=weights, gates=gates)
    else:
        rewards = [_rewards(group) for group in groups]
        scored = torch.cat([r[~r.isnan()] for r in rewards]) if rewards else torch.zeros(0)
        batch_std = float(scored.std()) if scored.numel() > 1 else 0.0
        raw = [
            group_relative(r, divide_by_std=scale, leave_one_out=loo, batch_std=batch_std)
            for r in rewards
        ]
    return [
        [None if not keep or math.isnan(value) else value for value in values_G.tolist()]
        for keep, values_G in zip(useful, raw, strict=True)
    ]


def _rewards(group: Group) -> torch.Tensor:
    values = [math.nan if r.score is None else r.score.value for r in group.rollouts]
    return torch.tensor(values, dtype=torch.float64)


def _decoupled(
    groups: Sequence[Group],
    useful: Sequence[bool],
    *,
    loo: bool,
    scale: Scale,
    weights: Mapping[str, float] | None,
    gates: Sequence[str],
) -> list[torch.Tensor]:
    names = dict(weights) if weights else _rewards_of_job(groups)
    part_scale: Scale = "none" if scale == "none" else "group"
    summed = []
    for group in groups:
        total_G = torch.zeros(len(group.rollouts), dtype=torch.float64)
        for name, weight in names.items():
            values = [_gated(rollout, name, gates) for rollout in group.rollouts]
            total_G = total_G + weight * group_relative(
                torch.tensor(values, dtype=torch.float64),
                divide_by_std=part_scale,
                leave_one_out=loo,
            )
        summed.append(total_G)
    if scale != "batch":
        return summed
    kept = [t[~t.isnan()] for t, keep in zip(summed, useful, strict=True) if keep]
    everything = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.float64)
    if everything.numel() < 2:
        return summed
    return [(t - everything.mean()) / (everything.std() + EPSILON) for t in summed]


def _rewards_of_job(groups: Sequence[Group]) -> dict[str, float]:
    """The parts that are whole rewards: a reward's own parts carry a dot after its name."""
    scores = [r.score for g in groups for r in g.rollouts if r.score is not None]
    return {name: 1.0 for score in scores for name in score.parts if "." not in name}


def _gated(rollout: Rollout, name: str, gates: Sequence[str]) -> float:
    shut = any(_part(rollout, gate) < 1.0 for gate in gates if gate != name)
    return 0.0 if shut else _part(rollout, name)


def _part(rollout: Rollout, name: str) -> float:
    if rollout.score is None:
        return math.nan
    if name not in rollout.score.parts:
        known = ", ".join(rollout.score.parts) or "none"
        raise ValueError(
            f"no part {name!r} in the score of task {rollout.task.id} (parts: {known})"
        )
    return rollout.score.parts[name]
