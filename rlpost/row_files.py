"""JSONL, CSV or Parquet file -> raw rows of plain JSON, with the place of every mistake.

All mistakes of a file are raised at once. An empty CSV cell, a Parquet null and a JSON null are the
same: no value. pyarrow is imported only where a Parquet file is read.
"""

import csv
import datetime
import decimal
import difflib
import io
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlpost.errors import RowError, UserError, UserErrors
from rlpost.types import JSON

SHOWN_ALIKE = 5  # lines named for one and the same mistake before the rest is counted
SHOWN = 100  # mistakes listed in all
_CSV_LIMIT = threading.Lock()  # csv.field_size_limit belongs to the whole process


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One raw row. `line` counts from 1: the line of the file, or the row of a Parquet file."""

    line: int
    columns: Mapping[str, JSON]


@dataclass(slots=True)
class Complaints:
    """Collects mistakes; the same one on many lines is listed a few times and then counted."""

    place: str
    rows_have_lines: bool = True
    errors: list[UserError] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, path: str | Path) -> "Complaints":
        return cls(str(path), rows_have_lines=Path(path).suffix != ".parquet")

    def add(self, problem: str, *, line: int | None = None, cure: str = "") -> None:
        self.seen[problem] += 1
        if self.seen[problem] <= SHOWN_ALIKE and len(self.errors) < SHOWN:
            place, at = self.place, line
            if line and not self.rows_have_lines:
                place, at = f"{self.place}, row {line}", None
            self.errors.append(RowError(problem, place=place, line=at, cure=cure))

    def settle(self) -> None:
        """Raises the one mistake, or all of them as UserErrors; returns when there is none."""
        if not self.errors:
            return
        hidden = self.seen.total() - len(self.errors)
        self.errors.sort(key=lambda error: error.line or 0)
        if hidden:
            tail = f"{hidden} more mistakes of these kinds" if hidden > 1 else "1 more mistake"
            self.errors.append(RowError(tail, place=self.place))
        raise self.errors[0] if len(self.errors) == 1 else UserErrors(self.errors)


def read_table(path: str | Path) -> list[Row]:
    """The raw rows of a file, by its suffix (.jsonl .ndjson .csv .tsv .parquet). Every value is
    plain JSON.

    Raises RowError or UserErrors for a file that is missing, empty, not UTF-8 or not what its
    suffix says.
    """
    complaints = Complaints.of(path)
    rows = collect_rows(path, complaints)
    complaints.settle()
    return rows


def collect_rows(path: str | Path, complaints: Complaints) -> list[Row]:
    """Like `read_table`, but the mistakes of single rows go to `complaints`, for others to be
    added."""
    path = Path(path)
    rows = list(_reader(path)(path, complaints))
    for row in rows:
        for column, value in row.columns.items():
            _demand_finite(column, value, row.line, complaints)
    if not rows:
        complaints.settle()
        raise RowError("the file has no rows", place=str(path), cure="put one row a line into it")
    return rows


def column_names(rows: Iterable[Row]) -> list[str]:
    """Every column that some row has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.columns))


def _reader(path: Path) -> Callable[[Path, Complaints], Iterator[Row]]:
    readers: dict[str, Callable[[Path, Complaints], Iterator[Row]]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    if not path.exists():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        cure = did_you_mean(path.name, there) or f"looked for {path.absolute()}"
        raise RowError("there is no such file", place=str(path), cure=cure)
    if path.is_dir():
        raise RowError("this is a folder, not a file of rows", place=str(path))
    if path.suffix not in readers:
        cure = "write the rows as .jsonl (one object a line), .csv or .parquet"
        raise RowError(
            f"rows cannot be read from {path.suffix or 'a file without suffix'}",
            place=str(path),
            cure=cure,
        )
    return readers[path.suffix]


def _read_jsonl(path: Path, complaints: Complaints) -> Iterator[Row]:
    # Lines are split at \n only: a JSON string may hold U+2028 and other breaks that splitlines()
    # would cut at.
    for line, raw in enumerate(
        path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1
    ):
        if not raw.strip():
            continue
        try:
            value = parse_json(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            _complain_of_bytes(error, raw, line, complaints)
        except json.JSONDecodeError as error:
            complaints.add(
                f"malformed JSON: {error.msg} at column {error.colno}",
                line=line,
                cure="one whole object a line",
            )
        except RecursionError:
            complaints.add("malformed JSON: it is nested too deeply", line=line)
        except ValueError as error:
            complaints.add(f"malformed JSON: {error}", line=line)
        else:
            if isinstance(value, dict):
                yield Row(line=line, columns=value)
            else:
                complaints.add(
                    f"the row is a JSON {json_type(value)}, not an object",
                    line=line,
                    cure='write {"prompt": …, "answer": …}',
                )


def _read_csv(path: Path, complaints: Complaints) -> Iterator[Row]:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _complain_of_bytes(error, raw, raw.count(b"\n", 0, error.start) + 1, complaints)
        return
    header_line = text.partition("\n")[0]
    # The separator is the one that the header uses: spreadsheets of half the world write
    # semicolons.
    delimiter = max(",;\t", key=re.sub(r'"[^"]*"', "", header_line).count)
    with _CSV_LIMIT:
        limit = csv.field_size_limit(
            2**31 - 1
        )  # a document may be longer than csv's 131,072 characters
        try:
            yield from _csv_rows(
                csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True),
                complaints,
            )
        except csv.Error as error:
            complaints.add(
                f"malformed CSV: {error}",
                line=text.count("\n") + 1,
                cure="look for a quote that is not closed",
            )
        finally:
            csv.field_size_limit(limit)


def _csv_rows(reader: Any, complaints: Complaints) -> Iterator[Row]:
    header: list[str] = [name.strip() for name in next(reader, [])]
    for name, times in Counter(header).items():
        if times > 1:
            complaints.add(
                f"the header names the column {name!r} {times} times", line=1, cure="rename one"
            )
    end = reader.line_num
    for cells in reader:
        line, end = end + 1, reader.line_num  # a quoted cell may span lines: name the first
        if not cells:
            continue
        if len(cells) != len(header):
            complaints.add(
                f"the row has {len(cells)} cells, the header {len(header)}",
                line=line,
                cure="quote cells that hold the separator or a line break",
            )
            continue
        yield Row(
            line=line, columns={n: c if c else None for n, c in zip(header, cells, strict=True)}
        )


def _read_parquet(path: Path, complaints: Complaints) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        complaints.add(f"not a readable Parquet file: {str(error).splitlines()[0]}")
        return
    for number, columns in enumerate(table.to_pylist(), start=1):
        try:
            yield Row(line=number, columns={name: _plain(value) for name, value in columns.items()})
        except TypeError as error:
            complaints.add(str(error), line=number, cure="drop the column or write it as text")


def _plain(value: Any) -> JSON:
    """A Parquet value as JSON: dates in ISO form, decimals as they are written."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a value is {type(value).__name__}, which JSON cannot hold")


def parse_json(text: str) -> JSON:
    """Strict JSON: no NaN, no Infinity, no key twice, no lone surrogate. Raises ValueError
    (JSONDecodeError where the place is known) or RecursionError."""
    value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a \\ud… escape without its partner is not text") from None
    return value


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON; write null where there is no value")


def _unique_keys(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        twice = next(name for name, times in Counter(k for k, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return keys


def _complain_of_bytes(
    error: UnicodeDecodeError, raw: bytes, line: int, complaints: Complaints
) -> None:
    start_of_line = raw.rfind(b"\n", 0, error.start) + 1
    byte = f"0x{raw[error.start]:02x} at byte {error.start - start_of_line + 1} of the line"
    complaints.add(f"not UTF-8: {byte}", line=line, cure="save the file as UTF-8")


def _demand_finite(column: str, value: JSON, line: int, complaints: Complaints) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        complaints.add(
            f"column {column!r} holds {value}",
            line=line,
            cure="leave it empty (null) where there is no value",
        )
    elif isinstance(value, dict):
        for inner in value.values():
            _demand_finite(column, inner, line, complaints)
    elif isinstance(value, list):
        for inner in value:
            _demand_finite(column, inner, line, complaints)


def json_type(value: JSON) -> str:
    """ "object", "array", "string", "boolean", "integer", "number" or "null"."""
    names = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
    }
    return names.get(type(value), "null")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """ "did you mean total?", or "" when nothing is near."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""
