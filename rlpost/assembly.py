"""From a job to its working parts: engine, rollout worker, learner. The parts themselves know no
job."""

import importlib.util
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost import plugins
from rlpost.config import Job
from rlpost.engine.base import MKL_CBWR, Engine, EngineSpec
from rlpost.errors import ModelError
from rlpost.evaluation import Metrics
from rlpost.learner_spec import LearnerSpec
from rlpost.preparation import model_folder, open_env

if TYPE_CHECKING:
    from rlpost.learner import Learner
    from rlpost.rollout_worker import RolloutWorker

COLOCATED_SHARE = 0.4  # of the card's memory for the engine; the learner has the rest
OWN_SHARE = 0.85
CPU_KV_MB = 512
MAX_RUNNING = {"cpu": 64, "cuda": 256}
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def set_threads(job: Job) -> None:
    """One OpenMP thread a process on the CPU: spinning threads on busy cores cost a factor of five.
    Called before torch or vLLM is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if job.run.gpus == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def device(job: Job) -> str:
    return "cpu" if job.run.gpus == "cpu" else "cuda"


def engine_spec(job: Job, model: Path) -> EngineSpec:
    """What the job's engines are started with."""
    on_cpu = device(job) == "cpu"
    kv_mb = job.rollout.kv_cache_mb or (CPU_KV_MB if on_cpu else None)
    return EngineSpec(
        model=str(model),
        dtype=job.dtype,
        max_length=job.model.max_length,
        lora_rank=job.lora.rank if job.learner.method == "lora" else 0,
        keep=job.staleness + 2,
        max_running=job.rollout.max_running or MAX_RUNNING[device(job)],
        kv_cache_bytes=kv_mb << 20 if kv_mb else None,
        memory_fraction=COLOCATED_SHARE if job.run.gpus == "colocated" else OWN_SHARE,
        device=device(job),
        seed=job.run.seed,
    )


def choose_engine(job: Job, model: Path) -> tuple[str, str]:
    """The engine's name and, where it is not what the job would like best, why in one line."""
    from rlpost.engine import available

    if job.model.engine != "auto":
        if job.model.engine not in available():
            raise ModelError(
                f"model.engine = {job.model.engine!r} is not installed",
                cure='leave it out ("auto") or install it',
            )
        return job.model.engine, ""
    why = _no_vllm(model, available())
    if not why:
        return "vllm", ""
    return "transformers", f"the transformers engine serves, since {why}"


def _no_vllm(model: Path, available: Collection[str]) -> str:
    """Why vLLM does not serve this model here; "" if it does."""
    if "vllm" not in available:
        return "vLLM is not installed here"
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):
        return ""
    names = " ".join(config.get("architectures") or ())
    if "Qwen3_5" in names and importlib.util.find_spec("torchvision") is None:
        return "vLLM's Qwen3.5 needs torchvision, which is not installed here"
    return ""


def build_worker(job: Job) -> "RolloutWorker":
    """A rollout worker of this job, not started. Its scoring processes must start before its
    engine."""
    set_threads(job)
    if device(job) == "cpu":
        os.environ.setdefault("MKL_CBWR", MKL_CBWR)  # before the imports below load MKL
    from rlpost.engine import open_engine
    from rlpost.policy.renderer import Renderer
    from rlpost.rollout_worker import RolloutWorker
    from rlpost.scoring.pool import ScoringPool

    model = model_folder(job)
    name, _ = choose_engine(job, model)
    engine: Engine = open_engine(name, engine_spec(job, model))
    pool = ScoringPool(
        job.rewards,
        processes=job.scoring.processes,
        deadline=job.scoring.deadline,
        memory_bytes=job.scoring.memory_mb << 20,
        trusted=job.scoring.trusted,
        allow_untrusted=job.scoring.allow_untrusted,
        on_timeout="stop" if job.run.lockstep else "score",
    )
    return RolloutWorker(
        engine=engine,
        env=open_env(job),
        pool=pool,
        renderer=Renderer(model, thinking=job.model.thinking),
        max_length=job.model.max_length,
    )


def build_learner(job: Job, *, reply_limit: int) -> "Learner":
    """The learner of this job, not started. `reply_limit` is the most tokens a reply may have."""
    set_threads(job)
    from rlpost.learner import Learner

    return Learner(learner_spec(job, reply_limit=reply_limit))


def learner_spec(job: Job, *, reply_limit: int = 0) -> LearnerSpec:
    """What the job's learner is started with; without a limit dr_grpo divides by the longest reply
    of an update."""
    rules, where, model = job.learner, device(job), model_folder(job)
    checkpointing = rules.checkpoint_activations
    return LearnerSpec(
        model=str(model),
        dtype=job.dtype,
        method=rules.method,
        rank=job.lora.rank,
        alpha=job.lora.alpha,
        learning_rate=rules.learning_rate or default_learning_rate(rules.method, model),
        warmup=rules.warmup,
        clip_norm=rules.clip_norm,
        loss=rules.loss,
        clip_low=rules.clip_low,
        clip_high=rules.clip_high,
        ratio_cap=rules.ratio_cap,
        correction=rules.correction,
        correction_cap=rules.correction_cap,
        guard=rules.sequence_guard,
        kl_coefficient=rules.kl,
        entropy_coefficient=rules.entropy,
        reply_limit=reply_limit,
        keep_start=rules.method == "full" and rules.kl > 0,
        micro_batch_tokens=rules.micro_batch_tokens or MICRO_BATCH_TOKENS[where],
        checkpointing=where == "cuda" if checkpointing is None else checkpointing,
        device=where,
        seed=job.run.seed,
    )


def default_learning_rate(method: str, model: Path) -> float:
    """Published values span 5e-6 to 1e-4 for LoRA; these are the middle, by size (design, section
    8)."""
    if method == "full":
        return 1e-6
    size = count_parameters(model)
    return 5e-5 if size <= 1.2e9 else 4e-5 if size <= 5e9 else 3e-5


def count_parameters(model: Path) -> int:
    """Numbers in the checkpoint, from the headers of its safetensors files; a tied head counts
    once."""
    from safetensors import safe_open

    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            shapes = [file.get_slice(name).get_shape() for name in list(file.keys())]
            total += sum(map(math.prod, shapes))
    return total


def export_job(job: Job, checkpoint: Path, out: Path) -> dict[str, Any]:
    """The export of a learner's checkpoint with what serving it needs; returns its summary. Raises
    RunError when the merged model is not the trained one, UserError when `out` is taken."""
    set_threads(job)
    import torch

    from rlpost.policy.export import Surroundings, export

    model = model_folder(job)
    prompt = job.data.prompt or job.environment.arguments.get("prompt")
    prompt_file = job.beside(prompt) if isinstance(prompt, str) else None
    schema_file = job.beside(job.data.answer_schema) if job.data.answer_schema else None
    surroundings = Surroundings(
        prompt=prompt_file.read_text() if prompt_file and prompt_file.is_file() else "",
        schema=json.loads(schema_file.read_text()) if schema_file else _first_schema(job),
        chat_template_arguments={"enable_thinking": job.model.thinking},
        licence=job.model.license or licence(model),
        serve_command=f"vllm serve {{model}} --max-model-len {job.model.max_length}"
        f" --served-model-name {job.run.name}",
        provenance={"run": job.run.name, "checkpoint": str(checkpoint), "model": job.model.path},
    )
    where = "cuda" if device(job) == "cuda" and torch.cuda.is_available() else "cpu"
    return export(checkpoint, model, out, surroundings=surroundings, device=where)


def _first_schema(job: Job) -> Any:
    """The schema that the environment's first task asks for, where the job names no file."""
    first = next(iter(open_env(job).tasks()), None)
    return dict(first.schema) if first is not None and first.schema else None


def licence(model: Path) -> str:
    """The licence that comes with a model: its file, else the name in its card; "" if neither."""
    for name in ("LICENSE", "LICENSE.txt", "LICENCE"):
        if (model / name).is_file():
            return (model / name).read_text(encoding="utf-8", errors="replace")
    try:
        card = (model / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^license(?:_name)?:\s*(\S+)", card, re.MULTILINE)
    return found[1] if found else ""


def task_metrics(job: Job) -> list[Metrics]:
    """The metrics over a set that the job's rewards bring along (`reward.metrics`)."""
    found: list[Metrics] = []
    for spec in job.rewards:
        if spec.use.endswith(".json"):
            continue
        reward = plugins.resolve("rlpost.rewards", spec.use, base_dir=spec.base_dir)
        measure = getattr(reward, "metrics", None)
        if callable(measure):
            found.append(_bound(measure, spec.arguments))
    return found


def _bound(measure: Any, arguments: Mapping[str, Any]) -> Metrics:
    return lambda tasks, rollouts: measure(tasks, rollouts, **arguments)
