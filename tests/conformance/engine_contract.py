"""What is true of every engine (`rlpost/engine/base.py`, points 1 to 6).
 An engine's test module subclasses the two classes and gives `engine` (started, adapters of rank 8,
two kept, max_length 96) or `full_engine`, and `model`, the same weights as a float32 transformers
model.
"""

import asyncio
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save

from rlpost.engine.base import BASE_VERSION, Publication, Sampling
from rlpost.errors import EngineError
from rlpost.policy.proof import BASE, bit_sum

PROMPTS = [[5, 9, 33, 70 + i, *range(40, 40 + 3 * (i % 4))] for i in range(8)]
RANK = 8


def logprobs_of(model, sequence):
    """The reference: [n] log-probabilities of the tokens, the first 0.0."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0, :-1].float()
    picked = logits.log_softmax(-1).gather(-1, torch.tensor(sequence[1:])[:, None])
    return [0.0, *picked[:, 0].tolist()]


def mean_difference(ours, theirs):
    pairs = [
        abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    ]
    return sum(pairs) / len(pairs)


def adapted(model, *, seed, scale=0.2):
    """The model with a random adapter on every linear layer (the model itself is wrapped: use a
    copy)."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return wrapped


def adapter_publication(wrapped, version, *, base_sum=0, dtype=torch.float32):
    tensors = get_peft_model_state_dict(wrapped)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
    config = wrapped.peft_config["default"].to_dict()
    config = json.loads(json.dumps(config, default=lambda value: sorted(map(str, value))))
    return Publication(
        version=version,
        kind="lora",
        payload=save(tensors),
        adapter_config=config,
        fingerprint={name: bit_sum(t) for name, t in tensors.items()} | {BASE: base_sum},
    )


def full_publication(model, version, *, leave_out=()):
    tensors = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in leave_out
    }
    return Publication(
        version=version,
        kind="full",
        payload=save(tensors),
        fingerprint={name: bit_sum(tensor) for name, tensor in model.state_dict().items()},
    )


def perturb(model, *, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * parameter.square().mean().sqrt() * noise)


def base_sum(model):
    return sum(bit_sum(tensor) for tensor in model.state_dict().values()) % (1 << 64)


async def turns():
    """Lets the tasks just made reach the engine (or, at its end, what waited on it)."""
    for _ in range(5):
        await asyncio.sleep(0)


async def a_step(engine):
    """Waits until the engine has computed something more."""
    before = engine.statistics()["busy_seconds"]
    while engine.statistics()["busy_seconds"] == before:
        await asyncio.sleep(0.001)


async def sample(engine, prompts, *, version=None, max_tokens=12, seed=7, temperature=1.0):
    return await asyncio.gather(
        *(
            engine.generate(
                prompt,
                Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed + index),
                version=version,
            )
            for index, prompt in enumerate(prompts)
        )
    )


class AdapterContract:
    """Fixtures: `engine`, `model`; `exact` says whether runs repeat bit for bit whatever the
    batch."""

    exact = True

    async def test_logprobs_are_those_of_the_sampled_distribution(self, engine, model):
        for temperature in (1.0, 0.7):
            completions = await sample(
                engine, PROMPTS, version=BASE_VERSION, temperature=temperature
            )
            for prompt, completion in zip(PROMPTS, completions, strict=True):
                sequence = [*prompt, *completion.token_ids]
                with torch.no_grad():
                    logits = model(torch.tensor([sequence])).logits[0] / temperature
                expected = logits.log_softmax(-1)
                for offset, token in enumerate(completion.token_ids):
                    value = float(expected[len(prompt) + offset - 1, token])
                    assert completion.logprobs[offset] == pytest.approx(value, abs=1e-4)

    async def test_scores_equal_transformers(self, engine, model):
        sequences = [[*prompt, *range(60, 80)] for prompt in PROMPTS]
        scores = await engine.score(sequences, version=BASE_VERSION)
        expected = [logprobs_of(model, sequence) for sequence in sequences]
        assert mean_difference(scores, expected) < 1e-4
        assert await engine.score([[], [4]], version=BASE_VERSION) == [[], [0.0]]

    async def test_scoring_what_was_sampled_gives_the_same_logprobs(self, engine):
        completions = await sample(engine, PROMPTS)
        sequences = [[*p, *c.token_ids] for p, c in zip(PROMPTS, completions, strict=True)]
        scores = await engine.score(sequences)
        for prompt, completion, score in zip(PROMPTS, completions, scores, strict=True):
            assert score[len(prompt) :] == pytest.approx(completion.logprobs, abs=1e-4)

    async def test_a_seeded_request_repeats_whatever_else_runs(self, engine):
        alone = [
            (await sample(engine, [prompt], seed=7 + i))[0] for i, prompt in enumerate(PROMPTS)
        ]
        together = await sample(engine, PROMPTS)
        for one, other in zip(alone, together, strict=True):
            assert one.token_ids == other.token_ids
            if self.exact:
                assert one.logprobs == other.logprobs
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)

    async def test_a_seeded_request_of_an_adapter_repeats_whatever_else_runs(
        self, engine, fresh_model
    ):
        """The adapter's own products must not round by the batch either."""
        await engine.publish(adapter_publication(adapted(fresh_model(), seed=33), 33))
        alone = [(await sample(engine, [p], seed=7 + i))[0] for i, p in enumerate(PROMPTS)]
        both = await asyncio.gather(
            sample(engine, PROMPTS), sample(engine, PROMPTS, version=BASE_VERSION, seed=70)
        )
        for one, other in zip(alone, both[0], strict=True):
            assert one.versions == other.versions == [(0, 33)]
            assert one.token_ids == other.token_ids
            if self.exact:
                assert one.logprobs == other.logprobs
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)

    async def test_greedy_takes_the_most_probable_token(self, engine, model):
        completion = (await sample(engine, PROMPTS[:1], version=BASE_VERSION, temperature=0.0))[0]
        sequence = list(PROMPTS[0])
        for token in completion.token_ids:
            with torch.no_grad():
                assert int(model(torch.tensor([sequence])).logits[0, -1].argmax()) == token
            sequence.append(token)

    async def test_a_reply_ends_with_its_stop_token(self, engine):
        free = (await sample(engine, PROMPTS[:1], max_tokens=20))[0]
        assert len(free.token_ids) == 20 and free.finish_reason == "length"
        stop = free.token_ids[6]
        stopped = await engine.generate(
            PROMPTS[0], Sampling(max_tokens=20, seed=7, stop_token_ids=[stop])
        )
        end = free.token_ids.index(stop) + 1
        assert list(stopped.token_ids) == list(free.token_ids[:end])
        assert stopped.finish_reason == "stop" and len(stopped.logprobs) == end

    async def test_a_reply_is_cut_where_max_length_is_reached(self, engine):
        prompt = list(range(10, 100))
        completion = (await sample(engine, [prompt], max_tokens=50))[0]
        assert len(completion.token_ids) == 96 - 90 and completion.finish_reason == "length"

    async def test_a_published_adapter_is_served(self, engine, fresh_model):
        wrapped = adapted(fresh_model(), seed=1)
        await engine.publish(adapter_publication(wrapped, 1))
        assert engine.version == 1
        sequences = [[*prompt, *range(60, 80)] for prompt in PROMPTS]
        scores = await engine.score(sequences)
        assert mean_difference(scores, [logprobs_of(wrapped, s) for s in sequences]) < 1e-4
        completions = await sample(engine, PROMPTS)
        assert all(completion.versions == [(0, 1)] for completion in completions)

    async def test_the_fingerprint_equals_the_publication(self, engine, fresh_model):
        model = fresh_model()
        expected_base = {name: bit_sum(t) for name, t in model.state_dict().items()}
        assert await engine.fingerprint(version=BASE_VERSION) == expected_base
        publication = adapter_publication(
            adapted(model, seed=2), 2, base_sum=base_sum(fresh_model())
        )
        await engine.publish(publication)
        assert await engine.fingerprint() == publication.fingerprint

    async def test_no_cache_of_an_older_version_is_used(self, engine, fresh_model):
        prompt = list(range(8, 72))  # several cache blocks
        for version, seed in ((3, 3), (4, 4), (4, 5)):  # the last under the same version number
            wrapped = adapted(fresh_model(), seed=seed)
            await engine.publish(adapter_publication(wrapped, version))
            for _ in range(2):  # the second time from the cache of this version
                completion = (await sample(engine, [prompt]))[0]
                expected = logprobs_of(wrapped, [*prompt, *completion.token_ids])[len(prompt) :]
                assert completion.logprobs == pytest.approx(expected, abs=1e-3)

    async def test_a_running_request_ends_on_its_version(self, engine, fresh_model):
        first, second = adapted(fresh_model(), seed=6), adapted(fresh_model(), seed=7)
        await engine.publish(adapter_publication(first, 6))
        alone = await sample(engine, PROMPTS, max_tokens=40)
        running = asyncio.ensure_future(sample(engine, PROMPTS, max_tokens=40))
        await a_step(engine)
        await engine.publish(adapter_publication(second, 7))
        assert engine.version == 7
        later = await sample(engine, PROMPTS, max_tokens=40)
        for one, other in zip(alone, await running, strict=True):
            assert other.versions == [(0, 6)] and one.token_ids == other.token_ids
        assert all(completion.versions == [(0, 7)] for completion in later)
        assert [c.token_ids for c in later] != [c.token_ids for c in alone]

    async def test_versions_that_share_a_step_do_not_mix(self, engine, fresh_model):
        for version in (7, 8, 9):  # every slot was filled: the base must not get what is in one
            await engine.publish(adapter_publication(adapted(fresh_model(), seed=version), version))
        versions = (BASE_VERSION, 8, 9)
        alone = [await sample(engine, PROMPTS[:3], version=version) for version in versions]
        together = await asyncio.gather(
            *(sample(engine, PROMPTS[:3], version=version) for version in versions)
        )
        for one, other in zip(alone, together, strict=True):
            assert [c.token_ids for c in one] == [c.token_ids for c in other]
            assert [c.versions for c in one] == [c.versions for c in other]
            for a, b in zip(one, other, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)

    async def test_only_the_newest_versions_are_kept(self, engine, fresh_model):
        for version in (10, 11, 12):
            await engine.publish(adapter_publication(adapted(fresh_model(), seed=version), version))
        older = (await sample(engine, PROMPTS[:1], version=11))[0]
        assert older.versions == [(0, 11)]
        with pytest.raises(EngineError, match="version 10 is not served"):
            await sample(engine, PROMPTS[:1], version=10)

    async def test_versions_that_still_run_delay_a_publish_but_do_not_stop_it(
        self, engine, fresh_model
    ):
        running = []
        for version in (20, 21, 22, 23, 24):
            await engine.publish(adapter_publication(adapted(fresh_model(), seed=version), version))
            running.append(asyncio.ensure_future(sample(engine, PROMPTS[:2], max_tokens=60)))
            await turns()
        for version, completions in zip((20, 21, 22, 23, 24), running, strict=True):
            assert all(c.versions == [(0, version)] for c in await completions)

    async def test_what_cannot_be_served_is_an_engine_error(self, engine, fresh_model):
        with pytest.raises(EngineError, match="leaves no room"):
            await sample(engine, [list(range(5, 101))])
        with pytest.raises(EngineError, match="empty"):
            await sample(engine, [[]])
        with pytest.raises(EngineError, match="not served"):
            await engine.score([[1, 2, 3]], version=999)
        with pytest.raises(EngineError, match="max_length"):
            await engine.score([[3] * 97])
        with pytest.raises(EngineError):
            await sample(engine, [[5, 10_000_000]])
        with pytest.raises(EngineError, match="serves adapters"):
            await engine.publish(full_publication(fresh_model(), 30))
        assert await sample(engine, PROMPTS[:1])  # and the engine goes on

    async def test_a_refused_adapter_leaves_the_others_served(self, engine, fresh_model):
        await engine.publish(adapter_publication(adapted(fresh_model(), seed=8), 31))
        good = adapter_publication(adapted(fresh_model(), seed=9), 32)
        wrong = Publication(
            version=32, kind="lora", payload=b"not a tensor", adapter_config=good.adapter_config
        )
        with pytest.raises(EngineError):
            await engine.publish(wrong)
        assert engine.version == 31 and await sample(engine, PROMPTS[:1])
        await engine.publish(good)
        assert engine.version == 32

    async def test_drain_waits_for_every_request(self, engine):
        running = asyncio.ensure_future(sample(engine, PROMPTS, max_tokens=30))
        await turns()
        await engine.drain()
        await turns()
        assert running.done()

    async def test_a_cancelled_request_is_forgotten(self, engine):
        request = asyncio.ensure_future(sample(engine, PROMPTS, max_tokens=80))
        await turns()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await asyncio.wait_for(engine.drain(), 10)
        assert await sample(engine, PROMPTS[:1])

    async def test_statistics_count_tokens(self, engine):
        before = engine.statistics()
        completions = await sample(engine, PROMPTS[:3])
        after = engine.statistics()
        tokens = sum(len(completion.token_ids) for completion in completions)
        assert after["completion_tokens"] - before["completion_tokens"] == tokens
        assert after["requests"] - before["requests"] == 3
        assert after["prompt_tokens"] - before["prompt_tokens"] == sum(map(len, PROMPTS[:3]))
        assert after["busy_seconds"] > before["busy_seconds"]


class FullContract:
    """Fixtures: `full_engine`, `fresh_model`; tests run in the order written, each publishing
    anew."""

    async def test_full_weights_are_swapped_the_head_included(self, full_engine, fresh_model):
        model = fresh_model()
        perturb(model, seed=1)
        publication = full_publication(model, 1)
        prompt = list(range(8, 72))
        await sample(full_engine, [prompt])  # fills the cache with the old weights
        await full_engine.publish(publication)
        assert full_engine.version == 1
        assert await full_engine.fingerprint() == publication.fingerprint
        completion = (await sample(full_engine, [prompt]))[0]
        assert completion.versions == [(0, 1)]
        expected = logprobs_of(model, [*prompt, *completion.token_ids])[len(prompt) :]
        assert completion.logprobs == pytest.approx(expected, abs=1e-3)

    async def test_a_full_publish_wants_a_drained_engine(self, full_engine, fresh_model):
        running = asyncio.ensure_future(sample(full_engine, PROMPTS, max_tokens=60))
        await turns()
        with pytest.raises(EngineError, match="drain first"):
            await full_engine.publish(full_publication(fresh_model(), 2))
        await full_engine.drain()
        await full_engine.publish(full_publication(fresh_model(), 2))
        await running

    async def test_the_version_before_is_gone(self, full_engine, fresh_model):
        await full_engine.publish(full_publication(fresh_model(), 3))
        with pytest.raises(EngineError, match="version -1 is not served"):
            await sample(full_engine, PROMPTS[:1], version=BASE_VERSION)

    async def test_an_adapter_is_refused(self, full_engine, fresh_model):
        with pytest.raises(EngineError, match="lora_rank = 0"):
            await full_engine.publish(adapter_publication(adapted(fresh_model(), seed=1), 4))
