"""A reward written into the job itself: Python source that defines `score(task, rollout)`.

    [[reward]]
    use = "python"
    source = '''
    def score(task, rollout):
        return float(rollout.reply.strip() == task.answer)
    '''

It runs in a scoring process, under whatever isolation the pool has in force; this file adds none.
"""

import inspect
import linecache
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rlpost.errors import JobError
from rlpost.types import Rollout, Score, Task


def python(task: Task, rollout: Rollout, *, source: str) -> float | Score:
    """What the `score(task, rollout)` of `source` returns: a number or a Score.

    Its exceptions pass through, with the source's own lines in their traceback. Raises JobError,
    naming the line, for source that does not compile or run, or that defines no such function.
    """
    return _function(source)(task, rollout)


@lru_cache(maxsize=32)
def _function(source: str) -> Callable[[Task, Rollout], Any]:
    """The `score` of a source, which is run once per process."""
    if not isinstance(source, str):
        raise JobError("python: source is not a text", cure="write Python between ''' and '''")
    source = textwrap.dedent(source)
    name = f"<reward source {hash(source) & 0xFFFFFF:06x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "rlpost_snippet", "Score": Score}
    try:
        exec(compile(source, name, "exec"), names)  # the user's own code is the point
    except SyntaxError as error:
        raise JobError(f"python: source is not Python: {error.msg}", line=error.lineno) from None
    except Exception as error:  # the user's code may raise anything while it is loaded
        raise JobError(
            f"python: source fails: {type(error).__name__}: {error}", line=_line(error, name)
        ) from None
    function = names.get("score")
    if not callable(function):
        raise JobError("python: source defines no score", cure="write def score(task, rollout): …")
    if inspect.iscoroutinefunction(function):
        raise JobError("python: score is async", cure="put it into a file and use module:score")
    return function


def _line(error: BaseException, name: str) -> int | None:
    trace, line = error.__traceback__, None
    while trace:
        if trace.tb_frame.f_code.co_filename == name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
