"""Rules between fields: `total == sum(items.amount)`, `abs(net + tax - total) <= 0.02`.

    rule   = sum ("==" | "!=" | "<=" | ">=" | "<" | ">") sum
    sum    = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor = number | "text" | "-" factor | "(" sum ")" | function "(" sum ")" | name ("." name)*

Functions: sum, min, max, count over a list; abs. A name that leads through a list gives the list of
what it finds; one that is not a plain word stands in `backticks`. Values that print amounts are
decimals, dates (of fields declared so) are ISO texts. Nothing is executed, and only
the job, never a reply, contains a rule.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal, DivisionByZero, InvalidOperation, Overflow, localcontext
from functools import lru_cache
from typing import Any

from rlpost.errors import JobError
from rlpost.types import JSON
from rlpost_rewards.amounts import read_number
from rlpost_rewards.dates import read_date
from rlpost_rewards.fields import Field, canonical, fold, is_absent

Value = Decimal | str | list
Names = Mapping[str, Field]
Evaluate = Callable[[Mapping[str, JSON], Names], Value]

_TOKENS = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<text>\"[^\"]*\"|'[^']*')"
    r"|(?P<name>(?:[^\W\d]\w*|`[^`]+`)(?:\.(?:[^\W\d]\w*|`[^`]+`))*)"
    r"|(?P<sign>==|!=|<=|>=|[-+*/()<>]))"
)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}
_FUNCTIONS = ("sum", "min", "max", "count", "abs")


class _Undecided(Exception):
    """A value that the rule needs is absent or of the wrong kind."""


class Rule:
    """One parsed rule. `names` are the top-level fields that it speaks of."""

    def __init__(self, text: str):
        self.text = text
        self.names: set[str] = set()
        self._tokens = list(_tokens(text))
        self._at = 0
        self._left = self._sum()
        sign = self._take()
        if sign not in _COMPARE:
            raise self._mistake(f"a comparison should stand at {sign or 'its end'!r}")
        self._sign, self._right = sign, self._sum()
        if self._at < len(self._tokens):
            raise self._mistake(f"{self._tokens[self._at][1]!r} is left over")

    def holds(self, values: Mapping[str, JSON], fields: Names) -> bool | None:
        """True or False; None if a value that it needs is absent or not of the kind it needs."""
        with localcontext() as context:
            context.traps[Overflow] = context.traps[InvalidOperation] = True
            context.traps[DivisionByZero] = True
            try:
                left, right = self._left(values, fields), self._right(values, fields)
                if isinstance(left, list) or type(left) is not type(right):
                    return None
                return _COMPARE[self._sign](left, right)
            except (_Undecided, ArithmeticError):
                return None

    def _sum(self) -> Evaluate:
        left = self._product()
        while self._peek() in ("+", "-"):
            left = _arithmetic(self._take(), left, self._product())
        return left

    def _product(self) -> Evaluate:
        left = self._factor()
        while self._peek() in ("*", "/"):
            left = _arithmetic(self._take(), left, self._factor())
        return left

    def _factor(self) -> Evaluate:
        kind, token = self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")
        self._at += 1
        if kind == "number":
            number = Decimal(token)
            return lambda values, fields: number
        if kind == "text":
            word = fold(token[1:-1])
            return lambda values, fields: word
        if token == "-":
            return _arithmetic("-", lambda values, fields: Decimal(0), self._factor())
        if token == "(":
            return self._closed()
        if kind == "name" and self._peek() == "(":
            if token not in _FUNCTIONS:
                raise self._mistake(f"{token!r} is no function (known: {', '.join(_FUNCTIONS)})")
            self._at += 1
            return _call(token, self._closed())
        if kind == "name":
            path = [quoted or word for quoted, word in re.findall("`([^`]+)`|([^.`]+)", token)]
            self.names.add(path[0])
            return lambda values, fields: _look_up(path, values, fields)
        raise self._mistake(f"a value should stand at {token or 'its end'!r}")

    def _closed(self) -> Evaluate:
        inner = self._sum()
        if self._take() != ")":
            raise self._mistake("a bracket is not closed")
        return inner

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def _mistake(self, what: str) -> JobError:
        return JobError(
            f"extraction: the rule {self.text!r} cannot be read: {what}",
            cure='write for example "total == sum(items.amount)"',
        )


@lru_cache(maxsize=256)
def read_rule(text: str) -> Rule:
    """The rule that `text` is. Raises JobError."""
    if not isinstance(text, str) or len(text) > 500:
        raise JobError("extraction: a rule is a text of at most 500 characters")
    try:
        return Rule(text)
    except RecursionError:
        raise JobError(f"extraction: the rule {text[:40]!r}… has too many brackets") from None


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while text[at:].strip():
        match = _TOKENS.match(text, at)
        if match is None:
            raise JobError(
                f"extraction: the rule {text!r} cannot be read from {text[at:].strip()[:20]!r} on",
                cure='write for example "total == sum(items.amount)"',
            )
        yield str(match.lastgroup), match.group(str(match.lastgroup))
        at = match.end()


def _arithmetic(sign: str, left: Evaluate, right: Evaluate) -> Evaluate:
    def evaluate(values: Mapping[str, JSON], fields: Names) -> Value:
        a, b = left(values, fields), right(values, fields)
        if not isinstance(a, Decimal) or not isinstance(b, Decimal):
            raise _Undecided
        return {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}[sign](b)

    return evaluate


def _call(name: str, argument: Evaluate) -> Evaluate:
    def evaluate(values: Mapping[str, JSON], fields: Names) -> Value:
        given = argument(values, fields)
        if name == "abs":
            if not isinstance(given, Decimal):
                raise _Undecided
            return abs(given)
        items = given if isinstance(given, list) else [given]
        if name == "count":
            return Decimal(len(items))
        if not items or not all(isinstance(item, Decimal) for item in items):
            raise _Undecided
        return {"sum": sum, "min": min, "max": max}[name](items)

    return evaluate


def _look_up(path: Sequence[str], values: JSON, fields: Names) -> Value:
    kind: Field | None = None
    for name in path:
        kind = _inner(kind, fields).get(name)
        values = _step(values, name)
    return _read(values, kind)


def _inner(kind: Field | None, fields: Names) -> Names:
    if kind is None:
        return fields
    return kind.items.fields if kind.items else kind.fields


def _step(values: JSON, name: str) -> JSON:
    if isinstance(values, list):
        return [_step(value, name) for value in values]
    if not isinstance(values, Mapping) or is_absent(values.get(name)):
        raise _Undecided
    return values[name]


def _read(value: JSON, kind: Field | None) -> Value:
    if isinstance(value, list):
        inner = kind.items if kind and kind.items else kind
        return [_read(item, inner) for item in value]
    if isinstance(value, Mapping):
        return canonical(value)  # can be counted and compared, not added
    if kind is not None and kind.type == "date" and isinstance(value, str):
        return read_date(value, day_first=kind.day_first) or _undecided()
    numbers = read_number(value, decimal=kind.decimal if kind else ".")
    if numbers:
        return min(numbers, key=abs) if len(numbers) == 1 else _most_likely(value, numbers)
    return fold(value) if isinstance(value, str) else _undecided()


def _most_likely(value: JSON, numbers: frozenset[Decimal]) -> Decimal:
    """ "1,234" is thousands and "1.234" is not, where nothing but the print can tell."""
    return max(numbers, key=abs) if "," in str(value) else min(numbers, key=abs)


def _undecided() -> Any:
    raise _Undecided
