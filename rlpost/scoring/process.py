"""One scoring process as its parent sees it: started, fed, watched, renewed, ended.

Knows sockets, process ids and memory, and nothing of retries (`lane.py`) or of scores (`pool.py`).
"""

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from rlpost.errors import PluginError, ScoringError
from rlpost.scoring import sandbox
from rlpost.scoring.worker import ASYNC, SYNC, Cell, Orders, Work

FRAME_LIMIT = 16 << 20  # bytes; a longer frame was not written by us
_BODY = "import sys; from rlpost.scoring.worker import main; sys.exit(main(sys.argv[1:]))"


class Channel:
    """Frames over a socket, on the running event loop. `on_frame` gets each value that arrives,
    `on_broken` is called once when the other side is gone or talks nonsense."""

    def __init__(
        self,
        end: socket.socket,
        on_frame: Callable[[Any], None],
        on_broken: Callable[[], None] = lambda: None,
    ):
        end.setblocking(False)
        self.end, self._on_frame, self._on_broken = end, on_frame, on_broken
        self._loop = asyncio.get_running_loop()
        self._read, self._write = bytearray(), bytearray()
        self._sent = 0  # bytes of `_write` that are out already
        self._open = True
        self._loop.add_reader(end.fileno(), self.receive)

    def send(self, body: bytes) -> None:
        """Queues `body` behind its length. What does not fit into the socket goes out later."""
        if not self._open:
            return
        data = len(body).to_bytes(4, "little") + body
        if not self._write:
            try:
                sent = self.end.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # its death is reported by whoever watches the process
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self.end.fileno(), self._continue)
        self._write += data

    def receive(self) -> None:
        """Handles everything that lies in the socket now."""
        while self._open:
            try:
                data = self.end.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                return self._break()
            self._read += data
            try:
                self._take_frames()
            except (ValueError, RecursionError):  # not our JSON: user code wrote into the socket
                return self._break()

    def close(self) -> None:
        """Stops listening; what has not arrived is lost."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self.end.fileno())
            self._loop.remove_writer(self.end.fileno())
            self.end.close()

    def _take_frames(self) -> None:
        start = 0
        while len(self._read) >= start + 4:
            size = int.from_bytes(self._read[start : start + 4], "little")
            if size > FRAME_LIMIT:
                raise ValueError("a frame of impossible length")
            if len(self._read) < start + 4 + size:
                break
            value = json.loads(self._read[start + 4 : start + 4 + size])
            start += 4 + size
            self._on_frame(value)
        del self._read[:start]

    def _continue(self) -> None:
        with memoryview(self._write) as left:
            try:
                self._sent += self.end.send(left[self._sent :])
            except BlockingIOError:
                return
            except OSError:
                self._sent = len(left)
        if self._sent >= len(self._write):
            self._write, self._sent = bytearray(), 0
            self._loop.remove_writer(self.end.fileno())

    def _break(self) -> None:
        self.close()
        self._on_broken()


class ScoringProcess:
    """Start it, `send` work, listen to `on_frame`; `on_lost` says that a scorer died unasked, and
    then `renew` gives a fresh one. Its owner calls everything from one event loop.

    The thread that calls `start` must live as long as the process does: the kernel ends the process
    with that thread.
    """

    def __init__(
        self,
        orders: Orders,
        *,
        is_async: bool = False,
        on_frame: Callable[[Any], None] = lambda _: None,
        on_lost: Callable[[str], None] = lambda _: None,
        start_timeout: float = 120.0,
    ):
        self.orders, self.is_async, self.start_timeout = orders, is_async, start_timeout
        self.on_frame, self.on_lost = on_frame, on_lost
        self.kinds: list[tuple[bool, bool]] = []  # (is group, is async) of each reward
        self.forks = False
        self.process: subprocess.Popen[bytes] | None = None
        self.cell: Cell | None = None
        self._control: Channel | None = None
        self._channel: Channel | None = None
        self._pidfd = -1
        self._news: asyncio.Future[Any] | None = None
        self._wanted = ""
        self._expected = True  # whether a death now is our own doing

    async def start(self) -> None:
        """Starts the process and waits until the rewards are imported. Raises PluginError for a
        reward that cannot be used, ScoringError when the process does not come up."""
        ours, theirs = socket.socketpair()
        cell_fd = os.memfd_create("rlpost-cell")
        os.ftruncate(cell_fd, 4096)
        self.cell = Cell(cell_fd)
        command = [sys.executable, "-P", "-c", _BODY]
        command += [str(theirs.fileno()), str(cell_fd), str(os.getpid())]
        if self.orders.shut_in:
            command = [*sandbox.wrapping(self.orders.specs), *command]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what rewards print could block or flood
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), cell_fd),
                start_new_session=True,
                env=sandbox.environment(shut_in=self.orders.shut_in),
            )
        except OSError as error:
            ours.close()
            raise ScoringError(f"a scoring process cannot be started: {error}") from None
        finally:
            theirs.close()
            os.close(cell_fd)
        self._watch_death()
        self._expected = True
        self._control = Channel(ours, self._on_control)
        news = self._await_news()
        self._control.send(pickle.dumps(self.orders))
        answer = await self._news_within(news, self.start_timeout)
        if "ready" not in answer:
            await self.end()
            kind = PluginError if answer.get("user") else ScoringError
            raise kind(str(answer.get("failed", "a scoring process ended while it started")))
        self.forks = bool(answer["ready"])
        self.kinds = [(bool(group), bool(is_async)) for group, is_async in answer["kinds"]]

    async def renew(self) -> None:
        """A fresh scorer: the old one, if any, is dead with everything it started, and every frame
        it had sent was handled. Raises what `start` raises."""
        self._expected = True
        if self.process is not None and self.forks and self.process.poll() is None:
            try:
                await self._fork()
                return
            except ScoringError:
                pass  # the keeper does not answer: replace it as well
        elif self.process is not None and self._channel is None and self.process.poll() is None:
            await self._fork()  # a process that cannot fork, before its first work
            return
        await self.end()
        await self.start()
        await self._fork()

    @property
    def is_up(self) -> bool:
        """Whether there is a scorer to send work to."""
        return self._channel is not None

    def send(self, work: Work) -> None:
        """Hands `work` to the scorer. Raises whatever pickle raises for values that cannot
        travel."""
        assert self._channel is not None, "renew() comes first"
        self._channel.send(pickle.dumps(tuple(work), protocol=pickle.HIGHEST_PROTOCOL))

    def usage(self) -> tuple[int, int]:
        """(resident bytes, processes) of the process and everything below it."""
        pages, count, todo = 0, 0, [self.process.pid] if self.process else []
        while todo and count < 10_000:
            pid = todo.pop()
            try:
                with open(f"/proc/{pid}/statm") as file:
                    pages += int(file.read().split()[1])
                count += 1
                for thread in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{thread}/children") as file:
                        todo += [int(each) for each in file.read().split()]
            except (OSError, IndexError, ValueError):
                continue  # it ended while we looked
        return pages * os.sysconf("SC_PAGE_SIZE"), count

    async def end(self) -> None:
        """Ends the process and everything below it; returns when it is gone."""
        self._expected = True
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._control is not None:
            self._control.close()  # the keeper sees this, buries its scorer and leaves
            self._control = None
        if self.process is not None:
            await self._gone(2.0 if self.forks else 0.0)
            self.process = None
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    async def _gone(self, patience: float) -> None:
        assert self.process is not None
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        while self.process.poll() is None and loop.time() < end:
            await asyncio.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        while self.process.poll() is None:
            await asyncio.sleep(0.002)

    async def _fork(self) -> None:
        assert self._control is not None
        ours, theirs = socket.socketpair()
        news = self._await_news("fresh")
        try:
            mode = ASYNC if self.is_async else SYNC
            socket.send_fds(self._control.end, [mode], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise ScoringError(f"a scoring process does not answer: {error}") from None
        finally:
            theirs.close()
        answer = await self._news_within(news, 30.0)
        if self._channel is not None:
            self._channel.receive()  # the last words of the old scorer, which is dead by now
            self._channel.close()
        if "fresh" not in answer:
            ours.close()
            raise ScoringError("a scoring process ended before its work")
        self._channel = Channel(ours, self.on_frame, self._on_nonsense)
        self._expected = False

    def _await_news(self, word: str = "") -> asyncio.Future[Any]:
        self._wanted = word  # "": whatever comes first
        self._news = asyncio.get_running_loop().create_future()
        return self._news

    async def _news_within(self, news: asyncio.Future[Any], seconds: float) -> dict[str, Any]:
        try:
            answer = await asyncio.wait_for(news, seconds)
        except TimeoutError:
            return {"failed": f"a scoring process gave no sign within {seconds:g} s"}
        finally:
            self._news = None
        return answer if isinstance(answer, dict) else {}

    def _on_control(self, news: Any) -> None:
        waiting = self._news is not None and not self._news.done()
        if self._news is not None and waiting and (not self._wanted or self._wanted in news):
            self._news.set_result(news)
        elif isinstance(news, dict) and "died" in news and not self._expected:
            self._lose(_how(int(news["died"])))

    def _watch_death(self) -> None:
        assert self.process is not None
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = os.pidfd_open(self.process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_death)

    def _on_death(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        code = self.process.wait() if self.process else 0
        if self._news is not None and not self._news.done():
            if self._control is not None:
                self._control.receive()  # why it failed may still lie in the socket
            if self._news is not None and not self._news.done():
                self._news.set_result({"failed": f"a scoring process ended: {_how(code)}"})
        elif not self._expected:
            self._lose(_how(code))

    def _on_nonsense(self) -> None:
        if not self._expected and self.process is not None and self.process.poll() is None:
            if self.forks:
                return  # the keeper reports the death; or the scorer closed its end and will
            self._lose("closed its channel")

    def _lose(self, how: str) -> None:
        self._expected = True
        if self._channel is not None:
            self._channel.receive()
        self.on_lost(how)


def _how(code: int) -> str:
    """An exit code in words: "killed by SIGSEGV", "exited with 3"."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
