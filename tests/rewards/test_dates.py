"""Printed dates become ISO, and what is no single date becomes nothing."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.dates import read_date

PRINTS = (
    "%d/%m/%Y", "%d-%m-%y", "%d.%m.%Y", "%d %b %Y", "%d-%b-%y", "%d%m%Y", "%Y%m%d", "%Y-%m-%d",
    "%Y/%m/%d", "%B %d, %Y", "%b %d %Y", "%A, %d %B %Y", "%a %d %b %y", "%d/%b/%Y",
    "%d/%m/%Y %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%d %B %Y %I:%M %p", "(%d/%m/%Y)", "%Y年%m月%d日",
)  # fmt: skip


@given(st.dates(datetime.date(2000, 1, 1), datetime.date(2068, 12, 31)), st.sampled_from(PRINTS))
def test_every_print_of_a_day_is_that_day(day, print_):
    moment = datetime.datetime.combine(day, datetime.time(18, 5, 9))
    assert read_date(moment.strftime(print_), day_first=True) == day.isoformat()


def test_day_first_decides_what_could_be_either():
    assert read_date("03/04/2018", day_first=True) == "2018-04-03"
    assert read_date("03/04/2018") == "2018-03-04"


def test_an_impossible_reading_yields_to_the_other():
    assert read_date("12/28/2017", day_first=True) == "2017-12-28"
    assert read_date("28/12/2017") == "2017-12-28"


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("March 3rd, 2018", "2018-03-03"),
        ("the 21st of May 2018", "2018-05-21"),
        ("3. März 2018", "2018-03-03"),
        ("5 de enero de 2020", "2020-01-05"),
        ("Jan 5 '18", "2018-01-05"),
        ("MAR 2018", "2018-03"),
        ("01/02/69", "1969-02-01"),
        ("6:03 PM 25/3/2018", "2018-03-25"),
    ],
)
def test_words_and_abbreviations_are_understood(text, iso):
    assert read_date(text, day_first=True) == iso


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "31/02/2018", "99/99/9999", "01/02/2018 03/04/2018", "01/02/2018 or later", "12",
        "1 2 3 4", "total 12/12/2018", "２０１８" * 20, "٢٥/١٢/٢٠١٨ x", "May May 2018",
        "5/2018/5/1",
    ],
)  # fmt: skip
def test_what_is_no_single_date_is_none(text):
    assert read_date(text, day_first=True) is None


@given(st.text(max_size=80))
def test_any_text_is_a_date_or_none(text):
    found = read_date(text, day_first=True)
    assert found is None or datetime.date.fromisoformat(found if len(found) > 7 else found + "-01")
