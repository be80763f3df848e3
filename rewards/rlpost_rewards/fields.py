"""Typed comparison of extracted fields: is this value the gold one, however it is printed?

| type | equal when |
|---|---|
| text | equal without case, space and punctuation; else up to 0.5 by similarity; `partial` |
| id | equal as strings |
| date | the same day, any print ("25 MAR 18" is "2018-03-25"); `day_first` |
| amount | the same decimal, currency and thousands marks aside; `decimal` "." or ","; `tolerance` |
| currency | the same ISO code ("RM" is "MYR") |
| number | the same decimal; `decimal`, `tolerance` |
| boolean | true or false, as JSON or as the words true, false, yes, no |
| enum | equal without case and outer space, and among `values` if there are any |
| list | `items` (a type) matched optimally, or in place if `ordered`; F1 of the comparisons |
| object | mean over its `fields`; where gold is a list, a list of such objects |

Every type takes a `weight` in the mean (1 unless said otherwise).
A gold date or amount that cannot be read as one is compared as text, all or nothing.
"""

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache

import numpy as np
from rapidfuzz import fuzz
from scipy.optimize import linear_sum_assignment

from rlpost.types import JSON
from rlpost_rewards.amounts import read_amount, read_currency, read_number
from rlpost_rewards.dates import read_date

MOST_PARTIAL = 0.5  # what a text that is not equal may earn at most
LEAST_SIMILAR = 0.6  # below it nothing: unrelated short texts share half their letters by chance
MAX_SIMILAR_CHARACTERS = 2_000  # the similarity costs the product of both lengths
MAX_MATCHED = 128  # items of a list that are matched; those beyond count as wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """How one field is compared. Options that its type has no use for keep their defaults."""

    type: str
    weight: float = 1.0
    day_first: bool = False
    decimal: str = "auto"
    tolerance: Decimal = Decimal(0)
    partial: bool = True
    values: frozenset[str] = frozenset()
    ordered: bool = False
    items: "Field | None" = None
    fields: Mapping[str, "Field"] = field(default_factory=dict)


def is_absent(value: JSON) -> bool:
    """None, blank text, an empty list or object: nothing was printed."""
    return (
        value is None
        or value == []
        or value == {}
        or (isinstance(value, str) and not value.strip())
    )


def text_of(value: JSON) -> str | None:
    """A scalar as text, the way JSON prints it; None for null, lists and objects."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else None


def is_exact(gold: JSON, predicted: JSON) -> bool:
    """SROIE's rule: an entity counts only if it is equal as a string. Two absent values are equal,
    lists and objects are equal as JSON."""
    if is_absent(gold) or is_absent(predicted):
        return is_absent(gold) and is_absent(predicted)
    if isinstance(gold, list | dict) or isinstance(predicted, list | dict):
        return canonical(gold) == canonical(predicted)
    return text_of(gold) == text_of(predicted)


def canonical(value: JSON) -> str:
    """One text for equal JSON values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def compare(kind: Field, gold: JSON, predicted: JSON) -> float:
    """How right `predicted` is, from 0 to 1, and 1 exactly when it is equal by its type. Two absent
    values are equal; a value where gold has none is wrong, and the other way round."""
    if is_absent(gold) or is_absent(predicted):
        return float(is_absent(gold) and is_absent(predicted))
    return _COMPARISONS[kind.type](kind, gold, predicted)


def compare_fields(
    fields: Mapping[str, Field], gold: Mapping[str, JSON], predicted: Mapping[str, JSON]
) -> dict[str, float]:
    """`compare` for each of `fields`, by name."""
    return {
        name: compare(kind, gold.get(name), predicted.get(name)) for name, kind in fields.items()
    }


def object_value(
    fields: Mapping[str, Field],
    scores: Mapping[str, float],
    gold: Mapping[str, JSON],
    predicted: Mapping[str, JSON],
    *,
    allowed: frozenset[str] = frozenset(),
) -> float:
    """The mean of `scores` by the weights of `fields`, a key that nobody asked for counting as one
    more field with a score of 0.

    A prediction that leaves out everything gold has is worth 0: rows with few values would
    otherwise pay for `{}`. Keys of gold and those in `allowed` are no surplus.
    """
    asked = [name for name in scores if not is_absent(gold.get(name))]
    if not scores or (asked and all(is_absent(predicted.get(name)) for name in asked)):
        return 0.0
    surplus = sum(key not in scores and key not in gold and key not in allowed for key in predicted)
    total = sum(fields[name].weight for name in scores)
    return sum(fields[name].weight * score for name, score in scores.items()) / (total + surplus)


def fold(text: str) -> str:
    """`text` without case, space, punctuation and symbols; letters, digits and accents stay."""
    return _fold_short(text) if len(text) <= MAX_SIMILAR_CHARACTERS else _fold(text)


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    if folded.isascii():
        return "".join(filter(str.isalnum, folded))
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LNM")


_fold_short = lru_cache(maxsize=4096)(_fold)  # gold is folded once for all rollouts of its group


def _compare_text(kind: Field, gold: JSON, predicted: JSON) -> float:
    """1 if equal when folded. Else similarity earns up to 0.5: an address with one letter wrong
    must be worth more than another shop's, or a small model sees no slope; a half keeps every
    right answer well above every wrong one."""
    left, right = text_of(gold), text_of(predicted)
    if left is None or right is None:
        return 0.0
    if left == right:
        return 1.0
    if max(len(left), len(right)) > MAX_SIMILAR_CHARACTERS:
        return float(len(right) <= 2 * len(left) + 100 and _same_text(left, right))
    if _same_text(left, right):
        return 1.0
    if not kind.partial:
        return 0.0
    similarity = fuzz.ratio(fold(left), fold(right)) / 100
    if similarity <= LEAST_SIMILAR:
        return 0.0
    # folded texts are unequal here, so similarity is below 1 even where it is rounded up
    return (
        min(similarity - LEAST_SIMILAR, 0.999 - LEAST_SIMILAR) / (1 - LEAST_SIMILAR) * MOST_PARTIAL
    )


def _same_text(left: str, right: str) -> bool:
    folded = fold(left)
    return fold(right) == folded if folded else left.split() == right.split()


def _compare_id(kind: Field, gold: JSON, predicted: JSON) -> float:
    return float(is_exact(gold, predicted))


def _compare_date(kind: Field, gold: JSON, predicted: JSON) -> float:
    left, right = text_of(gold), text_of(predicted)
    if left is None or right is None:
        return 0.0
    day = read_date(left, day_first=kind.day_first)
    if day is None:
        return float(len(right) <= 2 * len(left) + 100 and _same_text(left, right))
    return float(day == read_date(right, day_first=kind.day_first))


def _compare_amount(kind: Field, gold: JSON, predicted: JSON) -> float:
    return _compare_decimals(kind, gold, predicted, read_amount)


def _compare_number(kind: Field, gold: JSON, predicted: JSON) -> float:
    return _compare_decimals(kind, gold, predicted, read_number)


def _compare_decimals(
    kind: Field, gold: JSON, predicted: JSON, read: Callable[..., frozenset[Decimal]]
) -> float:
    wanted = read(gold, decimal=kind.decimal)
    if not wanted:
        left, right = text_of(gold), text_of(predicted)
        if left is None or right is None or len(right) > 2 * len(left) + 100:
            return 0.0
        return float(_same_text(left, right))
    found = read(predicted, decimal=kind.decimal)
    if not kind.tolerance:
        return float(not wanted.isdisjoint(found))
    return float(any(abs(a - b) <= kind.tolerance for a in wanted for b in found))


def _compare_currency(kind: Field, gold: JSON, predicted: JSON) -> float:
    left, right = text_of(gold), text_of(predicted)
    if left is None or right is None:
        return 0.0
    if left.strip().casefold() == right.strip().casefold():
        return 1.0
    return float(not read_currency(left).isdisjoint(read_currency(right)))


_WORDS = {"true": True, "yes": True, "false": False, "no": False}


def _compare_boolean(kind: Field, gold: JSON, predicted: JSON) -> float:
    left, right = (
        _WORDS.get(value.strip().casefold()) if isinstance(value, str) else value
        for value in (gold, predicted)
    )
    return float(isinstance(left, bool) and left is right)


def _compare_enum(kind: Field, gold: JSON, predicted: JSON) -> float:
    left, right = text_of(gold), text_of(predicted)
    if left is None or right is None:
        return 0.0
    word = right.strip().casefold()
    return float(left.strip().casefold() == word and (not kind.values or word in kind.values))


def _compare_object(kind: Field, gold: JSON, predicted: JSON) -> float:
    if isinstance(gold, list):
        return _compare_items(kind, kind.ordered, gold, predicted)
    if not isinstance(gold, Mapping) or not isinstance(predicted, Mapping):
        return 0.0
    if not kind.fields:
        return float(canonical(gold) == canonical(predicted))
    scores = compare_fields(kind.fields, gold, predicted)
    return object_value(kind.fields, scores, gold, predicted)


def _compare_list(kind: Field, gold: JSON, predicted: JSON) -> float:
    golds = gold if isinstance(gold, list) else [gold]
    return _compare_items(kind.items or _TEXT, kind.ordered, golds, predicted)


def _compare_items(item: Field, ordered: bool, gold: Sequence[JSON], predicted: JSON) -> float:
    """F1 of the best one-to-one matching: 2 · sum of comparisons / (items of both)."""
    if not isinstance(predicted, list):
        return 0.0
    total = len(gold) + len(predicted)
    golds, predictions = list(gold), list(predicted)
    matched = 0.0
    if not ordered and len(golds) * len(predictions) > 1024:
        # identical items first: each pair saved is a row and a column less to compare
        golds, predictions, matched = _take_equal(golds, predictions)
    golds, predictions = golds[:MAX_MATCHED], predictions[:MAX_MATCHED]
    if ordered:
        matched += sum(compare(item, g, p) for g, p in zip(golds, predictions, strict=False))
    elif golds and predictions:
        scores = np.array([[compare(item, g, p) for p in predictions] for g in golds])
        rows, columns = linear_sum_assignment(scores, maximize=True)
        matched += float(scores[rows, columns].sum())
    return min(1.0, 2 * matched / total)


def _take_equal(golds: list[JSON], predictions: list[JSON]) -> tuple[list[JSON], list[JSON], float]:
    waiting: dict[str, list[int]] = {}
    for index, gold in enumerate(golds):
        waiting.setdefault(canonical(gold), []).append(index)
    taken, rest = set(), []
    for prediction in predictions:
        if places := waiting.get(canonical(prediction)):
            taken.add(places.pop())
        else:
            rest.append(prediction)
    return [g for i, g in enumerate(golds) if i not in taken], rest, float(len(taken))


_TEXT = Field(type="text")
_COMPARISONS: dict[str, Callable[[Field, JSON, JSON], float]] = {
    "text": _compare_text,
    "id": _compare_id,
    "date": _compare_date,
    "amount": _compare_amount,
    "currency": _compare_currency,
    "number": _compare_number,
    "boolean": _compare_boolean,
    "enum": _compare_enum,
    "list": _compare_list,
    "object": _compare_object,
}
TYPES = tuple(_COMPARISONS)
