import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.strict_json import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    StrictJSONError,
    parse,
    unwrap,
)

any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab{[\\\"'"), inner),
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("NaN", "not_finite"),
        ("[-Infinity]", "not_finite"),
        ("1e999", "not_finite"),
        ("9" * 5_000, "long_number"),
        ('{"a": 1, "a": 1}', "duplicate_key"),
        ('[{"b": {"a": 1, "a": 2}}]', "duplicate_key"),
        (r'"\ud800"', "lone_surrogate"),
        (r'{"\udc00": 1}', "lone_surrogate"),
        ('"\ud800"', "lone_surrogate"),
        ("{'a': 1}", "not_json"),
        ('{"a": 1,}', "not_json"),
        ('{"a": 1} and so on', "not_json"),
        ("01", "not_json"),
        ("\u0663", "not_json"),
        ("\ufeff{}", "not_json"),
        ('"a\nb"', "not_json"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "too_deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "too_deep"),
        ("[" * 100_000, "too_deep"),
        ("[]" + " " * MAX_CHARACTERS, "too_long"),
    ],
)
def test_what_is_not_strict_json_is_refused_by_name(text, reason):
    with pytest.raises(StrictJSONError) as refusal:
        parse(text)
    assert refusal.value.reason == reason


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -2.5e3, true, null]}', {"a": [1, -2500.0, True, None]}),
        (" 1\n", 1),
        (r'"\ud83d\ude00"', "😀"),
        (r'"\\ud800"', "\\ud800"),
        ("9" * 400, int("9" * 400)),
    ],
)
def test_strict_json_is_read(text, value):
    assert parse(text) == value


def test_the_deepest_document_allowed_is_read():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse(text)) == text


def test_brackets_inside_strings_are_not_levels():
    assert parse(json.dumps("[{" * 1_000)) == "[{" * 1_000
    assert parse(json.dumps('\\"[' * 1_000)) == '\\"[' * 1_000
    assert parse("[" + ",".join(["{}"] * 1_000) + "]") == [{}] * 1_000


@given(any_json)
def test_every_finite_document_survives(value):
    for ascii_only in (True, False):
        read = parse(json.dumps(value, ensure_ascii=ascii_only))
        assert json.dumps(read) == json.dumps(value)


@given(st.text(st.characters() | st.sampled_from('[]{}",:\\u0dNaIf1eE-')))
def test_any_text_is_read_or_refused(text):
    try:
        json.dumps(parse(text), allow_nan=False).encode()
    except StrictJSONError as refusal:
        assert refusal.reason.isidentifier()


@pytest.mark.parametrize(
    "reply",
    [
        "[1]",
        "  [1]\n",
        "<think>[2] perhaps</think>\n[1]",
        "<think></think>[1]",
        "so [1] it is </think>[1]",
        "```json\n[1]\n```",
        "```\n[1]\n```",
        "```JSON [1]```",
        "```[1]```",
        "<think>x</think>```json\r\n[1]\r\n```\n",
    ],
)
def test_thinking_and_one_fence_come_off(reply):
    assert unwrap(reply) == "[1]"


@pytest.mark.parametrize(
    "reply",
    ["```json\n```json\n[1]\n```\n```", "here: ```json\n[1]\n```", "```json\n[1]", "[1]</think>x"],
)
def test_what_is_more_than_one_wrapping_stays(reply):
    with pytest.raises(StrictJSONError, match="not_json"):
        parse(unwrap(reply))


def test_a_closing_tag_inside_json_is_data():
    assert unwrap('{"tag": "</think>"}') == '{"tag": "</think>"}'


@pytest.mark.parametrize(
    ("reply", "options", "reason"),
    [
        ("<think>and on and on", {}, "open_thinking"),
        ("<think>x</think>[1]", {"thinking": "punish"}, "thinking"),
        ("x</think>[1]", {"thinking": "punish"}, "thinking"),
        ("```\n[1]\n```", {"fence": "punish"}, "fence"),
    ],
)
def test_wrappings_are_punished_where_the_job_says_so(reply, options, reason):
    with pytest.raises(StrictJSONError) as refusal:
        unwrap(reply, **options)
    assert refusal.value.reason == reason


def test_a_bare_reply_is_never_punished():
    assert unwrap("[1]", thinking="punish", fence="punish") == "[1]"
    # the template put <think></think> into the prompt, the model closed it: no thought of its own
    assert unwrap("</think>[1]", thinking="punish") == "[1]"
