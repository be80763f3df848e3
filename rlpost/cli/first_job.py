"""The first files of a job over the rows of a file: job.toml, prompt.md and schema.json as
texts."""

import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlpost.cli import column_guess
from rlpost.cli.column_guess import Roles
from rlpost.errors import RowError
from rlpost.preparation import WITHOUT_GOLD
from rlpost.row_files import Row, column_names, did_you_mean, read_table
from rlpost.rows import infer_schema, read_rows
from rlpost.types import Task

CHARACTERS_A_TOKEN = 1.5  # few: too much room costs memory, too little stops the job at `check`
TRAIN_SHARE = 0.85  # what [data] validation leaves
TASKS_PER_UPDATE = 32  # the default, which a small file cannot fill
FEW = 100  # rows, below which validation figures are noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is known of a job before its files are written."""

    folder: Path
    rows: Path
    roles: Roles
    tasks: Sequence[Task]
    reward: str  # "extraction", or "module:function"
    fields: Mapping[str, Mapping[str, Any]]  # of the extraction reward: {name: {"type": …}}
    labels: Sequence[str]  # of the label reward
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the reward, to be looked at
    scoring: Mapping[str, Any] = field(default_factory=dict)  # what [scoring] says

    @property
    def prompt(self) -> str | None:
        """A template over the columns that asks for what the reward looks for."""
        if not self.roles.prompt:
            return None
        columns = self.roles.prompt
        lines = [f"{name}: {{{name}}}" for name in columns]
        shown = "\n".join(lines) if len(lines) > 1 else f"{{{columns[0]}}}"
        return f"{self._ask().replace('{', '{{').replace('}', '}}')}\n\n{shown}\n"

    def _ask(self) -> str:
        if self.fields:
            return (
                f"Extract these fields as one JSON object with the keys {', '.join(self.fields)}."
                " Copy the text as printed, and write null for what is not there."
                " Answer with JSON only."
            )
        if self.labels:
            listed = ", ".join(self.labels)
            return f"Classify the text. Answer with exactly one of these labels: {listed}."
        if self.reward == "math":
            return r"Solve the problem. Put the final answer into \boxed{}."
        return "Answer the following."

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of answers that are objects; choices become enums."""
        objects = all(isinstance(task.answer, dict) for task in self.tasks)
        if not objects or self.reward == "tool_call":
            return None
        schema = infer_schema(self.tasks)
        for name, choice in self.fields.items():
            if choice["type"] == "enum":
                absent = any(task.answer.get(name) is None for task in self.tasks)
                schema["properties"][name]["enum"] = choice["values"] + ([None] if absent else [])
        return schema


def draft(folder: Path, path: Path, answer: Sequence[str], reward: str | None) -> Draft:
    """Guesses a job from the rows of a file. What it gives back reads without a mistake.

    Raises RowError or UserErrors for the rows, for an answer column that is not there, and where
    the gold cannot be guessed.
    """
    table = read_table(path)
    _check_columns(path, table, answer)
    roles = column_guess.guess_roles(table, answer)
    if roles.answer is None and reward is None:
        raise RowError(
            "which columns hold the gold cannot be guessed",
            place=str(path),
            cure=f"name them with --answer; the columns are {', '.join(column_names(table))}",
        )
    tasks = read_rows(
        path,
        prompt="".join(f"{{{name}}}" for name in roles.prompt) or None,
        answer=roles.answer,
        id=roles.id,
        split_by=roles.split_by,
    )
    golds = [task.answer for task in tasks if task.answer is not None]
    use = reward or (column_guess.guess_reward(golds) if golds else "json_schema")
    labels = _labels(golds) if use == "label" else []
    return Draft(
        folder=folder,
        rows=path,
        roles=roles,
        tasks=tasks,
        reward=use,
        fields=_fields(golds) if use == "extraction" else {},
        labels=labels if len(labels) <= column_guess.LABELS else [],
    )


def _check_columns(path: Path, table: Sequence[Row], answer: Sequence[str]) -> None:
    there = column_names(table)
    for name in answer:
        if name not in there:
            cure = did_you_mean(name, there) or f"the columns are {', '.join(there)}"
            problem = f"--answer names the column {name!r}, which no row has"
            raise RowError(problem, place=str(path), cure=cure)


def _fields(golds: Sequence[Any]) -> dict[str, dict[str, Any]]:
    objects = [gold for gold in golds if isinstance(gold, Mapping)]
    names = list(dict.fromkeys(name for gold in objects for name in gold))
    return {
        name: column_guess.guess_field(name, [g[name] for g in objects if g.get(name) is not None])
        for name in names
    }


def _labels(golds: Sequence[Any]) -> list[str]:
    return sorted({str(g) for gold in golds for g in (gold if isinstance(gold, list) else [gold])})


def files(job: Draft, *, model: str) -> dict[str, str]:
    """{file name: text} of the job. job.toml says what differs from the defaults, and in comments
    what is the user's to choose."""
    written: dict[str, str] = {}
    if job.prompt is not None:
        written["prompt.md"] = job.prompt
    if (schema := job.schema) is not None:
        written["schema.json"] = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    tables = [
        _run_table(job),
        _model_table(job, model),
        _data_table(job, written),
        _reward_table(job),
        ["[scoring]", *_assignments(job.scoring)] if job.scoring else [],
        _rollout_table(job),
        ["[eval]", "every = 10", *(['metric = "exact_f1"'] if job.fields else [])],
    ]
    text = "\n\n".join("\n".join(table) for table in tables if table) + "\n"
    return {"job.toml": text, **written}


def notes(job: Draft, *, guessed: bool) -> list[str]:
    """What the user should know before going on."""
    found = []
    if guessed and job.roles.answer is not None:
        answer = job.roles.answer
        gold = answer if isinstance(answer, str) else ", ".join(answer)
        found.append(f"taken for the gold: {gold} (say --answer to choose)")
    if len(job.tasks) < FEW:
        found.append(f"{len(job.tasks)} rows are few: expect noisy validation figures")
    return found


# ── the tables of job.toml ─────────────────────────────────────────────────────────────────────


def _run_table(job: Draft) -> list[str]:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.folder.resolve().name).lstrip("._-")[:63]
    return [
        f"# Written by `rlpost init` from {job.rows.name} ({len(job.tasks)} rows).",
        "# `rlpost check --explain` prints every value that is not written here, with its reason.",
        "[run]",
        f"name = {_toml(name or 'job')}",
        "seed = 1",
        _remark("updates = 150", "at most; [eval] stops earlier"),
        _remark("gpus = { rollout = 1, learner = 1 }", 'or "colocated" on one card, or "cpu"'),
    ]


def _model_table(job: Draft, model: str) -> list[str]:
    path = _relative(Path(model), job.folder) if Path(model).is_dir() else model
    return [
        "[model]",
        _remark(f"path = {_toml(path)}", "hub id or folder"),
        _remark("thinking = false", "always explicit: sizes differ by default"),
        _remark(
            f"max_length = {_max_length(job.tasks)}", "prompt + reply, a guess: `check` counts"
        ),
    ]


def _data_table(job: Draft, written: Mapping[str, str]) -> list[str]:
    lines = ["[data]", f"train = {_toml(_relative(job.rows, job.folder))}"]
    lines.append(_remark('# heldout = "heldout.jsonl"', "only `compare` opens it"))
    if job.roles.split_by:
        split = f"split_by = {_toml(job.roles.split_by)}"
        lines.append(_remark(split, "one value is never on both sides of the split"))
    if job.roles.id:
        lines.append(f"id = {_toml(job.roles.id)}")
    if "prompt.md" in written:
        lines.append('prompt = "prompt.md"')
    if job.roles.answer is not None and job.roles.answer != "answer":
        lines.append(f"answer = {_toml(job.roles.answer)}")
    if "schema.json" in written:
        lines.append('schema = "schema.json"')
    return lines


def _reward_table(job: Draft) -> list[str]:
    lines = ["[[reward]]", f"use = {_toml(job.reward)}", *_assignments(job.arguments)]
    if job.labels:
        listed = textwrap.wrap(
            _toml(job.labels), 98, break_on_hyphens=False, break_long_words=False
        )
        lines.append("labels = " + "\n  ".join(listed))
    if job.fields:
        short = {n: f["type"] if list(f) == ["type"] else f for n, f in job.fields.items()}
        lines.append(f"fields = {_toml(short)}")
    dates = [name for name, field in job.fields.items() if field["type"] == "date"]
    texts = [str(task.answer[n]) for task in job.tasks for n in dates if task.answer.get(n)]
    if texts:
        first = column_guess.day_comes_first(texts)
        line = f"day_first = {_toml(first is not False)}"
        lines.append(_remark(line, "the rows do not tell: check it") if first is None else line)
    return lines


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{_toml_key(name)} = {_toml(value)}" for name, value in values.items()]


def _rollout_table(job: Draft) -> list[str]:
    trained = int(len(job.tasks) * TRAIN_SHARE)
    if trained >= TASKS_PER_UPDATE:
        return []
    return ["[rollout]", _remark(f"tasks_per_update = {max(1, trained // 2)}", "the rows are few")]


def _max_length(tasks: Sequence[Task]) -> int:
    """Tokens of the longest prompt and twice the longest gold (512 without), by the characters, to
    the next 256."""
    prompt = max(sum(len(str(m.get("content", ""))) for m in task.messages) for task in tasks)
    gold = max(len(json.dumps(task.answer, ensure_ascii=False)) for task in tasks)
    tokens = (prompt + 2 * gold) / CHARACTERS_A_TOKEN + 128  # the question and the chat template
    if all(task.answer is None for task in tasks):
        tokens += WITHOUT_GOLD
    return max(512, -(-int(tokens) // 256) * 256)


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())


def _remark(line: str, remark: str) -> str:
    return f"{line:<42}# {remark}"


def _toml(value: Any) -> str:
    """A TOML value on one line; strings as JSON writes them, which TOML reads alike."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)
