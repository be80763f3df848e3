"""The run: four loops over clients, no Ray.

feed      takes the next task when a slot opens and gives it to the least busy rollout worker
collect   puts each judged group into the buffer, or drops it and requeues its task
train     turns the oldest cohort into a policy version
publish   brings the version to every engine and opens the slots once each has proven it

The controller alone writes the run directory and exports the metrics.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlpost import checkpoints
from rlpost.buffer import Buffer, TaskQueue, Ticket
from rlpost.clients import LearnerClient, RolloutClient
from rlpost.errors import Interrupted, RunError
from rlpost.evaluation import Curve, Metrics, evaluate, value_of
from rlpost.health import Health
from rlpost.metrics import RunMetrics
from rlpost.preparation import Prepared
from rlpost.publisher import Publisher
from rlpost.records import Phases, Progress, Records, Update
from rlpost.rollout_worker import GroupOrder
from rlpost.run_directory import RunDirectory
from rlpost.update import update

TICK = 1.0  # seconds between looks at stragglers and statistics


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
        self._records = Records(job, run, metrics)
        self._curve = Curve(points=self.progress.evals)
        self._publisher = Publisher(
            workers,
            learner,
            probes=prepared.probes,
            attempts=job.health.proof_limit,
            metrics=metrics,
            event=self._event,
        )
        self._busy = {worker.name: 0 for worker in workers}
        self._learner_info: Mapping[str, Any] = {}
        self._version = 0  # of the learner
        self._update = 0  # updates done
        self._stopping = False
        self._settled = False  # learner, buffer and counters speak of the same update
        self._samplers: set[asyncio.Task[None]] = set()
        self._again: list[Ticket] = []  # groups that a checkpoint had in flight
        self._failure: asyncio.Future[None] | None = None

    @property
    def progress(self) -> Progress:
        """What a watcher sees, at any time."""
        return self._records.progress

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
        self._records.phase("starting engines and learner")
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
            "started", seconds=round(self._records.seconds, 2),
            learner=dict(self._learner_info), workers=[dict(info) for info in engines],
        )  # fmt: skip
        if resume:
            await self._restore()
        self._records.phase("proving that the engines follow")
        await self._publisher.prove_canary(self._job.run.seed)
        await self._publisher.publish(Phases(), serving=self._buffer.version)
        self._buffer.version = self._version
        self._settled = True
        if not resume:
            await self._evaluate()
            await self._save()  # the start policy may stay the best, and a kill may come early

    # -- the loops ---------------------------------------------------------------------------------

    async def _loops(self) -> None:
        self._records.phase("training")
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
            self.progress.seconds = self._records.seconds

    async def _train(self) -> None:
        while self._update < self._job.run.updates and not self._stopping:
            phases = Phases()
            began = time.monotonic()
            groups = await self._buffer.take()
            if groups is None:
                break
            phases.wait = time.monotonic() - began
            self._settled = False
            learning = time.monotonic()
            report = await update(
                groups, self._learner, self._job,
                info=self._learner_info, number=self._update, version=self._version,
            )  # fmt: skip
            phases.learn = time.monotonic() - learning
            if self._job.run.lockstep:
                await self._buffer.quiet()
            if report.policy_version != self._version:
                self._version = report.policy_version
                await self._publisher.publish(phases, serving=self._buffer.version)
            staleness = self._buffer.staleness(
                groups, learner_version=report.policy_version - (not report.skipped)
            )
            await self._buffer.release(version=self._version)
            self._update += 1
            self._settled = True
            done = Update(
                number=self._update, groups=groups, report=report, phases=phases,
                staleness=staleness, seconds=time.monotonic() - began,
                proof=self._publisher.weakest, dropped=self._buffer.dropped,
            )  # fmt: skip
            statistics = [dict(await worker.statistics()) for worker in self._workers]
            self._records.write(done, statistics)
            self._watch(self._health.after_update, report)
            if self._failing or not await self._after_update():
                break

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
            if job.eval.patience and self._curve.without_gain >= job.eval.patience:
                self._event("early_stop", patience=job.eval.patience, best=self._curve.best)
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
        value = value_of(result, self._job.eval.metric)
        better = self._curve.add(self._update, value)
        self.progress.best = self._curve.best
        self._run.append_evaluation(self._update, result.summary(), result.rollouts)
        self._metrics.evaluated(
            result.score, result.metrics, update=self._update, parts=result.parts
        )
        self._event(
            "evaluated", score=result.score, metric=self._job.eval.metric, value=value,
            better=better, seconds=round(time.monotonic() - began, 2),
        )  # fmt: skip
        return better

    # -- checkpoints -------------------------------------------------------------------------------

    async def _save(self) -> None:
        self._metrics.phase("save")
        began = time.monotonic()
        state = {
            "update": self._update,
            "version": self._version,
            **self._curve.state(),
            "buffer": self._buffer.state(),
            "seconds": self._records.seconds,
        }
        await checkpoints.save(
            self._run.path / "checkpoints",
            self._update,
            state,
            self._learner,
            keep=self._job.run.keep_checkpoints,
            best=self._curve.best[0] if self._curve.best else None,
        )
        self._metrics.saved(time.monotonic() - began)
        self._event("checkpoint", seconds=round(time.monotonic() - began, 3))

    async def _restore(self) -> None:
        folder, state = checkpoints.newest(self._run.path / "checkpoints", note=self._event)
        self._version = await self._learner.load(str(folder / "learner"))
        self._update = state["update"]
        self._curve.restore(state)
        self.progress.best, self.progress.update = self._curve.best, self._update
        self._run.supersede_after(self._update)
        tasks = {task.id: task for task in self._prepared.train}
        self._again = self._buffer.restore(state["buffer"], tasks)
        self._event("resumed", checkpoint=folder.name)

    # -- end ---------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        if self._stopping:
            await self._save()
            self._records.phase("stopped")
            return
        self._records.phase("done")
        self._event("finished", best=self._curve.best)

    async def _pause(self, error: RunError) -> None:
        """Keeps what was done; the cause stands in the events."""
        self._records.phase("paused")
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

    def _event(self, kind: str, **fields: Any) -> None:
        self._run.append_event(kind, update=self._update, **fields)
