"""The metrics of a run and their endpoint.

Each series whose labels are known beforehand is there at 0 from the start, so that a rate over it
is right from its first event. The controller alone exports a run: workers hand their counts over.
`metric_table.py` declares them.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rlpost.errors import JobError
from rlpost.metric_table import METRICS, OUTCOMES, PHASES, SEVERITIES, Metric
from rlpost.reward import STATUSES
from rlpost.types import Group, StepReport

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
