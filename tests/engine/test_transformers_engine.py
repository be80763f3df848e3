"""The transformers engine keeps the engine contract, for every family."""

import asyncio

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from rlpost.engine import open_engine
from rlpost.engine.base import EngineSpec, Sampling
from rlpost.errors import EngineError
from tests.conformance.engine_contract import PROMPTS, AdapterContract, FullContract, sample, turns
from tests.families import FAMILIES, make

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("generate")]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return str(make(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def fresh_model(folder):
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(fresh_model):
    return fresh_model()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder):
    engine = open_engine(
        "transformers", EngineSpec(model=folder, max_length=96, lora_rank=8, keep=2)
    )
    await engine.start()
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def full_engine(folder):
    engine = open_engine("transformers", EngineSpec(model=folder, max_length=96))
    await engine.start()
    yield engine
    await engine.stop()


class TestAdapters(AdapterContract):
    exact = False


class TestFull(FullContract):
    pass


async def test_one_request_at_a_time_repeats_bit_for_bit(folder):
    engine = open_engine("transformers", EngineSpec(model=folder, max_length=96, max_running=1))
    await engine.start()
    alone = [(await sample(engine, [prompt], seed=7 + i))[0] for i, prompt in enumerate(PROMPTS)]
    assert await sample(engine, PROMPTS) == alone
    await engine.stop()


async def test_stop_ends_running_requests_with_a_reason(folder):
    engine = open_engine("transformers", EngineSpec(model=folder, max_length=96))
    await engine.start()
    running = asyncio.ensure_future(engine.generate(PROMPTS[0], Sampling(max_tokens=80)))
    await turns()
    await engine.stop()
    with pytest.raises(EngineError, match="stopped"):
        await running
    with pytest.raises(EngineError, match="stopped"):
        await engine.generate(PROMPTS[0], Sampling(max_tokens=8))
    await engine.stop()


async def test_a_model_that_is_not_there_is_an_engine_error(tmp_path):
    engine = open_engine("transformers", EngineSpec(model=str(tmp_path)))
    with pytest.raises(EngineError, match="the engine failed"):
        await engine.start()
