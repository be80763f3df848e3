"""Jobs over scoring processes, and what a failure means.

A job is one group of replies, a unit one call of one reward. The rules (design, walk, step 5):

- A failed unit is retried once, alone in a fresh scorer. The same failure twice is the reply's
doing.
- A scorer that dies or hangs costs the unit that was running; every other unit is done again
without
  blame if its verdict had not arrived.
- A failure that is the judge's (an endpoint out of reach), the row's or the job's is never the
reply's.
- Async rewards share one process with many jobs in flight, so their retries run there as well: a
fresh
  process for each would abandon the calls of all others. A process that died is fresh in any case.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlpost.errors import RlpostError
from rlpost.scoring.judge import Verdict, one_line, parse
from rlpost.scoring.process import ScoringProcess
from rlpost.scoring.worker import Item, Row, Work

AHEAD = 4  # quick jobs that a sync scorer holds, so that it never waits for its parent
QUICK = 0.005  # seconds of a quick job; slower ones are held singly, for whoever is free next
AT_ONCE = 32  # jobs in an async scorer
BARREN_DEATHS = 3  # with no unit running, before a job is given up as the machine's failure
STALL_GRACE = 30.0  # seconds without a sign beyond the deadline, before a scorer is taken for stuck


@dataclass(eq=False, kw_only=True)
class Job:
    """One group on its way through a lane. `verdicts` is complete when `done` is set."""

    id: int
    tasks: Sequence[Row]
    items: Sequence[Item]
    done: asyncio.Future[None]
    pending: dict[int, int]  # unit -> how many verdicts it gives (1, or G for a group reward)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    failed_once: dict[int, Verdict] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)  # units of the last message
    barren_deaths: int = 0

    def next_units(self, *, alone: bool) -> list[int]:
        """What to send now: all that was never tried, then the retries, one by one where `alone`.
        After a death with nothing running everything goes one by one, so that the next death has a
        culprit."""
        untried = [unit for unit in self.pending if unit not in self.failed_once]
        if self.barren_deaths:
            return untried[:1] or list(self.pending)[:1]
        return untried or list(self.pending)[: 1 if alone else None]

    def seconds(self) -> float:
        """What its calls took."""
        return sum(verdict.seconds for verdict in self.verdicts.values())

    def retries_only(self) -> bool:
        """Whether every unit left has failed once."""
        return all(unit in self.failed_once for unit in self.pending)


class Lane:
    """Some scoring processes of one kind, and the jobs that wait for them."""

    def __init__(
        self,
        processes: Sequence[ScoringProcess],
        *,
        names: Sequence[str],
        deadline: float,
        memory_bytes: int,
        process_limit: int,
        ahead: int = AHEAD,
    ):
        self.names, self.deadline, self.ahead = names, deadline, ahead
        self.memory_bytes, self.process_limit = memory_bytes, process_limit
        self.slots = [_Slot(self, process) for process in processes]
        self.queue: deque[Job] = deque()
        self.calls: Counter[tuple[str, str]] = Counter()  # (reward, status) -> calls
        self.seconds: dict[str, float] = dict.fromkeys(names, 0.0)
        self.restarts = 0
        self.job_seconds = 0.0  # of late
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """A fresh scorer in every slot."""
        await asyncio.gather(*(slot.begin() for slot in self.slots))

    async def run(self, job: Job) -> None:
        """Returns when every unit of `job` has its verdict."""
        self.queue.append(job)
        self.feed()
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        await job.done

    def feed(self) -> None:
        """Gives waiting jobs to slots with room, idle slots first."""
        ahead = self.ahead if self.job_seconds < QUICK else 1
        for room in range(1, ahead + 1):
            for slot in self.slots:
                limit = AT_ONCE if slot.process.is_async else room
                while self.queue and slot.ready and len(slot.jobs) < limit:
                    job = self.queue.popleft()
                    if not job.done.done():
                        slot.take(job)

    async def stop(self) -> None:
        """Ends every process. Jobs that are not done are cancelled."""
        if self._watcher is not None:
            self._watcher.cancel()
        for slot in self.slots:
            await slot.end()
        for job in self.queue:
            job.done.cancel()

    async def _watch(self) -> None:
        """Looks at the cells while anything runs: the deadline is measured from the start of the
        call."""
        tick = max(0.005, min(0.05, self.deadline / 20))
        while self.queue or any(slot.jobs for slot in self.slots):
            await asyncio.sleep(tick)
            for slot in self.slots:
                if slot.ready and slot.jobs:
                    slot.watch()

    def record(self, job: Job, unit: int, verdict: Verdict) -> None:
        """The outcome of a single reward's call: final, or to be tried once more."""
        self._count(job, unit, verdict)
        if verdict.score is None:
            first = job.failed_once.get(unit)
            if first is None and verdict.cause in ("reply", "judge"):
                job.failed_once[unit] = verdict
                return
            verdict.cause = _cause(first, verdict)
        del job.pending[unit]
        job.verdicts[unit] = verdict

    def record_group(self, job: Job, unit: int, verdicts: Sequence[Verdict]) -> None:
        """The outcome of a group reward's call: one failed reply is enough to try it once more."""
        for verdict in verdicts:
            self._count(job, unit, verdict)
        failed = [verdict for verdict in verdicts if verdict.score is None]
        first = job.failed_once.get(unit)
        if failed and first is None and failed[0].cause in ("reply", "judge"):
            job.failed_once[unit] = failed[0]
            return
        for verdict in failed:
            verdict.cause = _cause(first, verdict)
        del job.pending[unit]
        for index, verdict in enumerate(verdicts):
            job.verdicts[unit + index] = verdict

    def fail(self, job: Job, unit: int, verdict: Verdict) -> None:
        """The same failure for whatever `unit` would have judged."""
        width = job.pending[unit]
        if width == 1:
            self.record(job, unit, replace(verdict))
        else:
            self.record_group(job, unit, [replace(verdict) for _ in range(width)])

    def _count(self, job: Job, unit: int, verdict: Verdict) -> None:
        name = self.names[unit // len(job.items)]
        self.calls[name, verdict.status] += 1
        self.seconds[name] += verdict.seconds


def _cause(first: Verdict | None, second: Verdict) -> str:
    """Whose failure it is after the retry: the same one twice is the reply's doing."""
    if first is None or second.cause != "reply":
        return second.cause
    return "reply" if first.cause == "reply" and _alike(first, second) else "judge"


def _alike(one: Verdict, other: Verdict) -> bool:
    """The same failure: a time-out and a crash are two faces of using too much of the machine, and
    which shows is chance; an exception and an impossible result are both the reward's own words."""
    spent = ("timeout", "crashed")
    return (one.status in spent) == (other.status in spent)


class _Slot:
    """One process of a lane and the jobs it holds, oldest first."""

    def __init__(self, lane: Lane, process: ScoringProcess):
        self.lane, self.process = lane, process
        process.on_frame, process.on_lost = self._on_frame, self._on_lost
        self.jobs: dict[int, Job] = {}
        self.ready = False
        self._partial: dict[tuple[int, int], dict[int, Verdict]] = {}  # of group rewards
        self._renewal: asyncio.Task[None] | None = None
        self._sign = 0.0  # when the scorer last said or began anything
        self._fresh = False  # whether the scorer has not run anything yet
        self._unsent: set[int] = set()  # jobs that wait for a fresh scorer
        self._ended = False

    async def begin(self) -> None:
        await self.process.renew()
        self.ready = self._fresh = True

    def take(self, job: Job) -> None:
        self.jobs[job.id] = job
        if len(self.jobs) == 1:
            self._sign = time.monotonic()
        self._send(job)

    def watch(self) -> None:
        """Ends a call that is over its deadline or its memory, and a scorer that is stuck."""
        assert self.process.cell is not None
        job, unit, start = self.process.cell.read()
        now = time.monotonic()
        deadline = self.lane.deadline
        if not job:
            if now - self._sign > deadline + STALL_GRACE:
                self._renew(None, Verdict(status="timeout", detail="the scorer is stuck"))
            return
        running = now - start / 1e9
        self._sign = max(self._sign, start / 1e9)
        if running > deadline:
            detail = f"{self._name(job, unit)} ran for more than {deadline:g} s"
            self._renew((job, unit), Verdict(status="timeout", detail=detail, seconds=running))
        elif running > 0.02:
            size, count = self.process.usage()
            if count > self.lane.process_limit:
                detail = f"{count} processes, more than {self.lane.process_limit}"
            elif size > self.lane.memory_bytes:
                detail = f"out of memory: {size >> 20} MiB resident"
            else:
                return
            self._renew((job, unit), Verdict(status="crashed", detail=detail, seconds=running))

    async def end(self) -> None:
        self._ended, self.ready = True, False
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
        await self.process.end()
        for job in self.jobs.values():
            job.done.cancel()
        self.jobs.clear()

    def _name(self, job: int, unit: int) -> str:
        held = self.jobs.get(job)
        return self.lane.names[unit // len(held.items)] if held else "a reward"

    def _send(self, job: Job) -> None:
        """Sends what is left of `job`, if this scorer may have it: retries want a fresh one."""
        sync = not self.process.is_async
        if not self.process.is_up:  # it could not be replaced the last time: try again
            self._unsent.add(job.id)
            self._renew()
            return
        if sync and job.retries_only() and not self._fresh:
            self._unsent.add(job.id)
            return
        job.sent = job.next_units(alone=sync and self.process.forks)
        work = Work(
            job=job.id,
            tasks=job.tasks,
            items=job.items,
            units=job.sent,
            seconds=(self.lane.deadline + 1.0) * len(job.sent) + STALL_GRACE,
        )
        try:
            self.process.send(work)
        except Exception as error:  # pickle raises anything for values that cannot travel
            detail = f"the row cannot be sent to a scoring process: {one_line(error)}"
            self._give_up(job, Verdict(status="error", detail=detail, cause="judge"))
            return
        self._fresh = False
        self._unsent.discard(job.id)

    def _on_frame(self, frame: Any) -> None:
        """[job, 1 if it was the last, entries]; raises ValueError for anything else, which closes
        the channel: whoever wrote it was not our worker."""
        self._sign = time.monotonic()
        if not isinstance(frame, list) or len(frame) != 3 or not isinstance(frame[2], list):
            raise ValueError("not a frame of verdicts")
        job = self.jobs.get(frame[0]) if isinstance(frame[0], int) else None
        if job is None:
            return  # a job that was given up, or the last words of a dead scorer
        for entry in frame[2]:
            if type(entry) is not list or len(entry) != 5 or type(entry[0]) is not int:
                raise ValueError("not a verdict of a unit")
            verdict, unit = parse(entry), entry[0]
            if job.pending.get(unit) == 1:
                self.lane.record(job, unit, verdict)
            else:
                self._on_piece(job, unit, verdict)
        if frame[1]:
            self._on_done(job)

    def _on_piece(self, job: Job, unit: int, verdict: Verdict) -> None:
        """One of the G verdicts of a group reward; recorded when all are there."""
        base = unit - unit % len(job.items)
        width = job.pending.get(base, 0)
        if not base <= unit < base + width:
            return  # nobody waits for it
        pieces = self._partial.setdefault((job.id, base), {})
        pieces[unit] = verdict
        if len(pieces) == width:
            del self._partial[job.id, base]
            self.lane.record_group(job, base, [pieces[base + k] for k in range(width)])

    def _on_done(self, job: Job) -> None:
        if not job.pending:
            self._finish(job)
        elif self.ready:  # else the renewal that is under way sends it again
            self._send(job)
            self._renew_if_all_wait()

    def _finish(self, job: Job) -> None:
        self.jobs.pop(job.id, None)
        self._unsent.discard(job.id)
        self.lane.job_seconds += 0.2 * (job.seconds() - self.lane.job_seconds)
        if not job.done.done():
            job.done.set_result(None)
        self._renew_if_all_wait()
        self.lane.feed()

    def _renew_if_all_wait(self) -> None:
        if self.jobs and len(self._unsent) == len(self.jobs):
            self._renew()

    def _give_up(self, job: Job, verdict: Verdict) -> None:
        for unit in list(job.pending):
            job.failed_once[unit] = verdict  # no retry: nothing ran
            self.lane.fail(job, unit, verdict)
        self._finish(job)

    def _on_lost(self, how: str) -> None:
        """The scorer died by itself: the unit in its cell was running."""
        assert self.process.cell is not None
        job, unit, start = self.process.cell.read()
        seconds = max(0.0, time.monotonic() - start / 1e9) if job else 0.0
        blame = (job, unit) if job else None
        self._renew(blame, Verdict(status="crashed", detail=how, seconds=seconds))

    def _renew(self, blame: tuple[int, int] | None = None, verdict: Verdict | None = None) -> None:
        if self.ready and not self._ended:
            self.ready = False
            self._renewal = asyncio.create_task(self._renewed(blame, verdict))

    async def _renewed(self, blame: tuple[int, int] | None, verdict: Verdict | None) -> None:
        """A fresh scorer, then the blame, then all that this slot still holds."""
        self.lane.restarts += 1
        problem = await self._start_afresh()
        self._partial.clear()
        if verdict is not None:
            self._blame(blame, verdict)
        if problem:
            broken = Verdict(status="error", detail=problem, cause="judge")
            for job in list(self.jobs.values()):
                self._give_up(job, broken)
        self.ready = self._fresh = True
        self._unsent.clear()
        self._sign = time.monotonic()
        for job in list(self.jobs.values()):
            if job.pending:
                self._send(job)
            else:
                self._finish(job)  # its last verdict was in the dead scorer's last words
        self.lane.feed()

    async def _start_afresh(self) -> str:
        """Renews the scorer, three times if need be. Returns why it failed, or ""."""
        for pause in (0.1, 0.5, None):
            try:
                await self.process.renew()
                return ""
            except Exception as error:  # whatever it is, a group must not wait for ever
                problem = one_line(error, bare=isinstance(error, RlpostError))
                if pause is not None:
                    await asyncio.sleep(pause)
        return problem

    def _blame(self, blame: tuple[int, int] | None, verdict: Verdict) -> None:
        job = self.jobs.get(blame[0]) if blame else None
        if blame and job is not None and blame[1] in job.pending:
            self.lane.fail(job, blame[1], verdict)
            return
        if blame is not None or not self.jobs:
            return
        oldest = next(iter(self.jobs.values()))  # nothing was running, by the cell at least
        if oldest.barren_deaths and len(oldest.sent) == 1 and oldest.sent[0] in oldest.pending:
            unit = oldest.sent[0]  # it was sent alone, so its doing it was
            self.lane.fail(oldest, unit, verdict)
        oldest.barren_deaths += 1
        if oldest.barren_deaths > BARREN_DEATHS + 2 * len(oldest.items):
            self._give_up(oldest, replace(verdict, cause="judge"))
