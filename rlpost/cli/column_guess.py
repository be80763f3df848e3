"""What the columns of a file are for and what their values are, guessed from names and values.

Every guess is written into files that the user edits, so a wrong one costs a line, not a run.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.row_files import Row, column_names
from rlpost.types import JSON

ANSWER_NAMES = (
    "answer", "answers", "label", "labels", "category", "class", "intent", "target", "gold",
    "expected", "output", "completion", "response",
)  # fmt: skip
CLUSTER_NAMES = (
    "company",
    "vendor",
    "supplier",
    "merchant",
    "seller",
    "customer",
    "template",
    "source",
)
SIDE_NAMES = re.compile(
    r"(^|_)(image|images|file|filename|path|url|uri|split|index)$|^$|^unnamed", re.I
)
AMOUNT_NAMES = re.compile(r"amount|total|price|sum|cost|tax|fee|balance|paid|subtotal", re.I)
ID_NAMES = re.compile(r"(^|_)(id|no|nr|number|code|ref|reference|iban|vat|invoice)(_|$)", re.I)
CURRENCIES = frozenset(
    [
        "EUR",
        "USD",
        "GBP",
        "CHF",
        "JPY",
        "CNY",
        "MYR",
        "SGD",
        "INR",
        "AUD",
        "CAD",
        "SEK",
        "NOK",
        "DKK",
        "PLN",
        "CZK",
        "HUF",
    ]
)
LONG = 200  # characters in the mean: a document, not a value
LABELS = 200  # distinct values that a label may have
ENUM = 20  # distinct values of a field that is a choice

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_CLOCK = r"(?:[T ,]+\d{1,2}:\d{2}.*)?"
_NUMERIC_DATE = re.compile(rf"(\d{{1,2}})[-/. ](\d{{1,2}})[-/. ](?:\d{{4}}|\d{{2}}){_CLOCK}", re.I)
_OTHER_DATES = re.compile(
    rf"\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}{_CLOCK}"
    rf"|\d{{1,2}}(?:st|nd|rd|th)?[-/. ,]*{_MONTH}[-/. ,']*\d{{2,4}}{_CLOCK}"
    rf"|{_MONTH} ?\d{{1,2}},? \d{{4}}{_CLOCK}",
    re.I,
)
_MONEY_SIGN = r"(?:[A-Z]{3}|RM|[$€£¥₹])"
_AMOUNT = re.compile(
    rf"[-+(]?\s*({_MONEY_SIGN})?\s*[-+]?\d{{1,3}}(?:[.,' ]?\d{{3}})*"
    rf"([.,]\d{{1,2}})?\s*({_MONEY_SIGN})?\)?"
)
_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d{0,8})(?:\.\d+)?%?")
_IDENTIFIER = re.compile(r"(?=.*\d)[\w/.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What each column is for. `prompt` is empty where the rows hold prompts or messages
    themselves."""

    prompt: Sequence[str]
    answer: str | Sequence[str] | None
    id: str | None
    split_by: str | None


def guess_roles(rows: Sequence[Row], answer: Sequence[str] = ()) -> Roles:
    """The roles of a table's columns; `answer` is what the user said of the gold, if anything."""
    names = column_names(rows)
    filled = [n for n in names if any(row.columns.get(n) is not None for row in rows)]
    id = next((n for n in filled if n.lower() == "id"), None)
    own_form = "messages" in names or "prompt" in names
    gold: Sequence[str] = answer or _guess_gold(rows, filled, id, own_form)
    rest = [n for n in filled if n not in gold and n != id and not SIDE_NAMES.search(n)]
    cluster = next((n for n in filled if n.lower() in CLUSTER_NAMES and _clusters(rows, n)), None)
    return Roles(
        prompt=() if own_form else rest,
        answer=None if not gold else gold[0] if len(gold) == 1 else list(gold),
        id=id if id != "id" else None,  # "id" is found without being named
        split_by=cluster,
    )


def _guess_gold(
    rows: Sequence[Row], names: Sequence[str], id: str | None, own_form: bool
) -> list[str]:
    lowered = {name.lower(): name for name in reversed(names)}
    for name in ANSWER_NAMES:
        if name in lowered:
            return [lowered[name]]
    if own_form:
        return []
    lengths = {name: _mean_length(rows, name) for name in names}
    document = max(lengths, key=lambda name: lengths[name], default=None)
    skipped = {document, id}
    return [n for n in names if n not in skipped and lengths[n] < LONG and not SIDE_NAMES.search(n)]


def _mean_length(rows: Sequence[Row], name: str) -> float:
    lengths = [len(str(value)) for value in values_of(rows, name)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def _clusters(rows: Sequence[Row], name: str) -> bool:
    """Whether keeping equal values together leaves a split to choose: many clusters, none of them
    half."""
    values = [str(value) for value in values_of(rows, name)]
    sizes = Counter(values).values()
    return len(sizes) >= 10 and max(sizes) > 1 and max(sizes) < len(values) / 2


def values_of(rows: Iterable[Row], name: str) -> list[JSON]:
    """The values of a column, without those that are missing."""
    return [value for row in rows if (value := row.columns.get(name)) is not None]


def guess_field(name: str, values: Sequence[JSON]) -> dict[str, Any]:
    """The type of a field in the words of the `extraction` reward: {"type": …} and its options."""
    if not values:
        return {"type": "text"}
    for python, type_ in ((bool, "boolean"), (dict, "object"), (list, "list")):
        if all(isinstance(value, python) for value in values):
            return {"type": type_}
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {"type": "amount" if AMOUNT_NAMES.search(name) else "number"}
    texts = [str(value).strip() for value in values]
    distinct = sorted(set(texts))
    if _most(texts, is_date):
        return {"type": "date"}
    if {text.lower() for text in texts} <= {"true", "false"}:
        return {"type": "boolean"}
    if set(texts) <= CURRENCIES:
        return {"type": "currency"}
    if _most(texts, _AMOUNT.fullmatch) and (_has_cents(texts) or AMOUNT_NAMES.search(name)):
        return {"type": "amount"}
    if _most(texts, _NUMBER.fullmatch) and not ID_NAMES.search(name):
        return {"type": "number"}
    if len(distinct) <= min(ENUM, len(texts) // 4) and max(map(len, distinct)) <= 40:
        return {"type": "enum", "values": distinct}
    if ID_NAMES.search(name) and _most(texts, _IDENTIFIER.fullmatch):
        return {"type": "id"}
    return {"type": "text"}


def is_date(text: str) -> bool:
    """Whether a text is one date, in one of the usual ways of writing it."""
    return bool(_NUMERIC_DATE.fullmatch(text) or _OTHER_DATES.fullmatch(text))


def day_comes_first(texts: Iterable[str]) -> bool | None:
    """Whether 03/04 is the third of April, by the dates that can be read one way only; None if
    there is none."""
    days = months = 0
    for text in texts:
        if match := _NUMERIC_DATE.fullmatch(text.strip()):
            days += int(match[1]) > 12
            months += int(match[2]) > 12
    return None if days == months else days > months


def guess_reward(values: Sequence[JSON]) -> str:
    """The built-in reward that judges such answers: extraction, tool_call, label, math or text."""
    objects = [value for value in values if isinstance(value, Mapping)]
    if objects and len(objects) == len(values):
        return "tool_call" if all("calls" in value for value in objects) else "extraction"
    if all(isinstance(value, list) for value in values):
        return "label"
    texts = [str(value) for value in values]
    if _most(texts, lambda text: "####" in text or _AMOUNT.fullmatch(text.strip())):
        return "math"
    distinct = set(texts)
    if len(distinct) <= min(LABELS, max(2, len(texts) // 2)) and max(map(len, distinct)) <= 60:
        return "label"
    return "text"


def _has_cents(texts: Sequence[str]) -> bool:
    matches = [_AMOUNT.fullmatch(text) for text in texts]
    marked = [match for match in matches if match and (match[1] or match[2] or match[3])]
    return len(marked) > len(texts) / 2


def _most(texts: Sequence[str], test: Any) -> bool:
    """Nine in ten: real files hold a few slips."""
    return sum(bool(test(text)) for text in texts) >= 0.9 * len(texts)
