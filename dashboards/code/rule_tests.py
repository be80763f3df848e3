"""Tests of the alert rules for promtool, made from a table: one healthy run on which every alert is
silent, for each alert the one thing that makes it sick, and near misses that must stay silent.

Series are in promtool's notation, one sample every 30 s, 121 of them: `0+1x120` counts up by 1,
`0x110 1x9` stays at 0 and then at 1. Alerts are looked at after an hour.
"""

import json
import re
from typing import Any

import yaml

Series = dict[str, str]

HEALTHY: Series = {
    'rlpost_update{run_id="r"}': "0+1x120",
    'rlpost_planned_updates{run_id="r"}': "200x120",
    'rlpost_phase{run_id="r", phase="training"}': "1x120",
    'rlpost_phase{run_id="r", phase="paused"}': "0x120",
    'rlpost_last_update_timestamp_seconds{run_id="r"}': "1+30x120",
    'rlpost_update_duration_seconds_bucket{run_id="r", le="30"}': "0+1x120",
    'rlpost_update_duration_seconds_bucket{run_id="r", le="1000"}': "0+1x120",
    'rlpost_update_duration_seconds_bucket{run_id="r", le="+Inf"}': "0+1x120",
    'rlpost_group_ratio{run_id="r", outcome="mixed"}': "0.6x120",
    'rlpost_group_ratio{run_id="r", outcome="all_good"}': "0.2x120",
    'rlpost_group_ratio{run_id="r", outcome="all_bad"}': "0.2x120",
    'rlpost_grad_norm{run_id="r"}': "1+0.001x120",
    'rlpost_kl{run_id="r"}': "0.01+0.0001x120",
    'rlpost_entropy{run_id="r"}': "2-0.005x120",
    'rlpost_eval{run_id="r", metric="score"}': "0.5+0.001x120",
    'rlpost_reward_mean{run_id="r", split="train", part="value"}': "0.3+0.002x120",
    'rlpost_rollout_kl{run_id="r"}': "0.001x120",
    'rlpost_probability_gap{run_id="r"}': "0.002x120",
    'rlpost_effective_sample_ratio{run_id="r"}': "0.9x120",
    'rlpost_proof_slope{run_id="r"}': "1x120",
    'rlpost_proof_power{run_id="r"}': "0.95x120",
    'rlpost_publish_failures_total{run_id="r"}': "0x120",
    'rlpost_skipped_updates_total{run_id="r", reason="non_finite"}': "0x120",
    'rlpost_staleness_updates{run_id="r"}': "1x120",
    'rlpost_staleness_bound_updates{run_id="r"}': "1x120",
    'rlpost_rollouts_total{run_id="r", status="ok"}': "0+100x120",
    'rlpost_truncated_rollouts_total{run_id="r"}': "0+1x120",
    'rlpost_reply_length_tokens_sum{run_id="r"}': "0+10000x120",
    'rlpost_reply_length_tokens_count{run_id="r"}': "0+100x120",
    'rlpost_reward_calls_total{run_id="r", reward="f", outcome="ok"}': "0+100x120",
    'rlpost_reward_calls_total{run_id="r", reward="f", outcome="timeout"}': "0+1x120",
    'rlpost_reward_calls_total{run_id="r", reward="f", outcome="reply_error"}': "0+1x120",
    'rlpost_idle_seconds_total{run_id="r", role="learner"}': "0+6x120",
    'rlpost_idle_seconds_total{run_id="r", role="rollout"}': "0+24x120",
    'rlpost_actors{run_id="r", role="learner"}': "1x120",
    'rlpost_actors{run_id="r", role="rollout"}': "2x120",
    'rlpost_disk_free_bytes{run_id="r"}': "50x120",
    'rlpost_disk_size_bytes{run_id="r"}': "100x120",
    'rlpost_checkpoint_failures_total{run_id="r"}': "0x120",
    'rlpost_actor_restarts_total{run_id="r", role="rollout", reason="died"}': "0x120",
    'rlpost_actor_restarts_total{run_id="r", role="rollout", reason="planned"}': "0+1x120",
    'rlpost_sink_dropped_total{run_id="r", sink="wandb"}': "0x120",
    'rlpost_health{run_id="r", check="idle", severity="warning"}': "0x120",
    'up{job="rlpost", run_id="r", instance="host:1"}': "1x120",
}

STUCK = {'rlpost_last_update_timestamp_seconds{run_id="r"}': "1+30x60 1800x59"}
GOOD, BAD = (f'rlpost_group_ratio{{run_id="r", outcome="all_{word}"}}' for word in ("good", "bad"))
CALLS = 'rlpost_reward_calls_total{run_id="r", reward="f", outcome="%s"}'

SICK: dict[str, tuple[Series, dict[str, str]]] = {  # alert: what differs, labels besides run_id
    "RlpostNonFiniteUpdate": (
        {'rlpost_skipped_updates_total{run_id="r", reason="non_finite"}': "0x115 1x4"},
        {"reason": "non_finite"},
    ),
    "RlpostEntropyCollapse": ({'rlpost_entropy{run_id="r"}': "2x100 0.3x19"}, {}),
    "RlpostKlJump": ({'rlpost_kl{run_id="r"}': "0.01+0.0001x110 0.1x9"}, {}),
    "RlpostKlExplosion": ({'rlpost_kl{run_id="r"}': "0.01+0.0001x116 0.5x3"}, {}),
    "RlpostGradientJump": ({'rlpost_grad_norm{run_id="r"}': "1+0.001x110 5x9"}, {}),
    "RlpostGradientExplosion": ({'rlpost_grad_norm{run_id="r"}': "1+0.001x115 50x4"}, {}),
    "RlpostAllGood": ({GOOD: "0.8x120", BAD: "0.1x120"}, {}),
    "RlpostAllBad": ({GOOD: "0.1x120", BAD: "0.8x120"}, {}),
    "RlpostOverfit": (
        {'rlpost_eval{run_id="r", metric="score"}': "0.6x60 0.5x59"}, {"metric": "score"},
    ),
    "RlpostMismatch": ({'rlpost_rollout_kl{run_id="r"}': "0.02x120"}, {}),
    "RlpostMismatchCritical": ({'rlpost_rollout_kl{run_id="r"}': "0.2x120"}, {}),
    "RlpostProbabilityGap": ({'rlpost_probability_gap{run_id="r"}': "0.02x120"}, {}),
    "RlpostFewEffectiveSamples": ({'rlpost_effective_sample_ratio{run_id="r"}': "0.2x120"}, {}),
    "RlpostStaleEngine": ({'rlpost_proof_slope{run_id="r"}': "0.05x120"}, {}),
    "RlpostProofFailed": ({'rlpost_publish_failures_total{run_id="r"}': "0x110 1x9"}, {}),
    "RlpostStalenessBeyondBound": ({'rlpost_staleness_updates{run_id="r"}': "1x118 2x1"}, {}),
    "RlpostTruncation": ({'rlpost_truncated_rollouts_total{run_id="r"}': "0+30x120"}, {}),
    "RlpostLengthExplosion": (
        {'rlpost_reply_length_tokens_sum{run_id="r"}': "0+10000x100 1010000+100000x19"}, {},
    ),
    "RlpostRewardErrors": ({CALLS % "timeout": "0+10x120"}, {"reward": "f"}),
    "RlpostRewardBroken": ({CALLS % "reply_error": "0+10x120"}, {"reward": "f"}),
    "RlpostIdle": (
        {'rlpost_idle_seconds_total{run_id="r", role="learner"}': "0+20x120"}, {"role": "learner"},
    ),
    "RlpostStalled": (STUCK, {}),
    "RlpostNeverStarted": ({'rlpost_last_update_timestamp_seconds{run_id="r"}': "0x120"}, {}),
    "RlpostDiskLow": ({'rlpost_disk_free_bytes{run_id="r"}': "5x120"}, {}),
    "RlpostDiskFull": ({'rlpost_disk_free_bytes{run_id="r"}': "2x120"}, {}),
    "RlpostCheckpointFailed": ({'rlpost_checkpoint_failures_total{run_id="r"}': "0x110 1x9"}, {}),
    "RlpostRestarts": (
        {'rlpost_actor_restarts_total{run_id="r", role="rollout", reason="died"}': "0x100 0+1x19"},
        {"role": "rollout"},
    ),
    "RlpostSinkDrops": (
        {'rlpost_sink_dropped_total{run_id="r", sink="wandb"}': "0x110 9x9"}, {"sink": "wandb"},
    ),
    "RlpostEndpointDown": (
        {'up{job="rlpost", run_id="r", instance="host:1"}': "1x100 0x19"},
        {"job": "rlpost", "instance": "host:1"},
    ),
    "RlpostHealth": (
        {'rlpost_health{run_id="r", check="idle", severity="warning"}': "0x110 1x9"},
        {"check": "idle", "severity": "warning"},
    ),
}  # fmt: skip

NEAR_MISSES: list[tuple[str, str, Series]] = [
    ("a paused run is not stalled", "RlpostStalled",
     STUCK | {'rlpost_phase{run_id="r", phase="paused"}': "1x120"}),
    ("half an hour is usual where an update takes ten minutes", "RlpostStalled",
     STUCK | {'rlpost_update_duration_seconds_bucket{run_id="r", le="30"}': "0x120"}),
    ("all good is not all bad", "RlpostAllBad", {GOOD: "0.8x120", BAD: "0.1x120"}),
    ("all bad is not all good", "RlpostAllGood", {GOOD: "0.1x120", BAD: "0.8x120"}),
    ("a slope without power decides nothing", "RlpostStaleEngine",
     {'rlpost_proof_slope{run_id="r"}': "0x120", 'rlpost_proof_power{run_id="r"}': "0.3x120"}),
    ("a mismatch of 0.02 is not critical", "RlpostMismatchCritical",
     {'rlpost_rollout_kl{run_id="r"}': "0.02x120"}),
    ("5% free is not full", "RlpostDiskFull", {'rlpost_disk_free_bytes{run_id="r"}': "5x120"}),
    ("a disk that was never measured is not full", "RlpostDiskFull",
     {'rlpost_disk_free_bytes{run_id="r"}': "0x120",
      'rlpost_disk_size_bytes{run_id="r"}': "0x120"}),
    ("a jump of 4 deviations is no explosion", "RlpostKlExplosion",
     {'rlpost_kl{run_id="r"}': "0.01+0.0001x110 0.1x9"}),
    ("a falling held-out score beside a falling reward is not overfitting", "RlpostOverfit",
     {'rlpost_eval{run_id="r", metric="score"}': "0.6x60 0.5x59",
      'rlpost_reward_mean{run_id="r", split="train", part="value"}': "0.6-0.002x120"}),
]  # fmt: skip


def rule_tests(rules: str) -> str:
    """The text of rules_test.yml for the text of rules.yml. KeyError if an alert has no sick
    series."""
    alerts = {
        rule["alert"]: rule
        for group in yaml.safe_load(rules)["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    silent = [_expect(name, []) for name in alerts]
    tests = [_test("a healthy run: every alert is silent", HEALTHY, silent)]
    for name, rule in alerts.items():
        different, labels = SICK[name]
        labels = {"run_id": "r", **labels, **rule.get("labels", {})}
        notes = {key: _fill(text, labels) for key, text in rule["annotations"].items()}
        fires = [{"exp_labels": labels, "exp_annotations": notes}]
        tests.append(_test(f"{name} fires", HEALTHY | different, [_expect(name, fires)]))
    for title, name, different in NEAR_MISSES:
        tests.append(_test(title, HEALTHY | different, [_expect(name, [])]))
    head = (
        "# Made by code/build.py from code/rule_tests.py. Run: promtool test rules rules_test.yml\n"
    )
    body = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    return head + yaml.safe_dump(body, sort_keys=False, width=120, allow_unicode=True)


def _test(title: str, series: Series, expected: list[Any]) -> dict[str, Any]:
    unknown = series.keys() - HEALTHY.keys()
    if unknown:
        raise ValueError(f"{title}: {json.dumps(sorted(unknown))} replace no healthy series")
    return {
        "name": title,
        "interval": "30s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": expected,
    }


def _expect(alert: str, fires: list[Any]) -> dict[str, Any]:
    return {"eval_time": "1h", "alertname": alert, "exp_alerts": fires}


def _fill(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{ \$labels\.(\w+) }}", lambda found: labels[found[1]], text)
