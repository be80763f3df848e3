"""An engine that one thread of its own drives step by step: what vLLM in-process and transformers
share.
 Callers use asyncio. Everything that touches the model happens on the engine thread, between two
steps: that is what makes a publish atomic. Which versions are alive, and when one is let go, is
decided here.
"""

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rlpost.engine.base import BASE_VERSION, EngineSpec, Publication, Sampling
from rlpost.errors import EngineError
from rlpost.types import Completion

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Served:
    """A version as it is served. `name` was never used before, whatever the version: no cache keyed
    by it can be stale. `adapter` is the engine's own handle, None for the model's own weights."""

    version: int
    name: str
    adapter: Any = None
    running: int = 0


class Request:
    """One completion (or, if `scored`, the log-probabilities of the prompt) on its way."""

    __slots__ = ("answer", "prompt", "sampling", "scored", "served")

    def __init__(self, prompt: Sequence[int], sampling: Sampling, *, scored: bool):
        self.prompt, self.sampling, self.scored = list(prompt), sampling, scored
        self.answer: Future[Any] = Future()
        self.served: Served | None = None  # set once admitted


class SteppedEngine:
    """The engine contract (`rlpost/engine/base.py`) over a Stepper, which knows the library."""

    def __init__(self, spec: EngineSpec, stepper: "Stepper"):
        self.spec = spec
        self._stepper = stepper
        self._thread: threading.Thread | None = None
        self._open: set[asyncio.Future[Any]] = set()  # requests without an answer yet, for drain

    @property
    def version(self) -> int:
        return self._stepper.version

    async def start(self) -> None:
        """Loads the model. Raises EngineError with the library's reason."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._stepper.run, args=(ready,), name="engine", daemon=True
        )
        self._thread.start()
        await asyncio.wrap_future(ready)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, version: int | None = None
    ) -> Completion:
        """A reply ends at `sampling.stop_token_ids` and at nothing else, and is cut where prompt
        and reply together reach `spec.max_length`."""
        if not prompt_ids:
            raise EngineError("the prompt is empty")
        if len(prompt_ids) >= self.spec.max_length:
            raise EngineError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room for a reply: max_length is "
                f"{self.spec.max_length}"
            )
        if sampling.max_tokens < 1:
            raise EngineError(f"max_tokens is {sampling.max_tokens}; it must be at least 1")
        return await self._ask(Request(prompt_ids, sampling, scored=False), version)

    async def score(
        self, sequences: Sequence[Sequence[int]], *, version: int | None = None
    ) -> list[list[float]]:
        if too_long := [len(each) for each in sequences if len(each) > self.spec.max_length]:
            raise EngineError(
                f"a sequence of {max(too_long)} tokens: max_length is {self.spec.max_length}"
            )
        greedy = Sampling(max_tokens=1, temperature=0.0)

        async def one(sequence: Sequence[int]) -> list[float]:
            if len(sequence) < 2:
                return [0.0] * len(sequence)
            return await self._ask(Request(sequence, greedy, scored=True), version)

        return list(await asyncio.gather(*(one(sequence) for sequence in sequences)))

    async def publish(self, publication: Publication) -> None:
        while not await self._call(lambda: self._stepper.publish(publication)):
            await asyncio.sleep(0.01)  # every slot holds a version with running requests; they end

    async def fingerprint(self, *, version: int | None = None) -> Mapping[str, int]:
        return await self._call(lambda: self._stepper.fingerprint(self._stepper.find(version)))

    async def drain(self) -> None:
        while self._open:
            await asyncio.wait(self._open)

    def statistics(self) -> Mapping[str, float]:
        return dict(self._stepper.counters)

    async def stop(self) -> None:
        """Ends running requests with EngineError and frees what the engine held."""
        if self._thread is not None:
            self._stepper.stop()
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    async def _ask(self, request: Request, version: int | None) -> Any:
        answer = asyncio.wrap_future(request.answer)
        self._open.add(answer)
        answer.add_done_callback(self._open.discard)
        try:
            self._stepper.post(lambda: self._stepper.take(request, version), request.answer)
            return await answer
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):  # a stopped engine has nothing left to abort
                self._stepper.post(lambda: self._stepper.drop(request), Future())
            raise
        finally:
            self._open.discard(answer)

    async def _call(self, act: Callable[[], T]) -> T:
        done: Future[T] = Future()
        self._stepper.post(lambda: done.set_result(act()), done)
        return await asyncio.wrap_future(done)


class Stepper(ABC):
    """The engine thread and everything it owns. Only `post` and `stop` are called from outside."""

    def __init__(self, spec: EngineSpec):
        self.spec = spec
        self.version = BASE_VERSION
        self.vocabulary = 0  # rows of the embedding, set by `open`
        self.counters: dict[str, float] = dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "requests", "busy_seconds"), 0
        )
        self.requests: set[Request] = set()  # admitted and not answered
        self._served: dict[int, Served] = {}  # by version, oldest publication first
        self._retiring: list[Served] = []  # no new requests, some still running
        self._published = 0
        self._broken = ""  # why nothing is served until the next publish
        self._ended = ""  # why the thread takes no more work
        self._stopping = False
        self._inbox: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._wake = threading.Condition()

    # -- what a library fills in -------------------------------------------------------------------

    @abstractmethod
    def open(self) -> None:
        """Loads the model as `BASE_VERSION` and sets `vocabulary`."""

    @abstractmethod
    def close(self) -> None:
        """Frees everything; also called when `open` or `step` failed."""

    @abstractmethod
    def admit(self, request: Request) -> None:
        """Queues a request whose `served` is set."""

    @abstractmethod
    def abort(self, request: Request) -> None:
        """Forgets an admitted request."""

    @abstractmethod
    def step(self) -> None:
        """One step of the running batch; calls `answer` for requests that are done."""

    @abstractmethod
    def load_adapter(self, publication: Publication, name: str) -> Any:
        """The handle of a new adapter. Raises EngineError and leaves the others as they are."""

    @abstractmethod
    def unload_adapter(self, served: Served) -> None: ...

    @abstractmethod
    def load_full(self, publication: Publication) -> None:
        """Replaces all weights and drops every cache of the old ones; nothing is running."""

    @abstractmethod
    def fingerprint(self, served: Served) -> dict[str, int]: ...

    # -- from any thread ---------------------------------------------------------------------------

    def post(self, act: Callable[[], None], answer: "Future[Any]") -> None:
        """Runs `act` on the engine thread before its next step; what it raises becomes the
        answer."""
        with self._wake:
            if self._ended or self._stopping:
                raise EngineError(self._ended or "the engine is stopping")
            self._inbox.append((act, answer))
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # -- the engine thread -------------------------------------------------------------------------

    def run(self, ready: "Future[None]") -> None:
        reason = "the engine was stopped"
        try:
            self.open()
            self._served[BASE_VERSION] = Served(BASE_VERSION, "base")
            ready.set_result(None)
            while not self._stopping:
                self._take_inbox(wait=not self.requests)
                if self.requests and not self._stopping:
                    started = time.perf_counter()
                    self.step()
                    self.counters["busy_seconds"] += time.perf_counter() - started
        except Exception as error:  # whatever breaks the thread must reach everyone who waits on it
            reason = _reason("the engine failed", error)
        finally:
            with self._wake:
                self._ended = reason
                waiting = [answer for _, answer in self._inbox]
                self._inbox.clear()
            with contextlib.suppress(Exception):  # what broke may not close cleanly
                self.close()
            for answer in [ready, *waiting, *(request.answer for request in self.requests)]:
                _fail(answer, EngineError(reason))
            self.requests.clear()

    def _take_inbox(self, *, wait: bool) -> None:
        with self._wake:
            while wait and not self._inbox and not self._stopping:
                self._wake.wait()
            acts = list(self._inbox)
            self._inbox.clear()
        for act, answer in acts:
            try:
                act()
            except EngineError as error:
                _fail(answer, error)
            except Exception as error:  # a refused request is its own failure, not the engine's
                _fail(answer, EngineError(_reason("the engine refused", error)))

    def take(self, request: Request, version: int | None) -> None:
        if request.answer.cancelled():
            return
        request.served = self.find(version)
        if strange := [token for token in request.prompt if not 0 <= token < self.vocabulary]:
            # it would break the engine, on a GPU beyond repair
            raise EngineError(f"token {strange[0]} is outside the vocabulary of {self.vocabulary}")
        self.admit(request)
        request.served.running += 1
        self.requests.add(request)

    def drop(self, request: Request) -> None:
        """The caller is gone."""
        if request in self.requests:
            self.abort(request)
            self._forget(request)

    def answer(self, request: Request, result: Any) -> None:
        """Counts and hands over a finished request."""
        self.counters["prompt_tokens"] += len(request.prompt)
        if isinstance(result, Completion):
            self.counters["requests"] += 1
            self.counters["completion_tokens"] += len(result.token_ids)
        self._forget(request)
        if not request.answer.done():
            request.answer.set_result(result)

    def _forget(self, request: Request) -> None:
        self.requests.discard(request)
        served = request.served
        assert served is not None
        served.running -= 1
        if not served.running and served in self._retiring:
            self._retiring.remove(served)
            self.unload_adapter(served)

    # -- versions ----------------------------------------------------------------------------------

    def find(self, version: int | None) -> Served:
        """The version asked for, or the current one. Raises EngineError where it is not served."""
        if self._broken:
            raise EngineError(self._broken)
        served = self._served.get(self.version if version is None else version)
        if served is None:
            raise EngineError(f"version {version} is not served (served: {sorted(self._served)})")
        return served

    def publish(self, publication: Publication) -> bool:
        """False if it must be tried again, because running requests hold every adapter slot."""
        if publication.kind == "full":
            self._publish_full(publication)
            return True
        if not self.spec.lora_rank:
            raise EngineError("an adapter was published to an engine with lora_rank = 0")
        alive = [each for each in self._served.values() if each.adapter is not None]
        if len(alive) + len(self._retiring) > self.spec.keep:
            return False
        name = self._name(publication)
        served = Served(publication.version, name, self.load_adapter(publication, name))
        self._retire(self._served.pop(publication.version, None))  # the same version once more
        self._served[publication.version] = served
        self.version = publication.version
        adapters = [each for each in self._served.values() if each.adapter is not None]
        for old in adapters[: -self.spec.keep]:
            self._retire(self._served.pop(old.version))
        return True

    def _publish_full(self, publication: Publication) -> None:
        if self.spec.lora_rank:
            raise EngineError("full weights were published to an engine that serves adapters")
        if self.requests:
            raise EngineError("full weights were published while requests run: drain first")
        self._broken = f"the weights of version {publication.version} were only partly loaded"
        self.load_full(publication)
        self._broken = ""
        served = Served(publication.version, self._name(publication))
        self._served = {publication.version: served}
        self.version = publication.version

    def _name(self, publication: Publication) -> str:
        self._published += 1
        return f"v{publication.version}-{self._published}"

    def _retire(self, served: Served | None) -> None:
        if served is None or served.adapter is None:
            return
        if served.running:
            self._retiring.append(served)  # its requests end on the version they began with
        else:
            self.unload_adapter(served)


def _fail(answer: "Future[Any]", error: EngineError) -> None:
    if not answer.done():
        answer.set_exception(error)


def _reason(what: str, error: Exception) -> str:
    return (
        str(error) if isinstance(error, EngineError) else f"{what}: {type(error).__name__}: {error}"
    )
