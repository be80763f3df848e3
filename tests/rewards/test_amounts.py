"""Printed amounts become decimals, whatever currency and marks they are printed with."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.amounts import read_amount, read_currency, read_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("60.30", "60.3"), ("RM 1,007.50", "1007.5"), ("1.007,50 €", "1007.5"), ("RM4.00", "4"),
        ("1 234,50", "1234.5"), ("CHF 1'234.50", "1234.5"), ("$ 5", "5"), ("4.00 USD", "4"),
        ("US$ 3.00", "3"), ("Rs. 500", "500"), ("₹1,23,456.00", "123456"), ("1.234.567", "1234567"),
        ("-1.73", "-1.73"), ("−1.73", "-1.73"), ("-$4.00", "-4"), ("$-4", "-4"), ("4.00-", "-4"),
        ("(4.00)", "-4"), ("12.-", "12"), (".50", "0.5"), ("5.", "5"), ("0,250", "0.25"),
        ("1,234", "1234"), ("Rp 1.500.000", "1500000"), ("4,5", "4.5"), ("$5.00 USD", "5"),
    ],
)  # fmt: skip
def test_prints_of_one_amount_are_that_amount(text, number):
    assert read_amount(text) == {Decimal(number)}


def test_a_point_before_three_digits_may_divide_either():
    assert read_amount("1.234") == {Decimal("1.234"), Decimal("1234")}
    assert read_amount("1.234", decimal=".") == {Decimal("1.234")}
    assert read_amount("1.234", decimal=",") == {Decimal("1234")}
    assert read_amount("0.234") == {Decimal("0.234")}


@pytest.mark.parametrize(
    "value",
    [
        "", "EUR", "TOTAL 4.00", "1,2,3", "1..2", "1 2", "$4$5", "4.00 or 5.00", True, None, [4],
        "1e5",
        "RM 1,00,00", "9" * 65, "NaN", "Infinity", "4_000",
    ],
)  # fmt: skip
def test_what_prints_no_amount_is_empty(value):
    assert read_amount(value) == frozenset()


def test_json_numbers_are_what_they_are():
    assert read_amount(60.3) == read_amount("60.30")
    assert read_amount(7) == {Decimal(7)}
    assert read_amount(10**5000) == frozenset()  # no sum could hold it


def test_numbers_may_be_in_scientific_notation():
    assert read_number("1e5") == {Decimal(100000)}
    assert read_number("1e999999") == frozenset()
    assert read_number("nan") == frozenset()


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(["RM {}", "{} EUR", "${}", "{}"]))
def test_thousands_marks_go_both_ways(amount, frame):
    english = f"{amount:,.2f}"
    continental = english.translate(str.maketrans(",.", ".,"))
    assert read_amount(frame.format(english)) == {amount}
    assert read_amount(frame.format(continental)) == {amount}


@given(st.text(max_size=70))
def test_any_text_is_read_without_failing(text):
    assert all(number.is_finite() for number in read_number(text))


def test_currencies_are_iso_codes():
    assert read_currency("RM") == read_currency("myr") == {"MYR"}
    assert read_currency("€") == {"EUR"}
    assert read_currency("Rs.") == {"INR"}
    assert "NOK" in read_currency("kr")
    assert read_currency("total") == frozenset()
