"""How the controller reaches its workers: two protocols of plain types, and the local form of each.

`cluster/actors.py` has the form that goes through Ray. A payload may be any handle that the other
side understands: bytes here, an object reference there, so that weights never pass through the
controller.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from rlpost.engine.base import Publication
from rlpost.types import Group, MicroBatch, StepReport

if TYPE_CHECKING:
    from rlpost.learner import Learner
    from rlpost.rollout_worker import GroupOrder, RolloutWorker

Announcement = tuple[
    Publication, Any
]  # a publication without its payload, and the payload's handle


class RolloutClient(Protocol):
    name: str

    async def start(self) -> Mapping[str, Any]: ...
    async def run(self, order: "GroupOrder") -> Group: ...
    async def publish(self, header: Publication, payload: Any) -> float: ...
    async def fingerprint(self, *, version: int | None = None) -> Mapping[str, int]: ...
    async def score(
        self, sequences: Sequence[Sequence[int]], *, version: int | None = None
    ) -> list[list[float]]: ...
    async def statistics(self) -> Mapping[str, Any]: ...
    async def stop(self) -> None: ...


class LearnerClient(Protocol):
    async def start(self) -> Mapping[str, Any]: ...
    async def update(
        self, batches: Sequence[MicroBatch], *, measure_kl: bool = False
    ) -> StepReport: ...
    async def publication(self) -> Announcement: ...
    async def canary(self, seed: int) -> Announcement: ...
    async def logprobs(
        self, sequences: Sequence[Sequence[int]], *, policy: str = "current"
    ) -> list[list[float]]: ...
    async def canary_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...
    async def save(self, folder: str) -> None: ...
    async def load(self, folder: str) -> int: ...
    async def stop(self) -> None: ...


class LocalRollout:
    """A rollout worker in this process."""

    def __init__(self, worker: "RolloutWorker", name: str = "rollout-0"):
        self._worker, self.name = worker, name
        self.run, self.publish = worker.run, worker.publish
        self.fingerprint, self.score, self.stop = worker.fingerprint, worker.score, worker.stop

    async def start(self) -> Mapping[str, Any]:
        await self._worker.start()
        return {"engine": type(self._worker.engine).__name__}

    async def statistics(self) -> Mapping[str, Any]:
        return self._worker.statistics()


class LocalLearner:
    """A learner in this process, in a thread of its own so that the loop stays alive."""

    def __init__(self, learner: "Learner"):
        self._learner = learner

    async def start(self) -> Mapping[str, Any]:
        await asyncio.to_thread(self._learner.start)
        return describe(self._learner)

    async def update(
        self, batches: Sequence[MicroBatch], *, measure_kl: bool = False
    ) -> StepReport:
        return await asyncio.to_thread(self._learner.update, batches, measure_kl=measure_kl)

    async def publication(self) -> Announcement:
        return announce(await asyncio.to_thread(self._learner.publication))

    async def canary(self, seed: int) -> Announcement:
        return announce(await asyncio.to_thread(self._learner.canary, seed))

    async def logprobs(
        self, sequences: Sequence[Sequence[int]], *, policy: str = "current"
    ) -> list[list[float]]:
        return await asyncio.to_thread(self._learner.logprobs, sequences, policy=policy)

    async def canary_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return await asyncio.to_thread(self._learner.canary_logprobs, sequences)

    async def save(self, folder: str) -> None:
        await asyncio.to_thread(self._learner.save, folder)

    async def load(self, folder: str) -> int:
        await asyncio.to_thread(self._learner.load, folder)
        return self._learner.version

    async def stop(self) -> None:
        return None


def announce(publication: Publication) -> Announcement:
    """Header and payload apart."""
    return replace(publication, payload=b""), publication.payload


def describe(learner: "Learner") -> dict[str, Any]:
    """What the controller must know of a started learner, and what a reader of the events may want
    to."""
    return {
        "version": learner.version,
        "can_measure_kl": learner.can_measure_kl,
        "micro_batch_tokens": learner.micro_batch_tokens,
        **learner.describe(),
    }
