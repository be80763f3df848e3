"""A reward that is ready to be called: found, its arguments checked, its result made a verdict.

Runs inside a scoring process (`worker.py`) and, for plain functions in tests, anywhere. What a
reward does wrong never leaves `Judge` as an exception: it becomes a verdict with one of the
statuses of `rlpost.reward.STATUSES`.
"""

import asyncio
import inspect
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost import plugins
from rlpost.errors import PluginError, RlpostError, RowError
from rlpost.reward import RewardSpec, as_score, kind
from rlpost.scoring import foreign, graders
from rlpost.scoring.arguments import check_arguments
from rlpost.types import Rollout, Score, Task

PARTS_LIMIT = 256  # parts a reward may name; more is a mistake, and would flood every metric
TEXT_LIMIT = 300  # characters of a reason or of an error's text that are carried on

_UNREACHABLE = {
    "ConnectError", "ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout", "ReadError",
    "RemoteProtocolError", "ClientConnectionError", "APIConnectionError", "APITimeoutError",
    "RateLimitError", "InternalServerError", "MaxRetryError", "URLError",
}  # fmt: skip
"""Exceptions of HTTP clients, by name (httpx, aiohttp, openai, requests), that say that an endpoint
failed and nothing about the reply. Python's own ConnectionError and TimeoutError count as well."""


@dataclass(
    slots=True, kw_only=True
)  # not frozen: one is made for every call, and that costs double
class Verdict:
    """What one reward said about one rollout. `score` is set exactly when `status` is "ok".

    `cause` says whose failure it is: "reply" (retried, and the reply's doing if it comes again),
    "judge" (an endpoint that cannot be reached, a reward that does not import), "row" (the row
    lacks what the reward reads) or "job" (wrong arguments). `detail` is one line for people.
    """

    status: str
    score: Score | None = None
    detail: str = ""
    cause: str = "reply"
    seconds: float = 0.0


class Judge:
    """One reward of a job, bound to its arguments. Raises PluginError, one line, when the reward
    cannot be found or imported, or does not take these arguments."""

    def __init__(self, spec: RewardSpec):
        self.spec = spec
        function = load(spec)
        self.is_group = kind(function) == "group"
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  an object with an async __call__
        )
        check_arguments(spec, function)
        self._function = function
        self._plain_range = tuple(spec.range) == (0.0, 1.0)
        self._arguments = dict(spec.arguments)
        if "base_dir" in inspect.signature(function).parameters:  # paths in arguments are the job's
            self._arguments.setdefault("base_dir", spec.base_dir)

    def judge(self, task: Task, rollout: Rollout) -> Verdict:
        """The verdict on one rollout, by a single reward."""
        try:
            value = self._function(task, rollout, **self._arguments)
            return self.verdict(value)
        except BaseException as error:  # the point: whatever user code raises costs one rollout
            return failure(error, self.spec)

    async def judge_async(self, task: Task, rollout: Rollout) -> Verdict:
        """The verdict of an async single reward."""
        try:
            return self.verdict(await self._function(task, rollout, **self._arguments))
        except asyncio.CancelledError:
            raise  # the deadline, which the worker reports itself
        except BaseException as error:  # the point: whatever user code raises costs one rollout
            return failure(error, self.spec)

    def judge_group(self, task: Task, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """G verdicts of a group reward, in the order of the rollouts."""
        try:
            values = self._function(task, list(rollouts), **self._arguments)
            return self._group_verdicts(values, len(rollouts))
        except BaseException as error:  # the point: whatever user code raises costs one group
            return [failure(error, self.spec)] * len(rollouts)

    async def judge_group_async(self, task: Task, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """G verdicts of an async group reward."""
        try:
            values = await self._function(task, list(rollouts), **self._arguments)
            return self._group_verdicts(values, len(rollouts))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # the point: whatever user code raises costs one group
            return [failure(error, self.spec)] * len(rollouts)

    def verdict(self, value: Any) -> Verdict:
        """A reward's result, validated: finite, a number, in range, with bearable parts."""
        if self._plain_range and type(value) is Score and _is_plain(value):
            return Verdict(status="ok", score=value)  # as it is nearly always
        try:
            score = as_score(value, range=self.spec.range)
            if len(score.parts) > PARTS_LIMIT:
                raise ValueError(f"{len(score.parts)} parts, more than {PARTS_LIMIT}")
        except Exception as error:  # `__float__` and mappings of user classes may raise anything
            if inspect.iscoroutine(value):
                value.close()
            return Verdict(status="invalid_result", detail=one_line(error))
        if len(score.reason) > TEXT_LIMIT:
            score = Score(value=score.value, parts=score.parts, reason=score.reason[:TEXT_LIMIT])
        return Verdict(status="ok", score=score)

    def _group_verdicts(self, values: Any, count: int) -> list[Verdict]:
        if not isinstance(values, list | tuple) or len(values) != count:
            shape = len(values) if hasattr(values, "__len__") else type(values).__name__
            detail = f"a group reward returns a list of {count} values, this one gave {shape}"
            return [Verdict(status="invalid_result", detail=detail)] * count
        return [self.verdict(value) for value in values]


def _is_plain(score: Score) -> bool:
    """Whether `as_score` would return an equal score: plain finite floats in [0, 1], plain
    words."""
    value, parts, reason = score.value, score.parts, score.reason
    if type(value) is not float or not 0.0 <= value <= 1.0 or type(parts) is not dict:
        return False
    if type(reason) is not str or len(reason) > TEXT_LIMIT or len(parts) > PARTS_LIMIT:
        return False
    for name, part in parts.items():
        if type(name) is not str or type(part) is not float or part - part != 0.0:
            return False  # infinity and NaN minus themselves are NaN
    return True


def load(spec: RewardSpec) -> Callable[..., Any]:
    """The function that `spec.use` names: a plugin, a TRL function made ours, or an OpenAI grader
    file."""
    if spec.use.endswith(".json"):
        known = list(inspect.signature(graders.load).parameters)[1:]
        if unknown := [name for name in spec.arguments if name not in known]:
            raise PluginError(
                f"a grader file has no argument {unknown[0]!r}", cure=f"it takes {', '.join(known)}"
            )
        return graders.load(Path(spec.base_dir) / spec.use, **spec.arguments)
    function = plugins.resolve("rlpost.rewards", spec.use, base_dir=spec.base_dir)
    if isinstance(function, type):
        raise PluginError(
            f"the reward {spec.use!r} is a class", cure="name a function, or an instance"
        )
    if not callable(function):
        raise PluginError(f"the reward {spec.use!r} is a {type(function).__name__}, not a function")
    return foreign.adapt(function, spec.use) if kind(function) == "trl" else function


def failure(error: BaseException, spec: RewardSpec) -> Verdict:
    """What an exception of a reward means."""
    if isinstance(error, RowError):
        return Verdict(status="error", detail=one_line(error, bare=True), cause="row")
    if isinstance(error, RlpostError):
        return Verdict(status="error", detail=one_line(error, bare=True), cause="job")
    if isinstance(error, MemoryError):
        return Verdict(status="crashed", detail="out of memory: MemoryError")
    if isinstance(error, BlockingIOError):  # what fork says at the process limit
        return Verdict(status="crashed", detail=f"out of processes: {one_line(error)}")
    if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
        return Verdict(status="crashed", detail=f"the reward called exit: {one_line(error)}")
    detail = one_line(error) + _place(error, spec)
    if _is_unreachable(error):
        return Verdict(status="error", detail=detail, cause="judge")
    return Verdict(status="error", detail=detail)


def _is_unreachable(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return any(base.__name__ in _UNREACHABLE for base in type(error).__mro__)


def _place(error: BaseException, spec: RewardSpec) -> str:
    """ " (my_reward.py, line 12)": the innermost line outside the standard library and this
    package."""
    own = Path(__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).parent != own and "/lib/python3" not in frame.filename
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def one_line(error: BaseException, *, bare: bool = False) -> str:
    """ "KeyError: 'answer'" on one bounded line; `bare` leaves the type out. Never raises."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a user's exception may fail to print itself
        text = ""
    name = type(error).__name__
    return (text if bare and text else f"{name}: {text}" if text else name)[:TEXT_LIMIT]


_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def dump(unit: int, verdict: Verdict, nanoseconds: int) -> list[Any]:
    """The verdict on one unit as plain JSON values: what crosses from a scoring process to its
    parent."""
    score = verdict.score
    if score is None:
        return [unit, verdict.status, verdict.detail, verdict.cause, nanoseconds]
    return [unit, score.value, score.parts, score.reason, nanoseconds]


def parse(entry: list[Any]) -> Verdict:
    """The verdict in `entry`, which came from a process that ran user code: everything is checked
    again. Raises ValueError for anything that `dump` would not have written."""
    _, first, second, third, nanoseconds = entry
    if type(third) is not str or type(nanoseconds) is not int or not 0 <= nanoseconds < 1 << 60:
        raise ValueError("a verdict holds a word and a time")
    seconds = nanoseconds / 1e9
    if type(first) is float:
        if not 0.0 <= first <= 1.0:  # NaN fails the comparison too
            raise ValueError("the value is not in [0, 1]")
        if type(second) is not dict or len(second) > PARTS_LIMIT or len(third) > TEXT_LIMIT:
            raise ValueError("parts and reason are bounded")
        for part in second.values():
            if type(part) is not float or part - part != 0.0:
                raise ValueError("a part is not a finite number")
        score = Score(value=first, parts=second, reason=third)
        return Verdict(status="ok", score=score, seconds=seconds)
    if first not in ("error", "timeout", "crashed", "invalid_result") or type(second) is not str:
        raise ValueError("unknown status")
    return Verdict(status=first, detail=second[:TEXT_LIMIT], cause=third, seconds=seconds)


def to_frame(value: Any) -> bytes:
    """JSON bytes behind their length (4 bytes, little endian)."""
    body = _encode(value).encode()
    return len(body).to_bytes(4, "little") + body
