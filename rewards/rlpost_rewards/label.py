"""Did the reply name the right label, or the right set of labels?

A label may be any text: "true", "1", "a, b" and '"quoted"' are labels as good as "greeting". So the
whole reply is compared with the known labels first, and taken for JSON or a list only where it is
none of them.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlpost.errors import JobError, RowError
from rlpost.types import Rollout, Score, Task
from rlpost_rewards.strict_json import StrictJSONError, parse, unwrap

MAX_LABELS = 1_000  # read from one reply
_KEYS = ("label", "labels")


def label(
    task: Task,
    rollout: Rollout,
    *,
    labels: Sequence[str] | str | None = None,
    out_of_scope: str | None = None,
    fold_case: bool = False,
    thinking: str = "strip",
    fence: str = "strip",
    base_dir: str = ".",
) -> Score:
    """1 for the label of `task.answer`, else 0; where the answer is a list, the F1 of the two sets.

    The reply is the bare label, a JSON string, or {"label": …}; for several labels also a JSON
    list, {"labels": […]}, or one label a line or between commas. `labels` are those that exist (a
    list, or a file with one a line, relative to `base_dir`); a reply with any other is not valid
    and, with one label asked for, worth 0. `out_of_scope` is the label that stands for none of
    them, and for an answer that is null or []. `fold_case` compares without case.

    Parts: valid, correct (1 only if equal). Reason: ok, wrong, partial, unknown_label, or the word
    of `StrictJSONError`. Raises RowError for a row whose answer is no label, JobError for bad
    `labels`.
    """
    names = _names(labels, out_of_scope, fold_case, base_dir)
    gold = _gold(task, names, out_of_scope, fold_case)
    several = isinstance(task.answer, list | tuple)
    try:
        text = unwrap(rollout.reply, thinking=thinking, fence=fence)
    except StrictJSONError as error:
        return _score(0.0, valid=False, reason=error.reason)
    known = names | gold if names else frozenset()
    chosen = _read(text, known | gold, several, fold_case)
    if chosen == frozenset() and out_of_scope is not None:
        chosen = frozenset({_fold(out_of_scope, fold_case)})
    elif not chosen and not several:
        chosen = None
    if chosen is None:
        return _score(0.0, valid=False, reason="no_label")
    valid = not known or chosen <= known
    if not several:
        right = chosen == gold
        return _score(float(right), valid, reason="" if valid else "unknown_label")
    return _score(f1(chosen, gold), valid, reason="" if valid else "unknown_label")


def f1(chosen: frozenset[str], gold: frozenset[str]) -> float:
    """Twice the common labels over all labels on both sides; 1 for two empty sets."""
    total = len(chosen) + len(gold)
    return 2 * len(chosen & gold) / total if total else 1.0


def metrics(
    tasks: Sequence[Task], rollouts: Sequence[Rollout], **arguments: Any
) -> dict[str, float]:
    """Over a set: accuracy (equal), valid, f1 (mean), and with `out_of_scope` the accuracy on the
    rows in scope and the recall on those out of it. Empty for no rows."""
    rows = [
        (task, label(task, rollout, **arguments))
        for task, rollout in zip(tasks, rollouts, strict=True)
    ]
    outside = arguments.get("out_of_scope")
    found = {
        "accuracy": [score.parts["correct"] for _, score in rows],
        "valid": [score.parts["valid"] for _, score in rows],
        "f1": [score.value for _, score in rows],
    }
    if outside is not None:
        none = (None, [], outside, [outside])
        found["in_scope_accuracy"] = [s.parts["correct"] for t, s in rows if t.answer not in none]
        found["out_of_scope_recall"] = [s.parts["correct"] for t, s in rows if t.answer in none]
    return {name: sum(values) / len(values) for name, values in found.items() if values}


label.metrics = metrics  # type: ignore[attr-defined]  # where the evaluation looks for them


def _score(value: float, valid: bool, reason: str = "") -> Score:
    correct = value == 1.0
    word = "ok" if correct else reason or ("partial" if value else "wrong")
    return Score(value=value, parts={"valid": float(valid), "correct": float(correct)}, reason=word)


def _read(
    text: str, known: frozenset[str], several: bool, fold_case: bool
) -> frozenset[str] | None:
    """The labels that a reply names; None where it names nothing readable."""
    if not text:
        return None
    whole = _fold(text, fold_case)
    if whole in known:
        return frozenset({whole})
    try:
        value = parse(text)
    except StrictJSONError:
        return _read_bare(text, known, several, fold_case)
    if isinstance(value, Mapping):
        value = _only_value(value)
    if value is None:
        return frozenset()  # none of them, said in JSON
    if isinstance(value, list) and several and len(value) <= MAX_LABELS:
        names = [_scalar(each) for each in value]
        return None if None in names else frozenset(_fold(n, fold_case) for n in names if n)
    name = _scalar(value)
    return None if not name else frozenset({_fold(name, fold_case)})


def _read_bare(
    text: str, known: frozenset[str], several: bool, fold_case: bool
) -> frozenset[str] | None:
    if several:
        for separator in ("\n", ",", ";"):
            pieces = [_fold(piece, fold_case) for piece in text.split(separator)[: MAX_LABELS + 1]]
            pieces = [piece for piece in pieces if piece]
            if 1 < len(pieces) <= MAX_LABELS and known.issuperset(pieces):
                return frozenset(pieces)
    return frozenset({_fold(text, fold_case)})


def _only_value(value: Mapping[str, Any]) -> Any:
    """The value of an object whose one key is label or labels; any other as it is."""
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key in _KEYS:
            return inner
    return value


def _scalar(value: Any) -> str | None:
    """A JSON scalar as a label's text: 1 is the label "1". None for null, lists and objects."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return None


def _fold(text: str, fold_case: bool) -> str:
    text = unicodedata.normalize("NFC", text.strip())
    return text.casefold() if fold_case else text


def _gold(
    task: Task, names: frozenset[str], out_of_scope: str | None, fold_case: bool
) -> frozenset[str]:
    answer = task.answer
    several = isinstance(answer, list | tuple)
    if answer is None and out_of_scope is None:
        raise RowError(f"row {task.id} has no answer", cure="label needs the column `answer`")
    texts = [
        _scalar(each) for each in (answer if several else [answer] if answer is not None else [])
    ]
    if any(not text for text in texts):
        raise RowError(
            f"row {task.id}: answer holds something that is no label", cure="write texts"
        )
    gold = frozenset(_fold(text, fold_case) for text in texts if text)
    if not gold and out_of_scope is not None:
        gold = frozenset({_fold(out_of_scope, fold_case)})
    if names and not gold <= names:
        raise RowError(
            f"row {task.id}: answer {sorted(gold - names)[0]!r} is not among the labels",
            cure="add it to `labels`, or correct the row",
        )
    return gold


def _names(
    labels: Sequence[str] | str | None, out_of_scope: str | None, fold_case: bool, base_dir: str
) -> frozenset[str]:
    """The labels that exist, out of scope included; empty where the job names none."""
    if labels is None:
        return frozenset()
    listed = _file(base_dir, labels) if isinstance(labels, str) else tuple(labels)
    return _folded(listed, out_of_scope, fold_case)


@lru_cache(maxsize=16)
def _folded(labels: tuple[str, ...], out_of_scope: str | None, fold_case: bool) -> frozenset[str]:
    if not labels or not all(isinstance(each, str) and each.strip() for each in labels):
        raise JobError("label: `labels` is not a list of texts")
    names = frozenset(_fold(each, fold_case) for each in labels)
    if len(names) < len(labels):
        raise JobError(
            "label: `labels` has the same label twice" + (" without case" if fold_case else "")
        )
    return names if out_of_scope is None else names | {_fold(out_of_scope, fold_case)}


@lru_cache(maxsize=16)
def _file(base_dir: str, name: str) -> tuple[str, ...]:
    path = Path(base_dir, name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise JobError(
            f"label: labels cannot be read: {error}",
            place=str(path),
            cure="one label a line; the path is relative to the job's folder",
        ) from None
    return tuple(line.strip() for line in text.split("\n") if line.strip())
