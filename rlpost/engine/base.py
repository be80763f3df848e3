"""The engine contract: token ids in, completions out, under a policy version that can be proven.

Every engine passes `tests/conformance/engine_contract.py`. What is true of each:

1. `generate` returns exactly the tokens that were sampled, with the log-probability of each under
the
   distribution they were sampled from (after temperature), the stop token included.
2. Every completion names the version(s) that sampled it, and a version is named only once it is
served. 3. The same (prompt, sampling with a seed, version) gives the same tokens and logprobs
whatever else runs. 4. `publish` returns after the new version serves new requests. With "lora",
running requests end on the
   version they began with, and the `keep` newest versions stay available; with "full" nothing may
   run (`drain` first) unless the engine says it can swap in flight. No cache of an older version is
   reused.
5. `fingerprint` reads the weights that the engine really computes with, not the copy it was sent.
6. A request that cannot be served raises EngineError with a reason; nothing waits for ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rlpost.types import Completion

BASE_VERSION = -1
"""The version of the model as loaded, without adapter: the start policy of LoRA from scratch."""

MKL_CBWR = "AVX2,STRICT"
"""The environment variable of that name, for engines on the CPU. Adapters multiply by batched MKL
calls whose rounding depends on the batch; strict reproducibility makes a seeded reply the same
whatever else runs (point 3), at no cost measured. MKL reads it at its first product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a reply is sampled. top_p = 1 and top_k off, always: a truncated distribution biases the
    ratio.

    temperature 0 is greedy. `stop_token_ids` end the reply and belong to it. `seed` None is
    unseeded.
    """

    max_tokens: int
    temperature: float = 1.0
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One policy version on its way to the engines.

    `payload` is a safetensors file in memory: for "lora" PEFT's names
    (base_model.model.….lora_A.weight), for "full" the checkpoint's names, in the dtype that the
    engine serves. `adapter_config` is PEFT's adapter_config.json ("lora" only). `fingerprint` is
    what the engine must report once it serves it.
    """

    version: int
    kind: Literal["lora", "full"]
    payload: bytes
    adapter_config: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine is started with."""

    model: str  # a folder
    dtype: str = "float32"
    max_length: int = 4096  # prompt + reply
    lora_rank: int = 0  # 0: no adapters are served
    keep: int = 2  # adapter versions alive at once (S + 2)
    max_running: int = 64  # requests computed at once
    kv_cache_bytes: int | None = None  # None: the engine's own share of the device
    memory_fraction: float = 0.85  # of the GPU
    device: str = "cpu"
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Plain asyncio; an engine runs its own thread or process. Construct, `await start()`, use,
    `await stop()`."""

    spec: EngineSpec

    @property
    def version(self) -> int:
        """The version that new requests get."""
        ...

    async def start(self) -> None: ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, version: int | None = None
    ) -> Completion:
        """One completion. `version` None takes the current one; an older one must still be kept."""
        ...

    async def score(
        self, sequences: Sequence[Sequence[int]], *, version: int | None = None
    ) -> list[list[float]]:
        """Log-probabilities of given tokens at temperature 1: for each sequence of n tokens, n
        floats, the first of them 0.0 (nothing precedes it). Computed afresh, no cache used."""
        ...

    async def publish(self, publication: Publication) -> None: ...

    async def fingerprint(self, *, version: int | None = None) -> Mapping[str, int]:
        """Sum of bit patterns modulo 2^64 of each tensor served, keyed like the publication's
        payload; for an adapter version the stacked A and B of that slot (see policy/proof.py for
        the rules) plus one entry "base" over the untouched weights."""
        ...

    async def drain(self) -> None:
        """Returns when no request is running or waiting."""
        ...

    def statistics(self) -> Mapping[str, float]:
        """Counters since the start: prompt_tokens, completion_tokens, requests, busy_seconds."""
        ...

    async def stop(self) -> None: ...
