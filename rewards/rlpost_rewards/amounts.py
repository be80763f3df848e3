"""Printed amounts and currencies: "RM 1,007.50", "1.007,50 €", "(4.00)", "12.-"."""

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

MAX_CHARACTERS = 64
MAX_EXPONENT = 400  # beyond it a sum of decimals would need that many digits

_WRITTEN = """
USD $ us$ usd$ dollar dollars | EUR € euro euros | GBP £ pound pounds | JPY ¥ 円 yen
CNY ¥ 元 rmb yuan | MYR rm ringgit | SGD s$ sg$ | AUD a$ au$ | CAD c$ ca$ | NZD nz$ | HKD hk$
TWD nt$ | MXN mx$ | BRL r$ | INR ₹ rs rupee rupees | KRW ₩ won | RUB ₽ | TRY ₺ tl | VND ₫
THB ฿ baht | PHP ₱ | IDR rp | ILS ₪ | PLN zł | CZK kč | HUF ft | CHF fr sfr | SEK kr | NOK kr
DKK kr | ISK kr | RON lei | UAH ₴ | NGN ₦ | AED dh dhs | SAR ﷼ sr
BDT BGN BHD BND CLP COP CRC DOP EGP GHS JOD KES KHR KWD KZT LAK LKR MAD MMK NPR OMR PEN PKR
QAR RSD TND TZS UGX UYU ZAR
"""  # code, then the other ways in which it is printed


def _marks() -> dict[str, frozenset[str]]:
    marks: dict[str, set[str]] = {}
    for entry in re.split(r"[|\n]", _WRITTEN):
        code = ""
        for word in entry.split():
            code = word if re.fullmatch("[A-Z]{3}", word) else code
            marks.setdefault(word.lower(), set()).add(code)
    return {mark: frozenset(codes) for mark, codes in marks.items()}


CURRENCIES = _marks()  # "rm" -> {"MYR"}, "kr" -> several

_LETTERS = "|".join(re.escape(mark) for mark in sorted(CURRENCIES, key=len, reverse=True))
_MARK_BEFORE = re.compile(rf"(?:{_LETTERS})\.?\s*(?=[-+−(.,\d$€£¥]|$)")
_MARK_AFTER = re.compile(rf"(?<=[\d\s.)\-–+])(?:{_LETTERS})\.?$")
_SIGNS = "+-−–"
_GROUPED_BY_SPACE = re.compile(r"\d{1,3}(?:[ '’]\d{3})+(?=$|[.,])")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{2,3})*,\d{3}")  # groups of two are printed in India


@lru_cache(maxsize=8192)
def _printed(text: str, decimal: str) -> frozenset[Decimal]:
    body = unicodedata.normalize("NFKC", text).strip().lower()
    negative = body.startswith("(") and body.endswith(")")
    if negative:
        body = body[1:-1].strip()
    body, minus = _strip_marks(body)
    sign = -1 if negative != minus else 1
    return frozenset(sign * number for number in _readings(body, decimal))


def read_amount(value: Any, *, decimal: str = "auto") -> frozenset[Decimal]:
    """The numbers that `value` may print, without currency; empty if it prints none.

    Mostly one. "1,234" is thousands, but in "1.234" the point may divide thousands or decimals, and
    both readings are given, so that it equals either print; `decimal` "." or "," says which mark
    is the decimal one. JSON numbers are what they are.
    """
    if isinstance(value, bool):
        return frozenset()
    if isinstance(value, int | float):
        if isinstance(value, int) and value.bit_length() > 3 * MAX_EXPONENT:
            return frozenset()
        number = Decimal(str(value))
        return frozenset((number,)) if _is_small(number) else frozenset()
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        return frozenset()
    return _printed(value, decimal)


def read_number(value: Any, *, decimal: str = "auto") -> frozenset[Decimal]:
    """As `read_amount`, and scientific notation in text too ("1e5")."""
    found = read_amount(value, decimal=decimal)
    if found or not isinstance(value, str) or len(value) > MAX_CHARACTERS or "_" in value:
        return found
    try:
        number = Decimal(value.strip())
    except InvalidOperation:
        return frozenset()
    return frozenset((number,)) if _is_small(number) else frozenset()


def read_currency(text: str) -> frozenset[str]:
    """The ISO codes that a printed currency may mean: {"MYR"} for "RM", several for "kr"."""
    mark = unicodedata.normalize("NFKC", text).strip().lower()
    return CURRENCIES.get(mark) or CURRENCIES.get(mark.rstrip("."), frozenset())


def _is_small(number: Decimal) -> bool:
    return number.is_finite() and abs(number.adjusted()) <= MAX_EXPONENT


def _strip_marks(body: str) -> tuple[str, bool]:
    """The digits of `body`, and whether a minus stood on either side of them or of the currency."""
    minus = False
    for _ in range(4):  # sign, currency, sign, currency: no print has more
        before = body
        body = _MARK_BEFORE.sub("", body, count=1) if _MARK_BEFORE.match(body) else body
        body = _MARK_AFTER.sub("", body).strip()
        if body[:1] and body[0] in _SIGNS:
            minus, body = minus or body[0] != "+", body[1:].strip()
        if body[-1:] and body[-1] in _SIGNS and body[-2:-1] in ".,":
            body = body[:-2]  # "12.-" is twelve, nothing after it
        elif body[-1:] and body[-1] in _SIGNS:
            minus, body = minus or body[-1] != "+", body[:-1].strip()
        if body == before:
            break
    return body, minus


def _readings(body: str, decimal: str) -> Iterator[Decimal]:
    if grouped := _GROUPED_BY_SPACE.match(body):
        whole = re.sub("[ '’]", "", grouped.group())
        body = whole + body[grouped.end() :]
        if not re.fullmatch(r"\d+(?:[.,]\d+)?", body):
            return
        yield Decimal(body.replace(",", "."))
        return
    if not body.isascii() or not re.fullmatch(r"[\d.,]*\d[\d.,]*", body):
        return
    for mark in ".," if decimal == "auto" else decimal:
        other = "," if mark == "." else "."
        whole, point, fraction = body.partition(mark)
        if point and not fraction.isdecimal() and fraction:
            continue
        if other in whole and not _THOUSANDS.fullmatch(whole.replace(other, ",")):
            continue
        if other in whole and whole.startswith("0"):
            continue  # "0,250" is a quarter: no thousands begin with zero
        if decimal == "auto" and mark == "," and _THOUSANDS.fullmatch(body) and body[0] != "0":
            continue  # a decimal comma before three digits is rarer than one that groups
        yield Decimal(f"{whole.replace(other, '') or '0'}.{fraction or '0'}")
