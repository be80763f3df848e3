"""Are the fields of a document read right? One JSON object, compared with gold field by field.

value = parses × valid by the row's schema × mean of typed.<field> (× the precision of the keys).
Format, validity and correctness stay separate parts, for format alone is what a policy games first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpost.errors import JobError, RowError
from rlpost.types import JSON, Rollout, Score, Task
from rlpost_rewards.field_rules import Rule, read_rule
from rlpost_rewards.field_types import fields_of_answer, fields_of_schema, read_fields
from rlpost_rewards.fields import (
    Field,
    compare_fields,
    is_absent,
    is_exact,
    object_value,
)
from rlpost_rewards.json_schema import SchemaError, compile_schema
from rlpost_rewards.strict_json import StrictJSONError, check_choice, parse, unwrap

CREDITS = ("typed", "exact", "both")


def extraction(
    task: Task,
    rollout: Rollout,
    *,
    fields: Mapping[str, Any] | Sequence[str] | None = None,
    day_first: bool = False,
    rules: Sequence[str] | None = None,
    credit: str = "typed",
    thinking: str = "strip",
    fence: str = "strip",
) -> Score:
    """How much of `task.answer` ({field: value}) the reply's JSON object says, from 0 to 1.

    `fields` names the fields and their types (see `rlpost_rewards.fields`); without it the row's
    schema does, else the look of the gold. `rules` are conditions between fields (see
    `field_rules`), each of which counts like a field in the rows whose gold satisfies it; a rule on
    fields that have no gold is judged on the reply alone. `credit` says what the mean is over:
    "typed" comparisons, "exact" strings, or the mean of "both". `thinking` and `fence` are "strip"
    or "punish". A reply with every right value is worth 1; surplus keys cost precision; a reply
    with none of gold's values filled in is worth 0.

    Parts: parses, valid, exact.<field>, typed.<field>, rule.<number>. Reason: ok, wrong_values,
    extra_keys, broken_rule, not_an_object, the schema's keyword, or the word of StrictJSONError.
    Raises JobError for bad arguments, RowError for a row without a usable answer or schema.
    """
    plan = _plan(task, fields, day_first, rules, credit, thinking, fence)
    return _score(plan, _read_reply(task, rollout.reply, plan))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the job asks of one row."""

    fields: Mapping[str, Field]
    gold: Mapping[str, JSON]
    rules: Sequence[Rule]
    credit: str
    thinking: str
    fence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """What the reply turned out to be; `values` is empty unless it is one JSON object."""

    values: Mapping[str, JSON] = field(default_factory=dict)
    is_object: bool = False
    parses: bool = False
    valid: bool = False
    reason: str = ""


def _plan(
    task: Task,
    fields: Any,
    day_first: bool,
    rules: Sequence[str] | None,
    credit: str = "typed",
    thinking: str = "strip",
    fence: str = "strip",
) -> _Plan:
    if credit not in CREDITS:
        raise JobError(f"extraction: credit is {credit!r}", cure=f"one of {', '.join(CREDITS)}")
    try:
        check_choice("thinking", thinking)
        check_choice("fence", fence)
    except ValueError as error:
        raise JobError(f"extraction: {error}") from None
    gold = read_answer(task)
    if fields is not None:
        kinds = read_fields(fields, day_first=day_first)
    else:
        kinds = fields_of_schema(task.schema or {}, day_first=day_first) or fields_of_answer(gold)
    if not kinds:
        raise RowError(
            f"row {task.id} names no field to compare", cure="set `fields` or fill in `answer`"
        )
    texts = [rules] if isinstance(rules, str) else rules or ()
    parsed = [read_rule(text) for text in texts]
    return _Plan(
        fields=kinds, gold=gold, rules=parsed, credit=credit, thinking=thinking, fence=fence
    )


def read_answer(task: Task) -> Mapping[str, JSON]:
    """The gold fields of a row, also where a table holds them as JSON text. Raises RowError."""
    answer = task.answer
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError:
            answer = None
    if not isinstance(answer, Mapping):
        raise RowError(
            f"row {task.id}: answer is no object of fields",
            cure='extraction needs {"field": value, …}',
        )
    return answer


def _read_reply(task: Task, reply: str, plan: _Plan) -> _Reply:
    try:
        value = parse(unwrap(reply, thinking=plan.thinking, fence=plan.fence))
    except StrictJSONError as error:
        return _Reply(reason=error.reason)
    if not isinstance(value, dict):
        return _Reply(parses=True, reason="not_an_object")
    if task.schema is None:
        return _Reply(values=value, is_object=True, parses=True, valid=True)
    try:
        validator = compile_schema(task.schema, draft=task.meta.get("draft"))
    except SchemaError as error:
        raise RowError(f"row {task.id}: {error}", cure="correct its schema") from None
    valid = validator.is_valid(value)
    return _Reply(
        values=value,
        is_object=True,
        parses=True,
        valid=valid,
        reason="" if valid else validator.first_failure(value),
    )


def _score(plan: _Plan, reply: _Reply) -> Score:
    typed = dict.fromkeys(plan.fields, 0.0)
    exact = dict.fromkeys(plan.fields, 0.0)
    kept = _kept_rules(plan, reply)
    if reply.is_object:
        typed = compare_fields(plan.fields, plan.gold, reply.values)
        exact = {n: float(is_exact(plan.gold.get(n), reply.values.get(n))) for n in plan.fields}
    parts = {"parses": float(reply.parses), "valid": float(reply.valid)}
    parts |= {f"exact.{name}": score for name, score in exact.items()}
    parts |= {f"typed.{name}": score for name, score in typed.items()}
    parts |= {f"rule.{number}": score for number, score in kept.items()}
    if not reply.valid:
        return Score(value=0.0, parts=parts, reason=reply.reason)
    credited = _credited(plan.credit, typed, exact)
    named = frozenset().union(*(rule.names for rule in plan.rules))
    value = object_value(plan.fields, credited, plan.gold, reply.values, allowed=named)
    if kept:
        # a rule weighs as much as a field, and pays only as far as the fields are right: numbers
        # that agree with each other but with nothing on the page must not be worth much
        share = len(kept) / (len(credited) + len(kept))
        value *= 1 - share + share * sum(kept.values()) / len(kept)
    return Score(value=value, parts=parts, reason=_reason(value, credited, kept))


def _credited(
    credit: str, typed: Mapping[str, float], exact: Mapping[str, float]
) -> Mapping[str, float]:
    if credit == "typed":
        return typed
    if credit == "exact":
        return exact
    return {name: (typed[name] + exact[name]) / 2 for name in typed}


def _kept_rules(plan: _Plan, reply: _Reply) -> dict[int, float]:
    """1.0 or 0.0 for each rule that counts in this row: gold satisfies it, or has no say in it."""
    kept: dict[int, float] = {}
    for number, rule in enumerate(plan.rules, 1):
        has_gold = all(name in plan.fields or name in plan.gold for name in rule.names)
        if has_gold and not rule.holds(plan.gold, plan.fields):
            continue  # rounding on the receipt, or a value that is not printed
        kept[number] = float(rule.holds(reply.values, plan.fields) is True)
    return kept


def _reason(value: float, credited: Mapping[str, float], kept: Mapping[int, float]) -> str:
    if value == 1.0:
        return "ok"
    if any(score < 1.0 for score in credited.values()):
        return "wrong_values"
    return "broken_rule" if any(score < 1.0 for score in kept.values()) else "extra_keys"


def metrics(
    tasks: Sequence[Task],
    rollouts: Sequence[Rollout],
    *,
    fields: Mapping[str, Any] | Sequence[str] | None = None,
    day_first: bool = False,
    rules: Sequence[str] | None = None,
    thinking: str = "strip",
    fence: str = "strip",
    **others: Any,
) -> dict[str, float]:
    """Figures over a set, one rollout a task, with the arguments of `extraction`.

    exact_f1 and typed_f1 are micro F1 over entities (see `micro_f1`); valid is the share of replies
    that parse and satisfy the schema; whole_row the share in which every field is right by its
    type and no key is surplus.
    """
    rows: list[tuple[Mapping[str, Field], Mapping[str, JSON], Mapping[str, JSON]]] = []
    valid = whole = 0
    for task, rollout in zip(tasks, rollouts, strict=True):
        plan = _plan(task, fields, day_first, None, "typed", thinking, fence)
        reply = _read_reply(task, rollout.reply, plan)
        rows.append((plan.fields, plan.gold, reply.values))
        valid += reply.valid
        whole += reply.valid and _score(plan, reply).value == 1.0
    count = len(rows) or 1
    return {
        "exact_f1": micro_f1(rows, kind="exact"),
        "typed_f1": micro_f1(rows, kind="typed"),
        "valid": valid / count,
        "whole_row": whole / count,
    }


def micro_f1(
    rows: Sequence[tuple[Mapping[str, Field], Mapping[str, JSON], Mapping[str, JSON]]],
    *,
    kind: str = "exact",
) -> float:
    """Micro F1 over the entities of `rows` (fields, gold, predicted), by SROIE's rule: an entity
    counts only if it is equal, as a string ("exact") or by its type ("typed", all or nothing);
    absent gold is not counted, whatever is predicted there. 0.0 where nothing is right."""
    right = wanted = given = 0
    for fields, gold, predicted in rows:
        names = [name for name in fields if not is_absent(gold.get(name))]
        wanted += len(names)
        given += sum(not is_absent(predicted.get(name)) for name in names)
        if kind == "exact":
            right += sum(is_exact(gold[name], predicted.get(name)) for name in names)
        else:
            scores = compare_fields({name: fields[name] for name in names}, gold, predicted)
            right += sum(score == 1.0 for score in scores.values())
    return 2 * right / (wanted + given) if right else 0.0


extraction.metrics = metrics  # type: ignore[attr-defined]  # where evaluation looks for it
