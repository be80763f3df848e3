"""The inside of a scoring process, started by `process.py` and by nobody else.

Two processes in one file. The *keeper* is started once, imports the rewards once, and then only
forks, watches and buries. The *scorer* is a fork of it that runs user code; when that hangs,
crashes or may have been left in a bad state the keeper kills it with everything it started and
forks a fresh one, within milliseconds. If importing the rewards started threads a fork would be
unsafe; the keeper then scores itself and the parent starts whole processes instead.

What crosses: parent to us, pickles of the parent's own plain types, on sockets. Us to parent, JSON
frames, validated there (`judge.parse`): user code may write anything. Beside them a *cell* of
shared memory says what is running since when, so that the parent can tell, without one more
message, which call hangs and which one was running at a death.
"""

import asyncio
import contextlib
import ctypes
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlpost.errors import RlpostError
from rlpost.reward import RewardSpec
from rlpost.scoring import sandbox
from rlpost.scoring.judge import Judge, Verdict, dump, one_line, to_frame
from rlpost.types import Rollout, Task

CELL = struct.Struct("<qqq")  # job (0: nothing runs), unit, start in ns of the monotonic clock
FLUSH_NS = 5_000_000  # verdicts wait this long at most before they are sent
SYNC, ASYNC = b"s", b"a"  # how a fresh scorer is to work
CALLS_AT_ONCE = 64  # of async rewards, in one process
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a keeper is started with."""

    specs: Sequence[RewardSpec]
    limits: sandbox.Limits
    deadline: float  # seconds for one call
    shut_in: bool = False  # inside bubblewrap
    uid: int = 0  # whose user id it takes there


Item = tuple[int, str, Any, str, Any]  # task's index, reply, messages, stop reason, info
Row = tuple[Any, ...]  # the fields of a Task, in their order: tuples travel faster than dataclasses


class Work(NamedTuple):
    """One job on its way to a scorer. Units number the calls: spec * len(items) + item for a single
    reward, spec * len(items) for a group reward."""

    job: int
    tasks: Sequence[Row]
    items: Sequence[Item]
    units: Sequence[int]
    seconds: float  # of CPU that the units may use in all


class Cell:
    """Shared memory that says what runs: written by the scorer, read by the parent."""

    def __init__(self, fd: int):
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)

    def mark(self, job: int, unit: int, now: int) -> None:
        CELL.pack_into(self._memory, 0, job, unit, now)

    def clear(self) -> None:
        CELL.pack_into(self._memory, 0, 0, 0, 0)

    def read(self) -> tuple[int, int, int]:
        """(job, unit, start in ns); job 0 when nothing runs."""
        return CELL.unpack_from(self._memory, 0)

    def close(self) -> None:
        self._memory.close()


# ── keeper ─────────────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str]) -> int:
    """`worker CONTROL CELL PARENT`: two inherited file descriptors and the parent's process id."""
    control = socket.socket(fileno=int(arguments[0]))
    cell_fd, parent = int(arguments[1]), int(arguments[2])
    orders: Orders = pickle.loads(receive(control))
    if orders.shut_in:
        leave_root(
            orders.uid
        )  # before the first line of user code; bubblewrap ends us with the parent
    else:
        _die_with_parent(parent, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sandbox.apply(orders.limits, processes=orders.shut_in)
    cell = Cell(cell_fd)
    os.close(cell_fd)
    try:
        judges = [Judge(spec) for spec in orders.specs]
    except BaseException as error:  # user code may raise anything while it is imported
        ours = isinstance(error, RlpostError)
        control.sendall(to_frame({"failed": one_line(error, bare=ours), "user": ours}))
        return 1
    forks = len(os.listdir("/proc/self/task")) == 1
    kinds = [[judge.is_group, judge.is_async] for judge in judges]
    control.sendall(to_frame({"ready": forks, "kinds": kinds}))
    scorer = Scorer(orders, judges, cell)
    if not forks:
        mode, fds, _, _ = socket.recv_fds(control, 1, 1)
        if fds:
            control.sendall(to_frame({"fresh": os.getpid()}))
            scorer.run(socket.socket(fileno=fds[0]), is_async=mode == ASYNC)
        return 0
    return Keeper(control, scorer, orders.shut_in).run()


class Keeper:
    """Forks a scorer for every socket that arrives on `control`, and reports how the last one
    ended."""

    def __init__(self, control: socket.socket, scorer: "Scorer", shut_in: bool):
        self._control, self._scorer, self._shut_in = control, scorer, shut_in
        self._child, self._watch = 0, -1
        libc = ctypes.CDLL(None)
        libc.prctl(
            _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
        )  # orphans of a scorer come to us, to be killed

    def run(self) -> int:
        """Returns when the parent closes the control socket, with nothing left running."""
        signal.signal(signal.SIGTERM, lambda *_: self._leave())
        while True:
            watched = [self._control] + ([self._watch] if self._child else [])
            ready, _, _ = select.select(watched, [], [])
            if self._watch in ready:
                self._tell({"died": os.waitstatus_to_exitcode(self._bury())})
            if self._control in ready:
                mode, fds, _, _ = socket.recv_fds(self._control, 1, 1)
                self._bury()
                if not mode:
                    return 0
                self._fork(fds[0], is_async=mode == ASYNC)

    def _fork(self, fd: int, *, is_async: bool) -> None:
        keeper = os.getpid()
        self._scorer.cell.clear()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                _die_with_parent(keeper, signal.SIGKILL)
                os.setsid()
                self._control.close()
                self._scorer.run(socket.socket(fileno=fd), is_async=is_async)
                code = 0
            finally:
                os._exit(code)  # never back into the keeper's loop
        os.close(fd)
        self._child, self._watch = child, os.pidfd_open(child)
        self._tell({"fresh": child})

    def _bury(self) -> int:
        """Kills the scorer and everything that it started, however it detached itself. Returns the
        scorer's wait status."""
        if not self._child:
            return 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        os.close(self._watch)
        self._child, self._watch = 0, -1
        end = time.monotonic() + 5.0
        while time.monotonic() < end:  # a fork bomb takes some rounds
            if self._shut_in:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(-1, signal.SIGKILL)  # everything in this namespace but ourselves
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            time.sleep(0.001)
        return status

    def _tell(self, news: dict[str, int]) -> None:
        with contextlib.suppress(OSError):  # a parent that is gone is noticed by the next select
            self._control.sendall(to_frame(news))

    def _leave(self) -> None:
        self._bury()
        os._exit(0)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(each) for each in file.read().split()]
    except OSError:
        return []  # a kernel without this file: the session's death has to do


def leave_root(uid: int) -> None:
    """Becomes `uid` for good; without root there is nothing to leave."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def _die_with_parent(parent: int, how: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(how), 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(0)


def receive(source: socket.socket) -> bytes:
    """One message behind its length (4 bytes). EOFError when the other side is gone."""
    head = _exactly(source, 4)
    return bytes(_exactly(source, int.from_bytes(head, "little")))


def _exactly(source: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, have = memoryview(data), 0
    while have < count:
        got = source.recv_into(view[have:])
        if not got:
            raise EOFError
        have += got
    return data


# ── scorer ─────────────────────────────────────────────────────────────────────────────────────


class Scorer:
    """Runs the calls of user code, one after the other, or many at once where they are async."""

    def __init__(self, orders: Orders, judges: Sequence[Judge], cell: Cell):
        self.orders, self.judges, self.cell = orders, judges, cell

    def run(self, channel: socket.socket, *, is_async: bool) -> None:
        """Serves until the parent closes the channel."""
        channel.setblocking(True)
        try:
            if is_async:
                asyncio.run(self._serve_async(channel))
            else:
                self._serve(channel)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return

    def _serve(self, channel: socket.socket) -> None:
        """One call after the other. A call's end is the next one's start, and the cell is cleared
        only before a send: what the parent is slow to take must not count as somebody's time."""
        while True:
            work = Work(*pickle.loads(receive(channel)))
            sandbox.limit_cpu(work.seconds)
            rollouts = _rollouts(work)
            entries: list[Any] = []
            sent = start = time.monotonic_ns()
            for unit in work.units:
                self.cell.mark(work.job, unit, start)
                verdicts = self._call(unit, rollouts)
                now = time.monotonic_ns()
                share = (now - start) // len(verdicts)
                entries += [dump(unit + k, verdict, share) for k, verdict in enumerate(verdicts)]
                if now - sent > FLUSH_NS:
                    self.cell.clear()
                    channel.sendall(to_frame([work.job, 0, entries]))
                    entries = []
                    sent = now = time.monotonic_ns()
                start = now
            self.cell.clear()
            channel.sendall(to_frame([work.job, 1, entries]))

    def _call(self, unit: int, rollouts: list[Rollout]) -> list[Verdict]:
        spec, index = divmod(unit, len(rollouts))
        judge = self.judges[spec]
        if judge.is_group:
            return judge.judge_group(rollouts[0].task, rollouts)
        rollout = rollouts[index]
        return [judge.judge(rollout.task, rollout)]

    async def _serve_async(self, channel: socket.socket) -> None:
        """Many jobs at once. A call that blocks the event loop is seen by the parent through the
        cell, which holds the call that is being stepped; one that merely waits too long ends
        here."""
        channel.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=channel, limit=1 << 20)
        gate = asyncio.Semaphore(CALLS_AT_ONCE)
        running: set[asyncio.Task[None]] = set()
        while True:
            try:
                size = int.from_bytes(await reader.readexactly(4), "little")
                work = Work(*pickle.loads(await reader.readexactly(size)))
            except asyncio.IncompleteReadError:
                return
            sandbox.limit_cpu(work.seconds * 4)
            task = asyncio.create_task(self._serve_job(work, gate, writer))
            running.add(task)
            task.add_done_callback(running.discard)

    async def _serve_job(
        self, work: Work, gate: asyncio.Semaphore, writer: asyncio.StreamWriter
    ) -> None:
        rollouts = _rollouts(work)

        async def one(unit: int) -> None:
            async with gate:
                start = time.monotonic_ns()
                verdicts = await self._timed(work, unit, rollouts)
                share = (time.monotonic_ns() - start) // len(verdicts)
            entries = [dump(unit + k, verdict, share) for k, verdict in enumerate(verdicts)]
            writer.write(to_frame([work.job, 0, entries]))

        await asyncio.gather(*(one(unit) for unit in work.units))
        writer.write(to_frame([work.job, 1, []]))
        await writer.drain()

    async def _timed(self, work: Work, unit: int, rollouts: list[Rollout]) -> list[Verdict]:
        spec, index = divmod(unit, len(rollouts))
        judge = self.judges[spec]
        call: Awaitable[Any]
        if judge.is_group:
            call, count = judge.judge_group_async(rollouts[0].task, rollouts), len(rollouts)
        else:
            rollout = rollouts[index]
            call, count = judge.judge_async(rollout.task, rollout), 1
        try:
            async with asyncio.timeout(self.orders.deadline):
                done = await _Stepped(
                    call,
                    lambda: self.cell.mark(work.job, unit, time.monotonic_ns()),
                    self.cell.clear,
                )
        except TimeoutError:
            detail = f"no answer after {self.orders.deadline:g} s"
            done = [Verdict(status="timeout", detail=detail, cause="judge")] * count
        return done if isinstance(done, list) else [done]


class _Stepped:
    """An awaitable that says when it is being computed and when it merely waits."""

    def __init__(self, call: Any, enter: Callable[[], None], leave: Callable[[], None]):
        self._call, self._enter, self._leave = call, enter, leave

    def __await__(self) -> Any:
        inner = self._call.__await__()
        step, value = inner.send, None
        while True:
            self._enter()
            try:
                future = step(value)
            except StopIteration as done:
                return done.value
            finally:
                self._leave()
            try:
                step, value = inner.send, (yield future)
            except BaseException as error:  # a cancellation, which the call must see
                step, value = inner.throw, error


def _rollouts(work: Work) -> list[Rollout]:
    tasks = [
        Task(id=id, messages=messages, answer=answer, schema=schema, tools=tools, images=images,
             meta=meta)
        for id, messages, answer, schema, tools, images, meta in work.tasks
    ]  # fmt: skip
    return [
        Rollout(task=tasks[task], reply=reply, messages=messages, stop_reason=reason, info=info)
        for task, reply, messages, reason, info in work.items
    ]
