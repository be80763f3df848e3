"""The buffer: admits tasks, orders their groups, ages and drops them. It alone compares versions.

One update trains one *cohort*: P groups, admitted one after another. Cohort k is open for admission
once k - S cohorts have been released, so at most (S + 1) P groups are between admission and
release, and since cohorts are trained in order and released only after the new version is proven,
no group is older than S. A group that is dropped (useless under refill, late, without two scores)
gives its place to the next task, up to 4 P tasks a cohort.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.types import Group, Task

REFILL_LIMIT = 4  # times P tasks are tried for one update; then it is trained with what there is


@dataclass(slots=True, kw_only=True)
class Ticket:
    """An admitted task: group `id` of `cohort`, to be sampled under `version`."""

    id: int
    cohort: int
    task: Task
    version: int
    admitted: float  # monotonic seconds
    group: Group | None = None
    dropped: str = ""  # why, once dropped


@dataclass(slots=True)
class _Cohort:
    number: int
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def kept(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if not ticket.dropped]


class TaskQueue:
    """The tasks in seeded order, epoch after epoch; a task given back goes to the end of the queue.

    `cursor` counts the tasks drawn from the epochs, so that the order is a function of the seed
    alone.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int):
        if not tasks:
            raise ValueError("a queue needs at least one task")
        self._tasks, self._seed = list(tasks), seed
        self._by_id = {task.id: task for task in self._tasks}
        self._again: deque[Task] = deque()
        self._order: list[int] = []
        self._epoch = -1
        self.cursor = 0

    def draw(self) -> Task:
        """The next task; those given back come once the epoch that gave them is through."""
        epoch, place = divmod(self.cursor, len(self._tasks))
        if place == 0 and self._again and self._epoch == epoch - 1:
            return self._again.popleft()
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self._tasks)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
        self.cursor += 1
        return self._tasks[self._order[place]]

    def give_back(self, task: Task) -> None:
        self._again.append(task)

    def state(self) -> dict[str, object]:
        return {
            "cursor": self.cursor,
            "epoch": self._epoch,
            "again": [task.id for task in self._again],
        }

    def restore(self, state: dict[str, object]) -> None:
        self.cursor = int(state["cursor"])  # type: ignore[call-overload]
        self._epoch = int(state["epoch"])  # type: ignore[call-overload]
        if self._epoch >= 0:
            self._order = list(range(len(self._tasks)))
            random.Random(f"{self._seed}:{self._epoch}").shuffle(self._order)
        again: Any = state["again"]
        self._again = deque(self._by_id[name] for name in again)


class Buffer:
    """One asyncio owner; every method runs on its loop.

    `lockstep`: a cohort opens only when the one before it is complete, so that which task lands in
    which cohort does not depend on who finishes first.
    """

    def __init__(
        self,
        queue: TaskQueue,
        *,
        tasks_per_update: int,
        staleness: int,
        refill: bool = False,
        min_spread: float = 0.0,
        lockstep: bool = False,
        cohorts: int | None = None,
        clock: Callable[[], float],
    ):
        self._queue, self._clock = queue, clock
        self._P, self._S = tasks_per_update, staleness
        self._refill, self._min_spread, self._lockstep = refill, min_spread, lockstep
        self._last = cohorts  # no more than these are ever admitted
        self._cohorts: deque[_Cohort] = deque()
        self._next_id = 0
        self._changed = asyncio.Condition()
        self.released = 0  # cohorts whose update is published and proven
        self.version = 0  # what the engines serve
        self.dropped: Counter[str] = Counter()
        self.closed = False

    # -- admission ---------------------------------------------------------------------------------

    async def admit(self) -> Ticket | None:
        """Waits for a slot and takes the next task into it; None once the buffer is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.closed or self._wanting() is not None)
            if self.closed:
                return None
            cohort = self._wanting()
            assert cohort is not None
            ticket = Ticket(
                id=self._next_id,
                cohort=cohort.number,
                task=self._queue.draw(),
                version=self.version,
                admitted=self._clock(),
            )
            self._next_id += 1
            cohort.tickets.append(ticket)
            return ticket

    def _wanting(self) -> _Cohort | None:
        """The oldest open cohort that lacks a group, opened now if its turn has come."""
        for cohort in self._cohorts:
            if len(cohort.kept) < self._P and len(cohort.tickets) < REFILL_LIMIT * self._P:
                return cohort
            if self._lockstep and not self._complete(cohort):
                return None
        if len(self._cohorts) < self._openable():
            self._cohorts.append(_Cohort(self.released + len(self._cohorts)))
            return self._cohorts[-1]
        return None

    def _openable(self) -> int:
        """Cohorts that may be open now: S + 1, fewer at the end of the run."""
        left = self._S + 1 if self._last is None else self._last - self.released
        return min(self._S + 1, left)

    # -- arrival -----------------------------------------------------------------------------------

    async def put(self, ticket: Ticket, group: Group) -> None:
        """Takes a finished group. Fewer than two scores: dropped, its task requeued. Useless under
        refill: dropped and counted as all-good or all-bad, its task done."""
        async with self._changed:
            if ticket.dropped:
                return
            if len(group.values) < 2:
                self._drop(ticket, "unscored", requeue=True)
            elif self._refill and group.spread < self._min_spread:
                mean = sum(group.values) / len(group.values)
                self._drop(ticket, "all_good" if mean >= 0.5 else "all_bad", requeue=False)
            if not ticket.dropped:
                ticket.group = group
            self._changed.notify_all()

    async def drop(self, ticket: Ticket, reason: str) -> None:
        """Gives up a group; its task goes to the end of the queue."""
        async with self._changed:
            if not ticket.dropped and ticket.group is None:
                self._drop(ticket, reason, requeue=True)
            self._changed.notify_all()

    def _drop(self, ticket: Ticket, reason: str, *, requeue: bool) -> None:
        ticket.dropped = reason
        self.dropped[reason] += 1
        if requeue:
            self._queue.give_back(ticket.task)

    def _cohort(self, ticket: Ticket) -> _Cohort:
        return self._cohorts[ticket.cohort - self.released]

    def _complete(self, cohort: _Cohort) -> bool:
        full = len(cohort.kept) >= self._P or len(cohort.tickets) >= REFILL_LIMIT * self._P
        return full and all(ticket.group is not None for ticket in cohort.kept)

    # -- training ----------------------------------------------------------------------------------

    async def take(self) -> list[Group] | None:
        """Waits for the oldest cohort and returns its groups in order of admission; it keeps its
        slots until `release`. None once the buffer is closed."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self.closed or bool(self._cohorts and self._complete(self._cohorts[0]))
            )
            if self.closed:
                return None
            return [ticket.group for ticket in self._cohorts[0].kept if ticket.group is not None]

    def staleness(self, groups: Sequence[Group], *, learner_version: int) -> int:
        """The learner's version minus the oldest version that sampled any of the groups."""
        versions = [group.policy_version for group in groups]
        return learner_version - min(versions) if versions else 0

    async def release(self, *, version: int) -> None:
        """The cohort that was taken is trained and `version` is served and proven: its slots
        open."""
        async with self._changed:
            self._cohorts.popleft()
            self.released += 1
            self.version = version
            self._changed.notify_all()

    async def quiet(self) -> None:
        """Waits until every cohort that may be open is complete: in lockstep nothing runs at a
        publish, and nothing that belongs to the version before is still to come."""

        def all_there() -> bool:
            complete = [self._complete(cohort) for cohort in self._cohorts]
            return len(complete) == self._openable() and all(complete)

        async with self._changed:
            await self._changed.wait_for(lambda: self.closed or all_there())

    async def close(self) -> None:
        """No more admissions; whoever waits is told."""
        async with self._changed:
            self.closed = True
            self._changed.notify_all()

    # -- what there is -----------------------------------------------------------------------------

    def running(self) -> Iterator[Ticket]:
        """Tickets whose groups are still being sampled or scored, oldest first."""
        for cohort in self._cohorts:
            yield from (ticket for ticket in cohort.kept if ticket.group is None)

    @property
    def finished(self) -> int:
        return sum(ticket.group is not None for cohort in self._cohorts for ticket in cohort.kept)

    def state(self) -> dict[str, object]:
        """What a checkpoint needs: finished groups stay groups, running ones become tasks to
        redo."""
        cohorts = [
            [
                (ticket.id, ticket.task.id, ticket.version, ticket.group, ticket.dropped)
                for ticket in cohort.tickets
            ]
            for cohort in self._cohorts
        ]
        return {
            "queue": self._queue.state(),
            "released": self.released,
            "version": self.version,
            "next_id": self._next_id,
            "cohorts": cohorts,
        }

    def restore(self, state: dict[str, object], tasks: dict[str, Task]) -> list[Ticket]:
        """Takes up a saved state; returns the tickets whose groups must be sampled again."""
        self._queue.restore(state["queue"])  # type: ignore[arg-type]
        self.released = int(state["released"])  # type: ignore[call-overload]
        self.version = int(state["version"])  # type: ignore[call-overload]
        self._next_id = int(state["next_id"])  # type: ignore[call-overload]
        self._cohorts.clear()
        again: list[Ticket] = []
        for offset, saved in enumerate(state["cohorts"]):  # type: ignore[arg-type,var-annotated]
            cohort = _Cohort(self.released + offset)
            for id, task, version, group, dropped in saved:
                ticket = Ticket(
                    id=id, cohort=cohort.number, task=tasks[task], version=version,
                    admitted=self._clock(), group=group, dropped=dropped,
                )  # fmt: skip
                cohort.tickets.append(ticket)
                if group is None and not dropped:
                    ticket.version = self.version  # sampled anew: by what is served now
                    again.append(ticket)
            self._cohorts.append(cohort)
        return again
