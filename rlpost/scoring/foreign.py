"""Rewards written for TRL, `f(completions, **columns)`, taken as they are.

Each reply is judged by a call of its own, with lists of one, so that a reply that breaks the
function costs itself only. Columns are the row's: `answer`, `schema`, `tools`, `id` and everything
in `meta`; `prompts` are the task's messages. Keyword arguments of the job are passed on, constant.

TRL gives text or messages, as the data set is "standard" or "conversational", which a function does
not say. Text is tried first: a function that wants messages fails loudly on text
(`text[0]["content"]`), while one that wants text would be silently wrong on a list.
`completions_as` in the job decides it.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlpost.errors import PluginError, RowError
from rlpost.types import Rollout, Task

_NOT_GIVEN = ("completion_ids", "completions_ids", "prompt_ids", "prompts_ids")
_HARMLESS = {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
_WRONG_FORM = (TypeError, AttributeError, KeyError, IndexError)


def adapt(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A reward of ours around a TRL function, async where that is. Raises PluginError for a
    function that asks for token ids: a reward sees text only."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    required = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if ids := [each for each in required if each in _NOT_GIVEN]:
        raise PluginError(
            f"the TRL reward {name!r} needs {ids[0]!r}", cure="rewards see text, not tokens"
        )
    form = _Form()

    def arguments(
        task: Task, rollout: Rollout, as_text: bool, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        columns = {"prompts": [list(task.messages)], "completions": [_completion(rollout, as_text)]}
        row = {**task.meta, "id": task.id, "answer": task.answer}
        row |= {"schema": task.schema, "tools": task.tools}
        columns |= {key: [value] for key, value in row.items()}
        columns |= _HARMLESS | dict(given)
        if unknown := [each for each in given if each not in parameters and not takes_all]:
            raise PluginError(f"the TRL reward {name!r} has no argument {unknown[0]!r}")
        for each in required:
            if each not in columns or (each in row and row[each] is None):
                near = difflib.get_close_matches(each, [k for k in row if row[k] is not None], n=1)
                cure = f"did you mean {near[0]!r}?" if near else f"{name} reads it"
                raise RowError(f"the row has no column {each!r}", cure=cure)
        return columns if takes_all else {k: v for k, v in columns.items() if k in parameters}

    def call(task: Task, rollout: Rollout, *, completions_as: str = "auto", **given: Any) -> Any:
        failures: list[BaseException] = []
        for as_text in form.attempts(completions_as):
            try:
                value = _only(function(**arguments(task, rollout, as_text, given)))
            except _WRONG_FORM as error:
                failures.append(error)
                continue
            form.learn(as_text)
            return value
        raise _telling(failures) from None

    async def call_async(
        task: Task, rollout: Rollout, *, completions_as: str = "auto", **given: Any
    ) -> Any:
        failures: list[BaseException] = []
        for as_text in form.attempts(completions_as):
            try:
                value = _only(await function(**arguments(task, rollout, as_text, given)))
            except _WRONG_FORM as error:
                failures.append(error)
                continue
            form.learn(as_text)
            return value
        raise _telling(failures) from None

    return call_async if inspect.iscoroutinefunction(function) else call


class _Form:
    """Whether a function wants text or messages: learnt once, from the first form that works."""

    def __init__(self) -> None:
        self._as_text: bool | None = None

    def attempts(self, wanted: str) -> Sequence[bool]:
        """The forms to try, in order: True is text."""
        if wanted not in ("auto", "text", "messages"):
            raise PluginError(
                f"completions_as is {wanted!r}", cure='write "text", "messages" or "auto"'
            )
        if wanted != "auto":
            return [wanted == "text"]
        return [False] if self._as_text is False else [True, False]

    def learn(self, as_text: bool) -> None:
        if not as_text:  # success with text proves little: "" has no first character to index
            self._as_text = False


def _telling(failures: Sequence[BaseException]) -> BaseException:
    """Of the errors of both forms the one that is not merely about the form."""
    text = str(failures[0])
    return failures[-1] if "string ind" in text or "'str' object" in text else failures[0]


def _completion(rollout: Rollout, as_text: bool) -> Any:
    if as_text:
        return rollout.reply
    prompt = len(rollout.task.messages)
    return list(rollout.messages[prompt:]) or [{"role": "assistant", "content": rollout.reply}]


def _only(values: Any) -> Any:
    """The one value of a list of one. TRL lets None mean "does not apply here", which adds
    nothing."""
    if not isinstance(values, list | tuple) and not hasattr(values, "__getitem__"):
        raise ValueError(f"a TRL reward returns a list, this one gave {type(values).__name__}")
    if len(values) != 1:
        raise ValueError(f"one completion went in and {len(values)} values came out")
    return 0.0 if values[0] is None else values[0]
