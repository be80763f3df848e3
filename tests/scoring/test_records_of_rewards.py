"""Every part and every reward's status reaches metrics, samples and report."""

import json

import pytest

from rlpost.metrics import RunMetrics
from rlpost.report import write_report
from rlpost.reward import RewardSpec, recorded
from rlpost.run_directory import RunDirectory
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Group, StepReport, Task

REWARDS = """
from rlpost.types import Score

def form(task, rollout):
    return Score(value=0.5, parts={"parses": 1.0, "exact.total": 0.25}, reason="half")

def moody(task, rollout):
    if rollout.reply == "hard":
        raise ValueError("no such reply")
    if rollout.reply == "offline":
        raise ConnectionError("nobody is there")
    return 1.0
"""
REPORT = StepReport(
    policy_version=1, loss=0.0, grad_norm=0.0, entropy=0.0, clip_fraction=0.0, logprob_gap=0.0,
    kl=0.0, tokens=1, seconds=1.0,
)  # fmt: skip


@pytest.fixture
async def judged(tmp_path):
    """(rollouts of the replies "fine", "hard" and "offline", the pool's statistics)."""
    (tmp_path / "two.py").write_text(REWARDS)
    specs = [
        RewardSpec(use=f"two:{name}", name=name, base_dir=str(tmp_path))
        for name in ("form", "moody")
    ]
    task = Task(id="7", messages=[{"role": "user", "content": "say"}], answer="fine")
    replies = [recorded(task, reply) for reply in ("fine", "hard", "offline")]
    async with ScoringPool(specs) as pool:
        return await pool.score(replies), pool.statistics()


async def test_a_sample_tells_how_each_rewards_judgement_ended(judged, tmp_path):
    rollouts, _ = judged
    run = RunDirectory(tmp_path / "run")
    run.append_rollouts(1, [Group(id=0, task=rollouts[0].task, rollouts=rollouts)])
    [line] = (tmp_path / "run" / "rollouts" / "update-00001.jsonl").read_text().splitlines()
    fine, hard, offline = json.loads(line)["replies"]
    assert fine["statuses"] == {"form": "ok", "moody": "ok"}
    assert fine["parts"] == {
        "form": 0.5, "form.parses": 1.0, "form.exact.total": 0.25, "moody": 1.0,
    }  # fmt: skip
    assert (hard["status"], hard["value"]) == ("reply_error", 0.0)
    assert hard["statuses"] == {"form": "ok", "moody": "error"}
    assert hard["parts"]["form.parses"] == 1.0
    assert (offline["status"], offline["value"]) == ("error", None)
    assert offline["statuses"] == {"form": "ok", "moody": "error"}


async def test_the_metrics_have_every_part_and_every_call_by_outcome(judged):
    rollouts, statistics = judged
    metrics = RunMetrics("r")
    group = Group(id=0, task=rollouts[0].task, rollouts=rollouts)
    metrics.collected(group)
    metrics.updated(
        update=1, report=REPORT, groups=[group], staleness=0, learner_wait=0.0, dropped={},
        workers=[{"scoring": statistics}], min_spread=0.0,
    )  # fmt: skip
    metrics.evaluated(0.6, {"exact_f1": 0.5}, parts={"form": 0.5, "form.parses": 1.0})

    def value(name, **labels):
        return metrics.registry.get_sample_value(f"rlpost_{name}", {"run_id": "r", **labels})

    assert value("reward_mean", split="train", part="form.exact.total") == 0.25
    assert value("reward_mean", split="validation", part="form.parses") == 1.0
    assert value("reward_calls_total", reward="form", outcome="ok") == 3.0
    assert value("reward_calls_total", reward="moody", outcome="ok") == 1.0
    assert value("reward_calls_total", reward="moody", outcome="error") == 4.0  # each tried twice
    assert value("rollouts_total", status="reply_error") == 1.0
    assert value("rollouts_total", status="error") == 1.0


async def test_the_report_shows_every_part_and_every_judgement(judged, tmp_path):
    rollouts, _ = judged
    run = RunDirectory(tmp_path / "run")
    parts = {"form": 0.5, "form.parses": 1.0, "form.exact.total": 0.25, "moody": 1.0}
    for update, score in ((0, 0.2), (1, 0.4)):
        summary = {"score": score, "metrics": {}, "parts": parts, "rows": 3}
        run.append_metrics(update, reward=score)
        run.append_evaluation(update, summary, rollouts)
    text = write_report(run.path).read_text()
    assert "| moody | error | 2 | 2 |" in text
    assert "| moody | ok | 1 | 1 |" in text
    assert "| form.parses | 1.000 | 1.000 |" in text
    assert "| form: total | 0.250 → 0.250 |" in text
