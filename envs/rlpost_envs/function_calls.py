"""Questions to be answered with function calls, in the Berkeley leaderboard's form or in OpenAI's.

    {"question": [[messages]], "function": [...], "ground_truth": [{"f": {"x": [1, 2]}}]}
    {"messages": [...], "tools": [...], "answer": {"calls": [{"name", "arguments": {"x": [1, 2]}}]}}
    {"messages": [..., {"role": "assistant", "tool_calls": [...]}], "tools": [...]}

All become tasks of the second form, which the `tool_call` reward reads: for every argument the
list of accepted values, where "" means that it may be left out, and no calls where none is right.
In the third form each argument has the one value that was called.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlpost.env import SingleTurn
from rlpost.errors import JobError
from rlpost.row_files import Complaints, Row, read_table
from rlpost.types import Task

JSON_TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "any": None,
    "String": "string",
    "int": "integer",
    "bool": "boolean",
    "list": "array",
    "str": "string",
}
"""The leaderboard's type names -> JSON Schema's; None drops the type."""

Order = Literal["any", "fixed"]


class FunctionCalls(SingleTurn):
    """The environment of a file of such rows.

    `order` holds for rows that do not say it: "any" takes calls in any order. `system` is put in
    front of conversations that have no system message. Raises RowError or UserErrors for rows,
    JobError for arguments.
    """

    def __init__(self, *, path: str, order: Order = "any", system: str | None = None):
        if order not in ("any", "fixed"):
            raise JobError(f"environment.order is {order!r}", cure='write "any" or "fixed"')
        table, complaints = read_table(path), Complaints.of(path)
        tasks = [_read(row, order, system, complaints) for row in table]
        complaints.settle()
        super().__init__(task for task in tasks if task is not None)


def _read(row: Row, order: Order, system: str | None, complaints: Complaints) -> Task | None:
    columns = dict(row.columns)
    identity = str(columns.pop("id", row.line))
    try:
        if "function" in columns or "ground_truth" in columns:
            messages, tools, calls = _leaderboard_row(columns)
        else:
            messages, tools, calls, order = _openai_row(columns, order)
        if not messages:
            raise _Malformed("there are no messages")
    except _Malformed as error:
        complaints.add(error.problem, line=row.line, cure=error.cure)
        return None
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Task(
        id=identity,
        messages=messages,
        tools=tools,
        answer={"calls": calls, "order": order},
        meta=columns,
    )


class _Malformed(ValueError):
    def __init__(self, problem: str, cure: str = ""):
        super().__init__(problem)
        self.problem, self.cure = problem, cure


def _leaderboard_row(columns: dict[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Takes its columns out of `columns`; what is left goes to meta."""
    turns = columns.pop("question", None)
    if not isinstance(turns, list) or not turns:
        raise _Malformed("'question' is no list of turns", cure="write [[{role, content}]]")
    if isinstance(turns[0], list) and len(turns) > 1:
        raise _Malformed(
            f"'question' has {len(turns)} turns", cure="this environment asks one question a row"
        )
    messages = _messages(turns[0] if isinstance(turns[0], list) else turns)
    functions = columns.pop("function", None)
    if isinstance(functions, Mapping):
        functions = [functions]
    if not isinstance(functions, list):
        raise _Malformed("'function' is no list of functions")
    truth = columns.pop("ground_truth", None)
    if not isinstance(truth, list):
        raise _Malformed(
            "'ground_truth' is no list of calls", cure="write [] where no call is right"
        )
    calls = []
    for call in truth:
        if not isinstance(call, Mapping) or len(call) != 1:
            raise _Malformed("a call of 'ground_truth' is not {name: {argument: [accepted]}}")
        ((name, arguments),) = call.items()
        calls.append({"name": name, "arguments": _accepted(name, arguments)})
    return messages, [_tool(function) for function in functions], calls


def _openai_row(
    columns: dict[str, Any], order: Order
) -> tuple[list[Any], list[Any], list[Any], Order]:
    messages = _messages(columns.pop("messages", None))
    tools = columns.pop("tools", None)
    if not isinstance(tools, list):
        raise _Malformed("'tools' is no list of tools", cure="write them in OpenAI's form")
    answer = columns.pop("answer", None)
    if answer is None and messages and messages[-1]["role"] == "assistant":
        last = messages.pop()
        return messages, [_tool(t) for t in tools], _called(last.get("tool_calls") or []), order
    if not isinstance(answer, Mapping) or not isinstance(answer.get("calls"), list):
        raise _Malformed(
            "'answer' is not {\"calls\": [...]}",
            cure="or end the messages with the assistant's tool_calls",
        )
    if answer.get("order", order) not in ("any", "fixed"):
        raise _Malformed(f"'answer.order' is {answer['order']!r}", cure='write "any" or "fixed"')
    calls = []
    for call in answer["calls"]:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise _Malformed("a call of 'answer' has no name")
        arguments = _accepted(call["name"], call.get("arguments", {}))
        calls.append({"name": call["name"], "arguments": arguments})
    return messages, [_tool(t) for t in tools], calls, answer.get("order", order)


def _messages(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Malformed("there are no messages", cure="write [{role, content}]")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _Malformed("a message has no role")
    return list(value)


def _accepted(name: str, arguments: Any) -> dict[str, list[Any]]:
    if not isinstance(arguments, Mapping):
        raise _Malformed(f"the arguments of {name} are no object")
    for argument, values in arguments.items():
        if not isinstance(values, list) or not values:
            raise _Malformed(
                f"{name}.{argument} has no list of accepted values",
                cure="put the one accepted value into a list",
            )
    return dict(arguments)


def _called(calls: Sequence[Any]) -> list[dict[str, Any]]:
    """The calls that an assistant made, each value as the only accepted one."""
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise _Malformed("the arguments of a tool call are no JSON") from None
        if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
            raise _Malformed("a tool call has no name or no arguments")
        accepted = {name: [value] for name, value in arguments.items()}
        read.append({"name": function["name"], "arguments": accepted})
    return read


def _tool(function: Any) -> dict[str, Any]:
    """A function in OpenAI's form, its types in JSON Schema's words."""
    inner = function.get("function", function) if isinstance(function, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise _Malformed("a function has no name")
    return {"type": "function", "function": _json_types(inner)}


def _json_types(value: Any) -> Any:
    """The same, with the leaderboard's type names replaced wherever a schema names a type."""
    if isinstance(value, list):
        return [_json_types(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    read = {}
    for key, inner in value.items():
        if key == "properties" and isinstance(inner, Mapping):
            read[key] = {name: _json_types(schema) for name, schema in inner.items()}
        elif key == "type" and isinstance(inner, str):
            named = JSON_TYPES.get(inner, inner)
            if named is not None:
                read[key] = named
        elif key in ("enum", "default", "const", "examples"):
            read[key] = inner  # values, not schemas
        else:
            read[key] = _json_types(inner)
    return read
