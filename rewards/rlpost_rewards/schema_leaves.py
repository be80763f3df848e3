"""How much of an invalid document is right: the share of leaves that a schema asks for and gets.

A leaf is a value that the schema says nothing deeper about. Named properties that are there count
each, missing required ones count as all that they would have to hold, keys that are not allowed
count as wrong, keys that the schema does not name count not at all: else a reply could water down
its mistakes.
"""

from collections.abc import Mapping
from typing import Any

import jsonschema_rs

MAX_DEPTH = 32  # deeper parts count as one leaf each
MAX_VISITS = 5_000  # of one document: alternatives within alternatives grow exponentially

Count = tuple[int, int]  # (satisfied, asked for)


class Leaves:
    """Counts the leaves of documents against one schema. `parts` holds a validator per JSON
    pointer; `lone_ref` is true for the drafts in which `$ref` hides its neighbours (up to 7)."""

    def __init__(
        self,
        schema: Mapping[str, Any] | bool,
        parts: jsonschema_rs.ValidatorMap,
        *,
        lone_ref: bool,
    ):
        self._schema, self._parts, self._lone_ref = schema, parts, lone_ref
        self._visits = 0

    def fraction(self, value: Any) -> float:
        """Satisfied over asked-for leaves, in [0, 1); `value` is one that the schema refuses."""
        self._visits = 0
        satisfied, asked = self._count("#", self._schema, value, 0)
        return min(satisfied, asked - 1) / asked

    def _count(self, pointer: str, schema: Any, value: Any, depth: int) -> Count:
        """(satisfied, asked) at one place of the document; satisfied < asked if it is invalid
        there."""
        self._visits += 1
        validator = self._parts.get(pointer)
        valid = validator is None or validator.is_valid(value)
        if (
            depth > MAX_DEPTH
            or self._visits > MAX_VISITS
            or validator is None
            or not isinstance(schema, Mapping)
        ):
            return int(valid), 1
        if self._lone_ref and "$ref" in schema:
            counts = [self._at_ref(schema["$ref"], value, depth)]
        else:
            counts = [
                *self._inside(pointer, schema, value, depth),
                *self._combined(pointer, schema, value, depth),
            ]
        satisfied, asked = sum(c[0] for c in counts), sum(c[1] for c in counts)
        if not asked:  # nothing deeper is said about this value
            asked = self._size(schema, depth) if not valid and _other(schema, value) else 1
            return (asked, asked) if valid else (0, asked)
        if valid:
            return asked, asked
        # all parts fine and the whole not: a rule over the whole, such as minItems, is a leaf
        return (satisfied, asked) if satisfied < asked else (satisfied, asked + 1)

    def _inside(
        self, pointer: str, schema: Mapping[str, Any], value: Any, depth: int
    ) -> list[Count]:
        if isinstance(value, dict):
            return self._properties(pointer, schema, value, depth)
        if isinstance(value, list):
            return self._items(pointer, schema, value, depth)
        return []

    def _properties(
        self, pointer: str, schema: Mapping[str, Any], value: dict[str, Any], depth: int
    ) -> list[Count]:
        named = _mapping(schema.get("properties"))
        counts = [
            self._count(f"{pointer}/properties/{_escape(name)}", sub, value[name], depth + 1)
            for name, sub in named.items()
            if name in value
        ]
        required = schema.get("required")
        for name in required if isinstance(required, list) else ():
            if name not in value:
                counts.append((0, self._size(named.get(name, True), depth + 1)))
        others = schema.get("additionalProperties")
        if unexpected := self._unexpected(pointer, schema, value):
            counts.append((0, unexpected))
        if isinstance(others, Mapping) and "patternProperties" not in schema:
            counts += [
                self._count(f"{pointer}/additionalProperties", others, each, depth + 1)
                for name, each in value.items()
                if name not in named
            ]
        return counts

    def _items(
        self, pointer: str, schema: Mapping[str, Any], value: list[Any], depth: int
    ) -> list[Count]:
        first, rest = schema.get("prefixItems"), schema.get("items")
        first_key, rest_key = "prefixItems", "items"
        if isinstance(rest, list):  # up to draft 2019-09
            first, rest = rest, schema.get("additionalItems")
            first_key, rest_key = "items", "additionalItems"
        first = first if isinstance(first, list) else []
        counts = [
            self._count(f"{pointer}/{first_key}/{index}", sub, each, depth + 1)
            for index, (sub, each) in enumerate(zip(first, value, strict=False))
        ]
        if isinstance(rest, Mapping | bool):
            counts += [
                self._count(f"{pointer}/{rest_key}", rest, each, depth + 1)
                for each in value[len(first) :]
            ]
        return counts

    def _combined(
        self, pointer: str, schema: Mapping[str, Any], value: Any, depth: int
    ) -> list[Count]:
        counts: list[Count] = []
        if "$ref" in schema:
            counts.append(self._at_ref(schema["$ref"], value, depth))
        for index, sub in enumerate(_list(schema.get("allOf"))):
            counts.append(self._count(f"{pointer}/allOf/{index}", sub, value, depth + 1))
        for keyword in ("anyOf", "oneOf"):
            branches = [
                self._count(f"{pointer}/{keyword}/{index}", sub, value, depth + 1)
                for index, sub in enumerate(_list(schema.get(keyword)))
            ]
            if branches:  # the nearest one; among equals the one that asks for most
                counts.append(max(branches, key=lambda c: (c[0] / c[1], c[1])))
        return counts

    def _at_ref(self, ref: Any, value: Any, depth: int) -> Count:
        target = self._target(ref)
        if target is None:  # another document, or an anchor: its parts are not looked into
            return 0, 0
        return self._count(ref, target, value, depth + 1)

    def _target(self, ref: Any) -> Any:
        if ref == "#":
            return self._schema
        if not isinstance(ref, str) or not ref.startswith("#/") or ref not in self._parts:
            return None
        node: Any = self._schema
        for part in ref[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
            else:
                return None
        return node

    def _unexpected(self, pointer: str, schema: Mapping[str, Any], value: dict[str, Any]) -> int:
        """How many keys of `value` the schema forbids."""
        if "patternProperties" not in schema and schema.get("additionalProperties") is False:
            return len(value.keys() - _mapping(schema.get("properties")).keys())
        if False not in (schema.get("additionalProperties"), schema.get("unevaluatedProperties")):
            return 0
        names: set[str] = set()
        for error in self._parts[pointer].iter_errors(value):
            if not error.instance_path:
                names.update(getattr(error.kind, "unexpected", ()))
        return len(names)

    def _size(self, schema: Any, depth: int) -> int:
        """The leaves that the smallest document of `schema` would have to hold, at least 1."""
        self._visits += 1
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH or self._visits > MAX_VISITS:
            return 1
        if "$ref" in schema and (target := self._target(schema["$ref"])) is not None:
            return self._size(target, depth + 1)
        named, required = _mapping(schema.get("properties")), schema.get("required")
        names = required if isinstance(required, list) else []
        return max(1, sum(self._size(named.get(name, True), depth + 1) for name in names))


def _other(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether the schema speaks about objects and the value is none."""
    return "properties" in schema and not isinstance(value, dict)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
