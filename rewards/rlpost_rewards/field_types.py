"""The argument `fields` of a job, or a schema, or a gold answer, as comparisons."""

import difflib
import json
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from rlpost.errors import JobError
from rlpost.types import JSON
from rlpost_rewards.fields import TYPES, Field

_OPTIONS = {
    "text": {"partial"},
    "date": {"day_first"},
    "amount": {"decimal", "tolerance"},
    "number": {"decimal", "tolerance"},
    "enum": {"values"},
    "list": {"items", "fields", "ordered"},
    "object": {"fields", "ordered"},
}


def read_fields(fields: JSON, *, day_first: bool = False) -> Mapping[str, Field]:
    """`fields` of a job: a list of names (all text) or {name: type or {type, option…}}. Raises
    JobError that names the field and what it may be."""
    if isinstance(fields, list | tuple):
        fields = dict.fromkeys(fields, "text")
    if not isinstance(fields, Mapping) or not fields:
        raise JobError(
            f"extraction: fields is {_name(fields)}",
            cure='write fields = { total = "amount", date = "date" }',
        )
    try:
        key = json.dumps(fields)  # order counts: parts are listed as the job lists them
    except (TypeError, ValueError) as error:
        raise JobError(f"extraction: fields cannot be read: {error}") from None
    return _read_all(key, day_first)


@lru_cache(maxsize=256)
def _read_all(key: str, day_first: bool) -> Mapping[str, Field]:
    return {name: _read(name, kind, day_first) for name, kind in json.loads(key).items()}


def _read(place: str, kind: JSON, day_first: bool) -> Field:
    options = {"type": kind} if isinstance(kind, str) else kind
    if not isinstance(options, Mapping) or not isinstance(options.get("type"), str):
        raise JobError(
            f"extraction: field {place!r} has no type", cure=f"one of {', '.join(TYPES)}"
        )
    type_ = options["type"]
    if type_ not in TYPES:
        raise JobError(
            f"extraction: field {place!r} has the unknown type {type_!r}", cure=_hint(type_, TYPES)
        )
    known = _OPTIONS.get(type_, set()) | {"type", "weight"}
    for name in options:
        if name not in known:
            raise JobError(
                f"extraction: {name!r} is no option of field {place!r} ({type_})",
                cure=_hint(name, sorted(known)),
            )
    return Field(type=type_, **_values_of(place, options, day_first))


def _values_of(place: str, options: Mapping[str, JSON], day_first: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"day_first": bool(options.get("day_first", day_first))}
    values["partial"] = bool(options.get("partial", True))
    values["ordered"] = bool(options.get("ordered", False))
    if "decimal" in options:
        if options["decimal"] not in (".", ",", "auto"):
            raise JobError(
                f"extraction: decimal of field {place!r} is {options['decimal']!r}",
                cure='write ".", "," or "auto"',
            )
        values["decimal"] = options["decimal"]
    if "tolerance" in options:
        values["tolerance"] = Decimal(str(_number(place, options, "tolerance")))
    if "weight" in options:
        values["weight"] = float(_number(place, options, "weight"))
        if not values["weight"]:
            raise JobError(f"extraction: weight of field {place!r} is 0", cure="leave it out")
    if "values" in options:
        if not isinstance(options["values"], list) or not options["values"]:
            raise JobError(f"extraction: values of field {place!r} is no list of words")
        values["values"] = frozenset(str(v).strip().casefold() for v in options["values"])
    if "fields" in options:
        inner = options["fields"]
        if isinstance(inner, list):
            inner = dict.fromkeys(inner, "text")
        if not isinstance(inner, Mapping) or not inner:
            raise JobError(f"extraction: fields of field {place!r} names none")
        values["fields"] = {n: _read(f"{place}.{n}", k, day_first) for n, k in inner.items()}
    if options["type"] == "list":
        if "fields" in options:  # a list of objects, written short
            values["items"] = Field(type="object", fields=values.pop("fields"))
        else:
            values["items"] = _read(f"{place}[]", options.get("items", "text"), day_first)
    return values


def _number(place: str, options: Mapping[str, JSON], name: str) -> int | float:
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise JobError(
            f"extraction: {name} of field {place!r} is {value!r}",
            cure="write a number from 0 on, such as 0.01",
        )
    return value


def fields_of_schema(schema: Mapping[str, Any], *, day_first: bool = False) -> Mapping[str, Field]:
    """What a JSON schema says about the fields of its object: `format: date`, enums, numbers, lists
    and objects become their types, all else is text. Empty if it lists no properties."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {
        name: _of_schema(part, day_first)
        for name, part in properties.items()
        if isinstance(part, Mapping)
    }


def _of_schema(schema: Mapping[str, Any], day_first: bool) -> Field:
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if "object" in types or "properties" in schema:
        return Field(type="object", fields=fields_of_schema(schema, day_first=day_first))
    if "array" in types or "items" in schema:
        items = schema.get("items")
        inner = _of_schema(items, day_first) if isinstance(items, Mapping) else Field(type="text")
        return Field(type="list", items=inner)
    if isinstance(schema.get("enum"), list):
        return Field(type="enum")
    if "string" in types:
        is_date = schema.get("format") in ("date", "date-time")
        return Field(type="date" if is_date else "text", day_first=day_first)
    if "number" in types or "integer" in types:
        return Field(type="number")
    return Field(type="boolean" if "boolean" in types else "text")


def fields_of_answer(answer: Mapping[str, JSON]) -> Mapping[str, Field]:
    """Types by the look of the gold values, where neither job nor schema says more."""
    return {name: _of_value(value) for name, value in answer.items()}


def _of_value(value: JSON) -> Field:
    if isinstance(value, bool):
        return Field(type="boolean")
    if isinstance(value, int | float):
        return Field(type="number")
    if isinstance(value, Mapping):
        return Field(type="object", fields=fields_of_answer(value))
    if isinstance(value, list):
        merged = {k: v for item in value if isinstance(item, Mapping) for k, v in item.items()}
        inner = _of_value(merged) if merged else _of_value(value[0]) if value else None
        return Field(type="list", items=inner or Field(type="text"))
    return Field(type="text")


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _name(value: JSON) -> str:
    return "empty" if value in ({}, [], None) else f"a {type(value).__name__}"
