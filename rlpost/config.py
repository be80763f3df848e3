"""job.toml -> a frozen Job. Unknown keys are refused with a suggestion, every mistake is reported
at once with its line, and each default carries its reason (`rlpost check --explain` prints
them)."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rlpost.errors import JobError, UserErrors
from rlpost.job_errors import Places, as_user_errors, key_lines, set_value
from rlpost.reward import RewardSpec

LATER = {"sft": "the SFT warm start"}  # tables of the design that are not built yet


class Table(BaseModel):
    """One table of the job: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OpenTable(BaseModel):
    """A table whose remaining keys are keyword arguments of a plugin."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Gpus(Table):
    """Whole GPUs for each role."""

    rollout: int = Field(1, ge=1)
    learner: int = Field(1, ge=1)


class Run(Table):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    seed: int = Field(1, description="every random choice of the run derives from it")
    updates: int = Field(150, ge=1, description="at most; [eval] stops earlier")
    gpus: Gpus | Literal["colocated", "cpu"] = Field(
        Gpus(), description='{rollout, learner}, or "colocated" on one card, or "cpu"'
    )
    lockstep: bool = Field(
        False,
        description="update u uses version max(0, u - staleness) exactly; resumes bit for bit",
    )
    checkpoint_every: int = Field(10, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest kept, besides the best one")
    keep_samples: int = Field(
        4, ge=0, description="groups of each update kept readable in rollouts/"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="0: a free one, written to metrics.json"
    )

    @field_validator("gpus", mode="before")
    @classmethod
    def _gpus(cls, value: Any) -> Any:
        if isinstance(value, Mapping) or value in ("colocated", "cpu"):
            return value
        raise ValueError('say {rollout = 1, learner = 1}, "colocated" or "cpu"')


class Model(Table):
    path: str = Field(description="hub id or folder; a folder is looked up beside the job first")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="float32 on the CPU, bfloat16 on GPUs (adapters and optimizer stay float32)",
    )
    thinking: bool = Field(
        False, description="always passed to the chat template: sizes differ by default"
    )
    max_length: int = Field(
        4096, ge=16, description="prompt + reply; longer rows are listed, never cut"
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="vLLM where it is installed and serves the model, else transformers"
    )
    license: str | None = Field(
        None, description="written into the run; read from the model if unset"
    )


class Lora(Table):
    rank: int = Field(
        16, ge=1, le=512, description="every linear layer (LoRA Without Regret, Tinker)"
    )
    alpha: float = Field(32.0, gt=0, description="scaling alpha / rank = 2")


class Data(Table):
    train: str | None = Field(
        None, description="JSONL, CSV or Parquet; unset for a generating environment"
    )
    heldout: str | None = Field(
        None, description="only `compare` opens it, and the openings are counted"
    )
    validation: float = Field(0.15, gt=0, lt=1, description="share of the rows, never trained on")
    split_by: str | None = Field(None, description="a column: one value is never on both sides")
    prompt: str | None = Field(None, description="a template file over the columns, {column}")
    answer: str | list[str] | None = Field(
        None, description="the gold: one column, or columns as an object"
    )
    answer_schema: str | None = Field(
        None, alias="schema", description="a JSON schema file for the answer"
    )
    tools: str | None = Field(None, description="the column with the tools in OpenAI's form")
    id: str | None = Field(None, description="the column that names a row; else its line number")
    too_long: Literal["refuse", "skip"] = Field(
        "refuse", description="rows beyond model.max_length: an error, or left out and listed"
    )


class Environment(OpenTable):
    use: str = Field(
        "jsonl", description="entry point or module:Class; other keys are its arguments"
    )


class RewardTable(OpenTable):
    use: str = Field(description="entry point or module:function; other keys are its arguments")
    name: str | None = Field(
        None, description="prefix of its parts in metrics; the function's name"
    )
    weight: float = Field(1.0, ge=0, description="share in the weighted mean")
    gate: bool = Field(False, description="nothing counts unless it is 1")
    range: tuple[float, float] = Field((0.0, 1.0), description="what the function may return")

    @model_validator(mode="after")
    def _ordered(self) -> "RewardTable":
        if self.range[0] >= self.range[1]:
            raise ValueError("range must be [low, high] with low < high")
        return self


class Scoring(Table):
    processes: int = Field(1, ge=1, description="judging processes of each rollout worker")
    deadline: float = Field(
        10.0, gt=0, description="seconds for one reply, from the start of its judging"
    )
    memory_mb: int = Field(4096, ge=64, description="address space of a judging process")
    trusted: bool | None = Field(
        None,
        description="unset: only code written into the job or a grader is shut in, where it can be;"
        " false: every reward, or the run is refused; true: none",
    )
    allow_untrusted: bool = Field(
        False, description="run what is not trusted even where there is no sandbox"
    )
    unscored_limit: float = Field(
        0.05, gt=0, le=1, description="share of failed judgements that pauses"
    )


class RolloutTable(Table):
    tasks_per_update: int = Field(32, ge=1, description="P (TRL, AWS, Fireworks)")
    group_size: int = Field(8, ge=2, description="G; 16 when under 40% of the groups are mixed")
    staleness: int | None = Field(
        None, ge=0, le=8, description="S: 1, colocated 0; short replies need no more"
    )
    temperature: float = Field(1.0, gt=0, le=2, description="1: the policy itself is sampled")
    max_reply_tokens: int | None = Field(
        None, ge=1, description="twice the gold's 99th percentile, or 512 without gold"
    )
    refill: bool = Field(
        False, description="draw more tasks until P groups carry a gradient (at most 4 P an update)"
    )
    drop_after: float | None = Field(
        None,
        gt=0,
        description="seconds after which a straggling group is dropped and its task requeued",
    )
    truncated: Literal["lowest", "mask"] = Field(
        "lowest", description="run-on JSON must cost something; mask only for reasoning jobs"
    )
    max_running: int | None = Field(
        None,
        ge=1,
        description="requests that an engine computes at once: 64 on the CPU, 256 on GPUs",
    )
    kv_cache_mb: int | None = Field(
        None, ge=16, description="512 on the CPU; the engine's share on a GPU"
    )


class LearnerTable(Table):
    method: Literal["lora", "full"] = Field(
        "lora", description="adapters first; full keeps fp32 masters"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="LoRA 5e-5 to 1B, 4e-5 to 4B, 3e-5 above; full 1e-6 (published: 5e-6 to 1e-4)",
    )
    warmup: int = Field(5, ge=0, description="updates of linear warm-up, then constant")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm (Tinker, prime-rl)")
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = Field(
        "cispo", description="token mean over the update, ratio capped (ScaleRL, SkyRL, TRL)"
    )
    clip_low: float | None = Field(None, gt=0, description="the loss's own paper's: 0.2; gspo 3e-4")
    clip_high: float | None = Field(
        None, gt=0, description="the loss's own paper's: 0.2; dapo 0.28; gspo 4e-4"
    )
    ratio_cap: float = Field(3.0, gt=1, description="cispo: the importance weight is capped here")
    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = Field(
        "none", description="the ratio is learner over engine already; needed with several epochs"
    )
    correction_cap: float = Field(3.0, gt=1, description="cap of the correction (TRL)")
    sequence_guard: float = Field(
        0.5, gt=0, description="a sequence whose mean |log ratio| exceeds it is dropped and counted"
    )
    baseline: Literal["mean", "leave_one_out"] = Field("mean", description="of the group")
    scale: Literal["batch", "group", "none"] = Field(
        "batch", description="advantages are divided by the batch's standard deviation (Lite PPO)"
    )
    parts: Literal["sum", "decoupled"] = Field(
        "sum", description="decoupled: each reward is normalised in its group first (GDPO)"
    )
    min_spread: float = Field(0.02, ge=0, description="groups that spread less carry no gradient")
    kl: float = Field(0.0, ge=0, description="coefficient of the KL to the start policy")
    kl_every: int = Field(10, ge=1, description="updates between measurements of that KL")
    entropy: float = Field(0.0, ge=0, description="coefficient of an entropy bonus")
    micro_batch_tokens: int | None = Field(
        None, ge=64, description="2,048 on the CPU, 16,384 on GPUs"
    )
    checkpoint_activations: bool | None = Field(None, description="on GPUs yes, on the CPU no")


class Eval(Table):
    every: int = Field(10, ge=1, description="updates between greedy runs over the validation rows")
    metric: str = Field(
        "score", description="score, or one of the reward's metrics such as exact_f1"
    )
    patience: int = Field(
        4, ge=0, description="evaluations without a gain before stopping; 0: never"
    )
    rows: int = Field(200, ge=1, description="validation rows used")


class HealthTable(Table):
    on_critical: Literal["warn", "pause"] = Field("pause", description="pause keeps a checkpoint")
    non_finite_limit: int = Field(
        3, ge=1, description="skipped updates in a row that pause the run"
    )
    proof_limit: int = Field(3, ge=1, description="failed proofs of one version that stop the run")


class Job(Table):
    """A whole job, resolved and checked against itself (not yet against rows, plugins and
    model)."""

    run: Run
    model: Model
    lora: Lora = Lora()
    data: Data = Data()
    environment: Environment = Environment()
    reward: list[RewardTable] = Field(min_length=1)
    scoring: Scoring = Scoring()
    rollout: RolloutTable = RolloutTable()
    learner: LearnerTable = LearnerTable()
    eval: Eval = Eval()
    health: HealthTable = HealthTable()

    _folder: Path = Path(".")
    _places: Places = Places()

    @property
    def folder(self) -> Path:
        """Where the job file lies: paths in it are relative to this."""
        return self._folder

    def beside(self, path: str) -> Path:
        """A path of the job, relative to the job's folder."""
        return (self._folder / path).resolve()

    def at(self, *key: str) -> dict[str, Any]:
        """Where a key was written (`reward.0.use` is "reward", "0", "use"), for errors about it."""
        return self._places.find(*key)

    @property
    def staleness(self) -> int:
        """S: what the job says, else 0 colocated and 1 otherwise."""
        if self.rollout.staleness is not None:
            return self.rollout.staleness
        return 0 if self.run.gpus == "colocated" else 1

    @property
    def dtype(self) -> str:
        if self.model.dtype != "auto":
            return self.model.dtype
        return "float32" if self.run.gpus == "cpu" else "bfloat16"

    @property
    def rewards(self) -> list[RewardSpec]:
        """The [[reward]] tables as the scoring pool takes them."""
        return [
            RewardSpec(
                use=table.use,
                name=table.name or re.split(r"[:.]", table.use.removesuffix(".json"))[-1],
                weight=table.weight,
                gate=table.gate,
                range=table.range,
                arguments=table.arguments,
                base_dir=str(self._folder),
            )
            for table in self.reward
        ]


def read_job(path: str | Path, *, overrides: Sequence[str] = ()) -> Job:
    """Reads a job file; `overrides` are `table.key=value` with TOML values (bare words count as
    text).

    Raises JobError or UserErrors, one line a mistake, naming file, line and cure.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "job.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"{path} is not there", cure="`rlpost init DIR` writes a job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} cannot be read: {error}") from None
    return parse_job(text, path=path, overrides=overrides)


def parse_job(text: str, *, path: Path, overrides: Sequence[str] = ()) -> Job:
    """Like `read_job`, from the text; `path` names the file in complaints and anchors relative
    paths."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        line = int(found[1]) if found else None
        problem = re.sub(r"\s*\(at .*\)$", "", str(error))
        raise JobError(
            f"not TOML: {problem}", place=path.name, line=line, cure="mend the line"
        ) from None
    sets = {set_value(values, override): override for override in overrides}
    places = Places(path.name, key_lines(text), sets)
    for name, what in LATER.items():
        if name in values:
            raise JobError(
                f"[{name}] ({what}) is not built yet",
                **places.find(name),
                cure=f"leave [{name}] out",
            )
    try:
        job = Job.model_validate(values)
    except ValidationError as error:
        raise as_user_errors(error, places, Job) from None
    job._folder, job._places = path.parent.resolve(), places
    _check_together(job)
    return job


def _check_together(job: Job) -> None:
    errors: list[Any] = []

    def mistake(problem: str, *key: str, cure: str) -> None:
        errors.append(JobError(problem, **job.at(*key), cure=cure))

    names = [spec.name for spec in job.rewards]
    for index, name in enumerate(names):
        if name in names[:index]:
            mistake(f"two rewards are named {name}", "reward", str(index), cure="give one a name")
    if all(spec.weight == 0 and not spec.gate for spec in job.rewards):
        mistake("every reward has weight 0", "reward", "0", cure="give one a weight")
    if job.run.lockstep and job.rollout.drop_after is not None:
        cure = "leave rollout.drop_after out"
        mistake("lockstep awaits every group", "rollout", "drop_after", cure=cure)
    if job.environment.use == "jsonl" and job.data.train is None:
        cure = 'say train = "rows.jsonl" under [data], or name an [environment]'
        mistake("no rows", "data", cure=cure)
    if isinstance(job.run.gpus, Gpus) and job.run.gpus.learner > 1:
        problem = f"run.gpus.learner = {job.run.gpus.learner}: more than one is not built yet"
        mistake(problem, "run", "gpus", cure="set it to 1")
    reply, length = job.rollout.max_reply_tokens, job.model.max_length
    if reply and reply >= length:
        mistake(
            f"max_reply_tokens ({reply}) leaves no room for a prompt in model.max_length"
            f" ({length})",
            "rollout",
            "max_reply_tokens",
            cure="lower it",
        )
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)


def explain(job: Job) -> Iterator[tuple[str, Any, bool, str]]:
    """Every value of the job as (key, value, written by the user, reason of the default)."""
    for name in type(job).model_fields:
        table = getattr(job, name)
        for index, item in enumerate(table if isinstance(table, list) else [table]):
            prefix = f"{name}[{index}]" if isinstance(table, list) else name
            for key, about in type(item).model_fields.items():
                value = getattr(item, key)
                value = value.model_dump() if isinstance(value, BaseModel) else value
                yield (
                    f"{prefix}.{about.alias or key}",
                    value,
                    key in item.model_fields_set,
                    about.description or "",
                )
