"""Every Prometheus metric of a run, declared once: name, kind, help, labels and known values.

Prefix `rlpost_`, base units, `_total` on counters, and the label `run_id` (never `job`: Prometheus
writes that itself) on every series.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlpost.reward import STATUSES

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
