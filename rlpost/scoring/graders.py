"""OpenAI's grader JSON as a reward: string_check, text_similarity, python, score_model and multi.

Templates such as `{{sample.output_text}}` and `{{item.answer}}` read the reply and the row. The
rules are those of the platform's grader reference; where they name a metric that needs a model or a
word net (cosine, meteor) the grader is refused when it is loaded, not when it is first used. A
grader that asks a model needs `endpoint` (and `api_key_env`, the NAME of a variable) among the
job's arguments.
"""

import ast
import asyncio
import json
import math
import operator
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlpost.errors import PluginError, RowError
from rlpost.scoring import similarity
from rlpost.types import Rollout, Score, Task

Grade = Callable[["Context"], Score]
_TEMPLATE = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")
_TYPES = ("string_check", "text_similarity", "python", "score_model", "multi")


_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}


class Context:
    """What templates may read: `sample` (the reply) and `item` (the row)."""

    def __init__(self, task: Task, rollout: Rollout):
        item: dict[str, Any] = {**task.meta, "id": task.id, "answer": task.answer}
        item |= {"messages": task.messages, "schema": task.schema, "tools": task.tools}
        if isinstance(
            task.answer, Mapping
        ):  # `item.total` of a row whose answer was made of columns
            item = {**task.answer, **item}
        last = rollout.messages[-1] if rollout.messages else {}
        self.sample: dict[str, Any] = {
            "output_text": rollout.reply,
            "output_tools": last.get("tool_calls") or [],
            "choices": [{"message": last, "finish_reason": rollout.stop_reason}],
        }
        try:
            self.sample["output_json"] = json.loads(rollout.reply)
        except (ValueError, RecursionError):
            self.sample["output_json"] = None
        self.item = item

    def fill(self, template: str) -> str:
        """`template` with every `{{path}}` replaced. RowError for a path that leads nowhere."""
        return _TEMPLATE.sub(lambda match: self._text(match.group(1)), template)

    def _text(self, path: str) -> str:
        value: Any = {"sample": self.sample, "item": self.item}
        for part in re.findall(r"[^.\[\]]+", path):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif path.startswith("sample."):
                return ""  # a reply without this field is a bad reply, not a bad row
            else:
                raise RowError(f"the row has no {path!r}", cure="the grader's template reads it")
        return (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )


def load(
    file: Path, *, endpoint: str = "", api_key_env: str = "", timeout: float = 30.0
) -> Callable[..., Any]:
    """The reward that a grader file describes; async if a model is asked. Raises PluginError, one
    line."""
    try:
        grader = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PluginError(f"the grader cannot be read: {error.strerror}", place=str(file)) from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise PluginError(f"the grader is not JSON: {error}", place=str(file), line=line) from None
    grade = build(
        grader, place=file.name, endpoint=endpoint, api_key_env=api_key_env, timeout=timeout
    )
    if not _asks_model(grader):
        return lambda task, rollout, **_: grade(Context(task, rollout))
    waiting = ThreadPoolExecutor(
        32, thread_name_prefix="grader"
    )  # its threads only wait for sockets

    async def asked(task: Task, rollout: Rollout, **_: Any) -> Score:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(waiting, grade, Context(task, rollout))

    return asked


def build(grader: Any, *, place: str, **connection: Any) -> Grade:
    """The function of one grader object. `connection` has endpoint, api_key_env and timeout."""
    if not isinstance(grader, Mapping) or grader.get("type") not in _TYPES:
        shown = grader.get("type") if isinstance(grader, Mapping) else type(grader).__name__
        raise PluginError(
            f"a grader of type {shown!r} is not known",
            place=place,
            cure=f"types are {', '.join(_TYPES)}",
        )
    makers = {
        "string_check": _string_check,
        "text_similarity": _text_similarity,
        "python": _python,
        "score_model": _score_model,
        "multi": _multi,
    }
    return makers[grader["type"]](
        grader, f"{place}, {grader.get('name', grader['type'])}", **connection
    )


def _asks_model(grader: Mapping[str, Any]) -> bool:
    inner = grader.get("graders", {})
    inner = inner.values() if isinstance(inner, Mapping) else inner
    return grader["type"] == "score_model" or any(_asks_model(each) for each in inner)


def _needed(grader: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    if not isinstance(grader.get(name), kind):
        raise PluginError(
            f"a {grader['type']} grader needs {name!r} ({kind.__name__})", place=place
        )
    return grader[name]


def _string_check(grader: Mapping[str, Any], place: str, **_: Any) -> Grade:
    checks: dict[str, Callable[[str, str], bool]] = {
        "eq": operator.eq,
        "ne": operator.ne,
        "neq": operator.ne,
        "like": lambda text, reference: reference in text,
        "ilike": lambda text, reference: reference.casefold() in text.casefold(),
    }
    operation = _needed(grader, "operation", str, place)
    if operation not in checks:
        raise PluginError(
            f"operation {operation!r} is not known", place=place, cure=f"use {', '.join(checks)}"
        )
    text, reference = _needed(grader, "input", str, place), _needed(grader, "reference", str, place)
    check = checks[operation]

    def grade(context: Context) -> Score:
        right = check(context.fill(text), context.fill(reference))
        return Score(value=float(right), reason="" if right else operation)

    return grade


def _text_similarity(grader: Mapping[str, Any], place: str, **_: Any) -> Grade:
    metric = _needed(grader, "evaluation_metric", str, place)
    measure = similarity.METRICS.get(metric)
    if measure is None:
        known = ", ".join(similarity.METRICS)
        raise PluginError(f"the metric {metric!r} is not offered", place=place, cure=f"use {known}")
    text, reference = _needed(grader, "input", str, place), _needed(grader, "reference", str, place)
    threshold = grader.get("pass_threshold")

    def grade(context: Context) -> Score:
        value = measure(context.fill(text), context.fill(reference))
        passed = {} if threshold is None else {"passed": float(value >= threshold)}
        return Score(value=value, parts=passed)

    return grade


def _python(grader: Mapping[str, Any], place: str, **_: Any) -> Grade:
    source = _needed(grader, "source", str, place)
    names: dict[str, Any] = {"__name__": "grader"}
    try:
        exec(compile(source, place, "exec"), names)  # the user's own code, in a scoring process
    except Exception as error:  # whatever the user's source raises is one line for the user
        line = getattr(error, "lineno", None)
        raise PluginError(f"the source does not run: {error!r}", place=place, line=line) from None
    function = names.get("grade")
    if not callable(function):
        raise PluginError("the source has no function grade(sample, item)", place=place)

    def grade(context: Context) -> Score:
        return Score(value=function(context.sample, context.item))

    return grade


def _score_model(
    grader: Mapping[str, Any], place: str, *, endpoint: str, api_key_env: str, timeout: float
) -> Grade:
    if not endpoint:
        raise PluginError(
            "a score_model grader needs an endpoint",
            place=place,
            cure='write endpoint = "http://host:port/v1" in its [[reward]] table',
        )
    messages = _needed(grader, "input", list, place)
    low, high = grader.get("range") or (0.0, 1.0)
    body = {"model": _needed(grader, "model", str, place), **(grader.get("sampling_params") or {})}
    body.setdefault("temperature", 0.0)
    headers = {"Content-Type": "application/json"}
    if api_key_env:
        if api_key_env not in os.environ:
            raise PluginError(f"the variable {api_key_env} is not set", place=place)
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"

    def grade(context: Context) -> Score:
        filled = [{**m, "content": context.fill(_plain(m.get("content", "")))} for m in messages]
        data = json.dumps({**body, "messages": filled}).encode()
        url = endpoint.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                answer = json.loads(response.read(1 << 20))
            text = answer["choices"][0]["message"]["content"]
        except (OSError, ValueError, LookupError, TypeError) as error:  # URLError is an OSError
            raise ConnectionError(f"{url}: {error}") from None
        value = _number_in(text)
        if value is None or not low <= value <= high:
            raise ConnectionError(
                f"{url}: the model gave no number in [{low}, {high}]: {text[:80]!r}"
            )
        return Score(value=(value - low) / (high - low) if high > low else value)

    return grade


def _plain(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def _number_in(text: str) -> float | None:
    """The grade in a model's answer: `{"result": 0.5}`, or the last number that is written."""
    try:
        parsed = json.loads(text)
        parsed = parsed.get("result", parsed.get("score")) if isinstance(parsed, dict) else parsed
        if isinstance(parsed, int | float) and math.isfinite(parsed):
            return float(parsed)
    except (ValueError, RecursionError, TypeError):
        pass
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text[-2000:] if isinstance(text, str) else "")
    return float(numbers[-1]) if numbers else None


def _multi(grader: Mapping[str, Any], place: str, **connection: Any) -> Grade:
    inner = _needed(grader, "graders", dict, place)
    grades = {name: build(each, place=place, **connection) for name, each in inner.items()}
    formula = _Formula(_needed(grader, "calculate_output", str, place), set(grades), place)

    def grade(context: Context) -> Score:
        scores = {name: each(context) for name, each in grades.items()}
        values = {name: float(score.value) for name, score in scores.items()}
        reasons = [score.reason for score in scores.values() if score.reason]
        return Score(value=formula(values), parts=values, reason=reasons[0] if reasons else "")

    return grade


class _Formula:
    """Arithmetic over the names of graders: + - * / ^ and a few functions; nothing else is
    evaluated."""

    def __init__(self, text: str, names: set[str], place: str):
        try:
            self._tree = ast.parse(text.replace("^", "**"), mode="eval").body
            self._value(self._tree, dict.fromkeys(names, 1.0))
        except ArithmeticError:
            pass  # 1 / (a - b) is a fine formula all the same
        except (SyntaxError, ValueError, TypeError, RecursionError) as error:
            raise PluginError(
                f"calculate_output {text!r} is not understood: {error}",
                place=place,
                cure=f"use + - * / ^, {', '.join(_FUNCTIONS)} and {', '.join(sorted(names))}",
            ) from None

    def __call__(self, values: Mapping[str, float]) -> float:
        try:
            return float(self._value(self._tree, values))
        except ArithmeticError:
            return math.nan  # becomes invalid_result, as a division by zero should

    def _value(self, node: ast.expr, values: Mapping[str, float]) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.Name) and node.id in values:
            return values[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = self._value(node.left, values), self._value(node.right, values)
            if isinstance(node.op, ast.Pow) and (abs(left) > 1e6 or abs(right) > 64):
                raise OverflowError("power")
            return _OPERATORS[type(node.op)](left, right)
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](self._value(node.operand, values))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            function = _FUNCTIONS.get(node.func.id)
            if function is not None:
                return function(*(self._value(argument, values) for argument in node.args))
        raise ValueError(f"{ast.unparse(node)!r} is not allowed")
