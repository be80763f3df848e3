"""The policy losses, per token and as a sum over a micro-batch normalised by the whole update's
counts.

The ratio is learner over engine, directly: no third forward pass. Where a micro-batch brings
`old_logprobs` (the learner's before the update), or a correction is asked for, the ratio is
learner over old and the correction weighs each token or sequence by old over engine, as TRL does;
without `old_logprobs` the learner's own detached values stand for them, which they equal at one
update a batch.

Sources: grpo arXiv 2402.03300, dr_grpo 2503.20783, dapo 2503.14476, gspo 2507.18071, cispo
2506.13585; k3 estimator, J. Schulman 2020. Each equals TRL 1.16's `_compute_loss`
(tests/conformance/test_trl_parity.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from rlpost.types import MicroBatch

Kind = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
KINDS: tuple[Kind, ...] = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CLIPS = {  # (low, high) of each paper; cispo caps instead
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (0.2, 0.28),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """Which loss, and its knobs. None takes the paper's value (`CLIPS`)."""

    kind: Kind = "cispo"
    clip_low: float | None = None
    clip_high: float | None = None
    ratio_cap: float = 3.0  # cispo
    correction: str = "none"  # one of CORRECTIONS
    correction_cap: float = 3.0
    kl_coefficient: float = 0.0
    kl_unbiased: bool = True  # weigh each token's KL by its ratio, as arXiv 2512.02556 and TRL do
    entropy_coefficient: float = 0.0
    guard: float = (
        0.5  # largest mean |log ratio| of a sequence that is still trained; inf: no guard
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"loss {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.correction not in CORRECTIONS:
            raise ValueError(
                f"correction {self.correction!r} is not one of {', '.join(CORRECTIONS)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts of the whole update, planned before the first forward pass: trained tokens,
    sequences, and the longest completion (or the limit on it) in tokens."""

    tokens: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, batches: Sequence[MicroBatch], *, longest: int = 0) -> "Totals":
        """The counts of `batches`; a given `longest` (the reply limit) replaces the longest one
        seen."""
        counts = [count_tokens(batch) for batch in batches]
        tokens = sum(int(c.sum()) for c in counts)
        seen = max((int(c.max()) for c in counts if c.numel()), default=0)
        return cls(tokens=tokens, sequences=sum(c.numel() for c in counts), longest=longest or seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStatistics:
    """Sums over trained tokens, so that micro-batches add up. Ratios are learner over engine,
    uncapped."""

    tokens: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    gap: float = 0.0  # |learner - engine|
    entropy: float = 0.0
    kl: float = 0.0
    guarded_sequences: float = 0.0

    def __add__(self, other: "LossStatistics") -> "LossStatistics":
        names = [f.name for f in fields(self)]
        return LossStatistics(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def mean(self, name: str) -> float:
        """The sum called `name` per trained token; 0.0 when none was trained."""
        return float(getattr(self, name)) / self.tokens if self.tokens else 0.0

    @property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / (n sum w^2) of the importance weights, in (0, 1]."""
        square = self.tokens * self.ratio_squared
        return self.ratio**2 / square if square else 1.0


def count_tokens(batch: MicroBatch) -> torch.Tensor:
    """Trained tokens of each sequence [N]."""
    mask_T = torch.as_tensor(batch.loss_mask)
    return _sequence_sum(mask_T, torch.as_tensor(batch.starts))


def policy_loss(
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    batch: MicroBatch,
    *,
    spec: LossSpec,
    totals: Totals,
) -> tuple[torch.Tensor, LossStatistics]:
    """This micro-batch's share of the update's loss (a scalar; the shares of all micro-batches add
    up to it exactly) and its statistics. Computed in the dtype of `logprobs_T`, float32 at
    least."""
    learner_T = logprobs_T.to(torch.promote_types(logprobs_T.dtype, torch.float32))
    entropy_T = entropy_T.to(learner_T)
    mask_T = torch.as_tensor(batch.loss_mask).to(learner_T)
    starts = torch.as_tensor(batch.starts).to(logprobs_T.device)
    engine_T = torch.as_tensor(batch.logprobs).to(learner_T)
    advantages_T = torch.as_tensor(batch.advantages).to(learner_T)

    gap_T = (learner_T.detach() - engine_T) * mask_T  # 0.0 when learner and engine agree
    guarded_N = _guarded(gap_T, mask_T, starts, limit=spec.guard)
    kept_T = mask_T * _spread(~guarded_N, starts)
    old_T, weight_T = _correction(learner_T, engine_T, batch, mask_T, starts, spec=spec)

    token_loss_T, ratio_T, low_T, high_T = _token_loss(
        (learner_T - old_T) * mask_T, learner_T, advantages_T, mask_T, starts, spec=spec
    )
    token_loss_T = token_loss_T * weight_T
    kl_T = torch.zeros_like(learner_T)
    if batch.reference_logprobs is not None:
        kl_T = k3(learner_T, torch.as_tensor(batch.reference_logprobs).to(learner_T), mask_T)
    if spec.kl_coefficient:
        if batch.reference_logprobs is None:
            raise ValueError("kl_coefficient needs reference_logprobs in every micro-batch")
        weighed_T = kl_T * ratio_T if spec.kl_unbiased else kl_T  # the ratio's gradient counts
        token_loss_T = token_loss_T + spec.kl_coefficient * weighed_T
    loss = _aggregate(token_loss_T, kept_T, mask_T, starts, spec=spec, totals=totals)
    if spec.entropy_coefficient:
        bonus = (entropy_T * kept_T).sum() / max(totals.tokens, 1)
        loss = loss - spec.entropy_coefficient * bonus

    with torch.no_grad():
        importance_T = torch.exp(gap_T) * mask_T
        sums = torch.stack(
            [
                mask_T.sum(),
                importance_T.sum(),
                (importance_T**2).sum(),
                (low_T * mask_T).sum(),
                (high_T * mask_T).sum(),
                gap_T.abs().sum(),
                (entropy_T * mask_T).sum(),
                (kl_T * mask_T).sum(),
                guarded_N.sum().to(learner_T),
            ]
        ).tolist()  # one transfer from the device, not nine
    names = [f.name for f in fields(LossStatistics)]
    return loss, LossStatistics(**dict(zip(names, sums, strict=True)))


def k3(learner_T: torch.Tensor, reference_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Non-negative, unbiased estimate of KL(learner || reference) at each sampled token, 0 off the
    mask."""
    difference_T = (reference_T - learner_T) * mask_T
    return torch.exp(difference_T) - difference_T - 1


def _correction(
    learner_T: torch.Tensor,
    engine_T: torch.Tensor,
    batch: MicroBatch,
    mask_T: torch.Tensor,
    starts: torch.Tensor,
    *,
    spec: LossSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(denominator of the ratio [T], weight of each token [T])."""
    if batch.old_logprobs is not None:
        old_T = torch.as_tensor(batch.old_logprobs).to(engine_T)
    elif spec.correction != "none":
        old_T = learner_T.detach()
    else:
        return engine_T, torch.ones_like(engine_T)
    if spec.correction == "none":
        return old_T, torch.ones_like(engine_T)
    level, action = spec.correction.split("_")
    difference_T = (old_T - engine_T) * mask_T
    if level == "sequence":
        difference_T = _spread(_sequence_sum(difference_T, starts), starts)
    weight_T = torch.exp(difference_T)
    if action == "truncate":
        return old_T, weight_T.clamp(max=spec.correction_cap)
    return old_T, weight_T.masked_fill(weight_T > spec.correction_cap, 0.0)


def _token_loss(
    log_ratio_T: torch.Tensor,
    learner_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    starts: torch.Tensor,
    *,
    spec: LossSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, ratio, clipped from below, clipped from above), each [T]."""
    if spec.kind == "gspo":  # one ratio a sequence: the geometric mean of its tokens'
        counts_N = _sequence_sum(mask_T, starts).clamp(min=1.0)
        log_ratio_T = _spread(_sequence_sum(log_ratio_T, starts) / counts_N, starts)
    ratio_T = torch.exp(log_ratio_T)
    if spec.kind == "cispo":
        capped_T = ratio_T.clamp(
            max=spec.ratio_cap
        ).detach()  # a weight, not a path for the gradient
        high_T = (ratio_T > spec.ratio_cap) & (advantages_T != 0)
        return -capped_T * advantages_T * learner_T, ratio_T, torch.zeros_like(high_T), high_T
    low, high = CLIPS[spec.kind]
    low = 1 - (low if spec.clip_low is None else spec.clip_low)
    high = 1 + (high if spec.clip_high is None else spec.clip_high)
    loss_T = -torch.minimum(ratio_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    low_T = (ratio_T < low) & (advantages_T < 0)
    return loss_T, ratio_T, low_T, (ratio_T > high) & (advantages_T > 0)


def _aggregate(
    loss_T: torch.Tensor,
    kept_T: torch.Tensor,
    mask_T: torch.Tensor,
    starts: torch.Tensor,
    *,
    spec: LossSpec,
    totals: Totals,
) -> torch.Tensor:
    """The counts are the planned ones: a guarded sequence adds nothing and is still counted."""
    if spec.kind in ("grpo", "gspo"):  # mean over sequences of the mean over tokens
        counts_N = _sequence_sum(mask_T, starts).clamp(min=1.0)
        return (_sequence_sum(loss_T * kept_T, starts) / counts_N).sum() / max(totals.sequences, 1)
    summed = (loss_T * kept_T).sum()
    if spec.kind == "dr_grpo":
        return summed / max(totals.sequences * totals.longest, 1)
    return summed / max(totals.tokens, 1)  # dapo, cispo


def _guarded(
    gap_T: torch.Tensor, mask_T: torch.Tensor, starts: torch.Tensor, *, limit: float
) -> torch.Tensor:
    """Sequences [N] whose engine and learner are so far apart that one of them must be wrong. NaN
    passes: a non-finite loss has its own alarm."""
    counts_N = _sequence_sum(mask_T, starts).clamp(min=1.0)
    return _sequence_sum(gap_T.abs(), starts) / counts_N > limit


def _sequence_sum(values_T: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Sum over each sequence: [T] -> [N]."""
    owner_T = _owners(starts)
    sums_N = torch.zeros(starts.numel() - 1, dtype=values_T.dtype, device=values_T.device)
    return sums_N.index_add(0, owner_T, values_T)


def _spread(values_N: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Each sequence's value at each of its tokens: [N] -> [T]."""
    return values_N[_owners(starts)]


def _owners(starts: torch.Tensor) -> torch.Tensor:
    """The sequence each token belongs to [T]."""
    count = starts.numel() - 1
    return torch.repeat_interleave(torch.arange(count, device=starts.device), starts.diff())
