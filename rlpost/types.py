"""What flows through rlpost: frozen, slotted, keyword-only values that import nothing heavy.

Sizes: P tasks per update, G rollouts per group, L tokens of a trajectory, C tokens of a completion,
T tokens of a micro-batch, N sequences of a micro-batch. Index t always speaks about token t:
`logprobs[t]` is the log-probability of `token_ids[t]` given the tokens before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]  # {"role", "content", ...} in OpenAI's form
JSON = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing to solve. `answer` is the gold; `meta` keeps every other column of the row."""

    id: str
    messages: Sequence[Message]
    answer: JSON = None
    schema: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    images: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The tokens of one engine call. `token_ids` [C] end with the stop token if one was sampled."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]  # [C], of the distribution that was sampled from
    text: str
    finish_reason: str  # "stop" or "length"
    versions: Sequence[tuple[int, int]]  # (first token, policy version), ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The flat tokens of one rollout: prompt, replies and whatever the environment said between."""

    token_ids: Sequence[int]  # [L]
    loss_mask: Sequence[int]  # [L], 1 where the policy sampled the token
    logprobs: Sequence[float]  # [L], the engine's; 0.0 where loss_mask is 0
    policy_version: int  # the oldest version that sampled any of its tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an environment says after a reply. `info` of the last step becomes `Rollout.info`."""

    messages: Sequence[Message] = ()
    done: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A judgement in [0, 1]. `reason` is one filterable word such as "ok" or "not_json"."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished attempt at a task. `score` is None until judged, and stays None when the judge
    itself failed; `status` then says how (see `rlpost.reward.STATUSES`)."""

    task: Task
    reply: str  # the text of the last reply
    trajectory: Trajectory | None = None  # None when a recorded completion is scored
    messages: Sequence[Message] = ()  # the whole conversation, replies included
    stop_reason: str = "stop"  # "stop", "length" (truncated) or the environment's word
    info: Mapping[str, Any] = field(default_factory=dict)
    score: Score | None = None
    status: str = "unscored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """G rollouts of one task. `id` is the admission number: groups are trained in its order."""

    id: int
    task: Task
    rollouts: Sequence[Rollout]

    @property
    def policy_version(self) -> int:
        """The oldest version in the group; staleness is counted from it."""
        return min(r.trajectory.policy_version for r in self.rollouts if r.trajectory is not None)

    @property
    def values(self) -> list[float]:
        """The scores of the rollouts that have one."""
        return [r.score.value for r in self.rollouts if r.score is not None]

    @property
    def spread(self) -> float:
        """Largest minus smallest score; 0.0 with fewer than two scored rollouts."""
        values = self.values
        return max(values) - min(values) if len(values) > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """N sequences laid end to end. All per-token fields have T entries (sequences of plain numbers
    or 1-D tensors); `starts` has N + 1, the last being T."""

    token_ids: Any  # [T] int64
    position_ids: Any  # [T] int64, from 0 in each sequence
    starts: Any  # [N+1] int64
    loss_mask: Any  # [T] 0 or 1
    advantages: Any  # [T] float
    logprobs: Any  # [T] float, the engine's
    old_logprobs: Any = None  # [T] float, where a loss needs them
    reference_logprobs: Any = None  # [T] float, the start policy's, where a loss needs them


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one update did. Means are over the trained tokens; `kl` is to the start policy, NaN when
    it was not measured; `skipped` tells why no weight moved ("" when they did)."""

    policy_version: int
    loss: float
    grad_norm: float
    entropy: float
    clip_fraction: float
    logprob_gap: float  # mean |learner - engine|
    kl: float
    tokens: int  # trained tokens
    seconds: float
    learning_rate: float = 0.0
    ratio_mean: float = 1.0  # mean importance weight learner / engine, before capping
    effective_sample_size: float = 1.0  # of the importance weights, as a share of the tokens
    guarded_sequences: int = 0  # dropped by the sequence guard
    skipped: str = ""
