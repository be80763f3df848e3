"""The reward seam: a reward is a function of a task and a rollout.

    def fields(task: Task, rollout: Rollout, *, weights: dict | None = None) -> float | Score
    async def judged(task: Task, rollout: Rollout) -> float | Score
    def ranked(task: Task, rollouts: list[Rollout]) -> list[float | Score]      # a group reward

A second parameter called `rollouts` makes a group reward: it runs once, when all G replies are
there. A function whose first parameter is `completions` is taken for TRL's form, `f(completions,
**columns)`. Keyword arguments come from the job's [[reward]] table. Weights, gates and ranges are
the job's business.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.types import Rollout, Score, Task

STATUSES = ("ok", "reply_error", "error", "timeout", "crashed", "invalid_result")
"""How a judgement ended. `ok` and `reply_error` carry a score (the lowest value for the latter: the
same failure twice on the same reply is the reply's doing); the others leave the rollout without
one."""

Reward = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """One [[reward]] of a job. `name` is unique within the job and prefixes the parts in metrics.

    A gate multiplies: nothing counts unless it is 1. `range` is what the function may return;
    values are mapped from it to [0, 1]. `base_dir` is the job's folder, where `module:object` is
    looked up first.
    """

    use: str
    name: str
    weight: float = 1.0
    gate: bool = False
    range: tuple[float, float] = (0.0, 1.0)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    base_dir: str = "."


def kind(function: Reward) -> str:
    """ "single", "group" or "trl", from the names of the first two parameters."""
    names = list(inspect.signature(function).parameters)
    if names and names[0] in ("completions", "prompts"):
        return "trl"
    return "group" if len(names) > 1 and names[1] == "rollouts" else "single"


def as_score(value: Any, *, range: tuple[float, float] = (0.0, 1.0)) -> Score:
    """A reward's result as a Score in [0, 1]. Raises ValueError, naming the cause, for anything
    that is not finite, not a number or outside `range` (parts must be finite; booleans count as 0
    and 1)."""
    score = value if isinstance(value, Score) else Score(value=value)
    low, high = range
    number = _finite(score.value, "value")
    if not low <= number <= high:
        raise ValueError(f"value {number:g} is outside the range [{low:g}, {high:g}]")
    parts = {str(name): _finite(part, f"part {name}") for name, part in score.parts.items()}
    return Score(value=(number - low) / (high - low), parts=parts, reason=str(score.reason))


def _finite(value: Any, name: str) -> float:
    if not isinstance(value, int | float) and not hasattr(value, "__float__"):
        raise ValueError(f"{name} is {type(value).__name__}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}")
    return number


def combine(specs: Sequence[RewardSpec], scores: Sequence[Score]) -> Score:
    """The scores of one rollout, one a spec, as one: the weighted mean of the ungated ones times
    every gate.

    Parts carry the reward's name (`extraction`, `extraction.exact.date`); the reason is that of the
    first reward that has one and is below 1, else the first reason given.
    """
    gates, total, weights = 1.0, 0.0, 0.0
    parts: dict[str, float] = {}
    for spec, score in zip(specs, scores, strict=True):
        parts[spec.name] = score.value
        parts.update({f"{spec.name}.{name}": value for name, value in score.parts.items()})
        if spec.gate:
            gates *= 1.0 if score.value >= 1.0 else 0.0
        else:
            total += spec.weight * score.value
            weights += spec.weight
    reasons = [s.reason for s in scores if s.reason and s.value < 1.0] or [
        s.reason for s in scores if s.reason
    ]
    value = gates * (total / weights if weights else 1.0)
    return Score(value=value, parts=parts, reason=reasons[0] if reasons else "")


def recorded(task: Task, reply: str, **fields: Any) -> Rollout:
    """A rollout around a completion that was sampled elsewhere, as `rlpost score` judges it."""
    message = {"role": "assistant", "content": reply}
    return Rollout(task=task, reply=reply, messages=[*task.messages, message], **fields)
