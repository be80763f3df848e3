import json
import math
import time

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.json_schema import SchemaError, compile_schema, json_schema

from rlpost.errors import JobError, RowError
from rlpost.reward import recorded
from rlpost.types import Task

RECEIPT = {
    "type": "object",
    "properties": {
        "company": {"type": "string"},
        "date": {"type": "string", "pattern": r"^\d{2}/\d{2}/\d{4}$"},
        "total": {"type": "number"},
        "items": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "price": {"type": "number"}},
                "required": ["name", "price"],
            },
        },
    },
    "required": ["company", "date", "total"],
    "additionalProperties": False,
}
GOLD = {"company": "A", "date": "25/12/2018", "total": 9.5, "items": [{"name": "x", "price": 1}]}


def scored(reply, schema=RECEIPT, *, meta=None, **arguments):
    task = Task(id="7", messages=(), schema=schema, meta=meta or {})
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return json_schema(task, recorded(task, text), **arguments)


def leaves(reply, schema=RECEIPT):
    return scored(reply, schema).parts["leaves"]


def test_a_valid_reply_is_worth_one():
    score = scored(GOLD)
    assert (score.value, score.reason) == (1.0, "ok")
    assert score.parts == {"parses": 1.0, "valid": 1.0, "leaves": 1.0}


def test_a_reply_that_is_no_json_is_worth_nothing():
    score = scored("company: A")
    assert (score.value, score.reason) == (0.0, "not_json")
    assert score.parts == {"parses": 0.0, "valid": 0.0, "leaves": 0.0}


@pytest.mark.parametrize(
    ("change", "share", "reason"),
    [
        ({"date": "2018-12-25"}, 4 / 5, "pattern"),
        ({"extra": 1}, 5 / 6, "additionalProperties"),
        ({"items": []}, 3 / 4, "minItems"),
        ({"items": [{"name": "x"}]}, 4 / 5, "required"),
        ({"items": "none"}, 3 / 4, "type"),
        ({"company": None, "total": None}, 3 / 5, "type"),
    ],
)
def test_leaves_are_the_share_that_is_right(change, share, reason):
    score = scored({**GOLD, **change})
    assert score.parts["leaves"] == pytest.approx(share)
    assert score.value == pytest.approx(share / 2)
    assert score.reason == reason


@pytest.mark.parametrize("reply", [{}, [], None, 3, dict.fromkeys(GOLD), RECEIPT])
def test_degenerate_replies_earn_nothing(reply):
    assert scored(reply).value == 0.0


def test_a_missing_object_counts_as_all_it_would_hold():
    schema = {
        "required": ["a", "receipt"],
        "properties": {"a": {"type": "null"}, "receipt": RECEIPT},
    }
    assert leaves({"a": None}, schema) == pytest.approx(1 / 4)
    assert leaves({"a": None, "receipt": "?"}, schema) == pytest.approx(1 / 4)


def test_keys_that_the_schema_does_not_name_do_not_water_mistakes_down():
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
    padding = {f"k{index}": 1 for index in range(100)}
    assert leaves({"a": "x", **padding}, schema) == leaves({"a": "x"}, schema) == 0.0


def test_leaves_follow_refs_and_take_the_nearest_alternative():
    pair = {"properties": {"u": {"const": 1}, "v": {"const": 2}}, "required": ["u", "v"]}
    either = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}]}
    outer = {"properties": {"x": {"type": "integer"}, "y": either}}
    schema = {"$ref": "#/$defs/a~1b", "$defs": {"a/b": outer, "pair": {**pair, "type": "object"}}}
    assert leaves({"x": 1, "y": {"u": 1, "v": 0}}, schema) == pytest.approx(2 / 3)


def test_a_schema_that_recurses_or_multiplies_is_counted_in_bounded_time():
    both = {"properties": {"a": {"$ref": "#"}}}
    schema = {"anyOf": [both, {**both, "required": ["z"]}], "type": "object"}
    value = 1
    for _ in range(12):
        value = {"a": value}
    start = time.perf_counter()
    assert scored(value, schema).value <= 0.5
    assert scored(1, {"allOf": [{"$ref": "#"}], "type": "null"}).value == 0.0
    assert time.perf_counter() - start < 5


def _object(properties, required, closed):
    open_ = not closed
    return {"properties": properties, "required": required, "additionalProperties": open_}


def _array(items, least):
    return {"type": "array", "items": items, "minItems": least}


simple = [{}, {"type": "integer"}, {"type": "string", "minLength": 1}, {"enum": [1, "a"]}]
letters = st.sampled_from("abc")
schemas = st.deferred(
    lambda: st.one_of(
        st.sampled_from([*simple, True, False]),
        st.builds(
            _object,
            st.dictionaries(letters, schemas, max_size=3),
            st.lists(letters, unique=True),
            st.booleans(),
        ),
        st.builds(_array, schemas, st.integers(0, 2)),
        st.dictionaries(
            st.sampled_from(["anyOf", "oneOf", "allOf"]),
            st.lists(schemas, min_size=1, max_size=2),
            max_size=2,
        ),
        st.builds(lambda inner: {"not": inner}, schemas),
    )
)
documents = st.recursive(
    st.sampled_from([1, 2.5, "a", "", None, True]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner),
)


@given(schemas, documents)
def test_every_valid_reply_is_above_every_invalid_one(schema, document):
    score = scored(json.dumps(document), schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid(document)
    assert all(math.isfinite(part) for part in (score.value, *score.parts.values()))
    assert (score.value == 1.0) == valid == (score.parts["valid"] == 1.0)
    assert valid or (score.value <= 0.5 and 0.0 <= score.parts["leaves"] < 1.0)


@given(st.text())
def test_any_text_gets_a_score(text):
    assert 0.0 <= scored(text).value <= 1.0


def test_the_draft_is_the_schemas_then_the_rows_then_the_arguments():
    tuple_items = {"items": [{"type": "null"}]}  # a list of schemas up to 2019-09, an error after
    old = {"$schema": "http://json-schema.org/draft-07/schema#", **tuple_items}
    assert scored([1], old, meta={"draft": "draft2020-12"}, draft="draft2020-12").value < 1
    assert scored([1], tuple_items, meta={"draft": "draft4"}, draft="draft2020-12").value < 1
    assert scored([None], tuple_items, draft="draft2019-09").value == 1
    with pytest.raises(RowError, match=r"row 7.*draft2020-12"):
        scored([1], tuple_items)


def test_drafts_differ_where_their_rules_do():
    exclusive = {"maximum": 3, "exclusiveMaximum": True}  # a boolean in draft 4 only
    assert scored(3, exclusive, draft="draft4").value < 1
    beside_ref = {
        "properties": {"a": {"$ref": "#/definitions/x", "maximum": 3}},
        "definitions": {"x": {}},
    }
    assert scored({"a": 5}, beside_ref, draft="draft7").value == 1
    assert scored({"a": 5}, beside_ref, draft="draft2019-09").value < 1


def test_formats_are_asserted_only_when_asked_for():
    assert (
        scored("2018-13-45", {"format": "date"}).value == 0.0
    )  # the reply is no JSON without quotes
    assert scored('"2018-13-45"', {"format": "date"}).value == 1.0
    assert scored('"2018-13-45"', {"format": "date"}, formats=True).value < 1.0


@pytest.mark.parametrize(
    "ref",
    ["http://127.0.0.1:9/x.json", "file:///etc/hostname", "other.json", "https://example.com/s"],
)
def test_no_reference_is_ever_fetched(ref):
    with pytest.raises(RowError, match="row 7"):
        scored(1, {"$ref": ref})


def test_remotes_are_read_from_the_jobs_folder(tmp_path):
    (tmp_path / "remotes.json").write_text('{"http://x.example/int": {"type": "integer"}}')
    schema = {"$ref": "http://x.example/int"}
    assert scored(1, schema, remotes="remotes.json", base_dir=str(tmp_path)).value == 1.0
    assert scored("a", schema, remotes=str(tmp_path / "remotes.json")).value < 1.0


def test_two_sets_of_remotes_do_not_share_a_validator():
    schema = {"$ref": "u:x"}
    assert scored(1, schema, remotes={"u:x": {"type": "integer"}}).value == 1.0
    assert scored(1, schema, remotes={"u:x": {"type": "string"}}).value < 1.0


def test_bad_arguments_and_rows_are_named(tmp_path):
    with pytest.raises(JobError, match=r"remotes.*nowhere\.json"):
        scored(1, remotes="nowhere.json", base_dir=str(tmp_path))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(JobError, match=r"list\.json"):
        scored(1, remotes="list.json", base_dir=str(tmp_path))
    with pytest.raises(JobError, match="thinking = 'drop'"):
        scored(1, thinking="drop")
    with pytest.raises(JobError, match=r"draft3.*draft2019-09"):
        scored(1, draft="draft3")
    with pytest.raises(RowError, match=r"row 7.*draft3"):
        scored(1, meta={"draft": "draft3"})
    with pytest.raises(JobError, match="nowhere"):  # the job's mistake comes before the row's
        scored(1, None, remotes="nowhere.json")
    with pytest.raises(RowError, match="row 7 has no schema"):
        scored(1, None)
    with pytest.raises(RowError, match="row 7"):
        scored(1, {"type": "integr"})
    assert scored(1, True).value == 1.0


@pytest.mark.parametrize("pattern", [r"^(a+)+$", r"^(?=a)(a|aa)+$", r"^(a+)+\1$", r"(x+x+)+y"])
def test_a_catastrophic_pattern_costs_no_time(pattern):
    start = time.perf_counter()
    assert scored(json.dumps("a" * 50_000 + "x" * 50_000 + "!"), {"pattern": pattern}).value < 1
    assert time.perf_counter() - start < 2


def test_thousands_of_unique_objects_cost_no_time():
    start = time.perf_counter()
    assert scored([{"a": index} for index in range(20_000)], {"uniqueItems": True}).value == 1.0
    assert time.perf_counter() - start < 2


def test_deep_replies_are_refused_before_they_reach_the_validator():
    assert scored('{"a":' * 100_000 + "1" + "}" * 100_000, {}).reason == "too_deep"
    with pytest.raises(SchemaError):
        compile_schema(_nested(5_000))
    with pytest.raises(SchemaError):
        compile_schema(_nested(600))


def test_the_deepest_reply_allowed_is_validated():
    schema = {"type": "array", "items": {"$ref": "#"}}
    assert scored("[" * 250 + "]" * 250, schema).value == 1.0
    assert scored("[" * 249 + "3" + "]" * 249, schema).value < 1.0


def test_equal_schemas_share_one_validator():
    assert compile_schema(json.loads(json.dumps(RECEIPT))) is compile_schema(RECEIPT)
    assert compile_schema({"const": 1}) is not compile_schema({"const": True})


def _nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema
