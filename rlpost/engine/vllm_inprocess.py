"""vLLM inside this process: continuous batching without an engine process, which on a small CPU
machine costs 46 s at the start and a second copy of everything.

One engine per process: vLLM keeps its parallel state in module globals.
"""

import gc
import importlib.util
import io
import json
import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

from rlpost.engine.base import MKL_CBWR, EngineSpec, Publication
from rlpost.engine.stepped import Request, Served, SteppedEngine, Stepper
from rlpost.errors import EngineError
from rlpost.types import Completion

CPU_CACHE_BYTES = (
    512 << 20
)  # vLLM's own default takes most of the machine, and Ray kills the worker
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the adapter ranks that vLLM allocates for

_occupied = threading.Lock()


class VLLMInProcess(SteppedEngine):
    """The engine contract over `vllm.LLMEngine`. `spec.extra` goes to vLLM's EngineArgs as it
    is."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec, _VLLMStepper(spec))


class _VLLMStepper(Stepper):
    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        self._llm: Any = None
        self._tokenizer: Any = None
        self._folder: Path | None = None
        self._keys: dict[str, Request] = {}  # by the id given to vLLM
        self._admitted = 0

    def open(self) -> None:
        if not _occupied.acquire(blocking=False):
            raise EngineError("this process already runs a vLLM engine: stop it first")
        self._folder = Path(tempfile.mkdtemp(prefix="rlpost-", dir=_shared_memory()))
        weakref.finalize(
            self, _remove, self._folder
        )  # also at exit: shared memory is nobody's disk
        set_environment(self.spec)
        import torch
        from transformers import AutoTokenizer
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = engine_arguments(self.spec)
        if self.spec.device == "cpu":  # a thread has its own OpenMP setting, read only at import
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            if arguments["enforce_eager"]:
                # a sampling kernel would be compiled at the first request: 3 to 30 s for nothing
                torch._dynamo.config.disable = True
        self._tokenizer = AutoTokenizer.from_pretrained(self.spec.model)
        self._llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self.vocabulary = self._llm.model_config.get_vocab_size()
        if self.spec.lora_rank:
            self._llm.collective_rpc("rlpost_prepare_adapters")

    def close(self) -> None:
        if self._folder is None:  # it was another engine that held the process
            return
        try:
            if self._llm is not None:
                from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

                self._llm.engine_core.shutdown()
                self._llm = None
                gc.collect()
                cleanup_dist_env_and_memory()
        finally:
            _remove(self._folder)
            self._folder = None
            _occupied.release()

    def admit(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        served, sampling = request.served, request.sampling
        assert served is not None
        room = self.spec.max_length - len(request.prompt)
        parameters = SamplingParams(
            # scoring still samples one token, which nobody reads
            max_tokens=1 if request.scored else min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # what ends a reply is the caller's word, the same in every engine
            logprobs=0,  # the sampled token's only
            prompt_logprobs=0 if request.scored else None,  # vLLM then skips its prefix cache
            flat_logprobs=True,  # lists instead of an object per token
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._admitted += 1
        key = str(self._admitted)
        prompt = {"prompt_token_ids": request.prompt, "cache_salt": served.name}
        self._llm.add_request(key, prompt, parameters, lora_request=served.adapter)
        self._keys[key] = request

    def abort(self, request: Request) -> None:
        key = next(key for key, each in self._keys.items() if each is request)
        self._llm.abort_request([key])
        del self._keys[key]

    def step(self) -> None:
        for output in self._llm.step():
            if output.finished and (request := self._keys.pop(output.request_id, None)):
                self.answer(request, self._result(request, output))

    def _result(self, request: Request, output: Any) -> Any:
        if request.scored:
            return [0.0, *output.prompt_logprobs.logprobs]  # nothing precedes the first token
        reply = output.outputs[0]
        ids = list(reply.token_ids)
        assert request.served is not None
        return Completion(
            token_ids=ids,
            logprobs=list(reply.logprobs.logprobs),
            text=self._tokenizer.decode(ids, skip_special_tokens=True),
            finish_reason="stop" if reply.finish_reason == "stop" else "length",
            versions=[(0, request.served.version)],
        )

    def load_adapter(self, publication: Publication, name: str) -> Any:
        from vllm.lora.request import LoRARequest

        from rlpost.engine.vllm_weights import tensor_names

        names = tensor_names(io.BytesIO(publication.payload))
        if head := next(
            (each for each in names if "lm_head" in each or "embed_tokens" in each), ""
        ):
            raise EngineError(f"this engine serves no adapter on the head or the embedding: {head}")
        folder = self._roomy_folder(len(publication.payload)) / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(publication.payload)
        (folder / "adapter_config.json").write_text(json.dumps(dict(publication.adapter_config)))
        lora = LoRARequest(name, self._published, str(folder))
        try:
            loaded = self._llm.add_lora(lora)
        except Exception as error:  # vLLM's refusals have many types; the other versions go on
            shutil.rmtree(folder, ignore_errors=True)
            raise EngineError(f"vLLM refused the adapter {name}: {error}") from error
        if not loaded:
            raise EngineError(f"vLLM did not load the adapter {name}")
        return lora

    def unload_adapter(self, served: Served) -> None:
        self._llm.remove_lora(served.adapter.lora_int_id)
        shutil.rmtree(served.adapter.lora_path, ignore_errors=True)

    def load_full(self, publication: Publication) -> None:
        folder = self._roomy_folder(len(publication.payload))
        path = folder / f"{publication.version}.safetensors"
        path.write_bytes(publication.payload)
        try:
            self._llm.collective_rpc("rlpost_reload", args=(str(path),))
        finally:
            path.unlink()
        if self._llm.reset_prefix_cache() is False:
            raise EngineError("vLLM kept prefix-cache blocks of the old weights")

    def fingerprint(self, served: Served) -> dict[str, int]:
        number = served.adapter.lora_int_id if served.adapter else None
        return self._llm.collective_rpc("rlpost_fingerprint", args=(number,))[0]

    def _roomy_folder(self, size: int) -> Path:
        """The engine's folder in shared memory, or on disk where that is too small (containers
        often have 64 MB)."""
        assert self._folder is not None
        if shutil.disk_usage(self._folder).free > 2 * size:
            return self._folder
        disk = _on_disk(self._folder)
        disk.mkdir(exist_ok=True)
        return disk


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """vLLM's EngineArgs for `spec`; `spec.extra` has the last word."""
    config = json.loads((Path(spec.model) / "config.json").read_text())
    positions = config.get("text_config", config).get("max_position_embeddings") or spec.max_length
    length = max(spec.max_length, min(spec.max_length + 1, positions))  # scoring samples one more
    arguments: dict[str, Any] = {
        "model": spec.model,
        "dtype": spec.dtype,
        "seed": spec.seed,
        "max_model_len": length,
        "max_num_seqs": spec.max_running,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # raw ones ignore the temperature
        "skip_tokenizer_init": "vision_config" not in config,  # a vision processor needs it
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": "rlpost.engine.vllm_weights.WeightsExtension",
    }
    if spec.device == "cpu":
        arguments |= {
            "enforce_eager": True,  # compiling costs 25 s and gains an eighth
            "kv_cache_memory_bytes": spec.kv_cache_bytes or CPU_CACHE_BYTES,
            "enable_chunked_prefill": False,  # a seeded request fails if its prompt is cut
            "max_num_batched_tokens": max(length, 4096),
        }
    else:
        arguments["gpu_memory_utilization"] = spec.memory_fraction
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


def set_environment(spec: EngineSpec) -> None:
    """vLLM reads these when it is imported; what the user set stays, but for the process layout."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at every weight swap
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # one process talks to itself only
    if spec.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads cost 5 times on busy cores
        os.environ.setdefault("MKL_CBWR", MKL_CBWR)
    elif importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def _remove(folder: Path) -> None:
    for each in (folder, _on_disk(folder)):
        shutil.rmtree(each, ignore_errors=True)


def _shared_memory() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def _on_disk(folder: Path) -> Path:
    return Path(tempfile.gettempdir()) / f"{folder.name}-disk"
