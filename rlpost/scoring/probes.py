"""Replies to try a reward with: what the gold answer may look like, and what a lazy policy would
try.

Every function gives (kind, text) pairs for one task; the kinds are the words that findings use.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlpost.reward import RewardSpec
from rlpost.types import JSON, Task

UNICODE = "日本語 مرحبا 🧾👩‍👩‍👧 Ａ１ e\u0301 \u202eabc\u202c \x00 \ud800 {“total”: ‘１２’}"
GARBAGE = "lorem {ipsum: 12,, <x>] dolor \\boxed{ sit #### amet"


def gold_forms(task: Task) -> list[str]:
    """The ways to write the task's answer down, as a reply would: the best of them counts as
    gold."""
    answer = task.answer
    if answer is None:
        return []
    forms: list[str] = []
    if isinstance(answer, Mapping) and isinstance(answer.get("calls"), Sequence):
        return _call_forms(answer["calls"])
    if isinstance(answer, str):
        forms.append(answer)
    elif isinstance(answer, list) and all(isinstance(each, str) for each in answer):
        forms.append(", ".join(answer))
    forms.append(json.dumps(answer, ensure_ascii=False))
    forms.append(json.dumps({"label": answer}, ensure_ascii=False))
    last = str(answer).rpartition("####")[2].strip()
    return [*forms, f"\\boxed{{{last}}}", f"#### {last}"]


def ordinary(task: Task, *, length: int) -> list[tuple[str, str]]:
    """Replies that are simply bad: empty, garbage, unicode, and `length` characters of both."""
    return [
        ("empty", ""),
        ("garbage", GARBAGE),
        ("unicode", UNICODE),
        ("very long", (GARBAGE + "\n") * (length // len(GARBAGE))),
    ]


def degenerate(task: Task, labels: Sequence[str]) -> list[tuple[str, str]]:
    """What a policy finds that hunts the reward instead of the task."""
    keys = _keys(task)
    prompt = "\n".join(_text(message.get("content")) for message in task.messages)
    numbers = list(dict.fromkeys(re.findall(r"-?\d[\d,.]*", prompt)))[:500]
    replies = [
        ("the empty object", "{}"),
        ("the empty list", "[]"),
        ("all nulls", json.dumps(dict.fromkeys(keys)) if keys else ""),
        ("the copied schema", json.dumps(task.schema) if task.schema else ""),
        ("the copied tools", json.dumps(list(task.tools)) if task.tools else ""),
        ("every label at once", ", ".join(labels) if len(labels) > 1 else ""),
        ("every label as JSON", json.dumps(list(labels)) if len(labels) > 1 else ""),
        ("every number of the prompt", " ".join(numbers) if len(numbers) > 1 else ""),
        ("the copied prompt", prompt),
        ("<think></think>x", "<think></think>x"),
    ]
    right = set(gold_forms(task))
    return [(kind, reply) for kind, reply in replies if reply and reply not in right]


def labels_of(tasks: Iterable[Task], spec: RewardSpec) -> list[str]:
    """The labels that a reward may expect: its own argument, else the short answers of the rows."""
    given = spec.arguments.get("labels")
    if isinstance(given, list):
        return [str(label) for label in given]
    answers: dict[str, None] = {}
    for task in tasks:
        each = task.answer if isinstance(task.answer, list) else [task.answer]
        answers.update(
            (label, None) for label in each if isinstance(label, str) and len(label) < 60
        )
    return list(answers)


def _call_forms(calls: Sequence[Any]) -> list[str]:
    """Right calls in hermes JSON and in Qwen's XML; where no call is right, a plain sentence."""
    if not calls:
        return ["None of the tools can do this, so I cannot help with it here."]
    hermes, xml, plain = [], [], []
    for call in calls:
        if not isinstance(call, Mapping):
            return []
        chosen = {name: _first(value) for name, value in (call.get("arguments") or {}).items()}
        arguments = {name: value for name, value in chosen.items() if value != ""}
        plain.append({"name": call.get("name"), "arguments": arguments})
        hermes.append(f"<tool_call>\n{json.dumps(plain[-1], ensure_ascii=False)}\n</tool_call>")
        lines = [
            f"<parameter={k}>\n{v if isinstance(v, str) else json.dumps(v)}\n</parameter>"
            for k, v in arguments.items()
        ]
        body = "\n".join([f"<function={call.get('name')}>", *lines, "</function>"])
        xml.append(f"<tool_call>\n{body}\n</tool_call>")
    return ["\n".join(hermes), "\n".join(xml), json.dumps(plain, ensure_ascii=False)]


def _first(accepted: JSON) -> JSON:
    """The first accepted value, and of nested ones theirs; "" says that the argument may be
    missing."""
    value = accepted[0] if isinstance(accepted, list) and accepted else accepted
    if isinstance(value, Mapping):
        chosen = {key: _first(each) for key, each in value.items()}
        return {key: each for key, each in chosen.items() if each != ""}
    return value


def _keys(task: Task) -> list[str]:
    if task.schema and isinstance(task.schema.get("properties"), Mapping):
        return list(task.schema["properties"])
    return list(task.answer) if isinstance(task.answer, Mapping) else []


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
