"""What an update leaves behind: its line of metrics, its samples, the gauges, the progress a
watcher sees."""

import math
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.config import Job
from rlpost.grpo.advantage import usefulness
from rlpost.metrics import RunMetrics
from rlpost.policy.proof import ProofReport
from rlpost.run_directory import RunDirectory
from rlpost.types import Group, Rollout, StepReport


@dataclass(slots=True)
class Progress:
    """What a watcher sees; plain values only."""

    phase: str = "starting"
    update: int = 0
    updates: int = 0
    version: int = 0
    reward: float | None = None
    evals: list[tuple[int, float]] = field(default_factory=list)
    best: tuple[int, float] | None = None
    seconds: float = 0.0
    eta: float | None = None
    message: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True, kw_only=True)
class Phases:
    """Seconds of one update, by what the learner's side did."""

    wait: float = 0.0  # for a full cohort
    learn: float = 0.0
    publish: float = 0.0
    proof: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update that is done."""

    number: int
    groups: Sequence[Group]
    report: StepReport
    phases: Phases
    staleness: int  # largest of its groups
    seconds: float
    proof: ProofReport | None  # the weakest of the last publish
    dropped: Mapping[str, int]  # groups since the run began, by reason


class Records:
    """Writes the run directory's lines and sets the gauges; `progress` is always up to date."""

    def __init__(self, job: Job, run: RunDirectory, metrics: RunMetrics):
        self._job, self._run, self._metrics = job, run, metrics
        self._began = time.monotonic()
        self._recent: deque[float] = deque(maxlen=9)  # seconds of the last updates
        self.progress = Progress(updates=job.run.updates)
        metrics.configured(
            updates=job.run.updates,
            staleness=job.staleness,
            rewards=[spec.name for spec in job.rewards],
        )

    @property
    def seconds(self) -> float:
        """Since the controller was made."""
        return time.monotonic() - self._began

    def phase(self, name: str) -> None:
        """What the run is doing, for watchers and Prometheus."""
        self.progress.phase = name
        self._metrics.phase(name)

    def write(self, done: Update, workers: Sequence[Mapping[str, Any]]) -> None:
        """Everything that is written about one update; `workers` are the engines' statistics."""
        values = [value for group in done.groups for value in group.values]
        reward = math.fsum(values) / len(values) if values else math.nan
        min_spread = self._job.learner.min_spread
        self._recent.append(done.seconds)
        eta = (self._job.run.updates - done.number) * statistics.median(self._recent)
        self._run.append_metrics(
            done.number,
            reward=reward,
            reward_std=_deviation(values, reward),
            parts=_part_means(done.groups),
            groups=_outcomes(done.groups, min_spread),
            staleness=done.staleness,
            truncated=_share(done.groups, lambda rollout: rollout.stop_reason == "length"),
            reply_tokens=_reply_tokens(done.groups),
            **_of_report(done.report),
            **_of_proof(done.proof),
            dropped=dict(done.dropped),
            seconds={
                "update": done.seconds, "wait": done.phases.wait, "learn": done.phases.learn,
                "publish": done.phases.publish, "proof": done.phases.proof,
            },
        )  # fmt: skip
        self._run.append_rollouts(done.number, done.groups, limit=self._job.run.keep_samples)
        self._metrics.updated(
            update=done.number, report=done.report, groups=done.groups, staleness=done.staleness,
            learner_wait=done.phases.wait, dropped=done.dropped, workers=workers,
            min_spread=min_spread, seconds=done.seconds, eta=eta,
        )  # fmt: skip
        disk = shutil.disk_usage(self._run.path)
        self._metrics.disk(free_bytes=disk.free, size_bytes=disk.total)
        progress = self.progress
        progress.update, progress.version = done.number, done.report.policy_version
        progress.reward = reward
        progress.seconds, progress.eta = self.seconds, eta


def _of_report(report: StepReport) -> dict[str, Any]:
    names = (
        *("loss", "grad_norm", "entropy", "clip_fraction", "logprob_gap", "kl", "ratio_mean"),
        *("effective_sample_size", "guarded_sequences", "learning_rate", "tokens", "skipped"),
    )
    return {"version": report.policy_version} | {name: getattr(report, name) for name in names}


def _of_proof(proof: ProofReport | None) -> dict[str, float]:
    return {
        "proof_slope": proof.slope if proof else math.nan,
        "proof_power": proof.power if proof else 0.0,
    }


def _deviation(values: Sequence[float], mean: float) -> float:
    if not values:
        return math.nan
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def _part_means(groups: Sequence[Group]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for group in groups:
        for rollout in group.rollouts:
            for name, value in (rollout.score.parts if rollout.score else {}).items():
                sums.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in sorted(sums.items())}


def _outcomes(groups: Sequence[Group], min_spread: float) -> dict[str, int]:
    counts = {"useful": 0, "all_good": 0, "all_bad": 0, "unscored": 0}
    for group in groups:
        counts[usefulness(group, min_spread=min_spread)] += 1
    return counts


def _share(groups: Sequence[Group], test: Callable[[Rollout], bool]) -> float:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return sum(map(test, rollouts)) / len(rollouts) if rollouts else 0.0


def _reply_tokens(groups: Sequence[Group]) -> float:
    lengths = [sum(r.trajectory.loss_mask) for g in groups for r in g.rollouts if r.trajectory]
    return sum(lengths) / len(lengths) if lengths else 0.0
