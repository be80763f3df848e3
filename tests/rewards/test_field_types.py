"""The job, a schema or the gold say how each field is compared; mistakes are named."""

import pytest
from rlpost_rewards.field_types import fields_of_answer, fields_of_schema, read_fields

from rlpost.errors import JobError


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"total": "amout"}, ["'total'", "'amout'", "did you mean amount?"]),
        ({"total": {"decimal": "."}}, ["'total'", "no type"]),
        ({"total": {"type": "amount", "tolerence": 1}}, ["'tolerence'", "did you mean tolerance?"]),
        ({"total": {"type": "amount", "tolerance": "x"}}, ["tolerance", "'total'"]),
        ({"total": {"type": "amount", "decimal": ";"}}, ["decimal", "'total'"]),
        ({"items": {"type": "list", "items": "lines"}}, ["'items[]'", "'lines'"]),
        ({"items": {"type": "list", "fields": {"p": "amt"}}}, ["'items.p'", "'amt'"]),
        ({"state": {"type": "enum", "values": []}}, ["values", "'state'"]),
        ({"total": {"type": "amount", "weight": 0}}, ["weight", "'total'"]),
        ({"total": {"type": "amount", "weight": -1}}, ["weight", "'total'"]),
        ({}, ["empty"]),
        (5, ["int"]),
        ({"total": 5}, ["'total'"]),
    ],
)
def test_a_mistake_is_named_with_its_cure(fields, words):
    with pytest.raises(JobError) as caught:
        read_fields(fields)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_names_is_all_text():
    assert {kind.type for kind in read_fields(["a", "b"]).values()} == {"text"}


def test_day_first_goes_down_to_every_date_unless_it_says_otherwise():
    fields = {
        "day": "date",
        "us": {"type": "date", "day_first": False},
        "lines": {"type": "list", "items": "date"},
    }
    kinds = read_fields(fields, day_first=True)
    assert (kinds["day"].day_first, kinds["us"].day_first) == (True, False)
    assert kinds["lines"].items.day_first


def test_a_schema_names_the_types():
    schema = {
        "properties": {
            "name": {"type": "string"},
            "day": {"type": "string", "format": "date"},
            "state": {"enum": ["a", "b"]},
            "total": {"type": ["number", "null"]},
            "paid": {"type": "boolean"},
            "lines": {
                "type": "array",
                "items": {"type": "object", "properties": {"n": {"type": "integer"}}},
            },
        }
    }
    kinds = fields_of_schema(schema)
    assert {name: kind.type for name, kind in kinds.items()} == {
        "name": "text", "day": "date", "state": "enum", "total": "number", "paid": "boolean",
        "lines": "list",
    }  # fmt: skip
    assert kinds["lines"].items.fields["n"].type == "number"
    assert fields_of_schema({}) == {}


def test_gold_names_the_types_where_nothing_else_does():
    kinds = fields_of_answer(
        {"a": "x", "b": 1.5, "c": True, "d": ["x"], "e": [{"f": 1}], "g": {"h": "x"}}
    )
    assert [kind.type for kind in kinds.values()] == [
        "text",
        "number",
        "boolean",
        "list",
        "list",
        "object",
    ]
    assert kinds["e"].items.fields["f"].type == "number"
