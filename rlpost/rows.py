"""Rows of a data file -> Task, with the place of every mistake.

A row has `messages` (or `prompt`), `answer`, and optionally `id`, `schema`, `tools`, `images`;
every other column goes to `Task.meta`. With a template the prompt is text over the columns:
`{column}`, and `{{` or `}}` for a literal brace. All mistakes of a file are raised at once.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlpost.errors import RowError
from rlpost.prompt_template import Template
from rlpost.row_files import (
    Complaints,
    Row,
    collect_rows,
    column_names,
    did_you_mean,
    json_type,
    parse_json,
)
from rlpost.types import JSON, Message, Task

ROLES = ("system", "developer", "user", "assistant", "tool")
OWN_COLUMNS = ("messages", "prompt", "answer", "id", "schema", "tools", "images")

# ── rows to tasks ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """How the columns of one file become tasks: the arguments of `read_rows`, checked."""

    template: Template | None
    answer: str | Sequence[str] | None
    tools: str
    id: str
    id_is_named: bool
    schema: Mapping[str, Any] | None
    split_by: str | None
    text_cells: bool  # CSV: a list or an object can only be written as JSON text


def read_rows(
    path: str | Path,
    *,
    prompt: str | None = None,
    answer: str | Sequence[str] | None = None,
    tools: str | None = None,
    id: str | None = None,
    schema: str | Path | Mapping[str, Any] | None = None,
    split_by: str | None = None,
    prompt_place: str = "the prompt template",
) -> list[Task]:
    """The tasks of a file, in its order.

    `prompt` is the text of a template and `prompt_place` the name that errors give it. `answer` is
    the column of the gold, or a list of columns that become an object. `tools` and `id` name
    columns; without an id a task is called by its line number. `schema` (an object or a file) holds
    for every row that has none of its own; for a list of answer columns it is inferred when it is
    left out. `split_by` only demands that its column is there. Raises RowError for one mistake and
    UserErrors for several, each with file, line, column and cure.
    """
    complaints = Complaints.of(path)
    table = collect_rows(path, complaints)
    reading = _Reading(
        template=None if prompt is None else Template.parse(prompt, place=prompt_place),
        answer=answer,
        tools=tools or "tools",
        id=id or "id",
        id_is_named=id is not None,
        schema=schema if isinstance(schema, Mapping) or schema is None else read_schema(schema),
        split_by=split_by,
        text_cells=Path(path).suffix in (".csv", ".tsv"),
    )
    table_columns = column_names(table)
    absent = _complain_of_absent_columns(table_columns, reading, id, tools, complaints)
    tasks = [_TaskReader(row, reading, absent, complaints).task() for row in table]
    _complain_of_duplicates(table, tasks, complaints)
    complaints.settle()
    if isinstance(answer, str) or answer is None or reading.schema is not None:
        return tasks
    inferred = infer_schema(tasks)
    return [task if task.schema else replace(task, schema=inferred) for task in tasks]


def _complain_of_absent_columns(
    there: Sequence[str],
    reading: _Reading,
    id: str | None,
    tools: str | None,
    complaints: Complaints,
) -> frozenset[str]:
    """Columns that are asked for and that no row has: one complaint each instead of one a row."""
    asked: dict[str, str] = {}
    if reading.template:
        asked = dict.fromkeys(reading.template.columns, f"{reading.template.place} uses")
    for column in [reading.answer] if isinstance(reading.answer, str) else reading.answer or ():
        asked.setdefault(column, "[data] answer names")
    for key, name in (("id", id), ("tools", tools), ("split_by", reading.split_by)):
        if name:
            asked.setdefault(name, f"[data] {key} names")
    absent = {column: who for column, who in asked.items() if column not in there}
    for column, who in absent.items():
        cure = "; ".join(
            filter(None, (did_you_mean(column, there), f"the columns are {', '.join(there)}"))
        )
        complaints.add(f"{who} the column {column!r}, which no row has", cure=cure)
    if reading.template is None and "messages" not in there and "prompt" not in there:
        complaints.add(
            "no column 'messages' or 'prompt'",
            cure=f"name a template with [data] prompt; the columns are {', '.join(there)}",
        )
        absent["prompt"] = ""
    return frozenset(absent)


@dataclass(slots=True)
class _TaskReader:
    """One row on its way to a Task; what is wrong with it goes to `complaints`."""

    row: Row
    reading: _Reading
    absent: frozenset[str]  # columns complained about once for the whole file
    complaints: Complaints

    def task(self) -> Task:
        cells, reading = self.row.columns, self.reading
        answers = (
            [reading.answer or "answer"]
            if isinstance(reading.answer, str | None)
            else reading.answer
        )
        taken = {reading.id, reading.tools, "schema", "images", *answers}
        if reading.template is None:
            taken |= {"messages", "prompt"}
        if reading.split_by:
            self._lacks(reading.split_by)
        own_schema = self._schema(cells.get("schema"))
        return Task(
            id=self._id(cells.get(reading.id)),
            messages=self._messages(),
            answer=self._answer(),
            schema=reading.schema if own_schema is None else own_schema,
            tools=self._tools(cells.get(reading.tools)),
            images=self._images(cells.get("images")),
            meta={name: value for name, value in cells.items() if name not in taken},
        )

    def _problem(self, text: str, cure: str = "") -> None:
        self.complaints.add(text, line=self.row.line, cure=cure)

    def _lacks(self, column: str) -> bool:
        if column in self.row.columns:
            return False
        if column not in self.absent:
            self._problem(
                f"the row has no column {column!r}", did_you_mean(column, self.row.columns)
            )
        return True

    def _id(self, value: JSON) -> str:
        if self.reading.id_is_named and self._lacks(self.reading.id):
            return ""
        if value is None:
            return str(self.row.line)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas writes whole numbers beside a missing one as floats
        if isinstance(value, bool) or not isinstance(value, str | int):
            self._problem(
                f"column {self.reading.id!r} is a JSON {json_type(value)}",
                "an id is text or a whole number",
            )
        return str(value)

    def _messages(self) -> list[Message]:
        cells, template = self.row.columns, self.reading.template
        if template is not None:
            missing = [column for column in template.columns if self._lacks(column)]
            if missing:
                return []
            text = template.render(cells)
            if not text.strip():
                self._problem(f"{template.place} gives an empty prompt")
            return [{"role": "user", "content": text}]
        column = "messages" if cells.get("messages") is not None else "prompt"
        if self._lacks(column):
            return []
        value = cells[column]
        if column == "messages" and isinstance(value, str):
            value = self._parsed(column, value)
        if isinstance(value, str) and value.strip():
            return [{"role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            self._problem(
                f"column {column!r} is {'empty' if not value else 'a JSON ' + json_type(value)}",
                "write text in 'prompt', or a list of {role, content} in 'messages'",
            )
            return []
        return self._conversation(column, value)

    def _conversation(self, column: str, value: Sequence[JSON]) -> list[Message]:
        messages: list[Message] = []
        for number, message in enumerate(value, start=1):
            place = f"message {number} of {column!r}"
            if not isinstance(message, dict):
                self._problem(f"{place} is a JSON {json_type(message)}", "write {role, content}")
                return []
            message = {
                key: cell for key, cell in message.items() if cell is not None
            }  # Parquet fills up with nulls
            role = message.get("role")
            if role not in ROLES:
                self._problem(f"{place} has the role {role!r}", f"roles are {', '.join(ROLES)}")
            elif not isinstance(message.get("content"), str | list) and not message.get(
                "tool_calls"
            ):
                self._problem(f"{place} has no content")
            messages.append(message)
        if messages[-1].get("role") == "assistant":
            self._problem(
                f"{column!r} ends with the assistant's own message",
                "move it to the column 'answer'",
            )
        return messages

    def _answer(self) -> JSON:
        cells, names = self.row.columns, self.reading.answer
        if names is None:
            return self._gold(cells.get("answer"))
        if not isinstance(names, str):
            missing = [name for name in names if self._lacks(name)]
            return None if missing else {name: self._gold(cells[name]) for name in names}
        if self._lacks(names):
            return None
        if cells[names] is None:
            self._problem(f"column {names!r} is empty", "every row needs its answer")
        return self._gold(cells[names])

    def _gold(self, value: JSON) -> JSON:
        if self.reading.text_cells and isinstance(value, str) and value[:1] in ("{", "["):
            try:
                return parse_json(value)
            except (ValueError, RecursionError):
                return value  # a text that begins with a bracket
        return value

    def _parsed(self, column: str, text: str) -> JSON:
        try:
            return parse_json(text)
        except (ValueError, RecursionError) as error:
            self._problem(f"column {column!r} is not JSON: {error}")
            return None

    def _schema(self, value: JSON) -> Mapping[str, Any] | None:
        value = self._parsed("schema", value) if isinstance(value, str) else value
        if value is not None and not isinstance(value, dict):
            self._problem(f"column 'schema' is a JSON {json_type(value)}", "a schema is an object")
            return None
        return value

    def _tools(self, value: JSON) -> list[Mapping[str, Any]] | None:
        column = self.reading.tools
        value = self._parsed(column, value) if isinstance(value, str) else value
        if value is None:
            return None
        if not isinstance(value, list):
            self._problem(
                f"column {column!r} is a JSON {json_type(value)}",
                "tools are a list in OpenAI's form",
            )
            return None
        for number, tool in enumerate(value, start=1):
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                self._problem(
                    f"tool {number} of {column!r} is not in OpenAI's form",
                    'write {"type": "function", "function": {"name": …, "parameters": …}}',
                )
        return value

    def _images(self, value: JSON) -> list[str]:
        if isinstance(value, str) and value.startswith("["):
            value = self._parsed("images", value)
        images = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            self._problem("column 'images' is not a list of paths")
            return []
        return images


def _complain_of_duplicates(
    table: Sequence[Row], tasks: Sequence[Task], complaints: Complaints
) -> None:
    first: dict[str, int] = {}
    for row, task in zip(table, tasks, strict=True):
        if task.id and first.setdefault(task.id, row.line) != row.line:
            complaints.add(
                f"the id {task.id!r} is already that of row {first[task.id]}",
                line=row.line,
                cure="every row needs its own id; leave the ids out to number the lines",
            )


# ── schemas and splits ─────────────────────────────────────────────────────────────────────────


def read_schema(path: str | Path) -> Mapping[str, Any]:
    """A JSON schema from a file. RowError if it is missing or no object."""
    try:
        schema = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RowError(f"the schema cannot be read: {error.strerror}", place=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"the schema is not JSON: {error}", place=str(path)) from None
    if not isinstance(schema, dict):
        raise RowError(f"the schema is a JSON {json_type(schema)}, not an object", place=str(path))
    return schema


def infer_schema(tasks: Iterable[Task]) -> dict[str, Any]:
    """A JSON schema that every answer which is an object satisfies: keys that all have are
    required, others are allowed, and none that no answer has."""
    return _schema_of([task.answer for task in tasks if isinstance(task.answer, dict)])


def _schema_of(values: Sequence[JSON]) -> dict[str, Any]:
    types = sorted({json_type(value) for value in values})
    if "number" in types and "integer" in types:
        types.remove("integer")
    schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types} if types else {}
    objects = [value for value in values if isinstance(value, dict)]
    if objects:
        keys = list(dict.fromkeys(key for value in objects for key in value))
        schema["properties"] = {k: _schema_of([v[k] for v in objects if k in v]) for k in keys}
        schema["required"] = [key for key in keys if all(key in value for value in objects)]
        schema["additionalProperties"] = False
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        schema["items"] = _schema_of(items)
    return schema


def split(
    tasks: Sequence[Task], fraction: float, *, seed: int, split_by: str | None = None
) -> tuple[list[Task], list[Task]]:
    """(train, validation), each in the order of the file; validation has `fraction` of the tasks,
    at least one.

    The choice is a function of seed and ids alone. With `split_by` (a column of the row or of its
    answer) tasks of one cluster stay together; its text is compared without case, space and
    punctuation, and a task without a value is a cluster of its own. Raises RowError where either
    side would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise RowError(
            f"[data] validation is {fraction:g}", cure="write a share between 0 and 1, such as 0.15"
        )
    clusters: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        clusters.setdefault(_cluster(task, split_by), []).append(index)
    if len(clusters) < 2:
        what = f"the same {split_by}" if split_by and len(tasks) > 1 else "only one row"
        raise RowError(
            f"train and validation cannot be split: there is {what}",
            cure="add rows" + (", or leave out split_by" if split_by else ""),
        )
    wanted = max(1, round(fraction * len(tasks)))
    chosen: set[int] = set()
    order = sorted(clusters, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    for name in order[:-1]:  # the last cluster always trains
        overshoot = len(chosen) + len(clusters[name]) - wanted
        if overshoot <= 0 or overshoot < wanted - len(chosen):
            chosen.update(clusters[name])
    if not chosen:  # every cluster is far larger than the share: the smallest is the nearest
        chosen.update(clusters[min(order, key=lambda name: len(clusters[name]))])
    train = [task for index, task in enumerate(tasks) if index not in chosen]
    return train, [task for index, task in enumerate(tasks) if index in chosen]


def _cluster(task: Task, split_by: str | None) -> str:
    if split_by in (None, "id"):
        return f"id {task.id}"
    value = task.meta.get(split_by)
    if value is None and isinstance(task.answer, dict):
        value = task.answer.get(split_by)
    elif value is None and split_by == "answer":
        value = task.answer
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    plain = "".join(letter for letter in text.casefold() if letter.isalnum())
    return f"id {task.id}" if value is None or not plain else f"cluster {plain}"
