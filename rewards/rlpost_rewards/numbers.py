"""Reads plain numbers as people and models write them: 1,234.50 · $20 · −3 · 1,22 · 32,\\!349 ·
1e6."""

import re
from decimal import Decimal

MAX_DIGITS = 400
_CURRENCY = "$€£¥₹₽₩₺"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:[.,][0-9]+)?|\.[0-9]+)"
_NUMBER = rf"[+-]?{_DIGITS}(?:[eE][+-]?[0-9]{{1,3}})?"
_WHOLE = re.compile(rf"(-?)[{_CURRENCY}]?\s*({_NUMBER})\s*[{_CURRENCY}]?\.?")
_ANY = re.compile(_NUMBER)
_SPACING = re.compile(r"\\[!,;: ]\s*|\{,\}")
_QUANTITY = re.compile(r"(.*[0-9])\s+([A-Za-z]{2,}(?: [A-Za-z]{2,}){0,2})\.?")
_NOT_UNITS = {
    "hundred", "thousand", "million", "billion", "trillion", "dozen", "percent", "pct",
    "percentage", "half", "halves", "third", "thirds", "quarter", "quarters", "and", "or",
    "minus", "plus", "times", "over", "to", "out", "of", "by", "divided", "squared", "cubed",
    "factorial", "mod", "pi", "sqrt",
}  # fmt: skip
_OPERATORS = "+-*/^×÷_·{(\\<>"


def read_number(text: str) -> Decimal | None:
    """The number that `text` is, currency sign and full stop aside; None if it is anything else."""
    text = text.strip()
    if len(text) > MAX_DIGITS:
        return None
    text = _plain(text)
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    match = _WHOLE.fullmatch(text)
    if match is None:
        return None
    number = _value(match[2])
    return -number if match[1] else number


def read_quantity(text: str) -> Decimal | None:
    """The number of "18 dollars" or of a plain number; None where the words may change it ("5
    million", "5 or 6") or a single letter may be a variable."""
    number = read_number(text)
    if number is None and (match := _QUANTITY.fullmatch(text.strip())):
        words = match[2].lower().split()
        if not _NOT_UNITS.intersection(words):
            number = read_number(match[1])
    return number


def last_number(text: str) -> Decimal | None:
    """The last number of `text`, if it stands alone: not a term of a longer expression, a date, a
    part of a word or a percentage. None without one."""
    tail = _plain(text[-2_000:])
    *_, last = [None, *_ANY.finditer(tail)]
    if last is None or len(last[0]) > MAX_DIGITS:
        return None
    start, digits = last.start(), last[0]
    before = tail[:start]
    if digits[0] in "+-" and before and (before[-1].isalnum() or before[-1] in ")]}."):
        return None  # 10-15: a difference or a range
    before = before.rstrip(_CURRENCY)
    if before and (before[-1].isalnum() or before[-1] in ".,:"):
        return None
    after = tail[last.end() :].lstrip(" ")
    if before.endswith("**") and "**" in after[:4]:
        before, after = before[:-2], ""  # bold, not a power
    if before.rstrip()[-1:] and before.rstrip()[-1] in _OPERATORS:
        return None
    if after[:1] and after[:1] in "/^_%\\×÷}:(*":
        return None
    if re.match(r"p(?:er)?\s?c(?:en)?t", after, re.IGNORECASE):
        return None
    return _value(digits)


def _plain(text: str) -> str:
    """`text` without LaTeX spacing inside numbers, with ASCII signs."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%")
    if "\\" in text or "{,}" in text:
        text = _SPACING.sub(lambda match: "," if match[0] == "{,}" else "", text)
    return text


def _value(digits: str) -> Decimal:
    if "," in digits:
        head, _, tail = digits.partition(",")
        thousands = len(tail.split(".")[0].split(",")[0]) == 3 and head.lstrip("+-") not in (
            "",
            "0",
        )
        digits = digits.replace(",", "") if thousands else digits.replace(",", ".")
    return Decimal(digits)
