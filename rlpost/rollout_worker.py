"""A rollout worker: one engine, one environment, one scoring pool. Task in, judged Group out. No
Ray."""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rlpost.engine.base import BASE_VERSION, Engine, Publication, Sampling
from rlpost.env import Env
from rlpost.types import Completion, Group, Message, Rollout, Score, Task, Trajectory

if TYPE_CHECKING:
    from rlpost.policy.renderer import Renderer
    from rlpost.scoring.pool import ScoringPool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOrder:
    """What to sample: `group_size` attempts at `task` under `version` (None: whatever is served).

    temperature 0 is greedy. The seed of each rollout derives from `seed`, the task, the group's
    number, the rollout's number and the version, so that a group can be sampled again and comes out
    the same.
    """

    group_id: int
    task: Task
    group_size: int
    version: int | None
    seed: int
    max_reply_tokens: int
    temperature: float = 1.0
    truncated: str = (
        "lowest"  # a cut-off reply scores 0; "mask": it keeps its score and is not trained
    )


def rollout_seed(order: GroupOrder, index: int) -> int:
    """63 bits, the same on every machine."""
    version = -2 if order.version is None else order.version
    words = f"{order.seed}:{order.task.id}:{order.group_id}:{index}:{version}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(slots=True)
class _Transcript:
    """The flat tokens of an episode while it grows."""

    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def given(self, ids: Sequence[int]) -> None:
        self.token_ids += ids
        self.loss_mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def sampled(self, completion: Completion) -> None:
        self.token_ids += completion.token_ids
        self.loss_mask += [1] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        self.versions += [version for _, version in completion.versions]

    def trajectory(self) -> Trajectory:
        return Trajectory(
            token_ids=tuple(self.token_ids),
            loss_mask=tuple(self.loss_mask),
            logprobs=tuple(self.logprobs),
            policy_version=min(self.versions, default=BASE_VERSION),
        )


def _lowest_if_cut(rollout: Rollout) -> Rollout:
    """Run-on replies must cost something: a cut-off one gets 0, in every part."""
    if rollout.stop_reason != "length" or rollout.score is None:
        return rollout
    parts = dict.fromkeys(rollout.score.parts, 0.0)
    return replace(rollout, score=Score(value=0.0, parts=parts, reason="truncated"))


class RolloutWorker:
    """Samples groups, several at once, and publishes new versions to its engine in between."""

    def __init__(
        self,
        *,
        engine: Engine,
        env: Env,
        pool: "ScoringPool",
        renderer: "Renderer",
        max_length: int,
    ):
        self.engine, self._env, self._pool, self._renderer = engine, env, pool, renderer
        self._max_length = max_length
        self._open = asyncio.Event()  # closed while full weights are swapped
        self._open.set()
        self._idle_since: float | None = time.monotonic()
        self._idle_seconds = 0.0
        self._running = 0
        self._counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Scoring processes first: they are spawned before any engine thread exists."""
        started = self._pool.start()
        if asyncio.iscoroutine(started):
            await started
        await self.engine.start()

    async def stop(self) -> None:
        await self.engine.stop()
        await self._pool.stop()

    # -- sampling ----------------------------------------------------------------------------------

    async def run(self, order: GroupOrder) -> Group:
        """One judged group. Rollouts whose judge or environment failed have no score and say
        why."""
        self._begin()
        try:
            async with asyncio.TaskGroup() as episodes:
                running = [
                    episodes.create_task(self._episode(order, index))
                    for index in range(order.group_size)
                ]
            rollouts = [task.result() for task in running]
            rollouts = await self._judge(rollouts)
            if order.truncated == "lowest":
                rollouts = [_lowest_if_cut(rollout) for rollout in rollouts]
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self._end()
        return Group(id=order.group_id, task=order.task, rollouts=tuple(rollouts))

    async def _judge(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        whole = [r for r in rollouts if r.status == "unscored"]
        scored = await self._pool.score(whole) if whole else []
        judged = iter([r if r.score is not None else self._explained(r) for r in scored])
        return [next(judged) if r.status == "unscored" else r for r in rollouts]

    def _explained(self, rollout: Rollout) -> Rollout:
        """A rollout whose judge failed, with the words for it: which reward, and why."""
        for failure in reversed(self._pool.failures):
            if failure.task == rollout.task.id and failure.status == rollout.status:
                why = f"reward {failure.reward}: {failure.status}"
                why += f": {failure.detail}" if failure.detail else ""
                return replace(rollout, info={**rollout.info, "error": why})
        return rollout

    async def _episode(self, order: GroupOrder, index: int) -> Rollout:
        task = order.task
        said: list[Message] = []
        transcript = _Transcript()
        reply, stop_reason, info, status = "", "stop", {}, "unscored"
        try:
            episode = self._env.episode(task)
            said = list(episode.start())
        except (
            Exception
        ) as error:  # the environment is the user's code: its failure is no score, not a crash
            return self._failed(task, said, transcript, f"environment: {error!r}")
        transcript.given(self._renderer.prompt(said, tools=task.tools))
        while True:
            room = self._max_length - len(transcript.token_ids)
            if room < 1:
                stop_reason = "length"
                break
            completion = await self._complete(order, index, transcript, room)
            transcript.sampled(completion)
            reply = self._renderer.reply(completion.token_ids)
            before, said = said, [*said, {"role": "assistant", "content": reply}]
            stop_reason = completion.finish_reason
            if stop_reason == "length":
                break
            try:
                step = episode.step(reply)
            except Exception as error:  # as above
                return self._failed(task, said, transcript, f"environment: {error!r}")
            info = dict(step.info)
            said += step.messages
            if step.done:
                break
            transcript.given(
                self._renderer.continuation(
                    before, step.messages, tools=task.tools, reply_ids=completion.token_ids
                )
            )
        return Rollout(
            task=task,
            reply=reply,
            trajectory=transcript.trajectory(),
            messages=tuple(said),
            stop_reason=stop_reason,
            info=info,
            status=status,
        )

    async def _complete(
        self, order: GroupOrder, index: int, transcript: _Transcript, room: int
    ) -> Completion:
        await self._open.wait()
        seed = rollout_seed(order, index) + len(transcript.versions)  # every turn its own
        sampling = Sampling(
            max_tokens=min(order.max_reply_tokens, room),
            temperature=order.temperature,
            seed=seed if order.temperature > 0 else None,
            stop_token_ids=self._renderer.stop_token_ids,
        )
        completion = await self.engine.generate(
            transcript.token_ids, sampling, version=order.version
        )
        self._counts["prompt_tokens"] += len(transcript.token_ids)
        self._counts["completion_tokens"] += len(completion.token_ids)
        return completion

    def _failed(
        self, task: Task, said: Sequence[Message], transcript: _Transcript, why: str
    ) -> Rollout:
        trajectory = transcript.trajectory() if transcript.token_ids else None
        return Rollout(
            task=task, reply="", trajectory=trajectory, messages=tuple(said),
            stop_reason="error", info={"error": why}, status="error",
        )  # fmt: skip

    # -- weights -----------------------------------------------------------------------------------

    async def publish(self, publication: Publication, payload: bytes | None = None) -> float:
        """Serves a new version; returns the seconds it took. Full weights wait until nothing
        runs."""
        began = time.monotonic()
        if payload is not None:  # the payload travels beside its header: one object for all workers
            publication = replace(publication, payload=bytes(payload))
        if publication.kind == "full":
            self._open.clear()
            try:
                await self.engine.drain()
                await self.engine.publish(publication)
            finally:
                self._open.set()
        else:
            await self.engine.publish(publication)
        return time.monotonic() - began

    async def fingerprint(self, *, version: int | None = None) -> Mapping[str, int]:
        return await self.engine.fingerprint(version=version)

    async def score(
        self, sequences: Sequence[Sequence[int]], *, version: int | None = None
    ) -> list[list[float]]:
        """Log-probabilities of given tokens, as the engine sees them."""
        return await self.engine.score(sequences, version=version)

    # -- what there is to tell
    # -----------------------------------------------------------------------

    def statistics(self) -> dict[str, object]:
        """Counters since the start: tokens, idle seconds, and those of engine and scoring pool."""
        idle = self._idle_seconds
        if self._idle_since is not None:
            idle += time.monotonic() - self._idle_since
        return {
            **self._counts,
            "idle_seconds": idle,
            "engine": dict(self.engine.statistics()),
            "scoring": self._pool.statistics(),
        }

    def _begin(self) -> None:
        if self._running == 0 and self._idle_since is not None:
            self._idle_seconds += time.monotonic() - self._idle_since
            self._idle_since = None
        self._running += 1

    def _end(self) -> None:
        self._running -= 1
        if self._running == 0:
            self._idle_since = time.monotonic()
