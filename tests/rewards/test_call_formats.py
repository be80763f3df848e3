"""Calls are decoded as models write them; what is broken is counted, and nothing raises."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.call_formats import FORMATS, coerce, decode, shows_call, type_names

TOOLS = {
    "book": {
        "properties": {
            "seats": {"type": "integer"},
            "price": {"type": "number"},
            "name": {"type": "string"},
            "window": {"type": "boolean"},
            "legs": {"type": "array", "items": {"type": "string"}},
            "card": {"type": "dict"},
        }
    }
}
ARGUMENTS = {"seats": 2, "name": "Ann"}
HERMES = '<tool_call>\n{"name": "book", "arguments": {"seats": 2, "name": "Ann"}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=book>\n<parameter=seats>\n2\n</parameter>\n"
    "<parameter=name>\nAnn\n</parameter>\n</function>\n</tool_call>"
)
LLAMA = '{"name": "book", "parameters": {"seats": 2, "name": "Ann"}}'
OPENAI = json.dumps(
    {"tool_calls": [{"id": "1", "type": "function",
                     "function": {"name": "book", "arguments": json.dumps(ARGUMENTS)}}]}
)  # fmt: skip
PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<function=book>", "<function=", "</function>",
     "<parameter=seats>", "</parameter>", '{"name": "book", "arguments": {}}', "{", "}", ";",
     "<|python_tag|>", "\n", "2", "text ",
     "<think>", "</think>", "```",
     '{"name": "book", "parameters": {"seats": 1}}', '"tool_calls"', "[", "]"]
)  # fmt: skip


def found(reply, format="auto", **more):
    decoded = decode(reply, tools=TOOLS, format=format, **more)
    return [(call.name, dict(call.arguments)) for call in decoded.calls], decoded.broken


@pytest.mark.parametrize(
    ("format", "reply"),
    [("hermes", HERMES), ("qwen3_xml", XML), ("llama", LLAMA), ("openai", OPENAI)],
)
def test_each_format_is_read_by_its_name_and_by_auto(format, reply):
    assert found(reply, format) == found(reply) == ([("book", ARGUMENTS)], 0)


@pytest.mark.parametrize(
    ("format", "reply"),
    [
        ("hermes", XML),
        ("qwen3_xml", HERMES),
        ("hermes", LLAMA),
        ("openai", HERMES),
        ("llama", HERMES),
    ],
)
def test_a_named_format_takes_no_other(format, reply):
    assert found(reply, format)[0] == []


@pytest.mark.parametrize(
    "reply",
    [
        HERMES + HERMES,
        f"I will book two.\n{HERMES}\nand\n{HERMES}",
        XML + "\n" + XML,
        XML + HERMES,
        f"{LLAMA}; {LLAMA}",
        f"<|python_tag|>{LLAMA};{LLAMA}<|eom_id|>",
        f"[{LLAMA}, {LLAMA}]",
        f"<think>{HERMES}</think>{HERMES}{HERMES}",
        f"```json\n[{LLAMA}, {LLAMA}]\n```",
        (XML + XML).replace("<tool_call>", "").replace("</tool_call>", ""),
    ],
)
def test_several_calls_come_in_order(reply):
    assert found(reply) == ([("book", ARGUMENTS)] * 2, 0)


def test_auto_takes_several_calls_in_one_tag_a_line_each():
    reply = f"<tool_call>\n{LLAMA}\n{LLAMA}\n</tool_call>"
    assert found(reply) == ([("book", ARGUMENTS)] * 2, 0)
    assert found(reply, "hermes") == ([], 1)
    assert found(f"<tool_call>\n{LLAMA}\nand\n</tool_call>") == ([], 1)


def test_the_messages_tool_calls_count_before_its_text():
    calls = json.loads(OPENAI)["tool_calls"]
    assert found("", message={"role": "assistant", "tool_calls": calls}) == (
        [("book", ARGUMENTS)],
        0,
    )
    assert found("", "hermes", message={"role": "assistant", "tool_calls": calls}) == ([], 0)
    broken = [{"function": {"name": "book", "arguments": '{"seats": '}}]
    assert found("", message={"role": "assistant", "tool_calls": broken}) == ([], 1)


@pytest.mark.parametrize(
    "reply",
    [
        HERMES[:-12],
        HERMES.replace("}}", "}"),
        HERMES.replace("2", "NaN"),
        HERMES.replace('"name": "Ann"', '"seats": 3'),
        '<tool_call>{"name": "book", "arguments": "seats"}</tool_call>',
        "<tool_call></tool_call>",
        "</tool_call>",
        XML[:-12],
        XML.replace("</function>", ""),
        XML.replace("</parameter>\n<", "<"),
        XML.replace("<parameter=name>", "<parameter=seats>"),
        XML.replace("book", ""),
        LLAMA[:-1],
        "<|python_tag|>book(seats=2)",
        '{"name": "book"}',
        json.dumps({"name": "book", "description": "books", "parameters": TOOLS["book"]}),
        json.dumps([{"type": "function", "function": {"name": "book", "parameters": {}}}]),
    ],
)
def test_a_broken_call_is_counted_and_not_decoded(reply):
    calls, broken = found(reply)
    assert calls == []
    assert broken >= 1


def test_a_broken_call_beside_a_whole_one_is_counted():
    assert found(HERMES + "<tool_call>{</tool_call>") == ([("book", ARGUMENTS)], 1)


@pytest.mark.parametrize(
    "reply", ["", "I cannot.", '{"answer": 5}', "[1, 2]", "{}", "<think>" + HERMES]
)
def test_what_is_no_call_is_neither_decoded_nor_broken(reply):
    assert found(reply) == ([], 0)


def test_a_value_may_hold_the_closing_tags():
    call = {"name": "book", "arguments": {"name": "a </tool_call> b"}}
    assert found(f"<tool_call>{json.dumps(call)}</tool_call>") == ([("book", call["arguments"])], 0)
    reply = XML.replace("Ann", "a </function> b")
    assert found(reply) == ([("book", {"seats": 2, "name": "a </function> b"})], 0)


def test_an_untyped_value_loses_one_line_break_at_each_end_and_no_more():
    assert found(XML.replace("\nAnn\n", "\n Ann\n\n"))[0][0][1]["name"] == " Ann\n"


def test_json_values_are_never_coerced():
    reply = HERMES.replace("2", '"2"')
    assert found(reply) == ([("book", {"seats": "2", "name": "Ann"})], 0)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("2", {"type": "integer"}, 2),
        ("2", {"type": "string"}, "2"),
        (" 2 ", {"type": "string"}, " 2 "),
        ("2", {"type": "float"}, 2),
        ("2.50", {"type": "number"}, 2.5),
        ("2.0", {"type": "integer"}, "2.0"),
        ("two", {"type": "integer"}, "two"),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("1", {"type": "boolean"}, "1"),
        ('["a"]', {"type": "array"}, ["a"]),
        ('["a"]', {"type": "tuple"}, ["a"]),
        ('["a"]', {"type": "string"}, '["a"]'),
        ('{"a": 1}', {"type": "dict"}, {"a": 1}),
        ('["a"]', {"type": "object"}, '["a"]'),
        ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("5", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 5),
        ("5", {"type": "any"}, 5),
        ("dataset", {"type": "any"}, "dataset"),
        ("5", {}, 5),
        ("3", {"enum": ["3", 4]}, "3"),
        ("4", {"enum": ["3", 4]}, 4),
        ("1e999", {"type": "number"}, "1e999"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
    ],
)
def test_untyped_values_become_what_the_schema_wants(text, schema, value):
    coerced = coerce(text, schema)
    assert coerced == value
    assert type(coerced) is type(value)


def test_bfcl_type_names_are_json_types():
    assert type_names({"type": "dict"}) == {"object"}
    assert type_names({"type": "float"}) == {"number"}
    assert type_names({"type": "tuple"}) == {"array"}
    assert type_names({"type": "any"}) == type_names({}) == type_names(None) == frozenset()


@pytest.mark.parametrize(
    "text",
    [
        HERMES, XML, LLAMA, OPENAI, "book(seats=2)", "[book()]", '{"book": {"a": 1}}', "<tool_call",
        "Sure: book(seats=2).", '{"name": "bo',
    ],
)  # fmt: skip
def test_call_syntax_shows(text):
    assert shows_call(text, ["book"])


@pytest.mark.parametrize(
    "text", ["No tool can book (sadly) that.", "I cannot.", '{"answer": 5}', "f(x) = 2x", "book"]
)
def test_prose_shows_no_call(text):
    assert not shows_call(text, ["book"])


@given(st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join), st.sampled_from(FORMATS))
def test_no_text_makes_decoding_fail(text, format):
    decoded = decode(text, tools=TOOLS, format=format)
    assert all(isinstance(call.name, str) and call.name for call in decoded.calls)
    assert decoded.broken >= 0


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece",
    ["<tool_call>", "<function=", "<tool_call><function=a>", "</tool_call>",
     "<tool_call>{",
     "<function=a><parameter=b>", " ", "};{", '"name":', "<tool_call>x</tool_call>", "<|eot_id|>",
     "book(", "[", '{"a":', "</think>"],
)  # fmt: skip
def test_a_megabyte_of_anything_is_read_at_once(piece):
    text = "x" + piece * (900_000 // len(piece)) + "x"
    for format in FORMATS:
        decode(text, tools=TOOLS, format=format)
    shows_call(text, ["book"])
