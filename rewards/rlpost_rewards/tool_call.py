"""Did the reply call the right tools with the right arguments?

1 exactly if the calls are right by the rules; otherwise at most 0.5, by the share of names and
arguments that are: a reply that guesses an argument never comes near one that leaves it out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from rlpost.errors import JobError, RowError
from rlpost.types import JSON, Message, Rollout, Score, Task
from rlpost_rewards.call_formats import FORMATS, Call, Decoded, decode, same_name, shows_call
from rlpost_rewards.call_rules import (
    RULES,
    Exact,
    GoldCall,
    call_is_right,
    right_arguments,
)
from rlpost_rewards.strict_json import check_choice

MOST_PARTIAL = 0.5
_BEGINS_AS_JSON = re.compile(r"\{|\[\s*[\[\]{\"'\d-]")  # an answer in words does not
Tools = Mapping[str, Mapping[str, Any]]


def tool_call(
    task: Task,
    rollout: Rollout,
    *,
    format: str = "auto",
    rules: str = "exact",
    thinking: str = "strip",
    fence: str = "strip",
) -> Score:
    """1 if the calls of the reply are those of `task.answer`, else at most 0.5; see the module.

    The answer is {"calls": [{"name", "arguments": {argument: [accepted, …]}}], "order": "any" or
    "fixed"}; "" among the accepted values lets the argument be left out. Without calls none is
    right: 1 for a text of words without any call syntax, 0 for a call, a broken call, a JSON
    document or nothing.
    `format` is one of auto, hermes, qwen3_xml, llama, openai; `rules` "exact" takes strings as they
    are, "bfcl" compares like the Berkeley leaderboard (`call_rules`), with two departures: rows in
    which no call is right, as above, and parallel calls, which are matched optimally.

    Parts: decodes (share of the calls begun that can be read), valid, matched (F1 over names and
    arguments). Reason: ok, no_call, unneeded_call, broken_call, wrong_count, wrong_name,
    wrong_arguments, wrong_order, empty, not_words, or the word of StrictJSONError.
    Raises JobError for bad arguments, RowError for a row without a usable answer or tools.
    """
    if format not in FORMATS:
        raise JobError(f"tool_call: format is {format!r}", cure=f"one of {', '.join(FORMATS)}")
    if rules not in RULES:
        raise JobError(f"tool_call: rules is {rules!r}", cure=f"one of {', '.join(RULES)}")
    try:
        check_choice("thinking", thinking)
        check_choice("fence", fence)
    except ValueError as error:
        raise JobError(f"tool_call: {error}") from None
    golds, in_order = read_answer(task)
    tools = read_tools(task)
    message = _last_reply(rollout.messages)
    decoded = decode(
        rollout.reply, message=message, tools=tools, format=format, thinking=thinking, fence=fence
    )
    if not golds:
        return _judge_silence(decoded, message, tools)
    if not decoded.calls:
        reason = decoded.reason or ("broken_call" if decoded.broken else "no_call")
        return _score(0.0, decodes=0.0, valid=0.0, matched=0.0, reason=reason)
    return _judge_calls(decoded, golds, tools, RULES[rules], in_order)


def read_answer(task: Task) -> tuple[list[GoldCall], bool]:
    """The calls wanted, and whether their order counts. Raises RowError."""
    answer = task.answer
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError:
            answer = None
    if not isinstance(answer, Mapping) or not isinstance(answer.get("calls"), list | tuple):
        raise RowError(
            f"row {task.id}: answer has no calls",
            cure='tool_call needs {"calls": [{"name": …, "arguments": {…: [accepted, …]}}]}',
        )
    order = answer.get("order", "any")
    if order not in ("any", "fixed"):
        raise RowError(f"row {task.id}: answer.order is {order!r}", cure='write "any" or "fixed"')
    return [_gold_call(task, call) for call in answer["calls"]], order == "fixed"


def _gold_call(task: Task, call: JSON) -> GoldCall:
    arguments = call.get("arguments", {}) if isinstance(call, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(call.get("name"), str):
        raise RowError(
            f"row {task.id}: a call of answer.calls has no name or no arguments",
            cure='write {"name": …, "arguments": {argument: [accepted, …]}}',
        )
    accepted = {k: v if isinstance(v, list) else [v] for k, v in arguments.items()}
    return GoldCall(name=call["name"], arguments=accepted)


def read_tools(task: Task) -> Tools:
    """The parameter schemas of the row's tools by name, in OpenAI's form or without its wrapper.
    Raises RowError."""
    tools: dict[str, Mapping[str, Any]] = {}
    for tool in task.tools or ():
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowError(
                f"row {task.id}: a tool has no name",
                cure='write {"type": "function", "function": {"name": …, "parameters": {…}}}',
            )
        parameters = inner.get("parameters")
        tools[inner["name"]] = parameters if isinstance(parameters, Mapping) else {}
    return tools


def _last_reply(messages: Sequence[Message]) -> Message | None:
    return next((m for m in reversed(messages) if m.get("role") == "assistant"), None)


def _judge_silence(decoded: Decoded, message: Message | None, tools: Tools) -> Score:
    """No call is right: words earn 1; a call, what looks like one, or nothing earn 0."""
    if decoded.reason:
        reason = decoded.reason
    elif decoded.broken or decoded.calls or (message and message.get("tool_calls")):
        reason = "broken_call" if decoded.broken else "unneeded_call"
    elif not any(map(str.isalnum, decoded.text)):
        reason = "empty"
    elif shows_call(decoded.text, list(tools)):
        reason = "broken_call"
    else:
        reason = "not_words" if _BEGINS_AS_JSON.match(decoded.text) else "ok"
    right = float(reason == "ok")
    decodes = float(reason in ("ok", "unneeded_call"))
    return _score(right, decodes=decodes, valid=right, matched=right, reason=reason)


def _judge_calls(
    decoded: Decoded, golds: Sequence[GoldCall], tools: Tools, rules: Exact, in_order: bool
) -> Score:
    calls = decoded.calls
    begun = len(calls) + decoded.broken
    decodes = len(calls) / begun
    right_order = True
    if decoded.broken == 0 and len(calls) == len(golds):
        right = np.array([[call_is_right(c, g, tools, rules) for c in calls] for g in golds])
        if (right.diagonal() if in_order else _best(right)).all():
            return _score(1.0, decodes=1.0, valid=1.0, matched=1.0, reason="ok")
        right_order = not (in_order and _best(right).all())
    matched = _matched(decoded, golds, tools, rules)
    if decoded.broken:
        reason = "broken_call"
    elif len(calls) != len(golds):
        reason = "wrong_count"
    elif not right_order:
        reason = "wrong_order"
    else:
        named = np.array([[same_name(c.name, g.name, tools) for c in calls] for g in golds])
        reason = "wrong_arguments" if _best(named).all() else "wrong_name"
    return _score(
        MOST_PARTIAL * matched, decodes=decodes, valid=0.0, matched=matched, reason=reason
    )


def _best(right: np.ndarray) -> np.ndarray:
    """For each gold call, whether the best one-to-one matching gives it a right one."""
    rows, columns = linear_sum_assignment(right, maximize=True)
    return right[rows, columns]


def _matched(decoded: Decoded, golds: Sequence[GoldCall], tools: Tools, rules: Exact) -> float:
    """F1 over the names and the (name, argument, value) of all calls, matched one to one so that
    most agree. An optional argument left out is not missed."""
    calls = decoded.calls[: 4 * len(golds) + 16]  # those beyond only cost precision
    pairs = [[_agreement(call, gold, tools, rules) for call in calls] for gold in golds]
    # where as many agree, rather by needed arguments than by optional ones
    gain = np.array([[agree - optional / 1024 for agree, optional in row] for row in pairs])
    rows, columns = linear_sum_assignment(gain, maximize=True)
    chosen = [pairs[row][column] for row, column in zip(rows, columns, strict=True)]
    agreed = sum(agree for agree, _ in chosen)
    wanted = sum(1 + gold.needed for gold in golds) + sum(optional for _, optional in chosen)
    given = sum(1 + len(call.arguments) for call in decoded.calls) + decoded.broken
    return 2 * agreed / (wanted + given)


def _agreement(call: Call, gold: GoldCall, tools: Tools, rules: Exact) -> tuple[int, int]:
    """How many items agree (the name and each right argument), how many of them optional."""
    if not same_name(call.name, gold.name, tools):
        return 0, 0
    names = right_arguments(call, gold, tools, rules)
    return 1 + len(names), sum("" in gold.arguments[name] for name in names)


def _score(value: float, *, reason: str, **parts: float) -> Score:
    return Score(value=value, parts=parts, reason=reason)


def metrics(
    tasks: Sequence[Task], rollouts: Sequence[Rollout], **arguments: Any
) -> dict[str, float]:
    """Figures over a set, one rollout a task, with the arguments of `tool_call`: accuracy (the
    share that is right), decodes and matched (means), and no_call (accuracy where no call is
    right), if the set has such rows."""
    scores = [tool_call(t, r, **arguments) for t, r in zip(tasks, rollouts, strict=True)]
    count = len(scores) or 1
    figures = {
        "accuracy": sum(s.parts["valid"] for s in scores) / count,
        "decodes": sum(s.parts["decodes"] for s in scores) / count,
        "matched": sum(s.parts["matched"] for s in scores) / count,
    }
    silent = [s.parts["valid"] for t, s in zip(tasks, scores, strict=True) if not read_answer(t)[0]]
    return figures | ({"no_call": sum(silent) / len(silent)} if silent else {})


tool_call.metrics = metrics  # type: ignore[attr-defined]  # where evaluation looks for it
