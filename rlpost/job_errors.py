"""Where each value of a job was written, and pydantic's complaints about it as one line each:
file, line, key and cure."""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rlpost.errors import JobError, UserErrors


@dataclass(frozen=True, slots=True)
class Places:
    """Where each value of a job was written: a line of its file, or a --set."""

    file: str = "job.toml"
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    sets: Mapping[tuple[str, ...], str] = field(default_factory=dict)

    def find(self, *key: str) -> dict[str, Any]:
        """`place` and `line` of a key, or of the nearest table around it, as JobError takes
        them."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.sets:
                return {"place": f"--set {self.sets[key[:length]]}", "line": None}
            if key[:length] in self.lines:
                return {"place": self.file, "line": self.lines[key[:length]]}
        return {"place": self.file, "line": None}


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line numbers of tables and keys: ("rollout", "group_size") -> 14; list tables count from
    0."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.match(r"\s*(\[\[?)\s*([\w.\-\"]+)\s*\]", line):
            name = found[2].replace('"', "")
            table = tuple(name.split("."))
            if found[1] == "[[":
                table = (*table, str(counts.get(name, 0)))
                counts[name] = counts.get(name, 0) + 1
            elif table[0] in counts:  # [reward.fields] belongs to the last [[reward]]
                table = (table[0], str(counts[table[0]] - 1), *table[1:])
            lines.setdefault(table, number)
        elif found := re.match(r"\s*([\w\-.\"]+)\s*=", line):
            lines.setdefault((*table, *found[1].replace('"', "").split(".")), number)
    return lines


def set_value(values: dict[str, Any], text: str) -> tuple[str, ...]:
    """Puts one `table.key=value` of the command line into `values`; returns its key. Bare words
    count as text. Raises JobError."""
    key, equals, raw = text.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2:
        raise JobError(
            f"--set {text} is not table.key=value", cure="such as --set learner.learning_rate=3e-6"
        )
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    target: Any = values
    for name in path[:-1]:
        if isinstance(target, list):
            if not name.isdigit() or int(name) >= len(target):
                raise JobError(
                    f"--set {text}: there is no {name} in that list", cure="count from 0"
                )
            target = target[int(name)]
        elif isinstance(target, dict):
            target = target.setdefault(name, {})
    if not isinstance(target, dict):
        raise JobError(
            f"--set {text}: {'.'.join(path[:-1])} is not a table", cure="name a table and a key"
        )
    target[path[-1]] = value
    return tuple(path)


def as_user_errors(
    error: ValidationError, places: Places, root: type[BaseModel]
) -> JobError | UserErrors:
    """Pydantic's complaints about a `root` as ours: one a key, with its place and a cure."""
    errors: dict[str, JobError] = {}  # the first of each key: a union complains once a member
    for item in error.errors():
        loc = [str(part) for part in item["loc"] if not _UNION_MEMBER.match(str(part))]
        loc = _through_aliases(loc)
        if loc == ["run", "gpus"] and any(key.startswith("run.gpus.") for key in errors):
            continue
        problem, cure = _sentence(item, loc, root)
        errors.setdefault(".".join(loc), JobError(problem, **places.find(*loc), cure=cure))
    found = list(errors.values())
    return found[0] if len(found) == 1 else UserErrors(list(found))


_UNION_MEMBER = re.compile(r"literal\[|Gpus$|str$|list\[")  # in the path of pydantic's complaint


def _sentence(item: Any, loc: Sequence[str], root: type[BaseModel]) -> tuple[str, str]:
    """(what is wrong, what cures it) of one complaint."""
    key = ".".join(loc)
    if item["type"] == "extra_forbidden":
        names = _field_names(root, loc[:-1])
        close = difflib.get_close_matches(loc[-1], names, n=1)
        where = f"[{'.'.join(loc[:-1])}]" if len(loc) > 1 else "a job"
        cure = f"did you mean {close[0]}?" if close else f"{where} takes {', '.join(names)}"
        return f"{key} is not a field of {where}", cure
    if item["type"] == "missing":
        if len(loc) > 1:
            table = "[[reward]]" if loc[0] == "reward" else f"[{loc[0]}]"
            return f"{key} is missing", f"add {loc[-1]} under {table}"
        return f"{key} is missing", f"add [{'[reward]' if key == 'reward' else key}]"
    if key == "reward" and item["type"] == "list_type":
        return "[reward] is one table, and a job may have several rewards", "write [[reward]]"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = f", not {item['input']!r}" if not isinstance(item["input"], dict | list) else ""
    return f"{key}: {message}{given}", "change it"


def _through_aliases(loc: list[str]) -> list[str]:
    return ["schema" if part == "answer_schema" else part for part in loc]


def _field_names(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: Any = root
    for part in path:
        if part.isdigit() or not hasattr(model, "model_fields"):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if hasattr(c, "model_fields")), None)
    return [info.alias or name for name, info in model.model_fields.items()] if model else []
