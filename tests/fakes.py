"""Stand-ins for unit tests of the loop: an engine and a learner whose policy is one number.

Never used for a claim: everything the README says is shown with real vLLM, real Ray and a real
learner.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.engine.base import Publication
from rlpost.rollout_worker import GroupOrder
from rlpost.types import Group, Rollout, Score, StepReport, Task, Trajectory


def task(name: str = "t0", **fields: Any) -> Task:
    return Task(id=name, messages=[{"role": "user", "content": f"solve {name}"}], **fields)


def rollout(of: Task, value: float | None, *, version: int = 0, **fields: Any) -> Rollout:
    trajectory = Trajectory(
        token_ids=(1, 2, 3, 4), loss_mask=(0, 0, 1, 1), logprobs=(0.0, 0.0, -1.0, -0.5),
        policy_version=version,
    )  # fmt: skip
    score = None if value is None else Score(value=value, parts={"reward": value})
    status = "ok" if value is not None else "crashed"
    return Rollout(
        task=of, reply="x", trajectory=trajectory, score=score, status=status, **fields
    )  # fmt: skip


def group(
    id: int, values: Sequence[float | None], *, version: int = 0, of: Task | None = None
) -> Group:
    of = of or task(f"t{id}")
    return Group(id=id, task=of, rollouts=tuple(rollout(of, v, version=version) for v in values))


class FakeRollout:
    """A rollout client: takes a random while, remembers under which version each group was
    sampled."""

    name = "rollout-0"

    def __init__(self, *, seed: int = 0, slowest: float = 0.003):
        self._random, self._slowest = random.Random(seed), slowest
        self.served: list[int] = []
        self.sampled: list[tuple[int, str, int]] = []  # (group, task, version)
        self.publish_fails = 0
        self.lies = False
        self.value = lambda order, index: float(index % 2)

    async def start(self) -> Mapping[str, Any]:
        return {"engine": "fake"}

    async def run(self, order: GroupOrder) -> Group:
        version = self.served[-1] if order.version is None else order.version
        await asyncio.sleep(self._random.random() * self._slowest)
        if order.temperature > 0:
            self.sampled.append((order.group_id, order.task.id, version))
        values = [self.value(order, index) for index in range(order.group_size)]
        return group(order.group_id, values, version=version, of=order.task)

    async def publish(self, header: Publication, payload: Any) -> float:
        if not (self.lies and header.version > 0):
            self.served.append(header.version)
        return 0.0

    async def fingerprint(self, *, version: int | None = None) -> Mapping[str, int]:
        return {"w": self.served[-1]}

    async def score(
        self, sequences: Sequence[Sequence[int]], *, version: int | None = None
    ) -> list[list[float]]:
        return [fake_logprobs(sequence, self.served[-1]) for sequence in sequences]

    async def statistics(self) -> Mapping[str, Any]:
        return {"idle_seconds": 0.0, "engine": {}, "scoring": {}}

    async def stop(self) -> None:
        pass


class FakeLearner:
    """A learner client whose weights are its version."""

    def __init__(self) -> None:
        self.version = 0
        self.trained: list[int] = []  # trajectories' count of each update
        self.saved: dict[str, int] = {}
        self.skips: dict[int, str] = {}  # call number -> why
        self.calls = 0

    async def start(self) -> Mapping[str, Any]:
        return {"micro_batch_tokens": 512, "layout": "padded", "can_measure_kl": True}

    async def update(self, batches: Sequence[Any], *, measure_kl: bool = False) -> StepReport:
        skipped = self.skips.get(self.calls, "")
        self.calls += 1
        self.version += not skipped
        self.trained.append(sum(len(batch.starts) - 1 for batch in batches))
        return StepReport(
            policy_version=self.version, loss=0.1, grad_norm=1.0, entropy=1.0, clip_fraction=0.0,
            logprob_gap=0.0, kl=0.0, tokens=10, seconds=0.0, skipped=skipped,
        )  # fmt: skip

    async def publication(self) -> tuple[Publication, Any]:
        fingerprint = {"w": self.version}
        return Publication(
            version=self.version, kind="lora", payload=b"", fingerprint=fingerprint
        ), b""

    async def canary(self, seed: int) -> tuple[Publication, Any]:
        return Publication(version=-2, kind="lora", payload=b"", fingerprint={"w": -2}), b""

    async def logprobs(
        self, sequences: Sequence[Sequence[int]], *, policy: str = "current"
    ) -> list[list[float]]:
        return [fake_logprobs(sequence, self.version) for sequence in sequences]

    async def canary_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [fake_logprobs(sequence, -2) for sequence in sequences]

    async def save(self, folder: str) -> None:
        from pathlib import Path

        path = Path(folder)
        path.mkdir(parents=True)
        (path / "manifest.json").write_text('{"format": 1, "sha256": {}}')
        (path / "version").write_text(str(self.version))

    async def load(self, folder: str) -> int:
        from pathlib import Path

        self.version = int((Path(folder) / "version").read_text())
        return self.version

    async def stop(self) -> None:
        pass


def fake_logprobs(sequence: Sequence[int], version: int) -> list[float]:
    """Different for every version, the same for everyone who holds it."""
    values = [random.Random(f"{version}:{i}:{t}").uniform(-3, -0.1) for i, t in enumerate(sequence)]
    return [0.0, *values[1:]]
