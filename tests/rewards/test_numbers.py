from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.numbers import last_number, read_number, read_quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", "1234"),
        ("1,234,567.5", "1234567.5"),
        ("1,22", "1.22"),
        ("0,123", "0.123"),
        ("004", "4"),
        ("$20", "20"),
        ("-$5", "-5"),
        ("\u22123", "-3"),
        ("+3", "3"),
        (".5", "0.5"),
        ("5.", "5"),
        ("20€", "20"),
        ("$5$", "5"),
        ("\\$5", "5"),
        ("32,\\! 349", "32349"),
        ("1{,}000", "1000"),
        ("1e6", "1000000"),
    ],
)
def test_numbers_are_read_as_people_write_them(text, number):
    assert read_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5x",
        "12:00",
        "4%",
        "½",
        "٣",
        "1/2",
        "2^3",
        "1,2,3",
        "NaN",
        "inf",
        "1e9999",
        "-",
        "9" * 401,
    ],
)
def test_what_is_more_than_a_number_is_not_read(text):
    assert read_number(text) is None


def test_a_quantity_is_a_number_with_a_unit():
    assert read_quantity("18 dollars") == read_quantity("18") == 18
    assert read_quantity("1,200 square feet.") == 1200
    for text in ("5 million", "5 or 6", "5 x", "5 and a half", "five apples", "50 percent"):
        assert read_quantity(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 and gets 4, which makes 7 apples.", "7"),
        ("5 * 3 = 15", "15"),
        ("so **448000**", "448000"),
        ("it is $1,000.", "1000"),
        ("the -5", "-5"),
        ("1,000.99m\u00b2", "1000.99"),
    ],
)
def test_the_last_number_that_stands_alone_is_found(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "2 + 3",
        "10-15",
        "5%",
        "5 percent",
        "a5",
        "v1.2.3",
        "12/5/2018",
        "2**3",
        "x_3",
        "\\frac{1}{2}",
    ],
)
def test_a_term_of_something_longer_is_not_a_last_number(text):
    assert last_number(text) is None


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "${:,}", "{}.00", "{}."]))
def test_every_way_of_writing_an_integer_reads_the_same(number, form):
    assert read_number(form.format(number)) == number
    assert last_number(f"It is {form.format(number)}") == number


@given(st.text(st.characters() | st.sampled_from("0123456789.,-$%eE* ")))
def test_any_text_is_read_or_not_and_never_raises(text):
    for number in (read_number(text), last_number(text)):
        assert number is None or number.is_finite()
