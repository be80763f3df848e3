"""vLLM inside this process, driven step by step by one thread of its own: continuous batching
without an engine process (which costs 46 s and a second copy of everything on a small CPU machine).
 Callers use asyncio; every touch of vLLM happens on the engine thread, between two steps: that is
what makes a publish atomic. One engine per process: vLLM keeps its parallel state in module
globals.
"""

import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlpost.engine.base import BASE_VERSION, EngineSpec, Publication, Sampling
from rlpost.errors import EngineError
from rlpost.types import Completion

T = TypeVar("T")

CPU_CACHE_BYTES = (
    512 << 20
)  # vLLM's own default takes most of the machine, and Ray kills the worker
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the adapter ranks that vLLM allocates for

_occupied = threading.Lock()


class VLLMInProcess:
    """The engine contract (`rlpost/engine/base.py`) over `vllm.LLMEngine`.

    `spec.extra` goes to vLLM's EngineArgs as it is. A reply ends at `Sampling.stop_token_ids` and
    at nothing else, and is cut where prompt + reply reach `spec.max_length`.
    """

    def __init__(self, spec: EngineSpec):
        self.spec = spec
        self._driver = _Driver(spec)
        self._thread: threading.Thread | None = None
        self._open: set[asyncio.Future[Any]] = set()  # requests without an answer yet, for drain

    @property
    def version(self) -> int:
        return self._driver.version

    async def start(self) -> None:
        """Loads the model. Raises EngineError with vLLM's reason."""
        if not _occupied.acquire(blocking=False):
            raise EngineError("this process already runs a vLLM engine: stop it first")
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._driver.run, args=(ready,), name="vllm", daemon=True
        )
        self._thread.start()
        await asyncio.wrap_future(ready)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, version: int | None = None
    ) -> Completion:
        if not prompt_ids:
            raise EngineError("the prompt is empty")
        if len(prompt_ids) >= self.spec.max_length:
            raise EngineError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room for a reply: max_length is "
                f"{self.spec.max_length}"
            )
        return await self._ask(prompt_ids, sampling, version, scored=False)

    async def score(
        self, sequences: Sequence[Sequence[int]], *, version: int | None = None
    ) -> list[list[float]]:
        if too_long := [len(each) for each in sequences if len(each) > self.spec.max_length]:
            raise EngineError(
                f"a sequence of {max(too_long)} tokens: max_length is {self.spec.max_length}"
            )
        greedy = Sampling(max_tokens=1, temperature=0.0)  # vLLM samples at least one token more

        async def one(sequence: Sequence[int]) -> list[float]:
            if len(sequence) < 2:
                return [0.0] * len(sequence)
            return await self._ask(sequence, greedy, version, scored=True)

        return list(await asyncio.gather(*(one(sequence) for sequence in sequences)))

    async def publish(self, publication: Publication) -> None:
        while not await self._call(lambda: self._driver.publish(publication)):
            await asyncio.sleep(0.01)  # every slot holds a version with running requests; they end

    async def fingerprint(self, *, version: int | None = None) -> Mapping[str, int]:
        return await self._call(lambda: self._driver.fingerprint(version))

    async def drain(self) -> None:
        while self._open:
            await asyncio.wait(self._open)

    def statistics(self) -> Mapping[str, float]:
        return dict(self._driver.counters)

    async def stop(self) -> None:
        """Ends running requests with EngineError, frees the model, removes the adapter files."""
        if self._thread is not None:
            self._driver.stop()
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    async def _ask(
        self, prompt: Sequence[int], sampling: Sampling, version: int | None, *, scored: bool
    ) -> Any:
        request = _Request(prompt=list(prompt), sampling=sampling, scored=scored)
        answer = asyncio.wrap_future(request.answer)
        self._open.add(answer)
        answer.add_done_callback(self._open.discard)
        self._driver.post(lambda: self._driver.admit(request, version), request.answer)
        try:
            return await answer
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):  # a stopped engine has nothing left to abort
                self._driver.post(lambda: self._driver.abort(request), Future())
            raise

    async def _call(self, act: Callable[[], T]) -> T:
        done: Future[T] = Future()
        self._driver.post(lambda: done.set_result(act()), done)
        return await asyncio.wrap_future(done)


@dataclass(slots=True, eq=False)
class _Served:
    """A version as it is served. `lora` is vLLM's request for it, None for the model itself."""

    version: int
    salt: str  # of the prefix cache: no block of another version is ever reused
    lora: Any = None
    folder: Path | None = None
    running: int = 0


class _Request:
    __slots__ = ("answer", "id", "prompt", "sampling", "scored", "served")

    def __init__(self, *, prompt: list[int], sampling: Sampling, scored: bool):
        self.prompt, self.sampling, self.scored = prompt, sampling, scored
        self.answer: Future[Any] = Future()
        self.served: _Served | None = None  # set once admitted
        self.id = ""


class _Driver:
    """The engine thread and everything it owns. Only `post` and `stop` are called from outside."""

    def __init__(self, spec: EngineSpec):
        self.spec = spec
        self.version = BASE_VERSION
        self.counters: dict[str, float] = dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "requests", "busy_seconds"), 0
        )
        self._llm: Any = None
        self._tokenizer: Any = None
        self._folder: Path | None = None
        self._requests: dict[str, _Request] = {}
        self._served: dict[int, _Served] = {}  # by version, oldest publication first
        self._retiring: list[_Served] = []  # no new requests, some still running
        self._published = 0
        self._admitted = 0
        self._broken = ""  # why nothing is served until the next publish
        self._ended = ""  # why the thread takes no more work
        self._stopping = False
        self._inbox: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._wake = threading.Condition()

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
            self._open()
            ready.set_result(None)
            while not self._stopping:
                self._take_inbox(wait=not self._requests)
                if self._requests and not self._stopping:
                    self._step()
        except Exception as error:  # whatever breaks the thread must reach everyone who waits on it
            reason = f"vLLM failed: {type(error).__name__}: {error}"
            if not ready.done():
                ready.set_exception(EngineError(reason))
        finally:
            self._close(reason)

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
            except (
                Exception
            ) as error:  # a refused request is the request's failure, not the engine's
                _fail(answer, EngineError(f"{type(error).__name__}: {error}"))

    def _step(self) -> None:
        started = time.perf_counter()
        outputs = self._llm.step()
        self.counters["busy_seconds"] += time.perf_counter() - started
        for output in outputs:
            if output.finished and (request := self._requests.pop(output.request_id, None)):
                self._answer(request, output)

    def _answer(self, request: _Request, output: Any) -> None:
        served = request.served
        assert served is not None
        self.counters["prompt_tokens"] += len(request.prompt)
        if request.scored:
            rows = zip(request.prompt, output.prompt_logprobs, strict=True)
            result: Any = [row[token].logprob if row else 0.0 for token, row in rows]
        else:
            reply = output.outputs[0]
            ids = list(reply.token_ids)
            pairs = zip(ids, reply.logprobs, strict=True)
            result = Completion(
                token_ids=ids,
                logprobs=[row[token].logprob for token, row in pairs],
                text=self._tokenizer.decode(ids, skip_special_tokens=True),
                finish_reason="stop" if reply.finish_reason == "stop" else "length",
                versions=[(0, served.version)],
            )
            self.counters["requests"] += 1
            self.counters["completion_tokens"] += len(ids)
        self._release(served)
        if not request.answer.done():
            request.answer.set_result(result)

    def admit(self, request: _Request, version: int | None) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if request.answer.cancelled():
            return
        served = self._find(version)
        sampling = request.sampling
        parameters = SamplingParams(
            max_tokens=1
            if request.scored
            else min(sampling.max_tokens, self.spec.max_length - len(request.prompt)),
            temperature=sampling.temperature,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # what ends a reply is the caller's word, the same in every engine
            logprobs=0,  # the sampled token's only
            prompt_logprobs=0 if request.scored else None,  # computed afresh: vLLM skips its cache
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._admitted += 1
        request.id = self._llm.add_request(
            str(self._admitted),
            {"prompt_token_ids": request.prompt, "cache_salt": served.salt},
            parameters,
            lora_request=served.lora,
        ) or str(self._admitted)
        request.served = served
        served.running += 1
        # outputs carry the caller's id, aborting needs the one that vLLM made of it
        self._requests[str(self._admitted)] = request

    def abort(self, request: _Request) -> None:
        for key, each in list(self._requests.items()):
            if each is request:
                self._llm.abort_request([key])
                del self._requests[key]
                assert request.served is not None
                self._release(request.served)

    def _find(self, version: int | None) -> _Served:
        if self._broken:
            raise EngineError(self._broken)
        served = self._served.get(self.version if version is None else version)
        if served is None:
            raise EngineError(f"version {version} is not served (served: {sorted(self._served)})")
        return served

    # -- versions ----------------------------------------------------------------------------------

    def publish(self, publication: Publication) -> bool:
        """False if it must be tried again later, because running requests hold every adapter
        slot."""
        if publication.kind == "lora":
            if not self.spec.lora_rank:
                raise EngineError("an adapter was published, but lora_rank is 0")
            if self._slots_in_use() >= self.spec.keep + 1:
                return False
            self._publish_lora(publication)
        else:
            if self.spec.lora_rank:
                raise EngineError("full weights were published to an engine that serves adapters")
            if self._requests:
                raise EngineError("full weights were published while requests run: drain first")
            self._publish_full(publication)
        return True

    def _publish_lora(self, publication: Publication) -> None:
        from vllm.lora.request import LoRARequest

        self._published += 1
        name = (
            f"v{publication.version}-{self._published}"  # never used before, whatever the version
        )
        assert self._folder is not None
        folder = _roomy_folder(self._folder, len(publication.payload)) / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(publication.payload)
        (folder / "adapter_config.json").write_text(json.dumps(dict(publication.adapter_config)))
        lora = LoRARequest(name, self._published, str(folder))
        try:
            loaded = self._llm.add_lora(lora)
        except Exception as error:  # vLLM's reasons have many types; the older versions stay served
            shutil.rmtree(folder, ignore_errors=True)
            raise EngineError(
                f"vLLM refused the adapter of version {publication.version}: {error}"
            ) from error
        if not loaded:
            raise EngineError(f"vLLM did not load the adapter of version {publication.version}")
        served = _Served(publication.version, name, lora, folder)
        self._retire(self._served.pop(publication.version, None))  # published again: a new name
        self._served[publication.version] = served
        self.version = publication.version
        adapters = [each for each in self._served.values() if each.lora]
        for old in adapters[: -self.spec.keep]:
            self._retire(self._served.pop(old.version))

    def _publish_full(self, publication: Publication) -> None:
        self._published += 1
        self._broken = f"the weights of version {publication.version} were only partly loaded"
        assert self._folder is not None
        path = (
            _roomy_folder(self._folder, len(publication.payload)) / f"{self._published}.safetensors"
        )
        path.write_bytes(publication.payload)
        try:
            self._llm.collective_rpc("rlpost_reload", args=(str(path),))
        finally:
            path.unlink()
        if self._llm.reset_prefix_cache() is False:
            self._broken = "vLLM kept prefix-cache blocks of older weights"
            raise EngineError(self._broken)
        self._broken = ""
        self._served = {
            publication.version: _Served(
                publication.version, f"v{publication.version}-{self._published}"
            )
        }
        self.version = publication.version

    def _slots_in_use(self) -> int:
        return len(self._retiring) + sum(each.lora is not None for each in self._served.values())

    def _release(self, served: _Served) -> None:
        served.running -= 1
        if not served.running and served in self._retiring:
            self._retiring.remove(served)
            self._remove(served)

    def _retire(self, served: _Served | None) -> None:
        if served is None or served.lora is None:
            return
        if served.running:
            self._retiring.append(served)  # its requests end on the version they began with
        else:
            self._remove(served)

    def _remove(self, served: _Served) -> None:
        self._llm.remove_lora(served.lora.lora_int_id)
        shutil.rmtree(served.folder, ignore_errors=True)

    def fingerprint(self, version: int | None) -> dict[str, int]:
        lora = self._find(version).lora
        number = lora.lora_int_id if lora else None
        return self._llm.collective_rpc("rlpost_fingerprint", args=(number,))[0]

    # -- opening and closing -----------------------------------------------------------------------

    def _open(self) -> None:
        _set_environment(self.spec)
        import torch
        from transformers import AutoTokenizer
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if self.spec.device == "cpu":  # a thread has its own OpenMP setting, read only at import
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            if self.spec.extra.get("enforce_eager", True):
                # a sampling kernel would be compiled at the first request: 3 to 30 s, no gain here
                torch._dynamo.config.disable = True
        self._folder = Path(tempfile.mkdtemp(prefix="rlpost-", dir=_shared_memory()))
        self._tokenizer = AutoTokenizer.from_pretrained(self.spec.model)
        self._llm = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(self.spec)))
        if self.spec.lora_rank:
            self._llm.collective_rpc("rlpost_bare_head")
        self._served[BASE_VERSION] = _Served(BASE_VERSION, "base")

    def _close(self, reason: str) -> None:
        with self._wake:
            self._ended = reason
            waiting = [answer for _, answer in self._inbox]
            self._inbox.clear()
        for answer in [*waiting, *(request.answer for request in self._requests.values())]:
            _fail(answer, EngineError(reason))
        self._requests.clear()
        if self._llm is not None:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            with contextlib.suppress(Exception):  # an engine that broke may not shut down cleanly
                self._llm.engine_core.shutdown()
            self._llm = None
            gc.collect()
            with contextlib.suppress(Exception):
                cleanup_dist_env_and_memory()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        _occupied.release()


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """vLLM's EngineArgs for `spec`; `spec.extra` has the last word."""
    length = min(spec.max_length + 1, _longest(spec))  # scoring samples one token more
    arguments: dict[str, Any] = {
        "model": spec.model,
        "dtype": spec.dtype,
        "seed": spec.seed,
        "max_model_len": length,
        "max_num_seqs": spec.max_running,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # raw ones ignore the temperature
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": "rlpost.engine.vllm_weights.WeightsExtension",
    }
    if spec.device == "cpu":
        arguments |= {
            "enforce_eager": True,  # compiling costs 25 s and gains an eighth
            "kv_cache_memory_bytes": spec.kv_cache_bytes or CPU_CACHE_BYTES,
            # a seeded request whose prompt is cut into chunks fails on the CPU
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(length, 4096),
        }
    else:
        arguments |= {"gpu_memory_utilization": spec.memory_fraction}
        if spec.kv_cache_bytes:
            arguments["kv_cache_memory_bytes"] = spec.kv_cache_bytes
    if spec.lora_rank:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": next(rank for rank in RANKS if rank >= spec.lora_rank),
            "max_loras": spec.keep + 1,  # the new version loads before the oldest retires
            "max_cpu_loras": spec.keep + 1,
        }
    return arguments | dict(spec.extra)


def _longest(spec: EngineSpec) -> int:
    """The positions that the model has; max_length itself if its config does not say."""
    config = json.loads((Path(spec.model) / "config.json").read_text())
    text = config.get("text_config", config)
    return max(spec.max_length, text.get("max_position_embeddings") or 0)


def _set_environment(spec: EngineSpec) -> None:
    """vLLM reads these when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at every weight swap
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # one process talks to itself only
    if spec.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads on busy cores cost 5 times
    elif importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def _shared_memory() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def _roomy_folder(folder: Path, size: int) -> Path:
    """`folder` in shared memory, or one on disk where that is too small (containers often have 64
    MB)."""
    if shutil.disk_usage(folder).free > 2 * size:
        return folder
    disk = Path(tempfile.gettempdir()) / folder.name
    disk.mkdir(exist_ok=True)
    return disk


def _fail(answer: "Future[Any]", error: EngineError) -> None:
    if not answer.done():
        answer.set_exception(error)
