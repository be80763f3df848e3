"""The files of a run: one writer, and readers that anyone may use while it writes.

    job.toml                          the job as it was given
    resolved.toml                     the job as it runs: every value, revision and licence
    events.jsonl                      {time, sequence, update, kind, …}
    metrics.jsonl                     one object an update: {update, reward, …, eval where one was
    made} rollouts/update-00012.jsonl       samples, one group a line, readable
    eval/update-00010.jsonl           an evaluation's rollouts, in the same form checkpoints/
    written by policy/checkpoint.py metrics.json                      where Prometheus finds the run
    report.md                         written by report.py

A line is written whole with one call. A torn last line (a crash, a full disk) is skipped by readers
and cut off when the run is opened again. After a resume, what was written past the checkpoint is
superseded: lines carry `"superseded": true`, sample files change their name, and readers skip both.
"""

import contextlib
import datetime
import errno
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.errors import JobError, RunError
from rlpost.types import JSON, Group, Rollout

JOB, RESOLVED, EVENTS, METRICS, ADDRESS, REPORT = (
    "job.toml", "resolved.toml", "events.jsonl", "metrics.jsonl", "metrics.json", "report.md",
)  # fmt: skip
ROLLOUTS, EVALUATIONS, CHECKPOINTS = "rollouts", "eval", "checkpoints"
_SAMPLES = re.compile(r"update-(\d+)\.jsonl")


class RunDirectory:
    """The only writer of a run's files. One process holds it at a time; opening it again mends its
    tails."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            for folder in (ROLLOUTS, EVALUATIONS, CHECKPOINTS):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobError(
                f"the run directory cannot be made: {error.strerror}",
                place=str(path),
                cure="choose a folder that can be written",
            ) from None
        for name in (EVENTS, METRICS):
            _cut_torn_tail(self.path / name)
        self._updates = {line["update"] for line in read_metrics(self.path)}
        self._sequence = (
            max((e["sequence"] for e in read_events(self.path, superseded=True)), default=-1) + 1
        )

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def report(self) -> Path:
        return self.path / REPORT

    def write_job(self, text: str) -> Path:
        """The job as it was given, replaced whole."""
        return _replace(self.path / JOB, text)

    def write_resolved(self, text: str) -> Path:
        """The job as it runs, replaced whole: after a resume the newer values hold."""
        return _replace(self.path / RESOLVED, text)

    def write_address(self, address: str) -> Path:
        """Where the run's metrics are served: metrics.json with `address` and the process id."""
        return _replace(self.path / ADDRESS, _line({"address": address, "pid": os.getpid()}))

    def append_event(
        self, kind: str, *, update: int | None = None, **fields: Any
    ) -> dict[str, Any]:
        """One event with the time (UTC) and the next sequence number; `update` is the one it
        belongs to."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        event = {
            "time": now.replace("+00:00", "Z"),
            "sequence": self._sequence,
            "update": update,
            "kind": kind,
        }
        _append(self.path / EVENTS, [event | fields])
        self._sequence += 1
        return event | fields

    def append_metrics(self, update: int, **values: Any) -> None:
        """The values of one update. There is one object an update: values that come later (an
        evaluation of the same update, say) join the line that is there. `reward` is null where
        nothing was sampled yet."""
        path = self.path / METRICS
        if update not in self._updates:
            _append(path, [{"update": update, "reward": None} | values])
            self._updates.add(update)
            return
        lines = _read_lines(path)
        for line in reversed(lines):
            if line["update"] == update and not line.get("superseded"):
                line.update(values)
                break
        _replace(path, "".join(map(_line, lines)))

    def append_rollouts(
        self, update: int, groups: Iterable[Group], *, limit: int | None = None
    ) -> Path:
        """Samples of the groups that were trained at an update, the first `limit` of them."""
        records = [_record(update, g.rollouts, group=g.id) for g in list(groups)[:limit]]
        path = _samples(self.path / ROLLOUTS, update)
        _append(path, records)
        return path

    def append_evaluation(
        self, update: int, evaluation: Mapping[str, Any], rollouts: Sequence[Rollout]
    ) -> Path:
        """An evaluation of the policy after `update` updates: its rollouts, and `eval` in
        metrics.jsonl.

        `evaluation` is {"score", "metrics": {name: float}, "parts": {name: float}, "rows": n, …}.
        """
        by_task: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            by_task.setdefault(rollout.task.id, []).append(rollout)
        path = _samples(self.path / EVALUATIONS, update)
        _replace(path, "".join(_line(_record(update, each)) for each in by_task.values()))
        self.append_metrics(update, eval=dict(evaluation))
        return path

    def supersede_after(self, update: int) -> None:
        """Marks every metric, event and sample of a later update than `update`: the run goes on
        from there."""
        for name in (METRICS, EVENTS):
            lines = _read_lines(self.path / name)
            for line in lines:
                if line.get("update") is not None and line["update"] > update:
                    line["superseded"] = True
            if lines:
                _replace(self.path / name, "".join(map(_line, lines)))
        for folder in (ROLLOUTS, EVALUATIONS):
            for number, path in _sample_files(self.path / folder):
                if number > update:
                    path.rename(_free_name(path))
        self._updates = {number for number in self._updates if number <= update}


# ── readers ────────────────────────────────────────────────────────────────────────────────────


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a run already."""
    return (Path(path) / EVENTS).exists() or (Path(path) / METRICS).exists()


def read_metrics(path: str | Path, *, superseded: bool = False) -> list[dict[str, Any]]:
    """One object an update, in order of writing; `path` is the run's folder or the file."""
    return _surviving(_file(path, METRICS), superseded)


def read_events(path: str | Path, *, superseded: bool = False) -> list[dict[str, Any]]:
    """The events in order; those of a line of descent that a resume left are only given when asked
    for."""
    return _surviving(_file(path, EVENTS), superseded)


def read_rollouts(path: str | Path, update: int | None = None) -> Iterator[dict[str, Any]]:
    """The sampled groups of a run (or of one update, or of one file), oldest first."""
    return _read_samples(Path(path), ROLLOUTS, update)


def read_evaluation(path: str | Path, update: int) -> list[dict[str, Any]]:
    """The rollouts of one evaluation, one task an object; [] where none was made."""
    return list(_read_samples(Path(path), EVALUATIONS, update))


def read_address(path: str | Path) -> str | None:
    """Where the run's metrics are (or were) served."""
    try:
        return str(json.loads((Path(path) / ADDRESS).read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError):
        return None


def _surviving(path: Path, superseded: bool) -> list[dict[str, Any]]:
    return [line for line in _read_lines(path) if superseded or not line.get("superseded")]


def _file(path: str | Path, name: str) -> Path:
    return Path(path) / name if Path(path).is_dir() else Path(path)


def _read_samples(path: Path, folder: str, update: int | None) -> Iterator[dict[str, Any]]:
    if path.is_file():
        yield from _read_lines(path)
        return
    for number, file in _sample_files(path / folder):
        if update in (None, number):
            yield from _read_lines(file)


def _sample_files(folder: Path) -> list[tuple[int, Path]]:
    found = [
        (match, path)
        for path in folder.glob("update-*.jsonl")
        if (match := _SAMPLES.fullmatch(path.name))
    ]
    return sorted((int(match[1]), path) for match, path in found)


def _samples(folder: Path, update: int) -> Path:
    return folder / f"update-{update:05d}.jsonl"


def _free_name(path: Path) -> Path:
    tries = (path.with_name(f"{path.stem}.superseded-{n}.jsonl") for n in range(1, 10**6))
    return next(name for name in tries if not name.exists())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a torn last line is not there. RunError for damage anywhere
    else."""
    try:
        raw_lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    values = []
    for number, raw in enumerate(
        raw_lines[:-1], start=1
    ):  # what follows the last line break is torn
        try:
            value = json.loads(raw)
        except ValueError:
            if number == len(raw_lines) - 1:
                break  # the file's blocks reached the disk before their content did
            raise RunError(f"{path}, line {number} is damaged; delete the line to go on") from None
        values.append(value)
    return values


# ── writing ────────────────────────────────────────────────────────────────────────────────────


def _cut_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
    with contextlib.suppress(ValueError):
        if last:
            json.loads(last)
        last = b""
    whole = whole[: len(whole) - len(last)]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))


def _append(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    """All lines with one call: a reader sees each whole or not at all. A write that does not fit is
    undone."""
    data = "".join(map(_line, values)).encode(
        "utf-8", "backslashreplace"
    )  # a lone surrogate: its escape
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; free some space and resume"
        ) from error


def _replace(path: Path, text: str) -> Path:
    """The file's new content, whole or not at all, even if the power fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written: {error.strerror}; free some space and resume"
        ) from error
    return path


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> JSON:
    """JSON without NaN and infinities (null instead); tensors' and arrays' scalars as numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return _plain(value.tolist())
    return str(value)


def _record(
    update: int, rollouts: Sequence[Rollout], *, group: int | None = None
) -> dict[str, Any]:
    """A group as people read it: the prompt once, then every reply with its score."""
    task = rollouts[0].task
    head = {"update": update} if group is None else {"update": update, "group": group}
    return head | {
        "task": task.id,
        "messages": list(task.messages) or list(rollouts[0].messages[:-1]),
        "answer": task.answer,
        "replies": [_reply(rollout) for rollout in rollouts],
    }


def _statuses(rollout: Rollout) -> Mapping[str, str]:
    """How each reward's judgement ended: {reward: status}. The pool writes it down where one
    failed; else every reward that has a part was ok."""
    if "statuses" in rollout.info:
        told: Mapping[str, str] = rollout.info["statuses"]
        return told
    if rollout.score is None or rollout.status != "ok":
        return {}
    return {name: "ok" for name in rollout.score.parts if "." not in name}


def _reply(rollout: Rollout) -> dict[str, Any]:
    score, trajectory = rollout.score, rollout.trajectory
    reply: dict[str, Any] = {
        "reply": rollout.reply,
        "value": None if score is None else score.value,
        "parts": {} if score is None else score.parts,
        "status": rollout.status,
        "statuses": _statuses(rollout),
        "reason": "" if score is None else score.reason,
        "stop_reason": rollout.stop_reason,
        "policy_version": None if trajectory is None else trajectory.policy_version,
        "tokens": None if trajectory is None else sum(trajectory.loss_mask),
    }
    if rollout.info.get("error"):
        reply["error"] = rollout.info["error"]
    if (
        len(rollout.messages) > len(rollout.task.messages) + 1
    ):  # several turns: the reply alone does not tell it
        reply["turns"] = list(rollout.messages[len(rollout.task.messages) :])
    return reply
