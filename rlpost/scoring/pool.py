"""Scores replies in processes that may die: the one face of `scoring/` that a rollout worker sees.

    pool = ScoringPool(specs, processes=2, deadline=10.0)
    await pool.start()                       # before any engine thread exists
    scored = await pool.score(rollouts)      # one group; every rollout gets a score or a status
    await pool.stop()

Rewards see the text, the conversation, what the environment knows and the row of their own task:
no tokens, no other row.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlpost.errors import PluginError, ScoringError
from rlpost.reward import RewardSpec, combine
from rlpost.scoring import sandbox
from rlpost.scoring.judge import Verdict
from rlpost.scoring.lane import AHEAD, Job, Lane
from rlpost.scoring.process import ScoringProcess
from rlpost.scoring.worker import Item, Orders, Row
from rlpost.types import Rollout, Score, Task

FAILURES_KEPT = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed judgement, kept for reports."""

    reward: str
    status: str
    detail: str
    task: str


class ScoringPool:
    """Judges groups of rollouts with every reward of a job.

    `processes` run sync rewards; async rewards share one process more. `deadline` is in seconds for
    one call, counted from its start inside the process. `on_timeout="stop"` (lockstep mode) raises
    ScoringError for a call that timed out twice, where "score" leaves it to the usual rules.
    At most `waiting` groups are inside at once; `score` waits its turn beyond that.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        processes: int = 1,
        deadline: float = 10.0,
        memory_bytes: int = 4 << 30,
        trusted: bool | None = None,
        allow_untrusted: bool = False,
        on_timeout: Literal["score", "stop"] = "score",
        waiting: int = 256,
        limits: sandbox.Limits | None = None,
        start_timeout: float = 120.0,
    ):
        self.specs = tuple(specs)
        self.level = sandbox.choose(specs, trusted=trusted, allow_untrusted=allow_untrusted)
        self.failures: deque[Failure] = deque(maxlen=FAILURES_KEPT)
        self._processes, self._deadline, self._on_timeout = processes, deadline, on_timeout
        self._limits = limits or sandbox.Limits(memory_bytes=memory_bytes)
        self._start_timeout = start_timeout
        self._waiting = waiting
        self._inside = asyncio.Semaphore(waiting)
        self._ids = itertools.count(1)
        self._kinds: list[tuple[bool, bool]] = []
        self._lanes: list[tuple[Lane, list[int]]] = []  # a lane, and the rewards it judges with

    async def start(self) -> None:
        """Starts the processes; each has imported every reward when this returns. Call it before an
        engine starts threads, from the thread whose event loop will score. Raises PluginError, one
        line, for a reward that cannot be used."""
        if not self.specs:
            raise PluginError("there is no reward to score with", cure="write a [[reward]] table")
        first = self._process()
        await first.start()
        self._kinds = first.kinds
        try:
            await self._fill_lanes(first)
        except BaseException:  # nothing may be left running, whatever happened
            await first.end()
            await self.stop()
            raise

    async def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts of one group in their order, each with `score` and `status`.

        "ok": a score. "reply_error": the same failure twice on this reply; the score is 0.0 with
        the parts that are known, the reason names reward and failure. Any other status: no score,
        as the judge and not the reply failed. Raises ScoringError only under `on_timeout="stop"`.
        """
        judged = await self.judge(rollouts)
        return [self._scored(r, v) for r, v in zip(rollouts, judged, strict=True)]

    async def judge(self, rollouts: Sequence[Rollout]) -> list[list[Verdict]]:
        """The verdict of every reward on every rollout of one group: [rollout][reward]."""
        if not self._lanes:
            raise ScoringError("the scoring pool is not running; await start() first")
        if not rollouts:
            return []
        tasks, items = _stripped(rollouts)
        async with self._inside:
            jobs = [self._job(mine, tasks, items) for _, mine in self._lanes]
            lanes = [lane for lane, _ in self._lanes]
            if len(jobs) == 1:
                await lanes[0].run(jobs[0])
            else:
                await asyncio.gather(
                    *(lane.run(job) for lane, job in zip(lanes, jobs, strict=True))
                )
        verdicts = jobs[0].verdicts
        for job in jobs[1:]:
            verdicts |= job.verdicts
        count = len(rollouts)
        table = [
            [verdicts[spec * count + index] for spec in range(len(self.specs))]
            for index in range(count)
        ]
        if any(verdict.score is None for verdict in verdicts.values()):
            for rollout, row in zip(rollouts, table, strict=True):
                for spec, verdict in zip(self.specs, row, strict=True):
                    if verdict.score is None:
                        self._note(spec, verdict, rollout.task)
        return table

    def statistics(self) -> dict[str, Any]:
        """Counters since the start: `calls` {reward: {status: n}}, `seconds` {reward: s},
        `restarts` of scorers; and `waiting`, the groups inside now."""
        calls: dict[str, dict[str, int]] = {spec.name: {} for spec in self.specs}
        seconds = dict.fromkeys(calls, 0.0)
        for lane, _ in self._lanes:
            for (name, status), count in lane.calls.items():
                calls[name][status] = calls[name].get(status, 0) + count
            for name, spent in lane.seconds.items():
                seconds[name] += spent
        return {
            "calls": calls,
            "seconds": seconds,
            "restarts": sum(lane.restarts for lane, _ in self._lanes),
            "waiting": sum(
                len(lane.queue) + sum(len(slot.jobs) for slot in lane.slots)
                for lane, _ in self._lanes
            ),
        }

    async def stop(self) -> None:
        """Ends every process; nothing of the pool runs when this returns. Groups inside are
        cancelled."""
        lanes, self._lanes = self._lanes, []
        for lane, _ in lanes:
            await lane.stop()

    async def __aenter__(self) -> "ScoringPool":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _fill_lanes(self, first: ScoringProcess) -> None:
        """One lane for the sync rewards and one for the async ones, where there are any. `first` is
        running already; it told which is which."""
        everyone = range(len(self.specs))
        sync = [index for index in everyone if not self._kinds[index][1]]
        waiting = [index for index in everyone if self._kinds[index][1]]
        started = [first]
        for mine, count, is_async in ((sync, self._processes, False), (waiting, 1, True)):
            if not mine:
                continue
            processes = [started.pop() if started else self._process() for _ in range(count)]
            for process in processes:
                process.is_async = is_async
            lane = Lane(
                processes,
                names=[spec.name for spec in self.specs],
                deadline=self._deadline,
                memory_bytes=self._limits.memory_bytes,
                process_limit=self._limits.processes,
                # untrusted code must not find the next row in its socket
                ahead=1 if self.level.name == "sandbox" else AHEAD,
            )
            self._lanes.append((lane, mine))
            await lane.start()

    def _process(self) -> ScoringProcess:
        shut_in = self.level.name == "sandbox"
        orders = Orders(
            specs=self.specs,
            limits=self._limits,
            deadline=self._deadline,
            shut_in=shut_in,
            uid=sandbox.new_uid() if shut_in else 0,
        )
        return ScoringProcess(orders, start_timeout=self._start_timeout)

    def _job(self, mine: Sequence[int], tasks: Sequence[Row], items: Sequence[Item]) -> Job:
        count = len(items)
        pending: dict[int, int] = {}
        single = [spec for spec in mine if not self._kinds[spec][0]]
        for index in range(count):
            pending.update((spec * count + index, 1) for spec in single)
        pending.update((spec * count, count) for spec in mine if self._kinds[spec][0])
        return Job(
            id=next(self._ids),
            tasks=tasks,
            items=items,
            done=asyncio.get_running_loop().create_future(),
            pending=pending,
        )

    def _scored(self, rollout: Rollout, verdicts: Sequence[Verdict]) -> Rollout:
        score, status = self._outcome(verdicts)
        return Rollout(
            task=rollout.task,
            reply=rollout.reply,
            trajectory=rollout.trajectory,
            messages=rollout.messages,
            stop_reason=rollout.stop_reason,
            info=rollout.info if status == "ok" else self._with_statuses(rollout, verdicts),
            score=score,
            status=status,
        )

    def _with_statuses(self, rollout: Rollout, verdicts: Sequence[Verdict]) -> dict[str, Any]:
        """What the environment knows, and how each reward's judgement ended: {name: status}."""
        names = [spec.name for spec in self.specs]
        statuses = {name: v.status for name, v in zip(names, verdicts, strict=True)}
        return {**rollout.info, "statuses": statuses}

    def _outcome(self, verdicts: Sequence[Verdict]) -> tuple[Score | None, str]:
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if len(scores) == len(verdicts):
            return combine(self.specs, scores), "ok"
        failed = [(s, v) for s, v in zip(self.specs, verdicts, strict=True) if v.score is None]
        for _, verdict in failed:
            if verdict.cause != "reply":
                return None, verdict.status
        nothing = Score(value=0.0)
        parts = combine(self.specs, [verdict.score or nothing for verdict in verdicts]).parts
        spec, verdict = failed[0]
        reason = f"{spec.name}:{verdict.status}"
        return Score(value=0.0, parts=parts, reason=reason), "reply_error"

    def _note(self, spec: RewardSpec, verdict: Verdict, task: Task) -> None:
        failure = Failure(
            reward=spec.name, status=verdict.status, detail=verdict.detail, task=task.id
        )
        self.failures.append(failure)
        if verdict.status == "timeout" and self._on_timeout == "stop":
            raise ScoringError(
                f"the reward {spec.name!r} timed out twice on task {task.id} "
                f"(deadline {self._deadline:g} s); in lockstep mode that stops the run: "
                "raise the deadline, or make the reward faster"
            )


def _stripped(rollouts: Sequence[Rollout]) -> tuple[list[Row], list[Item]]:
    """What rewards may see: the tasks, each once, and the rollouts without their tokens."""
    rows: list[Row] = []
    places: dict[int, int] = {}
    items: list[Item] = []
    for rollout in rollouts:
        task = rollout.task
        place = places.get(id(task))
        if place is None:
            place = places[id(task)] = len(rows)
            row = (task.id, task.messages, task.answer, task.schema, task.tools, task.images)
            rows.append((*row, task.meta))
        items.append((place, rollout.reply, rollout.messages, rollout.stop_reason, rollout.info))
    return rows, items
