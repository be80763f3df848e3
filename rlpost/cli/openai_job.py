"""A job of OpenAI's reinforcement fine-tuning files: rows (`messages` and columns that the grader
calls `item.…`) and a grader."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.cli import first_job
from rlpost.cli.column_guess import Roles
from rlpost.cli.first_job import Draft
from rlpost.errors import PluginError, RowError
from rlpost.row_files import column_names, parse_json, read_table
from rlpost.rows import read_rows

ENDPOINT = "http://127.0.0.1:8000/v1"
ASKING = {"deadline": 120.0}  # seconds that a model may take to grade one reply
_ITEM = re.compile(r"\{\{\s*item\.([^.\[\]{}\s]+)")
_ALWAYS = ("id", "messages", "answer", "schema", "tools")  # of every task, given or not


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """The draft of the job, the grader's text (None where its file lies in the folder already) and
    what the user should know."""

    draft: Draft
    grader: Mapping[str, str]
    notes: list[str]


def read(folder: Path, rows: Path, grader_file: Path) -> Graded:
    """Reads both files and proves that they belong together.

    The grader may be given alone or inside a fine-tuning request (under `grader`). Raises
    PluginError for a grader that is none, RowError or UserErrors for rows, and RowError for a
    column that the grader reads and no row has. The source of a python grader is compiled here and
    not run.
    """
    from rlpost.scoring import graders

    grader = _unwrapped(_read_json(grader_file))
    stand_in = _stand_in(grader, str(grader_file))
    graders.build(stand_in, place=str(grader_file), endpoint=ENDPOINT, api_key_env="", timeout=1.0)
    columns = column_names(read_table(rows))
    _check_columns(grader, columns, rows, grader_file)
    tasks = read_rows(rows)
    models = [each["model"] for each in _graders(grader) if each["type"] == "score_model"]
    draft = Draft(
        folder=folder,
        rows=rows,
        roles=Roles(prompt=(), answer=None, id=None, split_by=None),
        tasks=tasks,
        reward=grader_file.name,
        fields={},
        labels=[],
        arguments={"endpoint": ENDPOINT} if models else {},
        scoring=ASKING if models else {},
    )
    notes = [f"{grader_file.name} grades the replies as it is; `item` is the row"]
    if models:
        notes.append(f"set endpoint to the server of {', '.join(dict.fromkeys(models))}")
    if (folder / grader_file.name).exists() and (folder / grader_file.name).samefile(grader_file):
        return Graded(draft=draft, grader={}, notes=notes)
    text = json.dumps(grader, indent=2, ensure_ascii=False) + "\n"
    return Graded(draft=draft, grader={grader_file.name: text}, notes=notes)


def files(job: Graded, *, model: str) -> dict[str, str]:
    """{file name: text} of the job; the grader is copied beside it."""
    return first_job.files(job.draft, model=model) | dict(job.grader)


def _read_json(file: Path) -> Any:
    if file.suffix != ".json":
        raise PluginError(
            f"a grader is a .json file, not {file.name}",
            place=str(file),
            cure="rlpost init DIR --from openai train.jsonl grader.json",
        )
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PluginError(f"the grader cannot be read: {error.strerror}", place=str(file)) from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise PluginError(f"the grader is not JSON: {error}", place=str(file), line=line) from None


def _unwrapped(value: Any) -> Any:
    """The grader in a whole fine-tuning request: {"method": {"reinforcement": {"grader": …}}}."""
    for key in ("method", "reinforcement", "grader"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    return value


def _stand_in(grader: Any, place: str) -> Any:
    """The grader with every python source compiled and then left out: it is the user's to run."""
    if isinstance(grader, list):
        return [_stand_in(each, place) for each in grader]
    if not isinstance(grader, Mapping):
        return grader
    copy = {key: _stand_in(value, place) for key, value in grader.items()}
    if copy.get("type") == "python" and isinstance(copy.get("source"), str):
        try:
            compile(copy["source"], place, "exec")
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            problem = f"the source of grader {copy.get('name', 'python')!r} is not Python: {error}"
            raise PluginError(" ".join(problem.split()), place=place, line=line) from None
        copy["source"] = "def grade(sample, item): return 0.0"
    return copy


def _graders(grader: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield grader
    inner = grader.get("graders") or {}
    for each in inner.values() if isinstance(inner, Mapping) else inner:
        yield from _graders(each)


def _check_columns(
    grader: Mapping[str, Any], columns: list[str], rows: Path, grader_file: Path
) -> None:
    templates = [each for each in _graders(grader) if each["type"] != "python"]
    for name in dict.fromkeys(_ITEM.findall(json.dumps(templates, ensure_ascii=False))):
        if name not in columns and name not in _ALWAYS:
            near = difflib.get_close_matches(name, columns, n=1)
            cure = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(columns)}"
            raise RowError(
                f"{grader_file.name} reads item.{name}, and no row has the column {name!r}",
                place=str(rows),
                cure=cure,
            )
