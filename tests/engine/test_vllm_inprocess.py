"""vLLM in this process keeps the engine contract. One engine lives at a time: vLLM allows no second
one in a process, so adapters and full weights are tried one after the other, each over its own
families."""

import asyncio
import importlib.util
import os
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from rlpost.engine import open_engine
from rlpost.engine.base import EngineSpec, Sampling
from rlpost.errors import EngineError
from tests.conformance.engine_contract import (
    PROMPTS,
    AdapterContract,
    FullContract,
    adapted,
    adapter_publication,
    turns,
)
from tests.families import make

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("vllm")]

# vLLM's hybrid needs torchvision, which the CPU set leaves out: the transformers engine serves it
FAMILIES = [
    "qwen3",
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "llama", "gemma3")),
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return str(make(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def fresh_model(folder):
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(fresh_model):
    return fresh_model()


async def opened(folder, **more):
    spec = EngineSpec(model=folder, max_length=96, kv_cache_bytes=64 << 20, **more)
    engine = open_engine("vllm", spec)
    await engine.start()
    return engine


class TestAdapters(AdapterContract):
    @pytest_asyncio.fixture(scope="class", loop_scope="module")
    async def engine(self, folder):
        engine = await opened(folder, lora_rank=8, keep=2)
        shared = engine._stepper._folder  # this engine's own: others may run beside it
        assert shared.parent == Path("/dev/shm") and shared.is_dir()
        yield engine
        await engine.stop()
        assert not shared.exists()

    async def test_a_second_engine_in_the_process_is_refused(self, engine, folder):
        with pytest.raises(EngineError, match="already runs a vLLM engine"):
            await opened(folder)
        assert await engine.score([[1, 2, 3]])

    async def test_retired_adapters_leave_the_shared_memory(self, engine, fresh_model):
        for version in (40, 41, 42, 43):
            await engine.publish(adapter_publication(adapted(fresh_model(), seed=version), version))
        folders = engine._stepper._folder.iterdir()
        assert sorted(path.name.split("-")[0] for path in folders) == ["v42", "v43"]


class TestFull(FullContract):
    @pytest_asyncio.fixture(scope="class", loop_scope="module")
    async def full_engine(self, folder):
        engine = await opened(folder)
        yield engine
        await engine.stop()

    async def test_stop_ends_running_requests_with_a_reason(self, full_engine):
        running = asyncio.ensure_future(full_engine.generate(PROMPTS[0], Sampling(max_tokens=80)))
        await turns()
        await full_engine.stop()
        with pytest.raises(EngineError, match="stopped"):
            await running
        with pytest.raises(EngineError, match="stopped"):
            await full_engine.generate(PROMPTS[0], Sampling(max_tokens=8))


def test_the_engine_process_is_never_started():
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
