"""One worker over a fake engine: tokens in and out, episodes, judging, publishing."""

import asyncio
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import task

from rlpost.engine.base import Publication
from rlpost.env import SingleTurn
from rlpost.policy.renderer import Renderer
from rlpost.rollout_worker import GroupOrder, RolloutWorker, rollout_seed
from rlpost.scoring.pool import Failure
from rlpost.types import Completion, Score, Step

MODEL = Path(__file__).parents[1] / "rlpost" / "template" / "model"


@pytest.fixture(scope="module")
def renderer():
    return Renderer(MODEL)


class ScriptedEngine:
    """Says what it is told; remembers what it was asked."""

    def __init__(self, renderer, *replies, versions=(0,)):
        self.renderer, self.replies = renderer, list(replies) or ["fine"]
        self.asked, self.events, self.versions = [], [], versions
        self.running = 0

    async def start(self):
        self.events.append("engine")

    async def generate(self, prompt_ids, sampling, *, version=None):
        turn = len(self.asked)
        self.asked.append((list(prompt_ids), sampling, version))
        self.running += 1
        await asyncio.sleep(0.002)
        self.running -= 1
        text = self.replies[turn % len(self.replies)]
        ids = self.renderer.tokenizer.encode(text, add_special_tokens=False)
        whole = [*ids, self.renderer.stop_token_ids[0]]
        cut = len(whole) > sampling.max_tokens
        whole = whole[: sampling.max_tokens]
        return Completion(
            token_ids=whole, logprobs=[-0.5] * len(whole), text=text,
            finish_reason="length" if cut else "stop",
            versions=[(0, self.versions[turn % len(self.versions)])],
        )  # fmt: skip

    async def publish(self, publication):
        assert publication.kind == "lora" or self.running == 0, "published while requests run"
        self.events.append(("publish", publication.version, publication.payload))

    async def drain(self):
        while self.running:
            await asyncio.sleep(0.001)

    def statistics(self):
        return {"requests": len(self.asked)}

    async def stop(self):
        self.events.append("engine stopped")


class FakePool:
    """Scores 1 for "fine", nothing for "broken", else 0."""

    def __init__(self, events=None):
        self.failures, self.events, self.judged = deque(), [] if events is None else events, []

    async def start(self):
        self.events.append("pool")

    async def score(self, rollouts):
        self.judged.append([rollout.reply for rollout in rollouts])
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout):
        if rollout.reply == "broken":
            self.failures.append(
                Failure(reward="tone", status="timeout", detail="10 s", task=rollout.task.id)
            )
            return replace(rollout, status="timeout")
        value = float(rollout.reply == "fine")
        return replace(rollout, status="ok", score=Score(value=value, parts={"tone": value}))

    def statistics(self):
        return {}

    async def stop(self):
        self.events.append("pool stopped")


class Dialogue:
    """Asks `turns` times, then is done."""

    def __init__(self, turns=2, break_at=None):
        self.turns, self.break_at = turns, break_at

    def tasks(self):
        return []

    def episode(self, task):
        outer = self

        class Episode:
            said = 0

            def start(self):
                if outer.break_at == 0:
                    raise OSError("no database")
                return task.messages

            def step(self, reply):
                self.said += 1
                if outer.break_at == self.said:
                    raise OSError("no database")
                if self.said >= outer.turns:
                    return Step(info={"turns": self.said})
                return Step(messages=[{"role": "user", "content": f"again {reply}"}], done=False)

        return Episode()


def worker_of(engine, *, env=None, pool=None, max_length=256):
    pool = pool or FakePool(engine.events)
    env = env or SingleTurn([])
    return RolloutWorker(
        engine=engine, env=env, pool=pool, renderer=engine.renderer, max_length=max_length
    )


def order(**fields):
    values = {
        "group_id": 7, "task": task("a"), "group_size": 2, "version": 3, "seed": 1,
        "max_reply_tokens": 32,
    }  # fmt: skip
    return GroupOrder(**values | fields)


# ── seeds ──────────────────────────────────────────────────────────────────────────────────────


def test_a_seed_is_a_function_of_task_group_rollout_version_and_run():
    seeds = [
        rollout_seed(order(**change), index)
        for index in (0, 1)
        for change in (
            {}, {"group_id": 8}, {"task": task("b")}, {"version": 4}, {"version": None}, {"seed": 2}
        )
    ]  # fmt: skip
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert rollout_seed(order(), 0) == 847191850779594100  # the same on every machine, for ever


async def test_every_rollout_and_every_turn_samples_with_its_own_seed(renderer):
    engine = ScriptedEngine(renderer)
    await worker_of(engine, env=Dialogue(turns=2)).run(order(group_size=3))
    seeds = [sampling.seed for _, sampling, _ in engine.asked]
    assert len(set(seeds)) == 6


async def test_a_greedy_order_has_no_seed_and_temperature_zero(renderer):
    engine = ScriptedEngine(renderer)
    await worker_of(engine).run(order(temperature=0.0, group_size=1))
    ((_, sampling, version),) = engine.asked
    assert (sampling.temperature, sampling.seed, version) == (0.0, None, 3)
    assert sampling.stop_token_ids == renderer.stop_token_ids


# ── tokens ─────────────────────────────────────────────────────────────────────────────────────


async def test_the_trajectory_is_the_prompt_and_what_was_sampled(renderer):
    engine = ScriptedEngine(renderer, "fine")
    group = await worker_of(engine).run(order(group_size=1))
    (rollout,) = group.rollouts
    prompt = renderer.prompt(group.task.messages)
    sampled = [*renderer.tokenizer.encode("fine", add_special_tokens=False),
               renderer.stop_token_ids[0]]  # fmt: skip
    t = rollout.trajectory
    assert list(t.token_ids) == prompt + sampled
    assert list(t.loss_mask) == [0] * len(prompt) + [1] * len(sampled)
    assert list(t.logprobs) == [0.0] * len(prompt) + [-0.5] * len(sampled)
    assert t.policy_version == 0
    assert (rollout.reply, rollout.stop_reason, rollout.status) == ("fine", "stop", "ok")
    assert rollout.messages[-1] == {"role": "assistant", "content": "fine"}


async def test_over_two_turns_the_second_prompt_begins_with_all_that_was_sampled(renderer):
    """What the engine said is never tokenised again: here it said it in unusual tokens."""
    engine = ScriptedEngine(renderer, "fi ne", "done")
    odd = [token for letter in "fine" for token in renderer.tokenizer.encode(letter)]
    plain = engine.generate

    async def spelt(prompt_ids, sampling, *, version=None):
        completion = await plain(prompt_ids, sampling, version=version)
        if len(engine.asked) == 1:
            ids = [*odd, renderer.stop_token_ids[0]]
            completion = replace(completion, token_ids=ids, logprobs=[-1.0] * len(ids))
        return completion

    engine.generate = spelt
    group = await worker_of(engine, env=Dialogue(turns=2)).run(order(group_size=1))
    (rollout,) = group.rollouts
    first, second = (ids for ids, *_ in engine.asked)
    assert odd != renderer.tokenizer.encode("fine")
    assert second[: len(first)] == first
    assert second[len(first) : len(first) + len(odd)] == odd
    t = rollout.trajectory
    assert list(t.token_ids[: len(second)]) == second
    assert [m for m, _ in zip(t.loss_mask, range(10**6), strict=False)].count(1) == (
        len(odd) + 1 + len(renderer.tokenizer.encode("done")) + 1
    )
    text = renderer.tokenizer.decode(t.token_ids)
    assert text.count("fine") == 2  # the reply, and the environment's echo of it
    assert rollout.info == {"turns": 2}
    assert [m["role"] for m in rollout.messages] == ["user", "assistant", "user", "assistant"]


async def test_a_trajectory_over_two_versions_is_as_old_as_the_older(renderer):
    engine = ScriptedEngine(renderer, versions=(5, 4))
    group = await worker_of(engine, env=Dialogue(turns=2)).run(order(group_size=1))
    assert group.policy_version == 4


# ── the end of a reply ─────────────────────────────────────────────────────────────────────────


async def test_a_truncated_reply_scores_the_lowest_in_every_part(renderer):
    engine = ScriptedEngine(renderer, "fine")
    group = await worker_of(engine).run(order(group_size=1, max_reply_tokens=1))
    (rollout,) = group.rollouts
    assert (rollout.stop_reason, rollout.score.reason) == ("length", "truncated")
    assert (rollout.score.value, dict(rollout.score.parts)) == (0.0, {"tone": 0.0})


async def test_a_masked_truncated_reply_keeps_its_score(renderer):
    class Generous(FakePool):
        def _one(self, rollout):
            return replace(rollout, status="ok", score=Score(value=0.7))

    engine = ScriptedEngine(renderer, "fine")
    worker = worker_of(engine, pool=Generous())
    (rollout,) = (
        await worker.run(order(group_size=1, max_reply_tokens=1, truncated="mask"))
    ).rollouts
    assert (rollout.stop_reason, rollout.score.value) == ("length", 0.7)


async def test_a_reply_gets_no_more_room_than_the_models_length_leaves(renderer):
    engine = ScriptedEngine(renderer, "fine")
    prompt = renderer.prompt(task("a").messages)
    await worker_of(engine, max_length=len(prompt) + 5).run(order(group_size=1))
    assert engine.asked[0][1].max_tokens == 5


async def test_a_dialogue_that_outgrows_the_model_ends_as_truncated(renderer):
    engine = ScriptedEngine(renderer, "fine")
    length = len(renderer.prompt(task("a").messages)) + 12
    group = await worker_of(engine, env=Dialogue(turns=50), max_length=length).run(
        order(group_size=1)
    )
    (rollout,) = group.rollouts
    assert rollout.stop_reason == "length"
    assert rollout.score.value == 0.0
    assert rollout.trajectory.policy_version == 0


# ── failures ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("break_at", [0, 1])
async def test_an_environment_that_fails_costs_its_rollout_a_score_and_says_why(renderer, break_at):
    engine = ScriptedEngine(renderer)
    group = await worker_of(engine, env=Dialogue(break_at=break_at)).run(order())
    for rollout in group.rollouts:
        assert rollout.score is None
        assert rollout.status == "error"
        assert rollout.info["error"] == "environment: OSError('no database')"
    assert group.values == []


async def test_a_judge_that_fails_leaves_no_score_and_names_its_reward(renderer):
    engine = ScriptedEngine(renderer, "broken", "fine")
    group = await worker_of(engine).run(order())
    broken = next(r for r in group.rollouts if r.reply == "broken")
    assert broken.score is None
    assert broken.info["error"] == "reward tone: timeout: 10 s"
    assert group.values == [1.0]


async def test_the_group_is_judged_at_once(renderer):
    """A group reward needs all G replies together."""
    engine = ScriptedEngine(renderer, "fine", "poor", "fine", "poor")
    worker = worker_of(engine)
    await worker.run(order(group_size=4))
    assert Counter(worker._pool.judged[0]) == {"fine": 2, "poor": 2}
    assert len(worker._pool.judged) == 1


async def test_an_engine_that_breaks_ends_the_group_with_its_own_error(renderer):
    class Broken(ScriptedEngine):
        async def generate(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    worker = worker_of(Broken(renderer))
    with pytest.raises(RuntimeError, match="out of memory"):
        await worker.run(order(group_size=3))
    assert worker._running == 0


# ── start, publish, stop ───────────────────────────────────────────────────────────────────────


async def test_scoring_processes_start_before_the_engine(renderer):
    engine = ScriptedEngine(renderer)
    worker = worker_of(engine)
    await worker.start()
    await worker.stop()
    assert engine.events == ["pool", "engine", "engine stopped", "pool stopped"]


async def test_full_weights_wait_until_nothing_runs_and_let_nothing_start(renderer):
    engine = ScriptedEngine(renderer)
    worker = worker_of(engine)
    running = [asyncio.create_task(worker.run(order(group_id=n))) for n in range(4)]
    await asyncio.sleep(0.001)
    await worker.publish(Publication(version=1, kind="full", payload=b""), b"weights")
    await asyncio.gather(*running)
    assert engine.events == [("publish", 1, b"weights")]
    assert len(engine.asked) == 8


async def test_an_adapter_is_published_while_requests_run(renderer):
    engine = ScriptedEngine(renderer)
    worker = worker_of(engine)
    running = asyncio.create_task(worker.run(order()))
    await asyncio.sleep(0.001)
    assert engine.running
    await worker.publish(Publication(version=1, kind="lora", payload=b"own"))
    assert engine.running
    await running
    assert engine.events == [("publish", 1, b"own")]


async def test_a_failed_full_publish_does_not_close_the_worker_for_ever(renderer):
    class Refusing(ScriptedEngine):
        async def publish(self, publication):
            raise RuntimeError("no room")

    worker = worker_of(Refusing(renderer))
    with pytest.raises(RuntimeError):
        await worker.publish(Publication(version=1, kind="full", payload=b""))
    assert len((await asyncio.wait_for(worker.run(order()), 1)).rollouts) == 2


async def test_statistics_count_tokens_and_idle_time(renderer):
    engine = ScriptedEngine(renderer, "fine")
    worker = worker_of(engine)
    await asyncio.sleep(0.01)
    await worker.run(order())
    told = worker.statistics()
    assert told["prompt_tokens"] == 2 * len(renderer.prompt(task("a").messages))
    assert told["completion_tokens"] == 2 * (len(renderer.tokenizer.encode("fine")) + 1)
    assert told["idle_seconds"] >= 0.01
    assert told["engine"] == {"requests": 2}
