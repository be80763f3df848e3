"""Brings a version to every engine, and proves that it is served."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlpost.clients import Announcement, LearnerClient, RolloutClient
from rlpost.errors import ProofError
from rlpost.metrics import RunMetrics
from rlpost.policy.proof import Proof, ProofReport
from rlpost.records import Phases


class Publisher:
    """Publishes to all of `workers`; a version counts once every one has proven it. `event` writes
    a line into the run's events."""

    def __init__(
        self,
        workers: Sequence[RolloutClient],
        learner: LearnerClient,
        *,
        probes: Sequence[Sequence[int]],
        attempts: int,
        metrics: RunMetrics,
        event: Callable[..., None],
    ):
        self._workers, self._learner, self._served = workers, learner, _Served(learner)
        self._probes, self._attempts = probes, attempts
        self._metrics, self._event = metrics, event
        self._proof = Proof()
        self.weakest: ProofReport | None = None  # of the last publish

    async def prove_canary(self, seed: int) -> None:
        """A random, non-zero policy must be followed: LoRA starts at B = 0, so a no-op would pass
        without. Raises ProofError."""
        header, payload = await self._learner.canary(seed)
        for worker in self._workers:
            await worker.publish(header, payload)
            report = await self._proof.prove_canary(
                worker, self._served, header.version, self._probes, expected=header.fingerprint
            )
            self._event("canary", worker=worker.name, **_plain(report))
            if not report.holds:
                raise ProofError(
                    f"{worker.name} does not follow the learner: {report}; nothing was trained"
                )

    async def publish(self, phases: Phases, *, serving: int) -> None:
        """Brings the learner's version to every engine; returns once each has proven that it serves
        it. `serving` is the version they had. Raises ProofError after `attempts` failed proofs."""
        self._metrics.phase("publish")
        announcement = await self._learner.publication()
        version = announcement[0].version
        for attempt in range(1, self._attempts + 1):
            failed = await self._publish_once(announcement, phases)
            if not failed:
                return
            self._event("proof_failed", version=version, attempt=attempt, failures=failed)
            self._metrics.proof_failed()
        raise ProofError(
            f"version {version} was published {self._attempts} times and the engines still do not"
            f" serve it: {'; '.join(failed)}. They serve version {serving}"
        )

    async def _publish_once(self, announcement: Announcement, phases: Phases) -> list[str]:
        began = time.monotonic()
        await asyncio.gather(*(worker.publish(*announcement) for worker in self._workers))
        published = time.monotonic()
        header = announcement[0]
        reports = [
            await self._proof.prove(
                worker,
                self._served,
                header.version,
                self._probes,
                expected=header.fingerprint,
                name=worker.name,
            )
            for worker in self._workers
        ]
        phases.publish += published - began
        phases.proof += time.monotonic() - published
        self.weakest = min(reports, key=lambda report: report.power)
        self._metrics.published(
            seconds=published - began,
            proof_seconds=time.monotonic() - published,
            slope=self.weakest.slope,
            power=self.weakest.power,
        )
        return [
            f"{worker.name}: {report}"
            for worker, report in zip(self._workers, reports, strict=True)
            if not report.holds
        ]


class _Served:
    """The learner as a proof asks it: its policy as the engines hold it."""

    def __init__(self, learner: LearnerClient):
        self._learner = learner
        self.canary_logprobs = learner.canary_logprobs

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return await self._learner.logprobs(sequences, policy="served")


def _plain(report: ProofReport) -> dict[str, Any]:
    return {
        "version": report.version,
        "holds": report.holds,
        "problems": list(report.problems),
        "slope": report.slope,
        "power": report.power,
        "verdict": report.verdict,
    }
