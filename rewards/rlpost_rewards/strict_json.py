"""One strict reader of JSON replies for every reward.

What the standard reader lets through is refused here: NaN and infinities, duplicate keys, lone
surrogates, numbers that do not fit, and documents whose size or depth would crash a validator
written in C or Rust (jsonschema-rs dies on 100,000 levels). Size and depth are measured on the
text, before anything is parsed.
"""

import json
import math
import re
from typing import Any

from rlpost.errors import JobError

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 250  # jsonschema-rs takes 255 levels of Python objects
WHITE_SPACE = " \t\r\n"  # JSON's own
MAX_DIGITS = 4_000  # of one integer; Python itself refuses more than 4,300

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]+|\\.)*+"?|[\[\]{}]', re.DOTALL)
_FENCE = re.compile(r"```(?:[\w+.-]*[ \t]*\r?\n|json\b)?", re.IGNORECASE)
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


class StrictJSONError(ValueError):
    """A reply that is not one strict JSON document. `reason` is one filterable word: empty,
    too_long, too_deep, not_json, duplicate_key, not_finite, long_number, lone_surrogate, and from
    `unwrap` thinking, open_thinking or fence."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def parse(text: str, *, max_characters: int = MAX_CHARACTERS, max_depth: int = MAX_DEPTH) -> Any:
    """The JSON value of `text`, all of it. Raises StrictJSONError and nothing else, whatever `text`
    is."""
    if len(text) > max_characters:
        raise StrictJSONError("too_long")
    if not text or text.isspace():
        raise StrictJSONError("empty")
    # fewer brackets than levels allowed: no need to look where they stand
    if text.count("[") + text.count("{") > max_depth and _depth(text) > max_depth:
        raise StrictJSONError("too_deep")
    if not text.isascii() and _LONE_SURROGATE.search(text):
        raise StrictJSONError("lone_surrogate")
    try:
        value = _DECODER.decode(text)
    except StrictJSONError:
        raise
    except (ValueError, RecursionError):
        raise StrictJSONError("not_json") from None
    if "\\u" in text and _ESCAPED_SURROGATE.search(text) and _has_lone_surrogate(value):
        raise StrictJSONError("lone_surrogate")
    return value


def unwrap(reply: str, *, thinking: str = "strip", fence: str = "strip") -> str:
    """The reply without a leading think block and without one code fence around all of the rest.

    "strip" takes them off; "punish" raises StrictJSONError("thinking") or ("fence") where there is
    one. A block that is opened and never closed always raises "open_thinking": there is no answer
    after it. Chat templates that put `<think>` into the prompt leave a reply with the closing tag
    only; all before it is thinking. Any other word for the two is a JobError.
    """
    _check_argument("fence", fence)
    text = strip_thinking(reply, thinking=thinking)
    if not text.startswith("```"):
        return text
    opening = _FENCE.match(text)
    if opening is None or len(text) < opening.end() + 3 or not text.endswith("```"):
        return text  # a fence that never closes is no JSON: the parser says so
    if fence == "punish":
        raise StrictJSONError("fence")
    return text[opening.end() : -3].strip(WHITE_SPACE)


def strip_thinking(reply: str, *, thinking: str = "strip") -> str:
    """The reply after its leading think block, white space around it taken off; see `unwrap`."""
    _check_argument("thinking", thinking)
    text = reply.strip(WHITE_SPACE)
    opened = text.startswith(_THINK_OPEN)
    # in {"tag": "</think>"} the tag is data: a closing tag alone counts where no JSON has begun
    if not opened and (_THINK_CLOSE not in text or text[:1] in '{["'):
        return text
    thought, closed, answer = text.partition(_THINK_CLOSE)
    if not closed:
        raise StrictJSONError("open_thinking")
    if thinking == "punish" and (opened or thought.strip()):
        raise StrictJSONError("thinking")
    return answer.strip(WHITE_SPACE)


def check_choice(name: str, value: str) -> None:
    """Raises ValueError unless `value` is "strip" or "punish", naming the argument."""
    if value not in ("strip", "punish"):
        raise ValueError(f'{name} = {value!r} is not known; write "strip" or "punish"')


def _check_argument(name: str, value: str) -> None:
    try:
        check_choice(name, value)
    except ValueError as error:
        raise JobError(str(error)) from None


def _depth(text: str) -> int:
    """The deepest nesting of brackets outside strings, at least the document's own."""
    level = deepest = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        character = text[match.start()]
        if character in "[{":
            level += 1
            deepest = max(deepest, level)
        elif character in "]}":
            level -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise StrictJSONError("duplicate_key")
    return value


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise StrictJSONError("not_finite")
    return number


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise StrictJSONError("long_number")
    return int(digits)


def _constant(name: str) -> Any:
    raise StrictJSONError("not_finite")


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_int=_integer, parse_constant=_constant
)
