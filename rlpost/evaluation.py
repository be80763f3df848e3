"""Greedy runs over validation or held-out rows, and the metrics of a task."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.clients import RolloutClient
from rlpost.errors import RunError
from rlpost.rollout_worker import GroupOrder
from rlpost.types import Rollout, Task

Metrics = Callable[[list[Task], list[Rollout]], Mapping[str, float]]

EVALUATION_GROUP = 1 << 40  # group numbers of evaluations start here: never those of training


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Means over the rows that got a score; `unscored` counts the others."""

    score: float
    metrics: Mapping[str, float]
    parts: Mapping[str, float]
    rows: int
    unscored: int
    truncated: int
    version: int
    rollouts: Sequence[Rollout]

    def value(self, metric: str) -> float:
        """`score`, one of the rewards' metrics, or a part. KeyError if there is none of that
        name."""
        if metric == "score":
            return self.score
        return self.metrics[metric] if metric in self.metrics else self.parts[metric]

    def summary(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "metrics": dict(self.metrics),
            "parts": dict(self.parts),
            "rows": self.rows,
            "unscored": self.unscored,
            "truncated": self.truncated,
            "version": self.version,
        }


@dataclass(slots=True, kw_only=True)
class Curve:
    """The evaluations of a run: the held-out curve, its best point, and how long ago that was."""

    points: list[tuple[int, float]] = field(default_factory=list)  # (update, value)
    best: tuple[int, float] | None = None
    without_gain: int = 0  # evaluations since the best

    def add(self, update: int, value: float) -> bool:
        """True when it is the best so far; NaN never is."""
        self.points.append((update, value))
        better = not math.isnan(value) and (self.best is None or value > self.best[1])
        if better:
            self.best, self.without_gain = (update, value), 0
        else:
            self.without_gain += 1
        return better

    def state(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint; `restore` takes it back."""
        return {
            "best": self.best, "evals": self.points, "evals_without_gain": self.without_gain,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best = tuple(state["best"]) if state["best"] else None
        self.points[:] = [tuple(point) for point in state["evals"]]
        self.without_gain = state["evals_without_gain"]


def value_of(result: Evaluation, metric: str) -> float:
    """The metric by which a run is judged. Raises RunError, naming what there is."""
    try:
        return result.value(metric)
    except KeyError:
        known = ", ".join(["score", *result.metrics, *result.parts])
        raise RunError(
            f"eval.metric = {metric!r} is not measured by this job's rewards; there are: {known}"
        ) from None


async def evaluate(
    workers: Sequence[RolloutClient],
    tasks: Sequence[Task],
    *,
    version: int,
    max_reply_tokens: int,
    metrics: Sequence[Metrics] = (),
) -> Evaluation:
    """One greedy reply to each task, spread over the workers, under one version."""

    async def answer(index: int, task: Task) -> Rollout:
        order = GroupOrder(
            group_id=EVALUATION_GROUP + index,
            task=task,
            group_size=1,
            version=version,
            seed=0,
            max_reply_tokens=max_reply_tokens,
            temperature=0.0,
        )
        group = await workers[index % len(workers)].run(order)
        return group.rollouts[0]

    rollouts = await asyncio.gather(*(answer(i, task) for i, task in enumerate(tasks)))
    return summarise(rollouts, version=version, metrics=metrics)


def summarise(
    rollouts: Sequence[Rollout], *, version: int, metrics: Sequence[Metrics] = ()
) -> Evaluation:
    """The evaluation of rollouts that were judged, whoever sampled them."""
    scored = [rollout for rollout in rollouts if rollout.score is not None]
    sums: dict[str, list[float]] = defaultdict(list)
    for rollout in scored:
        for name, value in rollout.score.parts.items():  # type: ignore[union-attr]
            sums[name].append(value)
    found: dict[str, float] = {}
    for measure in metrics:
        found.update(measure([rollout.task for rollout in rollouts], list(rollouts)))
    values = [rollout.score.value for rollout in scored]  # type: ignore[union-attr]
    return Evaluation(
        score=math.fsum(values) / len(values) if values else math.nan,
        metrics=found,
        parts={name: math.fsum(items) / len(items) for name, items in sorted(sums.items())},
        rows=len(rollouts),
        unscored=len(rollouts) - len(scored),
        truncated=sum(rollout.stop_reason == "length" for rollout in rollouts),
        version=version,
        rollouts=tuple(rollouts),
    )
