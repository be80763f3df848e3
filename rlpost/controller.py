"""The run: four loops over clients, no Ray.

feed      takes the next task when a slot opens and gives it to the least busy rollout worker
collect   puts each judged group into the buffer, or drops it and requeues its task
train     turns the oldest cohort into a policy version
publish   brings the version to every engine and opens the slots once each has proven it

The controller alone writes the run directory and exports the metrics.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost import checkpoints
from rlpost.buffer import Buffer, TaskQueue, Ticket
from rlpost.clients import Announcement, LearnerClient, RolloutClient
from rlpost.errors import Interrupted, ProofError, RunError
from rlpost.evaluation import Evaluation, Metrics, evaluate
from rlpost.grpo.advantage import advantages, usefulness
from rlpost.grpo.packing import pack
from rlpost.health import Health
from rlpost.metrics import RunMetrics
from rlpost.policy.proof import Proof, ProofReport
from rlpost.preparation import Prepared
from rlpost.rollout_worker import GroupOrder
from rlpost.run_directory import RunDirectory
from rlpost.types import Group, StepReport

TICK = 1.0  # seconds between looks at stragglers and statistics


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


class Controller:
    """Runs one job to its end. `run()` returns the final Progress, raises RunError when the run
    failed or was paused, and Interrupted after `stop()`; whatever happened, a checkpoint holds what
    was done."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        workers: Sequence[RolloutClient],
        learner: LearnerClient,
        run: RunDirectory,
        metrics: RunMetrics,
        task_metrics: Sequence[Metrics] = (),
    ):
        self._prepared, self._job = prepared, prepared.job
        self._workers, self._learner, self._run, self._metrics = workers, learner, run, metrics
        self._task_metrics = task_metrics
        job = self._job
        self._buffer = Buffer(
            TaskQueue(prepared.train, seed=job.run.seed),
            tasks_per_update=job.rollout.tasks_per_update,
            staleness=job.staleness,
            refill=job.rollout.refill,
            min_spread=job.learner.min_spread,
            lockstep=job.run.lockstep,
            cohorts=job.run.updates,
            clock=time.monotonic,
        )
        self._health = Health(
            unscored_limit=job.scoring.unscored_limit,
            non_finite_limit=job.health.non_finite_limit,
        )
        self._proof = Proof()
        self._weakest: ProofReport | None = None  # of the last publish
        self._busy = {worker.name: 0 for worker in workers}
        self._learner_info: Mapping[str, Any] = {}
        self._version = 0  # of the learner
        self._update = 0  # updates done
        self._best: tuple[int, float] | None = None
        self._evals_without_gain = 0
        self._stopping = False
        self._settled = False  # learner, buffer and counters speak of the same update
        self._samplers: set[asyncio.Task[None]] = set()
        self._again: list[Ticket] = []  # groups that a checkpoint had in flight
        self._failure: asyncio.Future[None] | None = None
        self.progress = Progress(updates=job.run.updates)
        self._began = time.monotonic()

    async def run(self, *, resume: bool = False) -> Progress:
        self._failure = asyncio.get_running_loop().create_future()
        try:
            await self._start(resume=resume)
            await self._loops()
            await self._finish()
        except RunError as error:
            await self._pause(error)
            raise
        finally:
            await self._stop_workers()
        if self._stopping:
            raise Interrupted(f"stopped after update {self._update}; a checkpoint is kept")
        return self.progress

    async def stop(self) -> None:
        """Ends after the update in hand, with a checkpoint."""
        self._stopping = True
        self._event("stopping")
        if not self._job.run.lockstep or self._settled:
            await self._buffer.close()  # in lockstep an update in hand waits for its groups

    # -- start -------------------------------------------------------------------------------------

    async def _start(self, *, resume: bool) -> None:
        self._phase("starting engines and learner")
        if (
            self._job.run.gpus == "colocated"
        ):  # an engine measures the card's free memory as it starts
            engines = [await worker.start() for worker in self._workers]
            self._learner_info = await self._learner.start()
        else:
            self._learner_info, *engines = await asyncio.gather(
                self._learner.start(), *(worker.start() for worker in self._workers)
            )
        self._event(
            "started", seconds=round(time.monotonic() - self._began, 2),
            learner=dict(self._learner_info), workers=[dict(info) for info in engines],
        )  # fmt: skip
        if resume:
            await self._restore()
        self._phase("proving that the engines follow")
        await self._prove_canary()
        await self._publish(Phases())
        self._buffer.version = self._version
        self._settled = True
        if not resume:
            await self._evaluate()
            await self._save()  # the start policy may stay the best, and a kill may come early

    async def _prove_canary(self) -> None:
        """A random, non-zero policy must be followed: LoRA starts at B = 0, so a no-op would pass
        without."""
        header, payload = await self._learner.canary(self._job.run.seed)
        for worker in self._workers:
            await worker.publish(header, payload)
            report = await self._proof.prove_canary(
                worker,
                _Served(self._learner),
                header.version,
                self._prepared.probes,
                expected=header.fingerprint,
            )
            self._event("canary", worker=worker.name, **_plain(report))
            if not report.holds:
                raise ProofError(
                    f"{worker.name} does not follow the learner: {report}; nothing was trained"
                )

    # -- the loops ---------------------------------------------------------------------------------

    async def _loops(self) -> None:
        self._phase("training")
        feed = asyncio.create_task(self._feed())
        ticks = asyncio.create_task(self._tick())
        train = asyncio.create_task(self._train())
        assert self._failure is not None
        try:
            await asyncio.wait({feed, ticks, train, self._failure}, return_when="FIRST_COMPLETED")
            while feed.done() and feed.exception() is None and not train.done():
                await asyncio.wait({ticks, train, self._failure}, return_when="FIRST_COMPLETED")
                if ticks.done() or self._failure.done():
                    break
            for task in (self._failure, feed, ticks, train):
                if task.done() and not task.cancelled() and task.exception():
                    raise task.exception()  # type: ignore[misc]
        finally:
            await self._buffer.close()
            for task in (feed, ticks, *self._samplers):
                task.cancel()
            # the update in hand ends first: saved in its midst, its groups would be trained twice
            await asyncio.gather(feed, ticks, train, *self._samplers, return_exceptions=True)

    async def _feed(self) -> None:
        for ticket in self._again:
            self._sample_soon(ticket)
        while (ticket := await self._buffer.admit()) is not None:
            self._sample_soon(ticket)

    def _sample_soon(self, ticket: Ticket) -> None:
        task = asyncio.create_task(self._sample(ticket))
        self._samplers.add(task)
        task.add_done_callback(self._sampled)

    def _sampled(self, task: "asyncio.Task[None]") -> None:
        self._samplers.discard(task)
        failure = self._failure
        assert failure is not None
        if not task.cancelled() and (error := task.exception()) and not failure.done():
            failure.set_exception(error)

    async def _sample(self, ticket: Ticket) -> None:
        """One group by the least busy worker, collected into the buffer."""
        worker = min(self._workers, key=lambda w: self._busy[w.name])
        self._busy[worker.name] += 1
        try:
            group = await worker.run(self._order(ticket))
        finally:
            self._busy[worker.name] -= 1
        self._metrics.collected(group)
        self._watch(self._health.after_group, group)
        await self._buffer.put(ticket, group)

    def _order(self, ticket: Ticket) -> GroupOrder:
        job = self._job
        return GroupOrder(
            group_id=ticket.id,
            task=ticket.task,
            group_size=job.rollout.group_size,
            # adapters stay loaded, so a group ends on the version it began with; full weights are
            # swapped
            version=ticket.version if job.learner.method == "lora" else None,
            seed=job.run.seed,
            max_reply_tokens=self._prepared.max_reply_tokens,
            temperature=job.rollout.temperature,
            truncated=job.rollout.truncated,
        )

    async def _tick(self) -> None:
        """Drops stragglers at their deadline and keeps the gauges fresh."""
        while True:
            await asyncio.sleep(TICK)
            if (limit := self._job.rollout.drop_after) is not None:
                late = [t for t in self._buffer.running() if time.monotonic() - t.admitted > limit]
                for ticket in late:
                    await self._buffer.drop(ticket, "late")
                    self._event("dropped", group=ticket.id, task=ticket.task.id, reason="late")
            running = sum(1 for _ in self._buffer.running())
            self._metrics.buffered(running=running, finished=self._buffer.finished)
            self.progress.seconds = time.monotonic() - self._began

    async def _train(self) -> None:
        while self._update < self._job.run.updates and not self._stopping:
            phases = Phases()
            began = time.monotonic()
            groups = await self._buffer.take()
            if groups is None:
                break
            phases.wait = time.monotonic() - began
            self._settled = False
            report = await self._learn(groups, phases)
            if self._job.run.lockstep:
                await self._buffer.quiet()
            if report.policy_version != self._version:
                self._version = report.policy_version
                await self._publish(phases)
            staleness = self._buffer.staleness(
                groups, learner_version=report.policy_version - (not report.skipped)
            )
            await self._buffer.release(version=self._version)
            self._update += 1
            self._settled = True
            await self._record(groups, report, phases, staleness, time.monotonic() - began)
            self._watch(self._health.after_update, report)
            if self._failing or not await self._after_update():
                break

    async def _learn(self, groups: Sequence[Group], phases: Phases) -> StepReport:
        began = time.monotonic()
        rules, job = self._job.learner, self._job
        gains = advantages(
            groups,
            baseline=rules.baseline,
            scale=rules.scale,
            min_spread=rules.min_spread,
            parts=rules.parts,
            weights={spec.name: spec.weight for spec in job.rewards if not spec.gate},
        )
        batches = pack(
            groups,
            gains,
            tokens=int(self._learner_info["micro_batch_tokens"]),
            padded=self._learner_info["layout"] == "padded",
            mask_truncated=job.rollout.truncated == "mask",
        )
        if not batches:  # every group is all good or all bad: no gradient, and no version
            report = _nothing_to_learn(self._version)
        else:
            measure = self._learner_info["can_measure_kl"] and self._update % rules.kl_every == 0
            report = await self._learner.update(batches, measure_kl=measure)
        phases.learn = time.monotonic() - began
        return report

    async def _publish(self, phases: Phases) -> None:
        """Brings the learner's version to every engine; returns once each has proven that it serves
        it."""
        self._metrics.phase("publish")
        announcement = await self._learner.publication()
        for attempt in range(1, self._job.health.proof_limit + 1):
            failed = await self._publish_once(announcement, phases)
            if not failed:
                return
            self._event("proof_failed", version=self._version, attempt=attempt, failures=failed)
            self._metrics.proof_failed()
        raise ProofError(
            f"version {self._version} was published {self._job.health.proof_limit} times and the"
            f" engines still do not serve it: {'; '.join(failed)}. They serve version"
            f" {self._buffer.version}"
        )

    async def _publish_once(self, announcement: Announcement, phases: Phases) -> list[str]:
        began = time.monotonic()
        await asyncio.gather(*(worker.publish(*announcement) for worker in self._workers))
        published = time.monotonic()
        header = announcement[0]
        reports = [
            await self._proof.prove(
                worker,
                _Served(self._learner),
                header.version,
                self._prepared.probes,
                expected=header.fingerprint,
                name=worker.name,
            )
            for worker in self._workers
        ]
        phases.publish += published - began
        phases.proof += time.monotonic() - published
        self._weakest = min(reports, key=lambda report: report.power)
        self._metrics.published(
            seconds=published - began,
            proof_seconds=time.monotonic() - published,
            slope=self._weakest.slope,
            power=self._weakest.power,
        )
        return [
            f"{worker.name}: {report}"
            for worker, report in zip(self._workers, reports, strict=True)
            if not report.holds
        ]

    @property
    def _failing(self) -> bool:
        return self._failure is not None and self._failure.done()

    def _watch(self, check: Callable[[Any], None], what: Any) -> None:
        """Health's look at a group or an update; what is critical pauses, or is only written
        down."""
        try:
            check(what)
        except RunError as error:
            if self._job.health.on_critical == "pause":
                raise
            self._event("critical", error=type(error).__name__, reason=str(error))

    # -- after an update ---------------------------------------------------------------------------

    async def _after_update(self) -> bool:
        """Evaluates and saves when it is time; False when the run should end early."""
        job = self._job
        last = self._update >= job.run.updates
        go_on, better = True, False
        if self._update % job.eval.every == 0 or last:
            better = await self._evaluate()
            if job.eval.patience and self._evals_without_gain >= job.eval.patience:
                self._event("early_stop", patience=job.eval.patience, best=self._best)
                go_on = False
        if better or last or not go_on or self._update % job.run.checkpoint_every == 0:
            await self._save()
        return go_on

    async def _evaluate(self) -> bool:
        """Greedy over the validation rows; True when it is the best so far."""
        began = time.monotonic()
        self._metrics.phase("evaluate")
        result = await evaluate(
            self._workers,
            self._prepared.validation,
            version=self._version if self._job.learner.method == "lora" else None,
            max_reply_tokens=self._prepared.max_reply_tokens,
            metrics=self._task_metrics,
        )
        value = self._eval_value(result)
        better = not math.isnan(value) and (self._best is None or value > self._best[1])
        if better:
            self._best, self._evals_without_gain = (self._update, value), 0
        else:
            self._evals_without_gain += 1
        self.progress.evals.append((self._update, value))
        self.progress.best = self._best
        self._run.append_evaluation(self._update, result.summary(), result.rollouts)
        self._metrics.evaluated(result.score, result.metrics, update=self._update)
        self._event(
            "evaluated", score=result.score, metric=self._job.eval.metric, value=value,
            better=better, seconds=round(time.monotonic() - began, 2),
        )  # fmt: skip
        return better

    def _eval_value(self, result: Evaluation) -> float:
        metric = self._job.eval.metric
        try:
            return result.value(metric)
        except KeyError:
            known = ", ".join(["score", *result.metrics, *result.parts])
            raise RunError(
                f"eval.metric = {metric!r} is not measured by this job's rewards;"
                f" there are: {known}"
            ) from None

    async def _record(
        self,
        groups: Sequence[Group],
        report: StepReport,
        phases: Phases,
        staleness: int,
        seconds: float,
    ) -> None:
        values = [value for group in groups for value in group.values]
        reward = math.fsum(values) / len(values) if values else math.nan
        statistics = [dict(await worker.statistics()) for worker in self._workers]
        self._run.append_metrics(
            self._update,
            reward=reward,
            reward_std=_deviation(values, reward),
            parts=_part_means(groups),
            groups=_outcomes(groups, self._job.learner.min_spread),
            staleness=staleness,
            version=report.policy_version,
            truncated=_share(groups, lambda rollout: rollout.stop_reason == "length"),
            reply_tokens=_reply_tokens(groups),
            loss=report.loss,
            grad_norm=report.grad_norm,
            entropy=report.entropy,
            clip_fraction=report.clip_fraction,
            logprob_gap=report.logprob_gap,
            kl=report.kl,
            ratio_mean=report.ratio_mean,
            effective_sample_size=report.effective_sample_size,
            guarded_sequences=report.guarded_sequences,
            learning_rate=report.learning_rate,
            tokens=report.tokens,
            skipped=report.skipped,
            proof_slope=self._weakest.slope if self._weakest else math.nan,
            proof_power=self._weakest.power if self._weakest else 0.0,
            dropped=dict(self._buffer.dropped),
            seconds={
                "update": seconds, "wait": phases.wait, "learn": phases.learn,
                "publish": phases.publish, "proof": phases.proof,
            },
        )  # fmt: skip
        self._run.append_rollouts(self._update, groups, limit=self._job.run.keep_samples)
        self._metrics.updated(
            update=self._update, report=report, groups=groups, staleness=staleness,
            learner_wait=phases.wait, dropped=self._buffer.dropped, workers=statistics,
            min_spread=self._job.learner.min_spread, seconds=seconds,
            eta=(self._job.run.updates - self._update) * seconds,
        )  # fmt: skip
        progress = self.progress
        progress.update, progress.version, progress.reward = self._update, self._version, reward
        progress.seconds = time.monotonic() - self._began
        progress.eta = (self._job.run.updates - self._update) * seconds

    # -- checkpoints -------------------------------------------------------------------------------

    async def _save(self) -> None:
        self._metrics.phase("save")
        began = time.monotonic()
        state = {
            "update": self._update,
            "version": self._version,
            "best": self._best,
            "evals": self.progress.evals,
            "evals_without_gain": self._evals_without_gain,
            "buffer": self._buffer.state(),
            "seconds": time.monotonic() - self._began,
        }
        await checkpoints.save(
            self._run.path / "checkpoints",
            self._update,
            state,
            self._learner,
            keep=self._job.run.keep_checkpoints,
            best=self._best[0] if self._best else None,
        )
        self._metrics.saved(time.monotonic() - began)
        self._event("checkpoint", seconds=round(time.monotonic() - began, 3))

    async def _restore(self) -> None:
        folder, state = checkpoints.newest(self._run.path / "checkpoints", note=self._event)
        self._version = await self._learner.load(str(folder / "learner"))
        self._update = state["update"]
        self._best = tuple(state["best"]) if state["best"] else None
        self._evals_without_gain = state["evals_without_gain"]
        self.progress.evals = [tuple(item) for item in state["evals"]]
        self.progress.best, self.progress.update = self._best, self._update
        self._run.supersede_after(self._update)
        tasks = {task.id: task for task in self._prepared.train}
        self._again = self._buffer.restore(state["buffer"], tasks)
        self._event("resumed", checkpoint=folder.name)

    # -- end ---------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        if self._stopping:
            await self._save()
            self._phase("stopped")
            return
        self._phase("done")
        self._event("finished", best=self._best)

    async def _pause(self, error: RunError) -> None:
        """Keeps what was done; the cause stands in the events."""
        self._phase("paused")
        self._event("paused", error=type(error).__name__, reason=str(error))
        if self._resumable():
            with contextlib.suppress(RunError, OSError):  # the first error is the one to report
                await self._save()

    def _resumable(self) -> bool:
        """Whether a checkpoint of this moment would resume as if nothing had happened; otherwise
        the last one is where the run goes on."""
        exact = all(ticket.version == self._version for ticket in self._buffer.running())
        return self._settled and (exact or not self._job.run.lockstep)

    async def _stop_workers(self) -> None:
        stops = [worker.stop() for worker in self._workers] + [self._learner.stop()]
        for result in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(result, Exception):
                self._event("stop_failed", error=repr(result))

    def _phase(self, name: str) -> None:
        self.progress.phase = name
        self._metrics.phase(name)

    def _event(self, kind: str, **fields: Any) -> None:
        self._run.append_event(kind, update=self._update, **fields)


class _Served:
    """The learner as a proof asks it: its policy as the engines hold it."""

    def __init__(self, learner: LearnerClient):
        self._learner = learner
        self.canary_logprobs = learner.canary_logprobs

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return await self._learner.logprobs(sequences, policy="served")


def _plain(report: ProofReport) -> dict[str, Any]:
    return {
        "version": report.version,
        "holds": report.holds,
        "problems": list(report.problems),
        "slope": report.slope,
        "power": report.power,
        "verdict": report.verdict,
    }


def _nothing_to_learn(version: int) -> StepReport:
    return StepReport(
        policy_version=version, loss=0.0, grad_norm=0.0, entropy=math.nan, clip_fraction=0.0,
        logprob_gap=math.nan, kl=math.nan, tokens=0, seconds=0.0, skipped="no_signal",
    )  # fmt: skip


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


def _share(groups: Sequence[Group], test: Any) -> float:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return sum(map(test, rollouts)) / len(rollouts) if rollouts else 0.0


def _reply_tokens(groups: Sequence[Group]) -> float:
    lengths = [sum(r.trajectory.loss_mask) for g in groups for r in g.rollouts if r.trajectory]
    return sum(lengths) / len(lengths) if lengths else 0.0
