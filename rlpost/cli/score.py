"""`rlpost score REWARD --rows FILE`: what a reward says about recorded completions.

One JSON object per row on stdout, in order: id, value, parts, status, reason. A summary on stderr.
The way to try a reward before any GPU is spent, and the way the conformance suites run.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rlpost.errors import PluginError, RowError, UserError
from rlpost.reward import RewardSpec
from rlpost.scoring.judge import Verdict
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Rollout, Task

AT_ONCE = 256  # rows on their way
_OWN = ("id", "completion", "messages", "prompt", "answer", "schema", "tools", "images")


def register(subparsers: Any) -> None:
    """Adds the verb `score`."""
    parser = subparsers.add_parser("score", help="score recorded completions", description=__doc__)
    parser.add_argument("reward", metavar="REWARD", help="a name, module:function or grader.json")
    parser.add_argument("--rows", required=True, metavar="FILE", help="JSON lines, CSV or Parquet")
    parser.add_argument("--args", default="{}", metavar="JSON", help="the reward's arguments")
    parser.add_argument("--json", action="store_true", help="the summary as JSON, too")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds for one row (10)")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument(
        "--range", nargs=2, type=float, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="what the reward may return (0 1)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 when every row has its line. Raises UserError (exit 2) for a wrong reward, file or
    argument."""
    spec = RewardSpec(
        use=args.reward,
        name=args.reward,
        range=_range(args.range),
        arguments=_arguments(args.args),
        base_dir=os.getcwd(),
    )
    if args.deadline <= 0 or args.processes < 1:
        raise UserError("--deadline and --processes are positive")
    rows = read_recorded(Path(args.rows))
    summary = Summary()
    asyncio.run(_score(spec, rows, summary, args.deadline, args.processes, sys.stdout))
    print(json.dumps(summary.as_json()) if args.json else summary, file=sys.stderr)
    return 0


def _range(limits: Any) -> tuple[float, float]:
    low, high = limits
    if not low < high:
        raise UserError(f"--range {low:g} {high:g} is empty", cure="write the smaller number first")
    return low, high


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--args is not JSON: {error}", cure="write --args '{\"name\": …}'"
        ) from None
    if not isinstance(arguments, dict):
        raise UserError(f"--args is a {type(arguments).__name__}", cure="write a JSON object")
    return arguments


# ── rows ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One row: a rollout, or what is wrong with the row."""

    id: str
    line: int
    rollout: Rollout | None = None
    problem: str = ""


def read_recorded(path: Path) -> Iterator[Recorded]:
    """The rows of a file, one by one; a malformed row is a `problem`. Raises RowError at once for a
    file that cannot be read."""
    if path.suffix in (".parquet", ".csv", ".tsv"):
        from rlpost.row_files import Complaints, collect_rows

        complaints = Complaints.of(path)
        table = collect_rows(path, complaints)
        complaints.settle()
        return (_recorded(row.line, row.columns) for row in table)
    try:
        file = path.open("rb")
        file.peek(1)
    except OSError as error:
        raise RowError(
            f"the rows cannot be read: {error.strerror}", place=str(path), cure="check --rows"
        ) from None
    return _lines(file)


def _lines(file: Any) -> Iterator[Recorded]:
    with file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode(), parse_constant=_refuse)
            except (ValueError, RecursionError) as error:
                problem = " ".join(str(error).split())
                yield Recorded(id=str(number), line=number, problem=f"not JSON: {problem}")
                continue
            yield _recorded(number, row)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _recorded(line: int, row: Any) -> Recorded:
    """A row made a rollout. `id` is the row's own, else its line number."""
    if not isinstance(row, Mapping):
        problem = f"the row is a {type(row).__name__}, not an object"
        return Recorded(id=str(line), line=line, problem=problem)
    own = row.get("id")
    is_id = isinstance(own, str | int) and not isinstance(own, bool)
    name = str(own) if is_id else str(line)
    try:
        if own is not None and not is_id:
            raise ValueError("'id' is neither text nor a whole number")
        return Recorded(id=name, line=line, rollout=_rollout(name, row))
    except ValueError as error:
        return Recorded(id=name, line=line, problem=str(error))


def _rollout(name: str, row: Mapping[str, Any]) -> Rollout:
    if row.get("completion") is None:
        raise ValueError("the row has no 'completion'")
    message = _message(row["completion"])
    task = Task(
        id=name,
        messages=_messages(row),
        answer=row.get("answer"),
        schema=row.get("schema"),
        tools=_tools(row.get("tools")),
        images=row.get("images") or (),
        meta={key: value for key, value in row.items() if key not in _OWN},
    )
    return Rollout(task=task, reply=_text(message), messages=[*task.messages, message])


def _message(completion: Any) -> dict[str, Any]:
    """The completion as an assistant message; text is one that says just that."""
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion}
    if not isinstance(completion, Mapping):
        raise ValueError("'completion' is neither text nor an assistant message")
    if completion.get("role", "assistant") != "assistant":
        raise ValueError(f"'completion' has the role {completion['role']!r}, not assistant")
    calls, content = completion.get("tool_calls"), completion.get("content")
    if calls is not None and not isinstance(calls, list):
        raise ValueError("'completion' has tool_calls that are not a list")
    if content is None and calls is None:
        raise ValueError("'completion' has neither content nor tool_calls")
    if content is not None and not isinstance(content, str | list):
        raise ValueError("'completion' has content that is neither text nor a list of parts")
    return {"role": "assistant", **completion}


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(
            part["text"]
            for part in content
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        )
    return content or ""


def _messages(row: Mapping[str, Any]) -> list[Any]:
    messages, prompt = row.get("messages"), row.get("prompt")
    if messages is None:
        messages = prompt
    if messages is None:
        return []
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not all(isinstance(each, Mapping) for each in messages):
        raise ValueError("'messages' is not a list of messages")
    return messages


def _tools(tools: Any) -> Any:
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise ValueError("'tools' is not a list of objects")
    return tools


# ── scoring ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Summary:
    """What is said on stderr at the end."""

    statuses: Counter[str] = field(default_factory=Counter)
    total: float = 0.0
    first_failure: str = ""
    isolation: str = ""  # the level in force
    started: float = field(default_factory=time.monotonic)

    def add(self, line: Mapping[str, Any]) -> None:
        self.statuses[line["status"]] += 1
        if line["status"] == "ok":
            self.total += line["value"]
        elif not self.first_failure:
            self.first_failure = f"{line['id']}: {line['reason']}"

    def as_json(self) -> dict[str, Any]:
        ok = self.statuses["ok"]
        return {
            "rows": self.statuses.total(),
            "statuses": dict(self.statuses),
            "mean": self.total / ok if ok else None,
            "isolation": self.isolation,
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def __str__(self) -> str:
        told = self.as_json()
        counts = ", ".join(f"{count} {status}" for status, count in self.statuses.most_common())
        mean = "no mean" if told["mean"] is None else f"mean {told['mean']:.4f}"
        text = f"{told['rows']} rows ({counts or 'none'}), {mean}, {told['seconds']:.1f} s"
        text += f"; {self.isolation}" if self.isolation else ""
        return f"{text}; first failure {self.first_failure}" if self.first_failure else text


async def _score(
    spec: RewardSpec,
    rows: Iterator[Recorded],
    summary: Summary,
    deadline: float,
    processes: int,
    out: TextIO,
) -> None:
    """Every row on its own, so that a reward never meets another row; many on their way at once."""
    waiting: deque[tuple[Recorded, asyncio.Task[Any] | None]] = deque()

    async def settle() -> None:
        row, judging = waiting.popleft()
        verdict = None if judging is None else (await judging)[0][0]
        line = _line(row, verdict, spec.range)
        summary.add(line)
        out.write(json.dumps(line) + "\n")

    async with ScoringPool([spec], processes=processes, deadline=deadline) as pool:
        summary.isolation = str(pool.level)
        for row in rows:
            judging = asyncio.create_task(pool.judge([row.rollout])) if row.rollout else None
            waiting.append((row, judging))
            if len(waiting) >= AT_ONCE:
                await settle()
        while waiting:
            await settle()
    out.flush()


def _line(row: Recorded, verdict: Verdict | None, limits: tuple[float, float]) -> dict[str, Any]:
    """What is printed for a row: the reward's own value and parts, or why there is none."""
    if verdict is not None and verdict.score is not None:
        low, high = limits
        value = low + verdict.score.value * (high - low)
        parts, reason = dict(verdict.score.parts), verdict.score.reason
        return {"id": row.id, "value": value, "parts": parts, "status": "ok", "reason": reason}
    if verdict is None:
        status, reason = "bad_row", f"{row.problem} (line {row.line})"
    elif verdict.cause == "job":
        raise PluginError(verdict.detail)
    elif verdict.cause == "row":
        status, reason = "bad_row", f"{verdict.detail} (line {row.line})"
    else:
        status, reason = verdict.status, verdict.detail or verdict.status
    return {"id": row.id, "value": None, "parts": {}, "status": status, "reason": reason}
