"""From a job to what a run needs: its environment, tasks, limits and probes, every mistake found
first.

`rlpost check` and `rlpost run` call this on the laptop, and the controller again where the job
runs.
"""

import difflib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost import plugins, rows
from rlpost.config import Job, RewardTable
from rlpost.env import Env
from rlpost.errors import JobError, ModelError, PluginError, RowError, UserError, UserErrors
from rlpost.types import Task

if TYPE_CHECKING:
    from rlpost.policy.renderer import Renderer

WITHOUT_GOLD = 512  # reply tokens where no gold answer tells how long a reply is
LEAST_REPLY = 16
PROBES = 8  # sequences on which each publish is proven
PROBE_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job whose plugins resolve and whose rows are read."""

    job: Job
    env: Env
    train: Sequence[Task]
    validation: Sequence[Task]
    max_reply_tokens: int
    longest_prompt: int  # tokens
    probes: Sequence[Sequence[int]]  # prompt + gold, as tokens
    too_long: Sequence[str] = ()  # ids of rows left out by data.too_long = "skip"


def open_env(job: Job) -> Env:
    """The job's environment, around its rows where it has some. Raises PluginError, RowError,
    UserErrors."""
    try:
        factory = plugins.resolve("rlpost.envs", job.environment.use, base_dir=job.folder)
    except UserError as error:
        raise placed(error, job.at("environment", "use")) from None
    arguments = dict(job.environment.arguments)
    for key in ("path", "prompt"):  # files of the job lie beside it
        value = arguments.get(key)
        if isinstance(value, str) and (key == "path" or job.beside(value).is_file()):
            arguments[key] = str(job.beside(value))
    positional: list[Any] = []
    if job.data.train is not None:
        positional.append(read_tasks(job, job.data.train))
    return _call(factory, job, positional, arguments)


def read_tasks(job: Job, path: str) -> list[Task]:
    """The rows of a file by the job's [data]."""
    data, file = job.data, job.beside(path)
    if not file.is_file():
        raise JobError(
            f"the rows {path} are not there, looked for {file}",
            **job.at("data", "heldout" if path == data.heldout else "train"),
            cure="name a .jsonl, .csv or .parquet file beside the job",
        )
    return rows.read_rows(
        file,
        prompt=_text(job, data.prompt, "data.prompt"),
        answer=data.answer,
        tools=data.tools,
        id=data.id,
        schema=job.beside(data.answer_schema) if data.answer_schema else None,
        split_by=data.split_by,
        prompt_place=data.prompt or "the prompt template",
    )


def model_folder(job: Job) -> Path:
    """The model on this machine: a folder beside the job, else the hub's local cache. Nothing is
    fetched when HF_HUB_OFFLINE is set. Raises ModelError."""
    beside = job.beside(job.model.path)
    if beside.is_dir():
        if not (beside / "config.json").is_file():
            raise ModelError(
                f"model.path {job.model.path} holds no config.json",
                **job.at("model", "path"),
                cure="name a model folder",
            )
        return beside
    if job.model.path.startswith((".", "/", "~")) or job.model.path.count("/") != 1:
        raise ModelError(
            f"model.path {job.model.path} is not there, looked for {beside}",
            **job.at("model", "path"),
            cure="name a folder beside the job or a hub id",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(job.model.path, ignore_patterns=["*.gguf", "*.bin", "*.pth"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise ModelError(
            f"model.path {job.model.path} is neither a folder nor on the hub: {problem}",
            **job.at("model", "path"),
            cure="download it first, or name its folder",
        ) from None


def resolve_rewards(job: Job) -> None:
    """Every [[reward]] resolves and takes the arguments it is given. Raises PluginError or
    UserErrors."""
    errors: list[UserError] = []
    for index, spec in enumerate(job.rewards):
        if spec.use.endswith(".json"):
            continue  # a grader file: the scoring pool reads and checks it
        table = ("reward", str(index))
        try:
            function = plugins.resolve("rlpost.rewards", spec.use, base_dir=spec.base_dir)
        except UserError as error:
            errors.append(placed(error, job.at(*table, "use")))
            continue
        own = [key for key in RewardTable.model_fields if key != "use"]
        _collect(
            lambda: _check_arguments(function, spec.use, spec.arguments, job, *table, also=own),  # noqa: B023
            errors,
        )
    _raise(errors)


def prepare(job: Job, *, renderer: "Renderer | None" = None) -> Prepared:
    """Resolves, reads and measures everything; collects every mistake before it raises.

    Without a renderer (no tokenizer at hand) lengths are not measured and there are no probes.
    """
    errors: list[UserError] = []
    for step in (
        lambda: resolve_rewards(job),
        lambda: _check_reward_columns(job),
        lambda: _check_positions(job),
    ):
        _collect(step, errors)
    env = _collect(lambda: open_env(job), errors)
    if env is None:
        _raise(errors)
    tasks = _collect(lambda: _tasks(job, env), errors) or []
    reply, longest, left_out = job.rollout.max_reply_tokens or WITHOUT_GOLD, 0, []
    probes: list[list[int]] = []
    if renderer is not None and tasks:
        reply = job.rollout.max_reply_tokens or reply_limit(tasks, renderer)
        measured = _collect(lambda: _measure(job, tasks, renderer, reply), errors)
        tasks, longest, left_out = measured or (tasks, 0, [])
        probes = _probes(tasks, renderer)
    split = _collect(lambda: _split(job, tasks), errors) if tasks else None
    _raise(errors)
    train, validation = split or ([], [])
    return Prepared(
        job=job,
        env=env,
        train=train,
        validation=validation[: job.eval.rows],
        max_reply_tokens=reply,
        longest_prompt=longest,
        probes=probes,
        too_long=left_out,
    )


def _split(job: Job, tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    data = job.data
    return rows.split(tasks, data.validation, seed=job.run.seed, split_by=data.split_by)


def reply_limit(tasks: Sequence[Task], renderer: "Renderer") -> int:
    """Twice the 99th percentile of the gold's tokens; 512 where no task has a gold answer."""
    from rlpost.policy.renderer import render_gold

    lengths = sorted(
        renderer.count(render_gold(task.answer)) for task in tasks if task.answer is not None
    )
    if not lengths:
        return WITHOUT_GOLD
    return max(LEAST_REPLY, 2 * lengths[math.ceil(0.99 * len(lengths)) - 1])


def _check_positions(job: Job) -> None:
    """A model reads no more positions than it was made for."""
    try:
        config = json.loads((model_folder(job) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"config.json of {job.model.path} cannot be read: {error}",
            **job.at("model", "path"),
            cure="mend it",
        ) from None
    most = config.get("text_config", config).get("max_position_embeddings")
    if isinstance(most, int) and job.model.max_length > most:
        raise ModelError(
            f"model.max_length is {job.model.max_length} and {job.model.path} reads {most} tokens",
            **job.at("model", "max_length"),
            cure=f"set model.max_length to {most} at most",
        )


def _tasks(job: Job, env: Env) -> list[Task]:
    tasks = list(env.tasks())
    if len(tasks) < 2:
        raise RowError(
            f"{len(tasks)} tasks are too few to train and validate",
            place=job.data.train or job.environment.use,
            cure="give more rows",
        )
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise RowError(
                f"two tasks have the id {task.id}",
                place=job.data.train or job.environment.use,
                cure="make ids unique",
            )
        seen.add(task.id)
    return tasks


def _check_reward_columns(job: Job) -> None:
    """A gold that no column gives is a mistake of the job, found before any row is read."""
    for index, spec in enumerate(job.rewards):
        fields = spec.arguments.get("fields")
        if (
            spec.use == "extraction"
            and isinstance(fields, Mapping)
            and isinstance(job.data.answer, list)
        ):
            missing = [name for name in fields if name not in job.data.answer]
            if missing:
                raise JobError(
                    f"reward {spec.name} scores {', '.join(missing)}, which data.answer lacks",
                    **job.at("reward", str(index), "fields"),
                    cure="add the column to data.answer or take the field out",
                )


def _measure(
    job: Job, tasks: Sequence[Task], renderer: "Renderer", reply: int
) -> tuple[list[Task], int, list[str]]:
    """The tasks that fit, the longest prompt in tokens, and the ids left out. Raises RowError
    naming the rows that do not fit and what would, unless data.too_long is "skip"."""
    renderer.check(tasks[0])
    lengths = [len(renderer.prompt(task.messages, tools=task.tools)) for task in tasks]
    room = job.model.max_length - reply
    fitting = [task for task, n in zip(tasks, lengths, strict=True) if n <= room]
    long = [(task.id, n) for task, n in zip(tasks, lengths, strict=True) if n > room]
    if long and (job.data.too_long == "refuse" or len(fitting) < 2):
        named = ", ".join(f"{id} ({n})" for id, n in long[:5]) + (", …" if len(long) > 5 else "")
        raise RowError(
            f"{len(long)} of {len(tasks)} prompts are longer than {room} tokens"
            f" (model.max_length {job.model.max_length} less {reply} for the reply): {named}",
            place=job.data.train or job.environment.use,
            cure=f"set model.max_length to {max(lengths) + reply}, or data.too_long to"
            ' "skip" to leave the rows out',
        )
    return fitting, max(n for n in lengths if n <= room), [id for id, _ in long]


def _probes(tasks: Sequence[Task], renderer: "Renderer") -> list[list[int]]:
    from rlpost.policy.renderer import render_gold

    probes = []
    for task in tasks[:PROBES]:
        prompt = renderer.prompt(task.messages, tools=task.tools)
        gold = renderer.prompt([{"role": "user", "content": render_gold(task.answer or "")}])
        probes.append((prompt + gold)[-PROBE_TOKENS:])  # the end: where replies stand
    return probes


def _check_arguments(
    function: Any,
    name: str,
    arguments: Mapping[str, Any],
    job: Job,
    *table: str,
    also: Sequence[str] = (),
) -> None:
    """Raises PluginError, with the place of the key in the job, for an argument that `function`
    does not take or one that it needs. `also` are keys of the table that are no arguments."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    keywords = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unknown = [key for key in arguments if key not in keywords]
    needed = [
        p.name
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
        and p.default is p.empty
        and p.name not in {*arguments, "base_dir"}  # the scoring process gives that one
    ]
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*keywords, *also], n=1)
        given = ("task", "rollout", "rollouts", "self", "base_dir")
        known = ", ".join(k for k in keywords if k not in given)
        raise PluginError(
            f"{name} takes no argument {unknown[0]}",
            **job.at(*table, unknown[0]),
            cure=f"did you mean {close[0]}?" if close else f"it takes {known or 'none'}",
        )
    if needed:
        raise PluginError(
            f"{name} needs the argument {needed[0]}", **job.at(*table), cure=f"add {needed[0]} = …"
        )


def _call(factory: Any, job: Job, positional: list[Any], arguments: dict[str, Any]) -> Any:
    name = job.environment.use
    _check_arguments(factory, name, arguments, job, "environment")
    try:
        return factory(*positional, **arguments)
    except UserError as error:
        raise placed(error, job.at("environment")) from None
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"environment {name} refuses its arguments: {error}",
            **job.at("environment"),
            cure="see [environment]",
        ) from None


def placed(error: UserError, where: Mapping[str, Any]) -> UserError:
    """The same mistake with its place in the job, unless it names a line of another file."""
    if error.line or isinstance(error, UserErrors):
        return error
    problem = f"{error.problem}, looked in {error.place}" if error.place else error.problem
    return type(error)(problem, **where, cure=error.cure)


def _collect(step: Any, errors: list[UserError]) -> Any:
    try:
        return step()
    except UserErrors as several:
        errors += several.errors
    except UserError as error:
        errors.append(error)
    return None


def _text(job: Job, path: str | None, key: str) -> str | None:
    if path is None:
        return None
    try:
        return job.beside(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(
            f"{key} = {path!r} is not there",
            **job.at(*key.split(".")),
            cure="write the file or leave it out",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(
            f"{key} = {path!r} cannot be read: {error}", **job.at(*key.split("."))
        ) from None


def _raise(errors: Sequence[UserError]) -> None:
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(list(errors))
