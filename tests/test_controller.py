"""The loop over fake workers: order, staleness, proof, pauses and resume."""

import asyncio
import hashlib
import json
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
from fakes import FakeLearner, FakeRollout, group, task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlpost import controller as controller_module
from rlpost.config import parse_job
from rlpost.controller import Controller
from rlpost.errors import Interrupted, NonFiniteError, ProofError, RunError, ScoringError
from rlpost.metrics import RunMetrics
from rlpost.preparation import Prepared
from rlpost.run_directory import RunDirectory, read_events, read_metrics, read_rollouts

JOB = """
[run]
name = "t"
gpus = "cpu"
updates = 6
checkpoint_every = 2
keep_samples = 99
[model]
path = "model"
[[reward]]
use = "extraction"
[environment]
use = "receipts"
[rollout]
tasks_per_update = 2
group_size = 2
[eval]
every = 100
"""
PROBES = [[1, 2, 3, 4, 5, 6, 7, 8]] * 4


class Killed(Exception):
    """What a SIGKILL is to the loop: nothing is written any more."""


def build(folder, *sets, workers=None, learner=None, tasks=6, validation=1):
    """(controller, workers, learner) of a small job with `--set`-like changes."""
    job = parse_job(JOB, path=folder / "job.toml", overrides=sets)
    prepared = Prepared(
        job=job, env=None, train=[task(f"t{i}") for i in range(tasks)],
        validation=[task(f"v{i}") for i in range(validation)],
        max_reply_tokens=8, longest_prompt=4, probes=PROBES,
    )  # fmt: skip
    workers = workers or [FakeRollout()]
    learner = learner or FakeLearner()
    made = Controller(
        prepared, workers=workers, learner=learner, run=RunDirectory(folder / "run"),
        metrics=RunMetrics("t"),
    )  # fmt: skip
    return made, workers, learner


def two_workers(**fields):
    workers = [FakeRollout(seed=i, **fields) for i in range(2)]
    for index, worker in enumerate(workers):
        worker.name = f"rollout-{index}"
    return workers


def reliable(order, index):
    """A score that depends on what was asked alone, never on when; some groups are useless."""
    words = f"{order.task.id}:{order.group_id}:{order.version}"
    kind = hashlib.sha256(words.encode()).digest()[0]
    return 1.0 if kind < 64 else 0.0 if kind < 96 else float(index % 2)


def trained(folder):
    """(update, group, task, version) of every group in a run's samples, in order."""
    return [
        (g["update"], g["group"], g["task"], g["replies"][0]["policy_version"])
        for g in read_rollouts(folder / "run")
    ]


def kinds(folder):
    return Counter(event["kind"] for event in read_events(folder / "run"))


def checkpoint_names(folder):
    return sorted(p.name for p in (folder / "run" / "checkpoints").glob("update-?????"))


# ── versions and staleness ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_in_lockstep_update_u_uses_version_max_0_u_minus_s(tmp_path, staleness):
    made, *_ = build(
        tmp_path, f"rollout.staleness={staleness}", "run.lockstep=true", workers=two_workers()
    )
    await made.run()
    assert [version for *_, version in trained(tmp_path)] == [
        max(0, update - staleness) for update in range(6) for _ in range(2)
    ]
    assert [g for _, g, *_ in trained(tmp_path)] == list(range(12))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("staleness", [0, 1])
async def test_staleness_never_exceeds_s_with_two_workers_of_random_speed(
    tmp_path, staleness, method
):
    workers = two_workers(slowest=0.02)
    made, *_ = build(
        tmp_path, f"rollout.staleness={staleness}", "run.updates=15",
        f"learner.method={method}", workers=workers,
    )  # fmt: skip
    await made.run()
    seen = [line["staleness"] for line in read_metrics(tmp_path / "run") if line["update"]]
    assert len(seen) == 15
    assert max(seen) <= staleness
    assert all(worker.sampled for worker in workers)  # both were used
    for update, *_, version in trained(tmp_path):
        assert update - 1 - staleness <= version <= update - 1


async def test_no_group_is_admitted_before_its_version_is_proven(tmp_path):
    """While a publish is under way nothing new starts; every order names a version that holds."""
    proven, early = [], []

    class Watched(FakeRollout):
        async def score(self, sequences, *, version=None):
            await asyncio.sleep(0.005)
            values = await super().score(sequences, version=version)
            proven.append(version)
            return values

        async def run(self, order):
            if order.version not in proven and order.version != 0:
                early.append(order.version)
            return await super().run(order)

    made, *_ = build(tmp_path, "rollout.staleness=0", workers=[Watched()])
    await made.run()
    assert early == []
    assert proven == [-2, 1, 2, 3, 4, 5, 6]  # the canary, then each version (0 has no step before)


async def test_full_weights_are_asked_for_without_a_version(tmp_path):
    versions = set()

    class Watched(FakeRollout):
        async def run(self, order):
            versions.add(order.version)
            return await super().run(order)

    made, *_ = build(tmp_path, "learner.method=full", workers=[Watched()])
    await made.run()
    assert versions == {None}


# ── proof ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lockstep", ["true", "false"])
async def test_a_publish_that_lies_is_retried_and_ends_before_one_more_rollout(tmp_path, lockstep):
    worker = FakeRollout()

    class Liar(FakeLearner):
        sampled_before = None

        async def publication(self):
            if self.version == 2:
                worker.lies, self.sampled_before = True, len(worker.sampled)
            return await super().publication()

    learner = Liar()
    made, *_ = build(
        tmp_path, "rollout.staleness=0", "health.proof_limit=4", f"run.lockstep={lockstep}",
        workers=[worker], learner=learner,
    )  # fmt: skip
    with pytest.raises(ProofError, match=r"version 2 was published 4 times.*serve version 1"):
        await made.run()
    assert len(worker.sampled) == learner.sampled_before
    failures = [e for e in read_events(tmp_path / "run") if e["kind"] == "proof_failed"]
    assert [e["attempt"] for e in failures] == [1, 2, 3, 4]
    assert {e["version"] for e in failures} == {2}
    assert "different: w" in str(failures[0]["failures"])


async def test_a_publish_that_holds_at_the_second_try_goes_on(tmp_path):
    class Forgetful(FakeRollout):
        missed = False

        async def publish(self, header, payload):
            if header.version == 2 and not self.missed:
                self.missed = True
                return 0.0
            return await super().publish(header, payload)

    made, *_ = build(tmp_path, workers=[Forgetful()])
    progress = await made.run()
    assert progress.update == 6
    assert kinds(tmp_path)["proof_failed"] == 1


async def test_one_liar_among_two_workers_is_named(tmp_path):
    workers = two_workers()
    workers[1].lies = True
    made, *_ = build(tmp_path, workers=workers)
    with pytest.raises(ProofError, match="rollout-1") as caught:
        await made.run()
    assert "rollout-0:" not in str(caught.value)


async def test_a_canary_that_is_not_followed_ends_with_nothing_sampled_or_trained(tmp_path):
    class Deaf(FakeRollout):
        async def publish(self, header, payload):
            self.served.append(0)  # whatever it is sent
            return 0.0

    made, (worker,), learner = build(tmp_path, workers=[Deaf()])
    with pytest.raises(ProofError, match="rollout-0 does not follow the learner"):
        await made.run()
    assert worker.sampled == []
    assert learner.calls == 0
    canary = next(e for e in read_events(tmp_path / "run") if e["kind"] == "canary")
    assert canary["holds"] is False


# ── updates that move nothing ──────────────────────────────────────────────────────────────────


async def test_an_all_good_cohort_is_counted_and_moves_no_version(tmp_path):
    worker = FakeRollout()
    worker.value = lambda order, index: 1.0 if order.group_id < 4 else float(index % 2)
    made, _, learner = build(tmp_path, "rollout.staleness=0", "run.updates=3", workers=[worker])
    await made.run()
    lines = [line for line in read_metrics(tmp_path / "run") if line["update"]]
    assert [line["version"] for line in lines] == [0, 0, 1]
    assert [line["groups"]["all_good"] for line in lines] == [2, 2, 0]
    assert [line["skipped"] for line in lines] == ["no_signal", "no_signal", ""]
    assert [line["staleness"] for line in lines] == [0, 0, 0]
    assert learner.calls == 1
    assert worker.served == [-2, 0, 1]  # nothing was published for them


async def test_skipped_updates_do_not_move_the_version(tmp_path):
    learner = FakeLearner()
    learner.skips = {1: "the loss is not finite", 3: "the gradient is not finite"}
    made, (worker,), _ = build(tmp_path, "rollout.staleness=0", learner=learner)
    await made.run()
    lines = [line for line in read_metrics(tmp_path / "run") if line["update"]]
    assert [line["version"] for line in lines] == [1, 1, 2, 2, 3, 4]
    assert [line["staleness"] for line in lines] == [0] * 6
    assert worker.served == [-2, 0, 1, 2, 3, 4]


async def test_non_finite_updates_in_a_row_pause_with_a_checkpoint(tmp_path):
    learner = FakeLearner()
    learner.skips = {2: "the loss is not finite", 3: "the loss is not finite"}
    made, *_ = build(
        tmp_path, "health.non_finite_limit=2", "run.checkpoint_every=50", learner=learner
    )
    with pytest.raises(NonFiniteError, match="2 updates in a row"):
        await made.run()
    assert checkpoint_names(tmp_path)[-1] == "update-00004"
    paused = next(e for e in read_events(tmp_path / "run") if e["kind"] == "paused")
    assert paused["error"] == "NonFiniteError"
    assert "learning_rate" in paused["reason"]


# ── evaluation ─────────────────────────────────────────────────────────────────────────────────


def marked_by_version(worker, marks):
    """Greedy replies score marks[version]; sampled ones are mixed."""
    worker.value = lambda order, index: (
        marks[order.version] if order.temperature == 0 else float(index % 2)
    )


async def test_the_run_stops_early_and_keeps_the_best(tmp_path):
    worker = FakeRollout()
    marked_by_version(worker, [0.1, 0.4, 0.8, 0.5, 0.6, 0.7, 0.9])
    made, *_ = build(tmp_path, "eval.every=1", "eval.patience=2", workers=[worker])
    progress = await made.run()
    assert progress.update == 4
    assert progress.best == (2, 0.8)
    assert progress.evals == [(0, 0.1), (1, 0.4), (2, 0.8), (3, 0.5), (4, 0.6)]
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert best == {"update": 2}
    assert "update-00002" in checkpoint_names(tmp_path)
    assert kinds(tmp_path)["early_stop"] == 1


async def test_where_training_never_helps_the_start_policy_is_kept_as_the_best(tmp_path):
    worker = FakeRollout()
    marked_by_version(worker, [0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    made, *_ = build(tmp_path, "eval.every=1", "eval.patience=2", workers=[worker])
    progress = await made.run()
    assert progress.best == (0, 0.9)
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text()) == {"update": 0}
    assert "update-00000" in checkpoint_names(tmp_path)


async def test_an_evaluation_without_any_score_is_never_the_best(tmp_path):
    worker = FakeRollout()
    marked_by_version(worker, [None, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2])
    made, *_ = build(tmp_path, "eval.every=1", "eval.patience=0", workers=[worker])
    assert (await made.run()).best == (2, 0.2)


async def test_a_metric_that_no_reward_gives_is_named_with_those_there_are(tmp_path):
    made, *_ = build(tmp_path, "eval.metric=exact_f2")
    with pytest.raises(RunError, match=r"exact_f2.*score, reward"):
        await made.run()


# ── pauses ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_judge_that_fails_too_often_pauses_and_is_named(tmp_path):
    class Judged(FakeRollout):
        async def run(self, order):
            whole = await super().run(order)
            if order.temperature == 0 or order.group_id % 4:
                return whole
            error = {"error": "reward style: timeout"}
            broken = replace(whole.rollouts[0], score=None, status="timeout", info=error)
            return replace(whole, rollouts=(broken, *whole.rollouts[1:]))

    made, *_ = build(tmp_path, "run.updates=40", "rollout.group_size=4", workers=[Judged()])
    with pytest.raises(ScoringError, match=r"got no score \(limit 5%\).*reward style: timeout"):
        await made.run()
    assert kinds(tmp_path)["paused"] == 1
    assert checkpoint_names(tmp_path)  # what was done is kept


async def test_a_pause_while_the_learner_works_trains_no_task_twice(tmp_path):
    """The judge fails while an update is under way: learner and buffer are saved in agreement."""

    class Slow(FakeLearner):
        async def update(self, batches, *, measure_kl=False):
            report = await super().update(batches, measure_kl=measure_kl)
            await asyncio.sleep(0.03)  # the weights have moved, the report is on its way
            return report

    class Breaking(FakeRollout):
        breaks_at = 9

        async def run(self, order):
            if order.temperature > 0 and order.group_id == self.breaks_at:
                await asyncio.sleep(0.01)
                raise ScoringError("the judge is gone")
            return await super().run(order)

    made, *_ = build(tmp_path, workers=[Breaking()], learner=Slow())
    with pytest.raises(ScoringError):
        await made.run()
    again, *_ = build(tmp_path, workers=[FakeRollout()], learner=Slow())
    progress = await again.run(resume=True)
    assert progress.version == progress.update == 6
    assert Counter(t for _, _, t, _ in trained(tmp_path)) == {f"t{i}": 2 for i in range(6)}


async def test_a_run_paused_by_a_failed_proof_resumes_without_training_a_task_twice(tmp_path):
    class LiesOnce(FakeRollout):
        async def publish(self, header, payload):
            if header.version != 3:
                self.served.append(header.version)
            return 0.0

    made, *_ = build(tmp_path, workers=[LiesOnce()])
    with pytest.raises(ProofError):
        await made.run()
    again, *_ = build(tmp_path)
    progress = await again.run(resume=True)
    assert progress.version == progress.update == 6
    assert Counter(t for _, _, t, _ in trained(tmp_path)) == {f"t{i}": 2 for i in range(6)}
    assert [line["update"] for line in read_metrics(tmp_path / "run")] == list(range(7))


async def test_a_broken_worker_pauses_the_run_with_its_own_words(tmp_path):
    class Broken(FakeRollout):
        async def run(self, order):
            if order.group_id == 5:
                raise RunError("rollout-0 died: out of memory")
            return await super().run(order)

    made, *_ = build(tmp_path, workers=[Broken()])
    with pytest.raises(RunError, match="out of memory"):
        await asyncio.wait_for(made.run(), 5)
    paused = next(e for e in read_events(tmp_path / "run") if e["kind"] == "paused")
    assert "out of memory" in paused["reason"]


async def test_a_warning_lets_the_run_go_on_and_is_written_once_a_window(tmp_path):
    worker = FakeRollout()
    worker.value = lambda order, index: None if index == 0 else float(index % 2)
    made, *_ = build(
        tmp_path, "health.on_critical=warn", "rollout.group_size=8", "run.updates=8",
        workers=[worker],
    )  # fmt: skip
    progress = await made.run()
    assert progress.update == 8
    events = [e for e in read_events(tmp_path / "run") if e["kind"] == "critical"]
    assert len(events) == 2  # 128 rollouts, 64 a window
    assert events[0]["error"] == "ScoringError"


# ── stop and resume ────────────────────────────────────────────────────────────────────────────


async def stopped_after(made, update):
    """Runs until that many updates are done, then asks to stop."""
    running = asyncio.create_task(made.run())
    while made.progress.update < update and not running.done():
        await asyncio.sleep(0.001)
    await made.stop()
    return await asyncio.wait_for(running, 5)


async def test_stop_ends_with_a_checkpoint_and_interrupted(tmp_path):
    made, *_ = build(tmp_path, "run.updates=500", "run.checkpoint_every=1000")
    with pytest.raises(Interrupted, match="stopped after update"):
        await stopped_after(made, 3)
    done = made.progress.update
    assert 3 <= done < 500
    assert checkpoint_names(tmp_path)[-1] == f"update-{done:05d}"
    assert made.progress.phase == "stopped"
    assert kinds(tmp_path)["stopping"] == 1
    assert "finished" not in kinds(tmp_path)


async def test_stop_before_the_first_update_is_a_clean_end_too(tmp_path):
    made, *_ = build(tmp_path)
    with pytest.raises(Interrupted):
        await stopped_after(made, 0)
    assert checkpoint_names(tmp_path)[0] == "update-00000"


async def test_a_stopped_run_goes_on_with_the_next_update_and_loses_no_task(tmp_path):
    made, *_ = build(tmp_path, workers=two_workers(slowest=0.01))
    with pytest.raises(Interrupted):
        await stopped_after(made, 3)
    again, *_ = build(tmp_path, workers=two_workers())
    progress = await again.run(resume=True)
    assert progress.update == progress.version == 6
    lines = read_metrics(tmp_path / "run")
    assert [line["update"] for line in lines] == list(range(7))
    assert Counter(t for _, _, t, _ in trained(tmp_path)) == {f"t{i}": 2 for i in range(6)}
    assert kinds(tmp_path)["resumed"] == 1


@pytest.mark.parametrize("kill", range(1, 6))
async def test_a_run_killed_after_any_update_trains_every_task_equally_often(tmp_path, kill):
    made, *_ = build(tmp_path, workers=two_workers(), learner=dying(kill))
    with pytest.raises(Killed):
        await made.run()
    again, _, learner = build(tmp_path, workers=two_workers())
    await again.run(resume=True)
    assert Counter(t for _, _, t, _ in trained(tmp_path)) == {f"t{i}": 2 for i in range(6)}
    assert learner.version == 6
    everything = read_metrics(tmp_path / "run", superseded=True)
    surviving = [line["update"] for line in read_metrics(tmp_path / "run")]
    assert surviving == list(range(7))
    assert len(everything) - len(surviving) == kill % 2  # updates past the checkpoint


def dying(calls):
    class Dying(FakeLearner):
        async def update(self, batches, *, measure_kl=False):
            if self.calls == calls:
                raise Killed
            return await super().update(batches, measure_kl=measure_kl)

    return Dying()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    S=st.integers(0, 2), kill=st.integers(1, 5), every=st.integers(1, 3), refill=st.booleans(),
    seed=st.integers(0, 99), clean=st.booleans(),
)  # fmt: skip
def test_in_lockstep_a_run_that_ended_anywhere_resumes_to_the_unbroken_sequence(
    tmp_path_factory, S, kill, every, refill, seed, clean
):
    """Killed at an update, or stopped by Ctrl-C at a random moment: (update, group, task, version)
    are those of a run that was left alone."""
    sets = (
        f"rollout.staleness={S}", "run.lockstep=true", f"run.checkpoint_every={every}",
        f"rollout.refill={str(refill).lower()}",
    )  # fmt: skip

    def workers():
        made = two_workers(slowest=0.004)
        for worker in made:
            worker.value = reliable
        return made

    class Slow(FakeLearner):
        async def update(self, batches, *, measure_kl=False):
            await asyncio.sleep(0.002)
            return await super().update(batches, measure_kl=measure_kl)

    async def story():
        whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
        made, *_ = build(whole, *sets, workers=workers(), tasks=50)
        await made.run()
        if clean:
            made, *_ = build(broken, *sets, workers=workers(), learner=Slow(), tasks=50)
            running = asyncio.create_task(made.run())
            await asyncio.sleep(0.001 * seed)
            await made.stop()
            with suppress(Interrupted):  # a late stop finds the run at its end
                await asyncio.wait_for(running, 10)
        else:
            made, *_ = build(broken, *sets, workers=workers(), learner=dying(kill), tasks=50)
            try:
                await made.run()
            except Killed:
                pass
            else:
                return  # fewer updates than that had a gradient
        again, *_ = build(broken, *sets, workers=workers(), tasks=50)
        await again.run(resume=True)
        assert trained(broken) == trained(whole)

    asyncio.run(story())


async def test_in_lockstep_a_stop_within_an_update_waits_for_the_groups_of_its_version(tmp_path):
    """Asked to stop while the learner works and the next cohort is half sampled: sampled again
    after the publish, that cohort would be of the wrong version."""
    sets = ("run.lockstep=true", "rollout.staleness=1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    made, *_ = build(whole, *sets)
    await made.run()

    class SlowSecond(FakeRollout):
        async def run(self, order):
            await asyncio.sleep(0.05 if order.group_id in (2, 3) else 0)
            return await super().run(order)

    class Stopping(FakeLearner):
        async def update(self, batches, *, measure_kl=False):
            if self.calls == 0:
                await made.stop()
            return await super().update(batches, measure_kl=measure_kl)

    made, *_ = build(broken, *sets, workers=[SlowSecond()], learner=Stopping())
    with pytest.raises(Interrupted, match="after update 1;"):
        await asyncio.wait_for(made.run(), 5)
    again, *_ = build(broken, *sets)
    await again.run(resume=True)
    assert trained(broken) == trained(whole)


async def test_in_lockstep_a_pause_within_an_update_resumes_exactly(tmp_path):
    sets = ("run.lockstep=true", "rollout.staleness=1", "run.checkpoint_every=1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    made, *_ = build(whole, *sets)
    await made.run()

    class Breaking(FakeRollout):
        async def run(self, order):
            if order.group_id in (6, 7):
                await asyncio.sleep(0.02)
                raise ScoringError("the reward timed out twice")
            return await super().run(order)

    class Slow(FakeLearner):
        async def update(self, batches, *, measure_kl=False):
            report = await super().update(batches, measure_kl=measure_kl)
            await asyncio.sleep(0.05)
            return report

    made, *_ = build(broken, *sets, workers=[Breaking()], learner=Slow())
    with pytest.raises(ScoringError):
        await asyncio.wait_for(made.run(), 5)
    again, *_ = build(broken, *sets)
    await again.run(resume=True)
    assert trained(broken) == trained(whole)


async def test_a_finished_run_resumed_trains_nothing_more(tmp_path):
    made, *_ = build(tmp_path)
    await made.run()
    again, (worker,), learner = build(tmp_path)
    progress = await again.run(resume=True)
    assert (progress.update, learner.calls, worker.sampled) == (6, 0, [])


async def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path):
    made, *_ = build(tmp_path)
    await made.run()
    (tmp_path / "run/checkpoints/update-00006/controller.json").write_text("{}")
    again, _, learner = build(tmp_path)
    await again.run(resume=True)
    assert learner.calls == 2  # from update 4
    passed = next(e for e in read_events(tmp_path / "run") if e["kind"] == "checkpoint_passed_over")
    assert passed["checkpoint"] == "update-00006"


# ── refill and stragglers ──────────────────────────────────────────────────────────────────────


async def test_refill_gives_every_update_p_useful_groups(tmp_path):
    worker = FakeRollout()
    worker.value = lambda order, index: 1.0 if order.group_id % 2 else float(index % 2)
    made, *_ = build(tmp_path, "rollout.refill=true", "run.updates=3", workers=[worker], tasks=40)
    await made.run()
    lines = [line for line in read_metrics(tmp_path / "run") if line["update"]]
    assert [line["groups"]["useful"] for line in lines] == [2, 2, 2]
    assert lines[-1]["dropped"]["all_good"] >= 4


async def test_a_straggler_is_dropped_at_its_deadline_and_its_task_comes_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(controller_module, "TICK", 0.01)

    class Stuck(FakeRollout):
        async def run(self, order):
            if order.group_id == 1:
                await asyncio.sleep(60)
            return await super().run(order)

    made, (worker,), _ = build(tmp_path, "rollout.drop_after=0.05", workers=[Stuck()])
    await asyncio.wait_for(made.run(), 10)
    event = next(e for e in read_events(tmp_path / "run") if e["kind"] == "dropped")
    assert (event["group"], event["reason"]) == (1, "late")
    assert event["task"] in {name for _, name, _ in worker.sampled}
    assert list(read_metrics(tmp_path / "run"))[-1]["dropped"] == {"late": 1}


async def test_work_goes_to_the_least_busy_worker(tmp_path):
    class Uneven(FakeRollout):
        async def run(self, order):
            if order.group_id == 2:
                await asyncio.sleep(0.2)
            return await super().run(order)

    first, second = Uneven(), Uneven()
    second.name = "rollout-1"
    made, *_ = build(tmp_path, "run.updates=3", workers=[first, second])
    await made.run()
    assert {g for g, *_ in second.sampled if g < 4} == {1, 3}
    assert 4 in [g for g, *_ in second.sampled]  # the first still had group 2


# ── what is written ────────────────────────────────────────────────────────────────────────────


async def test_metrics_and_events_tell_the_run(tmp_path):
    made, *_ = build(tmp_path, "eval.every=3")
    await made.run()
    lines = read_metrics(tmp_path / "run")
    assert [line["update"] for line in lines] == list(range(7))
    assert [line["update"] for line in lines if "eval" in line] == [0, 3, 6]
    assert lines[3]["eval"]["score"] == 0.0
    for line in lines[1:]:
        assert line["reward"] == 0.5
        assert set(line) >= {
            "reward_std", "parts", "groups", "staleness", "version", "truncated", "loss",
            "grad_norm", "entropy", "kl", "logprob_gap", "tokens", "proof_slope", "proof_power",
            "skipped", "seconds",
        }  # fmt: skip
        assert set(line["seconds"]) == {"update", "wait", "learn", "publish", "proof"}
    assert lines[2]["proof_slope"] == pytest.approx(1.0)
    seen = kinds(tmp_path)
    assert seen == {
        "started": 1, "canary": 1, "evaluated": 3, "checkpoint": 4, "finished": 1,
    }  # fmt: skip
    assert made.progress.phase == "done"


async def test_the_prometheus_text_follows_the_run(tmp_path):
    made, *_ = build(tmp_path)
    await made.run()
    text = made._metrics.text()
    assert 'rlpost_update{run_id="t"} 6.0' in text
    assert 'rlpost_policy_version{run_id="t"} 6.0' in text


async def test_workers_are_stopped_however_the_run_ends(tmp_path):
    stopped = []

    class Counting(FakeRollout):
        async def stop(self):
            stopped.append(self.name)
            raise OSError("already gone")  # must not hide the run's own end

    for learner in (FakeLearner(), dying(2)):
        folder = tmp_path / str(len(stopped))
        made, *_ = build(folder, workers=[Counting()], learner=learner)
        with suppress(Killed):
            await made.run()
        assert kinds(folder)["stop_failed"] == 1
    assert len(stopped) == 2


async def test_a_group_without_a_trajectory_is_dropped_and_its_task_comes_again(tmp_path):
    """An environment that failed at its start leaves nothing to train."""

    class Failing(FakeRollout):
        async def run(self, order):
            if order.group_id == 0:
                bare = group(0, [None, None], of=order.task)
                return replace(
                    bare, rollouts=tuple(replace(r, trajectory=None) for r in bare.rollouts)
                )
            return await super().run(order)

    made, *_ = build(tmp_path, workers=[Failing()])
    await made.run()
    assert read_metrics(tmp_path / "run")[-1]["dropped"] == {"unscored": 1}
    assert 0 not in [g for _, g, *_ in trained(tmp_path)]
