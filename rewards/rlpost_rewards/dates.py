"""Printed dates, read as ISO: "25 MAR 2018", "25/03/18", "March 25th, 2018", "2018年3月25日".

A date is read only if it is the whole text (weekday and time of day may stand beside it): a reply
that lists several dates to be right with one of them is no date.
"""

import datetime
import re
import unicodedata
from functools import lru_cache

MAX_CHARACTERS = 64

_MONTHS = (
    "january janvier januar enero gennaio janeiro januari janv ene genn jän jänner",
    "february février februar febrero febbraio fevereiro februari fevrier févr fevr",
    "march mars märz marzo março maret mac maart mrz maerz mär",
    "april avril abril aprile avr abr",
    "may mai mayo maggio maio mei mag",
    "june juin juni junio giugno junho jun giu",
    "july juillet juli julio luglio julho julai juil lug",
    "august août agosto augustus ogos aout agustus ago aoû",
    "september septembre septiembre settembre setembro sept set",
    "october octobre oktober octubre ottobre outubro okt ott out",
    "november novembre noviembre novembro nov",
    "december décembre dezember diciembre dicembre dezembro disember decembre déc dez dic dis",
)
_MONTH = {name: number for number, names in enumerate(_MONTHS, 1) for name in names.split()} | {
    names.split()[0][:3]: number for number, names in enumerate(_MONTHS, 1)
}
_WEEKDAYS = {
    name[:length]
    for name in ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
    for length in (2, 3, 4, 5, len(name))
}
_FILLERS = {"st", "nd", "rd", "th", "of", "the", "de", "den", "der", "del", "date", "dated", "on"}
_TIME = re.compile(
    r"(?:[t,]|\bat\b)?\s*(?<!\d)\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?!\d)"
    r"\s*(?:[ap]\.?m\.?(?![a-z]))?\s*(?:z\b|utc\b|gmt\b|[+-]\d{2}:?\d{2}(?!\d))?"
)
_TOKEN = re.compile(r"\d+|[^\W\d_]+")
_SEPARATORS = set(" \t\n./-,'’()[]:|\\–−")
_CJK = str.maketrans({"年": "-", "月": "-", "日": " ", "년": "-", "월": "-", "일": " "})


@lru_cache(maxsize=8192)
def read_date(text: str, *, day_first: bool = False) -> str | None:
    """The date that `text` is as ISO, "2018-03-25", or "2018-03" where no day is printed, or None.

    `day_first` decides 03/04/2018; a reading that gives no valid date (25/03 month first) yields to
    the other.
    Years of two digits are 2000 to 2068 and 1969 to 1999, as in POSIX.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    folded = unicodedata.normalize("NFKC", text).lower().translate(_CJK).strip()
    if ":" in folded:
        folded = _TIME.sub(" ", folded, count=1)
    numbers: list[str] = []
    month, month_at = 0, 0
    for match in _TOKEN.finditer(folded):
        token = match.group()
        if token.isdecimal():
            numbers.append(token)
        elif token in _MONTH and not month:
            month, month_at = _MONTH[token], len(numbers)
        elif token not in _WEEKDAYS and token not in _FILLERS and not _is_iso_t(token, numbers):
            return None
    if not set(_TOKEN.sub("", folded)) <= _SEPARATORS or not all(n.isascii() for n in numbers):
        return None
    if month:
        return _with_name(numbers, month, month_at)
    return _of_numbers(numbers, day_first)


def _is_iso_t(token: str, numbers: list[str]) -> bool:
    return token in ("t", "z") and len(numbers) >= 3


def _with_name(numbers: list[str], month: int, month_at: int) -> str | None:
    if len(numbers) == 1:
        return _iso(numbers[0], month, None) if len(numbers[0]) == 4 else None
    if len(numbers) != 2:
        return None
    first, second = numbers
    if len(first) == 4 or (len(first) == 2 and int(first) > 31):
        return _iso(first, month, second)
    # "05 MAY 18" and "May 5, 18": the day stands before the year in both
    return _iso(second, month, first) if month_at < 2 or len(second) == 4 else None


def _of_numbers(numbers: list[str], day_first: bool) -> str | None:
    if len(numbers) == 1:
        return _of_digits(numbers[0], day_first)
    if len(numbers) == 2:
        first, second = numbers
        if len(first) == 4:
            return _iso(first, second, None)
        return _iso(second, first, None) if len(second) == 4 else None
    if len(numbers) != 3:
        return None
    first, second, third = numbers
    if len(first) == 4 or (int(first) > 31 and len(first) == 2):
        return _iso(first, second, third) or _iso(first, third, second)
    day_month = (third, second, first)
    month_day = (third, first, second)
    readings = (day_month, month_day) if day_first else (month_day, day_month)
    return _iso(*readings[0]) or _iso(*readings[1])


def _of_digits(digits: str, day_first: bool) -> str | None:
    if len(digits) == 8:
        if digits[:2] in ("19", "20") and (iso := _iso(digits[:4], digits[4:6], digits[6:])):
            return iso
        return _of_numbers([digits[:2], digits[2:4], digits[4:]], day_first)
    if len(digits) == 6:
        return _of_numbers([digits[:2], digits[2:4], digits[4:]], day_first)
    return None


def _iso(year: str, month: str | int, day: str | None) -> str | None:
    if len(year) not in (2, 4) or len(str(month)) > 2 or (day is not None and len(day) > 2):
        return None
    number = int(year)
    if len(year) == 2:
        number += 2000 if number <= 68 else 1900
    try:
        date = datetime.date(number, int(month), int(day or 1))
    except ValueError:
        return None
    return date.isoformat() if day is not None else f"{date.year:04d}-{date.month:02d}"
