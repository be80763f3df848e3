"""Classes become Ray actors here, and only here: placement, clients, and the controller's own
actor.

Weights travel as one Ray object from the learner to every worker; the controller passes its
reference on.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads these once, when it is imported
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from rlpost import assembly
from rlpost.clients import Announcement, describe
from rlpost.config import Job, parse_job
from rlpost.engine.base import Publication
from rlpost.errors import ClusterError, EngineError, Interrupted, JobError, RlpostError, RunError
from rlpost.rollout_worker import GroupOrder
from rlpost.types import Group, MicroBatch, StepReport

JobSource = tuple[
    str, str, tuple[str, ...]
]  # text, path, overrides: parsed again where the job runs


def open_job(source: JobSource) -> Job:
    text, path, overrides = source
    return parse_job(text, path=Path(path), overrides=overrides)


class RolloutActor:
    """A rollout worker in its own process."""

    def __init__(self, source: JobSource):
        self._worker = assembly.build_worker(open_job(source))

    async def start(self) -> dict[str, Any]:
        await self._worker.start()
        return {"engine": type(self._worker.engine).__name__, "pid": os.getpid(), **_where()}

    async def run(self, order: GroupOrder) -> Group:
        return await self._worker.run(order)

    async def publish(self, header: Publication, payload: bytes) -> float:
        return await self._worker.publish(header, payload)

    async def fingerprint(self, version: int | None) -> Mapping[str, int]:
        return await self._worker.fingerprint(version=version)

    async def score(
        self, sequences: Sequence[Sequence[int]], version: int | None
    ) -> list[list[float]]:
        return await self._worker.score(sequences, version=version)

    async def statistics(self) -> Mapping[str, Any]:
        return self._worker.statistics()

    async def stop(self) -> None:
        await self._worker.stop()


class LearnerActor:
    """The learner in its own process; one call at a time."""

    def __init__(self, source: JobSource, reply_limit: int):
        self._learner = assembly.build_learner(open_job(source), reply_limit=reply_limit)

    def start(self) -> dict[str, Any]:
        self._learner.start()
        return {"pid": os.getpid(), **_where(), **describe(self._learner)}

    def update(self, batches: Sequence[MicroBatch], measure_kl: bool) -> StepReport:
        return self._learner.update(batches, measure_kl=measure_kl)

    def publication(self) -> tuple[Publication, bytes]:
        whole = self._learner.publication()
        return replace(whole, payload=b""), whole.payload

    def canary(self, seed: int) -> tuple[Publication, bytes]:
        whole = self._learner.canary(seed)
        return replace(whole, payload=b""), whole.payload

    def logprobs(self, sequences: Sequence[Sequence[int]], policy: str) -> list[list[float]]:
        return self._learner.logprobs(sequences, policy=policy)

    def canary_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._learner.canary_logprobs(sequences)

    def save(self, folder: str) -> None:
        self._learner.save(folder)

    def load(self, folder: str) -> int:
        self._learner.load(folder)
        return self._learner.version


class RayRollout:
    """RolloutClient over a RolloutActor."""

    def __init__(self, actor: Any, name: str):
        self._actor, self.name = actor, name

    async def start(self) -> Mapping[str, Any]:
        return await _call(self._actor.start.remote(), self.name)

    async def run(self, order: GroupOrder) -> Group:
        return await _call(self._actor.run.remote(order), self.name)

    async def publish(self, header: Publication, payload: Any) -> float:
        return await _call(self._actor.publish.remote(header, payload), self.name)

    async def fingerprint(self, *, version: int | None = None) -> Mapping[str, int]:
        return await _call(self._actor.fingerprint.remote(version), self.name)

    async def score(
        self, sequences: Sequence[Sequence[int]], *, version: int | None = None
    ) -> list[list[float]]:
        return await _call(self._actor.score.remote(sequences, version), self.name)

    async def statistics(self) -> Mapping[str, Any]:
        return await _call(self._actor.statistics.remote(), self.name)

    async def stop(self) -> None:
        await _call(self._actor.stop.remote(), self.name)


class RayLearner:
    """LearnerClient over a LearnerActor. Announcements hold a reference instead of the bytes."""

    def __init__(self, actor: Any):
        self._actor = actor

    async def start(self) -> Mapping[str, Any]:
        return await _call(self._actor.start.remote(), "learner")

    async def update(
        self, batches: Sequence[MicroBatch], *, measure_kl: bool = False
    ) -> StepReport:
        return await _call(self._actor.update.remote(list(batches), measure_kl), "learner")

    async def publication(self) -> Announcement:
        return await self._announced(self._actor.publication.options(num_returns=2).remote())

    async def canary(self, seed: int) -> Announcement:
        return await self._announced(self._actor.canary.options(num_returns=2).remote(seed))

    async def _announced(self, references: Sequence[Any]) -> Announcement:
        header, payload = references
        return await _call(header, "learner"), payload

    async def logprobs(
        self, sequences: Sequence[Sequence[int]], *, policy: str = "current"
    ) -> list[list[float]]:
        return await _call(self._actor.logprobs.remote(sequences, policy), "learner")

    async def canary_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return await _call(self._actor.canary_logprobs.remote(sequences), "learner")

    async def save(self, folder: str) -> None:
        await _call(self._actor.save.remote(folder), "learner")

    async def load(self, folder: str) -> int:
        return await _call(self._actor.load.remote(folder), "learner")

    async def stop(self) -> None:
        return None


async def _call(reference: Any, name: str) -> Any:
    """The result of a call; our own errors come back as they were raised, a dead actor as
    EngineError."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, RlpostError):
            raise cause from None
        raise EngineError(f"{name} failed: {_last_line(error)}") from error
    except ray.exceptions.RayActorError as error:
        raise EngineError(f"{name} died: {_last_line(error)}") from error


class ControllerActor:
    """Owns a run: makes the other actors, runs the controller, answers watchers."""

    def __init__(self, source: JobSource, run_path: str):
        self._source, self._run_path = source, Path(run_path)
        self._controller: Any = None

    async def run(self, resume: bool) -> dict[str, Any]:
        from rlpost.controller import Controller
        from rlpost.metrics import RunMetrics
        from rlpost.policy.renderer import Renderer
        from rlpost.preparation import model_folder, prepare
        from rlpost.resolved_job import resolve, write_toml
        from rlpost.run_directory import RunDirectory

        job = open_job(self._source)
        prepared = prepare(job, renderer=Renderer(model_folder(job), thinking=job.model.thinking))
        directory = RunDirectory(self._run_path)
        directory.write_resolved(write_toml(resolve(prepared)))
        metrics = RunMetrics(job.run.name)
        address = metrics.serve(port=job.run.metrics_port)
        directory.write_address(address)
        workers, learner = place(job, self._source, reply_limit=prepared.max_reply_tokens)
        self._controller = Controller(
            prepared,
            workers=workers,
            learner=learner,
            run=directory,
            metrics=metrics,
            task_metrics=assembly.task_metrics(job),
        )
        try:
            progress = await self._controller.run(resume=resume)
        except Interrupted:
            return {**self._controller.progress.as_dict(), "interrupted": True}
        return progress.as_dict()

    async def stop(self) -> None:
        if self._controller is not None:
            await self._controller.stop()

    async def progress(self) -> dict[str, Any]:
        return self._controller.progress.as_dict() if self._controller else {"phase": "preparing"}


def place(job: Job, source: JobSource, *, reply_limit: int) -> tuple[list[RayRollout], RayLearner]:
    """One actor a rollout worker and one for the learner: whole GPUs, halves when colocated, none
    on the CPU. `reply_limit` is the most tokens a reply may have."""
    workers, rollout_share, learner_share = 1, 0.0, 0.0
    if job.run.gpus == "colocated":
        rollout_share = learner_share = 0.5
    elif job.run.gpus != "cpu":
        workers, rollout_share, learner_share = job.run.gpus.rollout, 1.0, 1.0
    environment = {"env_vars": _environment(job)}
    rollouts = [
        RayRollout(
            ray.remote(RolloutActor)
            .options(
                num_cpus=0, num_gpus=rollout_share, runtime_env=environment, max_concurrency=1024
            )
            .remote(source),
            f"rollout-{index}",
        )
        for index in range(workers)
    ]
    learner = (
        ray.remote(LearnerActor)
        .options(num_cpus=0, num_gpus=learner_share, runtime_env=environment)
        .remote(source, reply_limit)
    )
    return rollouts, RayLearner(learner)


def start_controller(job: Job, source: JobSource, run_path: Path) -> Any:
    """The controller's actor; it places the others."""
    environment = {"env_vars": _environment(job)}
    return (
        ray.remote(ControllerActor)
        .options(num_cpus=0, runtime_env=environment, max_concurrency=64)
        .remote(source, str(run_path))
    )


def check_resources(job: Job) -> None:
    """Raises JobError, naming what is missing, when the cluster cannot hold the job."""
    if job.run.gpus == "cpu":
        return
    needed = 1 if job.run.gpus == "colocated" else job.run.gpus.rollout + job.run.gpus.learner
    there = int(ray.cluster_resources().get("GPU", 0))
    free = ray.available_resources().get("GPU", 0.0)
    if there < needed:
        cure = 'gpus = "colocated" needs one, gpus = "cpu" none' if there < 2 else "ask for fewer"
        raise JobError(
            f"run.gpus asks for {needed} GPU{'s' if needed > 1 else ''} and there are {there}",
            **job.at("run", "gpus"),
            cure=cure,
        )
    if free < needed:
        raise JobError(
            f"run.gpus asks for {needed} GPUs and {free:g} of {there} are free",
            **job.at("run", "gpus"),
            cure="wait for the other job, or ask for fewer",
        )


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS, else starts a private one on the loopback interface."""
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=512 << 20 if not _gpus() else None,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {address or 'this machine'}: {error}") from None


def _gpus() -> bool:
    return Path("/dev/nvidia0").exists()


def _environment(job: Job) -> dict[str, str]:
    names = ("HF_HUB_OFFLINE", "HF_HOME", "VLLM_USE_FLASHINFER_SAMPLER", "NCCL_NVLS_ENABLE")
    passed = {name: os.environ[name] for name in names if name in os.environ}
    if job.run.gpus == "cpu":
        passed["OMP_NUM_THREADS"] = "1"
    return {"TOKENIZERS_PARALLELISM": "false", **passed}


def _where() -> dict[str, Any]:
    return {"node": ray.util.get_node_ip_address(), "gpus": ray.get_gpu_ids()}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def wait(reference: Any, *, seconds: float) -> bool:
    """True once the call is done; waits `seconds` at most."""
    return bool(ray.wait([reference], timeout=seconds)[0])


def get(reference: Any) -> Any:
    """The result of a call to the controller; its own errors come back as they were raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RlpostError):
            raise error.cause from None
        raise RunError(f"the controller failed: {_last_line(error)}") from error
    except ray.exceptions.RayActorError as error:
        raise RunError(f"the controller died: {_last_line(error)}") from error
