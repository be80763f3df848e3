"""The proof of policy catches each known silent failure, on the real engines and with the real
learner.
 The three of design.md: a publish that keeps the old weights, an adapter that loads and does
nothing, a tied head that was not refreshed. Each is made in the engine itself, and each must be
caught twice: by the fingerprint, and by the canary or the slope where the fingerprint is told to
look away.
"""

import dataclasses
import importlib.util

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from rlpost.engine import open_engine
from rlpost.engine.base import EngineSpec
from rlpost.learner import Learner, LearnerSpec
from rlpost.policy.proof import Proof
from tests.conformance.engine_contract import (
    adapted,
    adapter_publication,
    base_sum,
    full_publication,
    logprobs_of,
    perturb,
)
from tests.families import FAMILIES, make

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("proof_of_engines")]

HAS_VLLM = importlib.util.find_spec("vllm") is not None
ENGINES = [
    "transformers",
    pytest.param("vllm", marks=pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")),
]
PROBES = [[5 + i, 9, 33, *range(40, 60), *range(80 + i, 100 + i)] for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make("qwen3", tmp_path_factory.mktemp("qwen3")))


@pytest.fixture(scope="module")
def fresh_model(folder):
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Reference:
    """The learner's side of a proof over two transformers models: before, and now (or the
    canary)."""

    def __init__(self, before, now):
        self.before, self.now, self.moved = before, now, False

    async def logprobs(self, sequences):
        model = self.now if self.moved else self.before
        return [logprobs_of(model, sequence) for sequence in sequences]

    async def canary_logprobs(self, sequences):
        return [logprobs_of(self.now, sequence) for sequence in sequences]


async def proven(engine, reference, publication, *, look_away=False):
    """The report on `publication`, which the engine has taken in its own way."""
    proof = Proof()
    await proof.observe(reference, publication.version - 1, PROBES)
    reference.moved = True
    expected = publication.fingerprint
    if look_away:
        expected = await engine.fingerprint(version=publication.version)
    return await proof.prove(engine, reference, publication.version, PROBES, expected=expected)


def serve_base_as(engine, version):
    """The adapter of `version` is loaded and does nothing: what a wrong module name does in
    vLLM."""
    engine._stepper._served[version].adapter = None


@pytest.mark.parametrize("name", ENGINES, scope="class")
class TestAdapters:
    @pytest_asyncio.fixture(scope="class", loop_scope="module")
    async def engine(self, folder, name):
        spec = EngineSpec(model=folder, max_length=96, lora_rank=8, kv_cache_bytes=64 << 20)
        engine = open_engine(name, spec)
        await engine.start()
        yield engine
        await engine.stop()

    async def test_an_honest_publish_holds(self, engine, fresh_model):
        now = adapted(fresh_model(), seed=1)
        publication = adapter_publication(now, 1, base_sum=base_sum(fresh_model()))
        await engine.publish(publication)
        report = await proven(engine, Reference(fresh_model(), now), publication)
        assert report.holds and report.verdict == "updated"
        assert report.slope == pytest.approx(1.0, abs=1e-3)

    async def test_a_publish_that_keeps_the_old_adapter_is_caught(self, engine, fresh_model):
        old, now = adapted(fresh_model(), seed=2), adapted(fresh_model(), seed=3)
        base = base_sum(fresh_model())
        publication = adapter_publication(now, 3, base_sum=base)
        await engine.publish(dataclasses.replace(adapter_publication(old, 3, base_sum=base)))
        report = await proven(engine, Reference(old, now), publication)
        assert not report.holds and any("lora_B" in problem for problem in report.problems)
        report = await proven(engine, Reference(old, now), publication, look_away=True)
        assert not report.holds and report.verdict == "stale"

    async def test_an_adapter_that_does_nothing_is_caught(self, engine, fresh_model):
        old, now = fresh_model(), adapted(fresh_model(), seed=5)  # the base is what nothing does
        publication = adapter_publication(now, 5, base_sum=base_sum(fresh_model()))
        await engine.publish(publication)
        serve_base_as(engine, 5)
        report = await proven(engine, Reference(old, now), publication)
        assert not report.holds and any("missing" in problem for problem in report.problems)
        report = await proven(engine, Reference(old, now), publication, look_away=True)
        assert not report.holds and report.verdict == "stale"

    async def test_the_canary_is_followed_or_the_start_fails(self, engine, fresh_model):
        canary = adapted(fresh_model(), seed=6)
        publication = adapter_publication(canary, -2, base_sum=base_sum(fresh_model()))
        await engine.publish(publication)
        reference, proof = Reference(fresh_model(), canary), Proof()
        report = await proof.prove_canary(
            engine, reference, -2, PROBES, expected=publication.fingerprint
        )
        assert report.holds and 0.99 < report.slope < 1.01
        serve_base_as(engine, -2)
        expected = await engine.fingerprint(version=-2)  # looks away from the fingerprint
        report = await proof.prove_canary(engine, reference, -2, PROBES, expected=expected)
        assert not report.holds and "canary" in report.problems[0]

    async def test_a_base_that_is_not_the_learners_is_caught(self, engine, fresh_model):
        other = fresh_model()
        perturb(other, seed=7, scale=1e-6)
        now = adapted(fresh_model(), seed=7)
        publication = adapter_publication(now, 7, base_sum=base_sum(other))
        await engine.publish(publication)
        report = await proven(engine, Reference(fresh_model(), now), publication)
        assert list(report.problems) == ["different: base"]


@pytest.mark.parametrize("name", ENGINES, scope="class")
class TestFullWeights:
    @pytest_asyncio.fixture(scope="class", loop_scope="module")
    async def engine(self, folder, name):
        engine = open_engine(name, EngineSpec(model=folder, max_length=96, kv_cache_bytes=64 << 20))
        await engine.start()
        yield engine
        await engine.stop()

    @pytest.fixture
    def moved_model(self, fresh_model):
        model = fresh_model()
        perturb(model, seed=1, scale=0.02)
        return model

    async def test_an_honest_publish_holds(self, engine, fresh_model, moved_model):
        publication = full_publication(moved_model, 1)
        await engine.publish(publication)
        report = await proven(engine, Reference(fresh_model(), moved_model), publication)
        assert report.holds and report.verdict == "updated"

    async def test_a_publish_that_keeps_the_old_weights_is_caught(
        self, engine, fresh_model, moved_model
    ):
        publication = full_publication(moved_model, 2)
        await engine.publish(full_publication(fresh_model(), 2))
        report = await proven(engine, Reference(fresh_model(), moved_model), publication)
        assert not report.holds and len(report.problems) == len(publication.fingerprint) + 1
        reference = Reference(fresh_model(), moved_model)
        report = await proven(engine, reference, publication, look_away=True)
        assert report.verdict == "stale" and not report.holds

    async def test_one_stale_tensor_is_named(self, engine, fresh_model, moved_model):
        publication = full_publication(moved_model, 3)
        stale = full_publication(moved_model, 3)
        name = "model.layers.1.self_attn.k_proj.weight"
        swapped = fresh_model()
        swapped.load_state_dict(moved_model.state_dict() | {name: fresh_model().state_dict()[name]})
        await engine.publish(
            dataclasses.replace(stale, payload=full_publication(swapped, 3).payload)
        )
        report = await proven(engine, Reference(fresh_model(), moved_model), publication)
        assert f"different: {name}" in report.problems

    async def test_a_tied_head_that_was_forgotten_is_caught(
        self, engine, name, fresh_model, moved_model
    ):
        await engine.publish(full_publication(fresh_model(), 4))
        if name == "transformers":  # shares one tensor; a broken tie is what there is to forget
            head = engine._stepper._model.lm_head
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        publication = full_publication(moved_model, 5)
        headless = full_publication(moved_model, 5, leave_out={"lm_head.weight"})
        await engine.publish(headless)
        report = await proven(engine, Reference(fresh_model(), moved_model), publication)
        assert not report.holds and report.problems[0] == "different: lm_head.weight"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_the_learners_fingerprint_is_the_engines_for_every_family(
    family, method, tmp_path_factory
):
    await handshake(str(make(family, tmp_path_factory.mktemp(family))), method, "transformers")


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "llama", "gemma3")]
    + ["qwen3"],
)
async def test_the_learners_fingerprint_is_vllms(family, method, tmp_path_factory):
    await handshake(str(make(family, tmp_path_factory.mktemp(family))), method, "vllm")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ENGINES)
async def test_the_proof_is_exact_in_bfloat16_too(name, method, folder):
    await handshake(folder, method, name, "bfloat16")


class Client:
    """The real learner as the proof sees it."""

    def __init__(self, learner):
        self.learner = learner

    async def logprobs(self, sequences):
        return self.learner.logprobs(sequences)

    async def canary_logprobs(self, sequences):
        return self.learner.canary_logprobs(sequences)


async def handshake(folder, method, name, dtype="float32"):
    """Canary, then the start policy, each proven on the engine."""
    learner = Learner(LearnerSpec(model=folder, method=method, rank=8, dtype=dtype))
    learner.start()
    spec = EngineSpec(
        model=folder,
        dtype=dtype,
        max_length=96,
        lora_rank=8 if method == "lora" else 0,
        kv_cache_bytes=64 << 20,
    )
    engine, proof, client = open_engine(name, spec), Proof(), Client(learner)
    await engine.start()
    try:
        canary = learner.canary(seed=1)
        await engine.publish(canary)
        report = await proof.prove_canary(
            engine, client, canary.version, PROBES, expected=canary.fingerprint
        )
        assert report.holds, str(report)
        publication = learner.publication()
        await engine.publish(publication)
        report = await proof.prove(
            engine, client, publication.version, PROBES, expected=publication.fingerprint
        )
        assert report.holds, str(report)
    finally:
        await engine.stop()
