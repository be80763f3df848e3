import math
import re
import shutil
import socket
import subprocess
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlpost.errors import JobError
from rlpost.metric_table import METRICS, OUTCOMES, PHASES, SEVERITIES
from rlpost.metrics import RunMetrics
from rlpost.reward import STATUSES
from rlpost.types import Group, Rollout, Score, StepReport, Task, Trajectory


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"rlpost_{name}", {"run_id": "run", **labels})


def rollout(score, status="ok", stop="stop", tokens=3, **parts):
    trajectory = Trajectory(
        token_ids=[0] * tokens, loss_mask=[1] * tokens, logprobs=[0.0] * tokens, policy_version=0
    )
    judged = None if score is None else Score(value=score, parts=parts)
    return Rollout(
        task=Task(id="t", messages=[]), reply="", trajectory=trajectory,
        score=judged, status=status, stop_reason=stop,
    )  # fmt: skip


def group(*rollouts):
    return Group(id=0, task=rollouts[0].task, rollouts=rollouts)


def report(**fields):
    plain = {
        "policy_version": 3, "loss": 0.1, "grad_norm": 2.0, "entropy": 0.5, "clip_fraction": 0.25,
        "logprob_gap": 0.01, "kl": math.nan, "tokens": 100, "seconds": 1.0, "learning_rate": 1e-4,
    }  # fmt: skip
    return StepReport(**(plain | fields))


def update(metrics, groups=(), **fields):
    plain = {
        "update": 1, "report": report(), "groups": groups, "staleness": 1, "learner_wait": 0.5,
        "dropped": {}, "workers": [], "min_spread": 0.02,
    }  # fmt: skip
    metrics.updated(**(plain | fields))


@pytest.fixture
def metrics():
    return RunMetrics("run")


def test_names_follow_the_conventions():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        assert "job" not in metric.labels and "run_id" not in metric.labels
        words = set(metric.name.split("_"))
        assert not words & {
            "ms",
            "millis",
            "minutes",
            "hours",
            "kb",
            "mb",
            "percent",
            "count",
            "sum",
            "bucket",
        }
        if metric.kind == "histogram":
            assert metric.name.endswith(("_seconds", "_tokens", "_bytes"))
            assert list(metric.buckets) == sorted(metric.buckets)


def test_every_series_with_known_labels_is_there_at_zero_from_the_start(metrics):
    families = list(text_string_to_metric_families(metrics.text()))
    with_unknown_labels = {
        m.name.removesuffix("_total") for m in METRICS if m.labels.get("reward") == ()
    }
    for family in families:
        name = family.name.removeprefix("rlpost_")
        assert bool(family.samples) == (name not in with_unknown_labels), name
        for sample in family.samples:
            assert sample.labels["run_id"] == "run"
            expected = 1.0 if sample.labels.get("phase") == "starting" else 0.0
            assert sample.value == expected, sample
    assert len(families) == len(METRICS)
    for status in STATUSES:
        assert value(metrics, "rollouts_total", status=status) == 0
    assert "_created" not in metrics.text()


def test_a_run_is_in_one_phase_at_a_time(metrics):
    metrics.phase("proving that the engines follow")
    assert value(metrics, "phase", phase="proving") == 1
    metrics.phase("publish")
    assert sum(value(metrics, "phase", phase=phase) for phase in PHASES) == 1


def test_rollouts_are_counted_by_status_with_length_and_truncation(metrics):
    metrics.collected(group(rollout(1.0), rollout(None, "timeout", "length", tokens=40)))
    assert value(metrics, "rollouts_total", status="ok") == 1
    assert value(metrics, "rollouts_total", status="timeout") == 1
    assert value(metrics, "truncated_rollouts_total") == 1
    assert value(metrics, "reply_length_tokens_sum") == 43
    assert value(metrics, "reply_length_tokens_bucket", le="32.0") == 1


def test_rewards_have_mean_and_deviation_by_part(metrics):
    update(metrics, [group(rollout(0.0, date=1.0), rollout(1.0, date=0.0), rollout(None, "error"))])
    assert value(metrics, "reward_mean", split="train", part="value") == 0.5
    assert value(metrics, "reward_std", split="train", part="value") == 0.5
    assert value(metrics, "reward_mean", split="train", part="date") == 0.5


def test_groups_without_a_gradient_are_told_apart(metrics):
    spreads = ([0, 1], [1, 1], [0, 0], [0.5, 0.51])
    update(metrics, [group(*map(rollout, scores)) for scores in spreads])
    counts = {o: value(metrics, "groups_total", outcome=o) for o in OUTCOMES}
    assert counts == {"mixed": 1, "all_good": 2, "all_bad": 1}
    assert value(metrics, "group_ratio", outcome="all_good") == 0.5


def test_a_skipped_update_is_counted_and_leaves_the_learners_gauges(metrics):
    update(metrics)
    update(metrics, report=report(skipped="loss is not finite", loss=math.nan, grad_norm=9.0))
    assert value(metrics, "skipped_updates_total", reason="non_finite") == 1
    assert value(metrics, "loss") == 0.1
    assert value(metrics, "grad_norm") == 2.0
    assert value(metrics, "trained_tokens_total") == 100


def test_a_kl_that_was_not_measured_keeps_the_last_one(metrics):
    update(metrics, report=report(kl=0.2))
    update(metrics, report=report(kl=math.nan))
    assert value(metrics, "kl") == 0.2


def test_running_totals_of_workers_become_counters_and_survive_a_restart(metrics):
    def worker(total):
        return {
            "prompt_tokens": total,
            "completion_tokens": 2 * total,
            "idle_seconds": 1.0,
            "scoring": {"restarts": 1, "calls": {"f": {"ok": total}}, "seconds": {"f": total / 10}},
        }

    update(metrics, workers=[worker(10), worker(100)], dropped={"late": 2})
    update(metrics, workers=[worker(15), worker(30)], dropped={"late": 3})  # the second began anew
    assert value(metrics, "tokens_total", kind="prompt") == 10 + 100 + 5 + 30
    assert value(metrics, "tokens_total", kind="completion") == 2 * 145
    assert value(metrics, "reward_calls_total", reward="f", outcome="ok") == 145
    assert value(metrics, "reward_seconds_total", reward="f") == pytest.approx(14.5)
    assert value(metrics, "scoring_restarts_total") == 2
    assert value(metrics, "dropped_groups_total", reason="late") == 3
    assert value(metrics, "idle_seconds_total", role="learner") == 1.0
    assert value(metrics, "idle_seconds_total", role="rollout") == 2.0


def test_the_largest_staleness_is_kept(metrics):
    for staleness in (0, 2, 1):
        update(metrics, staleness=staleness)
    assert value(metrics, "staleness_updates") == 1
    assert value(metrics, "staleness_max_updates") == 2


def test_publishes_evaluations_checkpoints_and_restarts_are_seen(metrics):
    metrics.published(seconds=0.2, proof_seconds=0.1, slope=0.98, power=math.nan, bytes=7)
    metrics.proof_failed()
    metrics.evaluated(0.4, {"exact_f1": 0.3}, update=10)
    metrics.saved(2.0)
    metrics.restarted("rollout")
    metrics.buffered(running=5, finished=2)
    assert value(metrics, "publish_duration_seconds_count") == 1
    assert value(metrics, "published_bytes_total") == 7
    assert value(metrics, "publish_failures_total") == 1
    assert (value(metrics, "proof_slope"), value(metrics, "proof_power")) == (0.98, 0.0)
    assert value(metrics, "reward_mean", split="validation", part="value") == 0.4
    assert value(metrics, "eval", metric="exact_f1") == 0.3
    assert value(metrics, "eval_update") == 10
    assert value(metrics, "checkpoints_total") == 1
    assert value(metrics, "actor_restarts_total", role="rollout", reason="died") == 1
    assert (value(metrics, "groups_in_flight"), value(metrics, "buffer_groups")) == (5, 2)


def test_a_reward_has_every_outcome_at_zero_before_its_first_judgement(metrics):
    metrics.configured(updates=10, staleness=1, rewards=["f"])
    for status in STATUSES:
        assert value(metrics, "reward_calls_total", reward="f", outcome=status) == 0
    assert value(metrics, "reward_seconds_total", reward="f") == 0
    assert value(metrics, "planned_updates") == 10
    assert value(metrics, "staleness_bound_updates") == 1


def test_health_shows_one_severity_of_a_check_at_a_time(metrics):
    metrics.health("idle", "warning")
    metrics.health("idle", "critical")
    shown = {s: value(metrics, "health", check="idle", severity=s) for s in SEVERITIES}
    assert shown == {"warning": 0, "critical": 1}
    metrics.health("idle", None)
    assert value(metrics, "health", check="idle", severity="critical") == 0


def test_a_prompt_is_what_comes_before_the_first_sampled_token(metrics):
    trajectory = Trajectory(
        token_ids=[0] * 40, loss_mask=[0] * 20 + [1] * 5 + [0] * 10 + [1] * 5, logprobs=[0.0] * 40,
        policy_version=0,
    )  # fmt: skip
    metrics.collected(
        group(Rollout(task=Task(id="t", messages=[]), reply="", trajectory=trajectory))
    )
    assert value(metrics, "prompt_length_tokens_sum") == 20
    assert value(metrics, "reply_length_tokens_sum") == 10


def test_a_scrape_of_the_served_address_gets_the_metrics(metrics):
    address = metrics.serve()
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*/metrics", address)
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert 'rlpost_update{run_id="run"} 0.0' in answer.read().decode()
    metrics.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=1)


@pytest.mark.parametrize("port", ["busy", 70000])
def test_a_port_that_cannot_be_had_is_the_users_mistake_with_a_cure(metrics, port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1] if port == "busy" else port
        with pytest.raises(JobError, match=rf"{number}: .*; set run.metrics_port to 0"):
            metrics.serve(port=number)


def test_two_runs_share_a_registry_of_their_own_only():
    one, two = RunMetrics("run"), RunMetrics("run")
    one.saved(1.0)
    assert value(two, "checkpoints_total") == 0


def test_promtool_finds_nothing_to_mend(metrics):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    update(metrics, [group(rollout(0.0), rollout(1.0))])
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.text(), capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
