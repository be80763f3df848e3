"""A reward that is ready to be called: found, its arguments checked, its result made a verdict.

Runs inside a scoring process (`worker.py`) and, for plain functions in tests, anywhere. What a
reward does wrong never leaves `Judge` as an exception: it becomes a verdict with one of the
statuses of `rlpost.reward.STATUSES`.
"""

import asyncio
import difflib
import inspect
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost import plugins
from rlpost.errors import PluginError, RlpostError, RowError
from rlpost.reward import RewardSpec, as_score, kind
from rlpost.scoring import foreign, graders
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


@dataclass(frozen=True, slots=True, kw_only=True)
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
        _check_arguments(spec, function)
        self._function = function
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


def load(spec: RewardSpec) -> Callable[..., Any]:
    """The function that `spec.use` names: a plugin, a TRL function made ours, or an OpenAI grader
    file."""
    if spec.use.endswith(".json"):
        return graders.load(Path(spec.base_dir) / spec.use, **spec.arguments)
    function = plugins.resolve("rlpost.rewards", spec.use, base_dir=spec.base_dir)
    if isinstance(function, type):
        raise PluginError(
            f"the reward {spec.use!r} is a class", cure="name a function, or an instance"
        )
    if not callable(function):
        raise PluginError(f"the reward {spec.use!r} is a {type(function).__name__}, not a function")
    return foreign.adapt(function, spec.use) if kind(function) == "trl" else function


def _check_arguments(spec: RewardSpec, function: Callable[..., Any]) -> None:
    """Unknown and missing keyword arguments, before anything is scored. A function of foreign form
    checks its own."""
    parameters = inspect.signature(function).parameters.values()
    if len(
        [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    ) < 2 and (not any(p.kind is p.VAR_POSITIONAL for p in parameters)):
        raise PluginError(
            f"the reward {spec.use!r} does not take (task, rollout)",
            cure="write def name(task, rollout, *, …)",
        )
    named = list(parameters)[2:]
    known = [p.name for p in named if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in spec.arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                cure = (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"it takes {', '.join(known) or 'none'}"
                )
                raise PluginError(f"the reward {spec.use!r} has no argument {name!r}", cure=cure)
    missing = [p.name for p in named if p.name in known and p.default is p.empty]
    if lacking := [name for name in missing if name not in spec.arguments]:
        raise PluginError(
            f"the reward {spec.use!r} needs the argument {lacking[0]!r}",
            cure=f"write {lacking[0]} = … in its [[reward]] table",
        )


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


def dump(verdict: Verdict, seconds: float) -> list[Any]:
    """A verdict as plain JSON values: what crosses from a scoring process to its parent."""
    if verdict.score is None:
        return [verdict.status, verdict.detail, verdict.cause, round(seconds, 6)]
    score = verdict.score
    return [score.value, score.parts, score.reason, round(seconds, 6)]


def parse(entry: Any) -> Verdict:
    """The verdict in `entry`, which came from a process that ran user code: everything is checked
    again.

    Raises ValueError for anything that `dump` would not have written.
    """
    if not isinstance(entry, list) or len(entry) != 4:
        raise ValueError("a verdict is a list of four")
    first, second, third, seconds = entry
    if not isinstance(third, str) or not isinstance(seconds, int | float):
        raise ValueError("a verdict holds a word and seconds")
    if isinstance(first, str):
        if first not in ("error", "timeout", "crashed", "invalid_result") or not isinstance(
            second, str
        ):
            raise ValueError(f"unknown status {first[:20]!r}")
        return Verdict(status=first, detail=second[:TEXT_LIMIT], cause=third, seconds=seconds)
    if type(first) not in (int, float) or not 0.0 <= first <= 1.0:  # NaN fails the comparison too
        raise ValueError("the value is not in [0, 1]")
    if not isinstance(second, dict) or len(second) > PARTS_LIMIT:
        raise ValueError("parts are a bounded object")
    for part in second.values():
        if type(part) not in (int, float) or not -1e300 < part < 1e300:
            raise ValueError("a part is not a finite number")
    score = Score(value=float(first), parts=second, reason=third[:TEXT_LIMIT])
    return Verdict(status="ok", score=score, seconds=seconds)


def to_frame(value: Any) -> bytes:
    """JSON bytes behind their length (4 bytes, little endian)."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return len(body).to_bytes(4, "little") + body


def describe(arguments: Mapping[str, Any]) -> str:
    """Arguments as one short line, for reports."""
    return json.dumps(dict(arguments), default=str)[:TEXT_LIMIT]
