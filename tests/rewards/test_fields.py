"""Each type says when two values are the same, and nothing else is worth a whole point."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.field_types import read_fields
from rlpost_rewards.fields import MOST_PARTIAL, TYPES, compare, is_exact

ITEMS = {"type": "list", "fields": {"name": "text", "price": "amount"}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def score(kind, gold, predicted, **options) -> float:
    return compare(read_fields({"f": kind}, **options)["f"], gold, predicted)


@pytest.mark.parametrize(
    ("kind", "gold", "predicted"),
    [
        ("text", "INDAH GIFT & HOME DECO", "Indah Gift  Home-Deco."),
        ("text", "12", 12),
        ("text", "***", "* * *".replace(" ", "")),
        ("id", "acct-12", "acct-12"),
        ("id", "12", 12),
        ("date", "19/10/2018", "October 19, 2018"),
        ("amount", "RM 60.30", 60.3),
        ("amount", "1.234", "1,234"),
        ("currency", "RM", "MYR"),
        ("number", "1,000", 1000),
        ("boolean", True, "Yes"),
        ("enum", "Paid", " paid"),
        ("list", ["a", "b"], ["B", "a"]),
        ({"type": "object", "fields": {"city": "text"}}, {"city": "Rome"}, {"city": "rome"}),
        (ITEMS, [{"name": "a", "price": "2"}, {"name": "b", "price": "4"}],
         [{"name": "b", "price": 4}, {"name": "a", "price": 2.0}]),
        ({"type": "object", "fields": {"name": "text"}}, [{"name": "a"}], [{"name": "A"}]),
        ({"type": "amount", "tolerance": 0.05}, "10.00", "10.04"),
        ("date", "last week", "Last week"),
        ("amount", "free", "FREE"),
    ],
)  # fmt: skip
def test_the_same_value_in_another_print_is_right(kind, gold, predicted):
    assert score(kind, gold, predicted, day_first=True) == 1.0


@pytest.mark.parametrize(
    ("kind", "gold", "predicted"),
    [
        ("id", "acct-12", "acct12"),
        ("id", "acct-12", "ACCT-12"),
        ("date", "19/10/2018", "20/10/2018"),
        ("date", "19/10/2018", "19/10/2018 20/10/2018"),
        ("amount", "60.30", "60.31"),
        ("amount", "1,000", "1.00"),
        ("amount", "60.30", "60.30 or 70.30"),
        ("amount", "60.30", True),
        ("currency", "RM", "USD"),
        ("number", 1, True),
        ("boolean", True, 1),
        ("boolean", True, False),
        ("enum", "paid", "unpaid"),
        ("text", "INDAH GIFT", "SYL ROASTED DELIGHTS"),
        ("text", "INDAH GIFT", ["INDAH GIFT"]),
        ({"type": "amount", "tolerance": 0.05}, "10.00", "10.06"),
        ({"type": "text", "partial": False}, "INDAH GIFT", "INDAH GIFTS"),
    ],
)
def test_another_value_is_worth_nothing(kind, gold, predicted):
    assert score(kind, gold, predicted, day_first=True) == 0.0


def test_a_near_text_earns_at_most_a_half():
    near = score(
        "text", "27, JALAN DEDAP 13, TAMAN JOHOR JAYA", "27, JALAN DEDAP 18, TAMAN JOHOR JAYA"
    )
    nearer_not = score("text", "27, JALAN DEDAP 13, TAMAN JOHOR JAYA", "27, JALAN DEDAP, JOHOR")
    assert 0.0 < nearer_not < near < 0.5 == MOST_PARTIAL


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("absent", [None, "", "  ", [], {}])
def test_absent_is_right_only_where_gold_is_absent(kind, absent):
    assert score(kind, absent, None) == score(kind, None, absent) == 1.0
    assert score(kind, "5", absent) == score(kind, absent, "5") == 0.0


def test_lists_pay_for_precision_and_recall():
    assert score("list", ["a", "b"], ["a"]) == pytest.approx(2 / 3)
    assert score("list", ["a"], ["a", "b", "c"]) == pytest.approx(0.5)
    assert score("list", ["a", "b"], ["a", "a"]) == pytest.approx(0.5)


def test_an_ordered_list_is_compared_in_place():
    kind = {"type": "list", "ordered": True}
    assert score(kind, ["a", "b"], ["b", "a"]) == 0.0
    assert score(kind, ["a", "b"], ["a", "b"]) == 1.0


def test_matching_is_optimal_not_greedy():
    """The first gold line agrees with both replies in part; taking the first costs the second."""
    gold = [{"name": "a", "price": "2"}, {"name": "a", "price": "4"}]
    predicted = [{"name": "a", "price": "4"}, {"name": "a", "price": "2"}]
    assert score(ITEMS, gold, predicted) == 1.0


def test_surplus_keys_of_an_object_cost_precision():
    kind = {"type": "object", "fields": {"city": "text"}}
    assert score(kind, {"city": "Rome"}, {"city": "Rome", "zip": 1}) == 0.5


def test_a_flood_of_items_is_cheap_and_worth_little():
    flood = [{"name": f"n{i}", "price": i} for i in range(20_000)]
    assert score(ITEMS, [{"name": "n7", "price": 7}] * 40, flood) < 0.01


def test_exact_is_equality_as_text():
    assert is_exact("60.30", "60.30")
    assert is_exact("7", 7)
    assert not is_exact("60.30", 60.3)
    assert not is_exact("Paid", "paid")
    assert is_exact(None, "")
    assert is_exact({"a": 1, "b": 2}, {"b": 2, "a": 1})


@given(st.sampled_from([*TYPES, "items"]), JSON, JSON)
def test_every_comparison_is_between_nothing_and_one(kind, gold, predicted):
    value = score(ITEMS if kind == "items" else kind, gold, predicted)
    assert 0.0 <= value <= 1.0


@given(st.sampled_from([*TYPES, "items"]), JSON)
def test_gold_is_right_against_itself(kind, gold):
    sound = {
        "boolean": isinstance(gold, bool) or gold in ("true", "false"),
        "object": isinstance(gold, dict)
        or (isinstance(gold, list) and all(isinstance(g, dict) for g in gold)),
        "items": isinstance(gold, list)
        and all(isinstance(g, dict) and g.get("name") for g in gold),
        "list": isinstance(gold, list) and all(isinstance(g, str | int | float) for g in gold),
    }.get(kind, isinstance(gold, str | int | float))
    if sound:
        assert score(ITEMS if kind == "items" else kind, gold, gold) == pytest.approx(1.0)
