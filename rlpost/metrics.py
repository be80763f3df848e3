"""Every Prometheus metric of a run, declared once.

Prefix `rlpost_`, base units, `_total` on counters, and the label `run_id` (never `job`: Prometheus
writes that itself) on every series. Each series whose labels are known beforehand is there at 0
from the start, so that a rate over it is right from its first event. The controller alone exports a
run: workers hand their counts over.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rlpost.errors import JobError
from rlpost.reward import STATUSES
from rlpost.types import Group, StepReport

PHASES = ("starting", "proving", "training", "publish", "evaluate", "save", "done", "paused")
OUTCOMES = ("mixed", "all_good", "all_bad")
ROLES = ("rollout", "learner", "scoring", "controller")
DROPPED = ("unscored", "all_good", "all_bad", "late")
RESTARTS = ("died", "timeout", "planned")
ROOFLINES = ("generate", "learn", "publish")
CHECKS = (
    *("non_finite", "entropy_collapse", "kl_explosion", "grad_norm", "mismatch", "proof"),
    *("all_bad", "all_good", "overfit", "truncation", "length_explosion", "staleness"),
    *("stalled", "reward_errors", "idle", "disk"),
)
"""What health watches; dashboards/RUNBOOKS.md has one heading for each."""
SEVERITIES = ("warning", "critical")
ACTIONS = ("warn", "skip", "lower_learning_rate", "pause", "roll_back")
SINKS = ("tensorboard", "wandb")
FAST = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds
SLOW = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table. `labels` come besides run_id, each with the values that are known
    beforehand."""

    name: str  # without the prefix
    kind: Kind
    help: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    buckets: Sequence[float] = ()


def _gauge(name: str, help: str, **labels: Sequence[str]) -> Metric:
    return Metric(name, "gauge", help, labels)


def _counter(name: str, help: str, **labels: Sequence[str]) -> Metric:
    return Metric(name, "counter", help, labels)


def _histogram(name: str, help: str, buckets: Sequence[float], **labels: Sequence[str]) -> Metric:
    return Metric(name, "histogram", help, labels, buckets)


METRICS: tuple[Metric, ...] = (
    # progress
    _gauge("update", "Updates done."),
    _gauge("planned_updates", "Updates after which the run ends at the latest."),
    _gauge("policy_version", "Version of the policy that the learner holds."),
    _gauge("phase", "1 for what the run is doing now, 0 for the rest.", phase=PHASES),
    _gauge("last_update_timestamp_seconds", "When the last update ended (Unix); 0 before."),
    _gauge("eta_seconds", "Expected time to the last planned update."),
    _histogram("update_duration_seconds", "Wall-clock time of an update, publish included.", SLOW),
    # learning
    _gauge("reward_mean", "Mean reward of the last update, or score of the last evaluation, by part"
           " (value: the combined one).", split=("train", "validation"), part=("value",)),
    _gauge("reward_std", "Its standard deviation over the rollouts.",
           split=("train",), part=("value",)),
    _gauge("group_ratio", "Share of the last update's groups; only mixed carry a gradient.",
           outcome=OUTCOMES),
    _counter("groups_total", "Groups that were trained, by outcome.", outcome=OUTCOMES),
    _gauge("eval", "Metrics of the last evaluation over the validation rows.", metric=("score",)),
    _gauge("eval_update", "Update after which the last evaluation was made."),
    _counter("evaluations_total", "Evaluations made."),
    _gauge("loss", "Loss of the last update."),
    _gauge("kl", "KL to the start policy when last measured, in nats a token."),
    _gauge("logprob_gap", "Mean |learner - engine| of log-probabilities."),
    _gauge("probability_gap", "Mean |learner - engine| of the sampled tokens' probabilities."),
    _gauge("rollout_kl", "KL of the engine's policy to the learner's, in nats a token."),
    _gauge("importance_weight_mean", "Mean weight learner / engine before capping; 1 on policy."),
    _gauge("effective_sample_ratio", "Effective sample size of the weights, by tokens."),
    _gauge("entropy", "Entropy of the policy over the trained tokens, in nats."),
    _gauge("clip_ratio", "Share of the trained tokens whose weight was clipped or capped."),
    _gauge("clip_low_ratio", "Share of the trained tokens clipped at the lower bound."),
    _gauge("clip_high_ratio", "Share of the trained tokens clipped or capped at the upper bound."),
    _gauge("grad_norm", "Gradient norm before clipping."),
    _gauge("learning_rate", "Learning rate of the last update."),
    _counter("skipped_updates_total", "Updates that moved no weight, by reason.",
             reason=("no_signal", "non_finite")),
    _counter("guarded_sequences_total", "Sequences on which learner and engine disagree."),
    _counter("trained_tokens_total", "Tokens that carried a gradient."),
    # rollouts
    _counter("tokens_total", "Tokens through the engines.", kind=("prompt", "completion")),
    _counter("rollouts_total", "Rollouts, by status of their judgement.", status=STATUSES),
    _counter("truncated_rollouts_total", "Rollouts that ended at the reply limit."),
    _histogram("prompt_length_tokens", "Tokens before the first reply of a rollout.", TOKENS),
    _histogram("reply_length_tokens", "Tokens that the policy sampled in a rollout.", TOKENS),
    _gauge("groups_in_flight", "Groups that are being sampled or judged."),
    _gauge("buffer_groups", "Finished groups that wait for their update."),
    _gauge("staleness_updates", "Largest staleness in the last update."),
    _gauge("staleness_max_updates", "Largest staleness in any update so far."),
    _gauge("staleness_bound_updates", "Staleness that no update may exceed."),
    _counter("dropped_groups_total", "Groups that were not trained, by reason.", reason=DROPPED),
    # rewards
    _counter("reward_calls_total", "Judgements, by outcome.", reward=(), outcome=STATUSES),
    _counter("reward_seconds_total", "Time spent in rewards.", reward=()),
    _counter("scoring_restarts_total", "Scoring processes that were replaced."),
    # weights
    _histogram("publish_duration_seconds", "Time until every engine has a version.", FAST),
    _counter("published_bytes_total", "Bytes of weights sent to engines."),
    _counter("publishes_total", "Times a version was sent to the engines."),
    _counter("publish_failures_total", "Times an engine did not prove that it serves it."),
    _histogram("proof_duration_seconds", "Time to prove that every engine serves a version.", FAST),
    _gauge("proof_slope", "Engine's change on the learner's: 1 updated, 0 stale."),
    _gauge("proof_power", "Power of that slope; undecided while it is low."),
    # keeping and running
    _counter("checkpoints_total", "Checkpoints written."),
    _counter("checkpoint_failures_total", "Checkpoints that could not be written."),
    _histogram("checkpoint_duration_seconds", "Time to write a checkpoint.", SLOW),
    _gauge("last_checkpoint_timestamp_seconds", "When the last checkpoint was whole (Unix)."),
    _counter("actor_restarts_total", "Actors that were started again, by role and reason.",
             role=ROLES, reason=RESTARTS),
    _counter("idle_seconds_total", "Time without work, by role.", role=("rollout", "learner")),
    _gauge("actors", "Actors whose idle time is counted, by role.", role=("rollout", "learner")),
    # hardware
    _gauge("gpu_memory_used_bytes", "GPU memory in use, all cards of a role.",
           role=("rollout", "learner")),
    _gauge("gpu_memory_size_bytes", "GPU memory that there is, all cards of a role.",
           role=("rollout", "learner")),
    _gauge("gpu_busy_ratio", "Share of the time in which a role's GPUs ran a kernel.",
           role=("rollout", "learner")),
    _gauge("roofline_ratio", "Speed as a share of what the hardware allows, by work.",
           work=ROOFLINES),
    _gauge("disk_free_bytes", "Free space where the run directory lies."),
    _gauge("disk_size_bytes", "Size of the file system where the run directory lies."),
    # health
    _gauge("health", "1 while a check of the run's health fires.",
           check=CHECKS, severity=SEVERITIES),
    _counter("health_actions_total", "What health did to the run, by action.", action=ACTIONS),
    _counter("sink_dropped_total", "Points that a sink outside the run did not take.", sink=SINKS),
)  # fmt: skip
_MAKERS = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}


class RunMetrics:
    """The metrics of one run: a method for each thing that happens. NaN leaves a gauge as it
    was."""

    def __init__(self, run_id: str, registry: CollectorRegistry | None = None):
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # double series
        self.run_id, self.registry = run_id, registry or CollectorRegistry()
        self._declared = {metric.name: metric for metric in METRICS}
        self._made = {metric.name: self._make(metric) for metric in METRICS}
        self._seen: dict[
            tuple[Any, ...], float
        ] = {}  # running totals of others, as last handed over
        self._server: Any = None
        for metric in METRICS:
            _touch(self._made[metric.name], run_id, list(metric.labels.values()))
        self.phase("starting")

    def _make(self, metric: Metric) -> Any:
        options: dict[str, Any] = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
        names = ("run_id", *metric.labels)
        name = f"rlpost_{metric.name}"
        return _MAKERS[metric.kind](name, metric.help, names, registry=self.registry, **options)

    def _series(self, name: str, labels: Mapping[str, str]) -> Any:
        return self._made[name].labels(run_id=self.run_id, **labels)

    def _set(self, name: str, value: float | None, **labels: str) -> None:
        if value is not None and value == value:
            self._series(name, labels).set(value)

    def _add(self, name: str, amount: float = 1, **labels: str) -> None:
        self._series(name, labels).inc(amount)

    def _observe(self, name: str, value: float, **labels: str) -> None:
        self._series(name, labels).observe(value)

    def _advance(self, name: str, total: float, *, source: Any, **labels: str) -> None:
        """Adds what a running total of somebody else has grown by; a smaller total means that it
        began anew."""
        key = (name, source, *labels.values())
        before = self._seen.get(key, 0.0)
        self._seen[key] = total
        self._add(name, total - before if total >= before else total, **labels)

    # ── what happens in a run ──────────────────────────────────────────────────────────────────

    def phase(self, name: str) -> None:
        """What the run does now: one of PHASES, or a sentence that begins with one of them."""
        current = next((phase for phase in PHASES if name.startswith(phase)), name)
        for phase in {*PHASES, current}:
            self._set("phase", float(phase == current), phase=phase)

    def configured(self, *, updates: int, staleness: int, rewards: Iterable[str] = ()) -> None:
        """What the job allows (updates at most, the largest staleness) and the names of its
        rewards."""
        for reward in rewards:
            self._judges(reward)
        self._set("planned_updates", updates)
        self._set("staleness_bound_updates", staleness)

    def _judges(self, reward: str) -> None:
        """Its series are there at 0 for every outcome: a share of one that never happened is 0."""
        self._series("reward_seconds_total", {"reward": reward})
        for status in STATUSES:
            self._series("reward_calls_total", {"reward": reward, "outcome": status})

    def collected(self, group: Group) -> None:
        """A group came back from its rollout worker, judged or not."""
        for rollout in group.rollouts:
            self._add("rollouts_total", status=rollout.status)
            if rollout.stop_reason == "length":
                self._add("truncated_rollouts_total")
            if rollout.trajectory is not None:
                mask = list(rollout.trajectory.loss_mask)
                self._observe("prompt_length_tokens", mask.index(1) if 1 in mask else len(mask))
                self._observe("reply_length_tokens", sum(mask))

    def buffered(self, *, running: int, finished: int) -> None:
        self._set("groups_in_flight", running)
        self._set("buffer_groups", finished)

    def published(
        self, *, seconds: float, proof_seconds: float, slope: float, power: float, bytes: int = 0
    ) -> None:
        """A version reached every engine and was put to the proof; `proof_failed` follows if one
        fails."""
        self._observe("publish_duration_seconds", seconds)
        self._observe("proof_duration_seconds", proof_seconds)
        self._add("published_bytes_total", bytes)
        self._add("publishes_total")
        self._set("proof_slope", slope)
        self._set("proof_power", power)

    def proof_failed(self) -> None:
        self._add("publish_failures_total")

    def updated(
        self,
        *,
        update: int,
        report: StepReport,
        groups: Sequence[Group],
        staleness: int,
        learner_wait: float,
        dropped: Mapping[str, int],
        workers: Sequence[Mapping[str, Any]],
        min_spread: float,
        seconds: float | None = None,
        eta: float | None = None,
    ) -> None:
        """An update ended. `dropped` and `workers` (a rollout worker's statistics each) are running
        totals."""
        self._set("update", update)
        self._set("last_update_timestamp_seconds", time.time())
        self._set("eta_seconds", eta)
        if seconds is not None:
            self._observe("update_duration_seconds", seconds)
        self._learned(report)
        self._rewarded(groups, min_spread)
        self._set("staleness_updates", staleness)
        largest = max(staleness, self._seen.get(("staleness",), 0))
        self._seen[("staleness",)] = largest
        self._set("staleness_max_updates", largest)
        self._add("idle_seconds_total", learner_wait, role="learner")
        self._set("actors", 1, role="learner")  # its ranks wait together
        self._set("actors", len(workers), role="rollout")
        for reason, total in dropped.items():
            self._advance("dropped_groups_total", total, source="buffer", reason=reason)
        for number, statistics in enumerate(workers):
            self._worked(number, statistics)

    def evaluated(
        self,
        score: float,
        metrics: Mapping[str, float],
        *,
        parts: Mapping[str, float] | None = None,
        update: int | None = None,
    ) -> None:
        for part, value in {"value": score, **(parts or {})}.items():
            self._set("reward_mean", value, split="validation", part=part)
        for name, value in {"score": score, **metrics}.items():
            self._set("eval", value, metric=name)
        self._set("eval_update", update)
        self._add("evaluations_total")

    def saved(self, seconds: float) -> None:
        self._add("checkpoints_total")
        self._observe("checkpoint_duration_seconds", seconds)
        self._set("last_checkpoint_timestamp_seconds", time.time())

    def save_failed(self) -> None:
        self._add("checkpoint_failures_total")

    def restarted(self, role: str, reason: str = "died") -> None:
        """An actor was started again; `reason` is one of RESTARTS."""
        self._add("actor_restarts_total", role=role, reason=reason)

    def diverged(self, *, kl: float, probability_gap: float) -> None:
        """How far engine and learner are apart over an update's tokens: nats and probability."""
        self._set("rollout_kl", kl)
        self._set("probability_gap", probability_gap)

    def clipped(self, *, low: float, high: float) -> None:
        """Shares of an update's trained tokens that each bound of the weight held back."""
        self._set("clip_low_ratio", low)
        self._set("clip_high_ratio", high)

    def hardware(
        self, role: str, *, used_bytes: float, size_bytes: float, busy: float | None = None
    ) -> None:
        """The GPUs of a role together; `busy` is the mean share of time in [0, 1]."""
        self._set("gpu_memory_used_bytes", used_bytes, role=role)
        self._set("gpu_memory_size_bytes", size_bytes, role=role)
        self._set("gpu_busy_ratio", busy, role=role)

    def roofline(self, work: str, ratio: float) -> None:
        """`work` is one of ROOFLINES, `ratio` the measured speed over the possible one."""
        self._set("roofline_ratio", ratio, work=work)

    def disk(self, *, free_bytes: float, size_bytes: float) -> None:
        self._set("disk_free_bytes", free_bytes)
        self._set("disk_size_bytes", size_bytes)

    def health(self, check: str, severity: str | None) -> None:
        """A check of CHECKS fires with this severity, or with None no longer."""
        for known in SEVERITIES:
            self._set("health", float(known == severity), check=check, severity=known)

    def acted(self, action: str) -> None:
        """Health did one of ACTIONS."""
        self._add("health_actions_total", action=action)

    def sink_dropped(self, sink: str, points: int = 1) -> None:
        """A sink (one of SINKS) did not take these points; the run went on without it."""
        self._add("sink_dropped_total", points, sink=sink)

    def _learned(self, report: StepReport) -> None:
        self._set("policy_version", report.policy_version)
        if report.skipped:
            reason = "non_finite" if "finite" in report.skipped else report.skipped
            self._add("skipped_updates_total", reason=reason)
        else:  # what a skipped update measured says nothing about the policy
            for name in ("loss", "grad_norm", "learning_rate", "entropy", "logprob_gap"):
                self._set(name, getattr(report, name))
            self._set("clip_ratio", report.clip_fraction)
            self._set("importance_weight_mean", report.ratio_mean)
            self._set("effective_sample_ratio", report.effective_sample_size)
            self._add("trained_tokens_total", report.tokens)
        self._set("kl", report.kl)
        self._add("guarded_sequences_total", report.guarded_sequences)

    def _rewarded(self, groups: Sequence[Group], min_spread: float) -> None:
        samples: dict[str, list[float]] = {"value": []}
        outcomes = dict.fromkeys(OUTCOMES, 0)
        for group in groups:
            outcomes[_outcome(group, min_spread)] += 1
            for rollout in group.rollouts:
                if rollout.score is not None:
                    samples["value"].append(rollout.score.value)
                    for part, value in rollout.score.parts.items():
                        samples.setdefault(part, []).append(value)
        for part, values in samples.items():
            if values:
                mean = sum(values) / len(values)
                deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
                self._set("reward_mean", mean, split="train", part=part)
                self._set("reward_std", deviation, split="train", part=part)
        for outcome, count in outcomes.items():
            self._add("groups_total", count, outcome=outcome)
            self._set("group_ratio", count / len(groups) if groups else None, outcome=outcome)

    def _worked(self, number: int, statistics: Mapping[str, Any]) -> None:
        """A rollout worker's running totals: tokens, idle time, and those of its scoring pool."""
        for kind in ("prompt", "completion"):
            total = float(statistics.get(f"{kind}_tokens", 0))
            self._advance("tokens_total", total, source=number, kind=kind)
        self._advance(
            "idle_seconds_total",
            float(statistics.get("idle_seconds", 0.0)),
            source=number,
            role="rollout",
        )
        scoring: Mapping[str, Any] = statistics.get("scoring") or {}
        self._advance("scoring_restarts_total", float(scoring.get("restarts", 0)), source=number)
        for reward, calls in scoring.get("calls", {}).items():
            self._judges(reward)
            for status, total in calls.items():
                self._advance(
                    "reward_calls_total", total, source=number, reward=reward, outcome=status
                )
        for reward, total in scoring.get("seconds", {}).items():
            self._advance("reward_seconds_total", total, source=number, reward=reward)

    # ── the endpoint ───────────────────────────────────────────────────────────────────────────

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Serves the metrics and returns their address; port 0 takes a free one. JobError if it is
        busy."""
        try:
            self._server = prometheus_client.start_http_server(
                port, addr=host, registry=self.registry
            )
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise JobError(
                f"the metrics cannot be served at {host}:{port}: {reason}",
                cure="set run.metrics_port to 0 (any free port) or to another one",
            ) from None
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self._server[0].server_port}/metrics"

    def close(self) -> None:
        """Stops serving; the numbers stay."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()

    def text(self) -> str:
        """What a scrape would get."""
        return prometheus_client.generate_latest(self.registry).decode("utf-8")


def _touch(metric: Any, run_id: str, values: Sequence[Sequence[str]]) -> None:
    """Makes every series of the known label values, at 0."""
    combinations: list[tuple[str, ...]] = [(run_id,)]
    for known in values:
        combinations = [(*labels, value) for labels in combinations for value in known]
    for labels in combinations:
        metric.labels(*labels)


def _outcome(group: Group, min_spread: float) -> str:
    """As the learner sees it: a group whose scores spread less than `min_spread` carries no
    gradient."""
    if group.spread > 0 and group.spread >= min_spread:
        return "mixed"
    values = group.values
    return "all_good" if values and sum(values) / len(values) >= 0.5 else "all_bad"
