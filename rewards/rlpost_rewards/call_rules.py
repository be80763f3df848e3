"""Is this call the gold one? The rules of the Berkeley function calling leaderboard, for Python.

Source: ShishirPatil/gorilla (Apache-2.0), `bfcl_eval/eval_checker/ast_eval/ast_checker.py`, read
and written anew. What they say, oddities included:
- every required argument is there, every argument is known to the tool and to gold; an argument of
  gold that is missing must have "" among its accepted values;
- types are exact (an int passes for a float, nothing else); a value of another type than the tool's
  passes if it is of the type of gold's first value (gold then names a variable);
- items of a list have the tool's item type or that of gold's first item: no int for a float there;
- strings are compared folded: lower case, without space and `,./-_*^`, ' like "; in lists and
  objects one level deep. Objects hold accepted values per key, "" if the key may be left out;
- an empty list passes where "" is accepted.
With `Exact` strings count as they are, and nested objects may be plain values, to any depth.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.types import JSON
from rlpost_rewards.call_formats import Call, find_tool, same_name, type_names

_DROPPED = re.compile(r"[ ,./\-_*^]")
_PYTHON = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldCall:
    """The call wanted: its name and, for each argument, the accepted values."""

    name: str
    arguments: Mapping[str, Sequence[JSON]]

    @property
    def needed(self) -> int:
        """How many arguments may not be left out."""
        return sum("" not in accepted for accepted in self.arguments.values())


class Exact:
    """Strings as they are; nested values by JSON equality or by accepted values per key."""

    def fold(self, text: str) -> str:
        return text

    def equal(self, left: JSON, right: JSON) -> bool:
        """JSON equality: 1 is 1.0 and never true."""
        if isinstance(left, bool) or isinstance(right, bool):
            return left is right
        if isinstance(left, list) and isinstance(right, list):
            return len(left) == len(right) and all(map(self.equal, left, right))
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            return left.keys() == right.keys() and all(self.equal(left[k], right[k]) for k in left)
        return bool(left == right)

    def object_is_right(
        self, value: Mapping[str, JSON], gold: Mapping[str, JSON], schema: JSON
    ) -> bool:
        """Equal to `gold`, or key by key among its accepted values."""
        if self.equal(value, gold):
            return True
        if not all(isinstance(accepted, list) for accepted in gold.values()):
            return False
        inner = schema.get("properties") if isinstance(schema, Mapping) else None
        known = inner if isinstance(inner, Mapping) else {}
        return _keys_are_right(value, gold) and all(
            any(self._nested(value[key], one, known.get(key)) for one in gold[key]) for key in value
        )

    def _nested(self, value: JSON, gold: JSON, schema: JSON) -> bool:
        if isinstance(value, Mapping) and isinstance(gold, Mapping):
            return self.object_is_right(value, gold, schema)
        if type_names(schema) == {"array"} and not isinstance(gold, list):
            return False  # gold was a plain list: its items are no alternatives to it
        return self.equal(value, gold)


class Official(Exact):
    """The leaderboard's own comparison."""

    def fold(self, text: str) -> str:
        return _DROPPED.sub("", text).lower().replace("'", '"')

    def equal(self, left: JSON, right: JSON) -> bool:
        return bool(left == right)  # Python's: True is 1 where no type was checked before

    def object_is_right(
        self, value: Mapping[str, JSON], gold: Mapping[str, JSON], schema: JSON
    ) -> bool:
        return _keys_are_right(value, gold) and all(
            self._folded(value[key]) in [self._folded(one) for one in _alternatives(gold[key])]
            for key in value
        )

    def _folded(self, value: JSON) -> JSON:
        return self.fold(value) if isinstance(value, str) else value


RULES: Mapping[str, Exact] = {"exact": Exact(), "bfcl": Official()}


def call_is_right(
    call: Call, gold: GoldCall, tools: Mapping[str, Mapping[str, Any]], rules: Exact
) -> bool:
    """Whether the leaderboard calls `call` valid, with `rules` for comparing."""
    if not same_name(call.name, gold.name, tools):
        return False
    parameters = find_tool(gold.name, tools) or {}
    required = parameters.get("required")
    missing = set(required if isinstance(required, list | tuple) else ())
    missing |= {name for name, accepted in gold.arguments.items() if "" not in accepted}
    if missing - call.arguments.keys():
        return False
    return len(right_arguments(call, gold, tools, rules)) == len(call.arguments)


def right_arguments(
    call: Call, gold: GoldCall, tools: Mapping[str, Mapping[str, Any]], rules: Exact
) -> list[str]:
    """The names of the arguments whose values are accepted."""
    parameters = find_tool(gold.name, tools)
    properties = (parameters or {}).get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    return [
        name
        for name, value in call.arguments.items()
        if name in gold.arguments
        and (name in known or parameters is None)
        and argument_is_right(value, gold.arguments[name], known.get(name), rules)
    ]


def argument_is_right(value: JSON, accepted: Sequence[JSON], schema: JSON, rules: Exact) -> bool:
    """Whether `value` is of the right type and one of the `accepted` ones."""
    expected, item = _expected_types(value, accepted, schema)
    if expected is float and type(value) is int:
        value = _as_float(value)
    gold_type = _first_type(accepted)
    is_variable = gold_type is not None and gold_type is not expected
    if type(value) is expected:
        if item is not None and not _items_are_typed(value, accepted, item):
            return False
    elif gold_type is None or type(value) is not gold_type:
        return False
    else:
        is_variable = True
    if is_variable:
        return any(rules.equal(value, one) for one in accepted)
    if expected is dict:
        objects = [one for one in accepted if isinstance(one, Mapping)]
        return any(rules.object_is_right(value, one, schema) for one in objects)
    if expected is list and item is dict:
        return any(_objects_are_right(value, one, schema.get("items"), rules) for one in accepted)
    if expected is list:
        return _list_is_right(value, accepted, rules)
    if expected is str:
        return rules.fold(value) in [rules.fold(one) for one in accepted if isinstance(one, str)]
    return any(rules.equal(value, one) for one in accepted)


def _expected_types(
    value: JSON, accepted: Sequence[JSON], schema: JSON
) -> tuple[type, type | None]:
    """The Python type that the schema wants and, for lists, that of the items. A schema of several
    types wants the value's own if that is among them; one that says nothing wants gold's."""
    if isinstance(schema, Mapping) and str(schema.get("type")).lower() == "any":
        return str, None  # the leaderboard's reading; other types pass by gold's first value
    kinds = [_PYTHON[name] for name in sorted(type_names(schema)) if name in _PYTHON]
    if not kinds:
        return _first_type(accepted) or str, None
    expected = type(value) if type(value) in kinds else kinds[0]
    if type(value) is int and int not in kinds and float in kinds:
        expected = float
    if expected is not list:
        return expected, None
    inner = schema.get("items") if isinstance(schema, Mapping) else None
    if isinstance(inner, Mapping) and str(inner.get("type")).lower() == "any":
        return list, str
    items = [_PYTHON[name] for name in type_names(inner) if name in _PYTHON]
    return list, items[0] if len(items) == 1 else None  # the leaderboard knows no unions


def _first_type(accepted: Sequence[JSON]) -> type | None:
    return next((type(one) for one in accepted if one != ""), None)


def _items_are_typed(value: Sequence[JSON], accepted: Sequence[JSON], item: type) -> bool:
    """Every element is of type `item` or of the type of the first element of one accepted list."""
    return any(
        not isinstance(one, list)
        or all(type(element) in (item, _first_type(one)) for element in value)
        for one in accepted
    )


def _list_is_right(value: Sequence[JSON], accepted: Sequence[JSON], rules: Exact) -> bool:
    folded = _folded_items(value, rules)
    return any(
        rules.equal(folded, _folded_items(one, rules))
        for one in accepted
        if isinstance(one, list | str)  # "" reads as an empty list
    )


def _folded_items(items: Sequence[JSON], rules: Exact) -> list[JSON]:
    return [rules.fold(item) if isinstance(item, str) else item for item in items]


def _objects_are_right(value: Sequence[JSON], gold: JSON, schema: JSON, rules: Exact) -> bool:
    if not isinstance(gold, list | str) or len(value) != len(gold):
        return False
    return all(
        isinstance(left, Mapping)
        and isinstance(right, Mapping)
        and rules.object_is_right(left, right, schema)
        for left, right in zip(value, gold, strict=True)
    )


def _keys_are_right(value: Mapping[str, JSON], gold: Mapping[str, JSON]) -> bool:
    return value.keys() <= gold.keys() and all(
        key in value or "" in _alternatives(gold[key]) for key in gold
    )


def _alternatives(accepted: JSON) -> Sequence[JSON]:
    return accepted if isinstance(accepted, list) else [accepted]


def _as_float(value: int) -> JSON:
    try:
        return float(value)
    except OverflowError:
        return value
