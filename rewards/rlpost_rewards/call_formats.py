"""Tool calls as models write them, decoded to names and arguments.

hermes     Qwen2.5, Qwen3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once per call
qwen3_xml  Qwen3.5: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function>…`
llama      3.1 on: `{"name": …, "parameters": {…}}`, several by `;`, after `<|python_tag|>` or bare
openai     `tool_calls` of the assistant message, or the same as JSON text
auto       whichever of these the reply shows

XML values carry no types and are coerced by the tool's schema; JSON values are never coerced.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlpost.types import JSON, Message
from rlpost_rewards.strict_json import StrictJSONError, parse, unwrap

FORMATS = ("auto", "hermes", "qwen3_xml", "llama", "openai")
MAX_CHARACTERS = 1_000_000
MAX_CALLS = 256  # begun calls that are looked at
OPEN, CLOSE, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_TAG = re.compile("|".join((OPEN, CLOSE, _FUNCTION)))
_END_MARKS = ("<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>")
_SYNTAX = re.compile(
    r"</?tool_calls?\b|</?function\b|</?parameter\b|<\|python_tag\||<\|tool_calls?|\[TOOL_CALLS\]"
    r"|[\"']tool_calls[\"']|[\"']function_call[\"']|[\"']function[\"']\s*:"
    r"|\A\W{0,20}[\"'](?:name|arguments|parameters|type)[\"']\s*:",
    re.IGNORECASE,
)
_AS_CALL = r"(?<![\w.]){0}\(\s*\w+\s*=|[\"']{0}[\"']\s*:\s*\{{"  # f(a=… or {"f": {…
_NAME_KEY = re.compile(r"[\"']name[\"']\s*:")
_ARGUMENTS_KEY = re.compile(r"[\"'](?:arguments|parameters)[\"']\s*:")
_CALL_KEYS = {"name", "function", "arguments", "parameters", "tool_calls"}
_INTEGER = re.compile(r"[+-]?\d{1,400}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,4})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One decoded call. `arguments` are JSON values."""

    name: str
    arguments: Mapping[str, JSON]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What a reply holds. `broken` counts the calls that were begun and cannot be read; `text` is
    the reply without thinking; `reason` says why it was not looked at ("" if it was)."""

    calls: Sequence[Call] = ()
    broken: int = 0
    text: str = ""
    reason: str = ""


def decode(
    reply: str,
    *,
    message: Message | None = None,
    tools: Mapping[str, Mapping[str, Any]] | None = None,
    format: str = "auto",
    thinking: str = "strip",
    fence: str = "strip",
) -> Decoded:
    """The calls of a reply, in order. `message` is the assistant message it came in, if any;
    `tools` maps names to parameter schemas. Whatever the reply is, nothing is raised."""
    structured = message.get("tool_calls") if message else None
    if structured and format in ("auto", "openai"):
        return _decoded([_openai_call(item) for item in _items(structured)], reply)
    if len(reply) > MAX_CHARACTERS:
        return Decoded(reason="too_long")
    try:
        text = unwrap(reply, thinking=thinking, fence=fence)
    except StrictJSONError as error:
        return Decoded(reason=error.reason)
    while text.endswith(_END_MARKS):
        text = text[: text.rindex("<|")].rstrip()
    found: Iterable[Call | None]
    if format == "llama":
        found = _llama(text)
    elif format == "openai":
        found = _json_calls(text)
    elif format == "auto" and not _TAG.search(text):
        found = _llama(text) if PYTHON_TAG in text else _json_calls(text) or _llama(text)
    else:
        found = _tagged(text, tools or {}, format)
    return _decoded(found, text)


def _decoded(begun: Iterable[Call | None], text: str) -> Decoded:
    found = list(islice(begun, MAX_CALLS))
    calls = [call for call in found if call is not None]
    return Decoded(calls=calls, broken=len(found) - len(calls), text=text)


def shows_call(text: str, names: Sequence[str] = ()) -> bool:
    """Whether `text` has the syntax of a call in any format, whole or broken: a tag, a name with
    arguments as JSON, `tool(key=` or nothing but `tool(…)` for one of the tools `names`."""
    if _SYNTAX.search(text) or (_NAME_KEY.search(text) and _ARGUMENTS_KEY.search(text)):
        return True
    head, bracket, _ = text.strip("`[]; \n").partition("(")
    for name in {*names, *(name.replace(".", "_") for name in names)}:
        if bracket and head.strip() == name:
            return True
        if name in text and re.search(_AS_CALL.format(re.escape(name)), text):
            return True
    return False


def same_name(predicted: str, gold: str, tools: Mapping[str, Any]) -> bool:
    """Equal, or equal but for dots written as underscores (OpenAI's form allows no dots), unless
    both are tools of their own."""
    if predicted == gold:
        return True
    if predicted.replace(".", "_") != gold.replace(".", "_"):
        return False
    return not (predicted in tools and gold in tools)


def find_tool(name: str, tools: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The parameters of tool `name`, dots and underscores being one; None if there is none."""
    if name in tools:
        return tools[name]
    return next((tools[other] for other in tools if same_name(name, other, tools)), None)


def _items(value: JSON) -> Sequence[JSON]:
    return value if isinstance(value, list | tuple) else [value]


# --- tags: hermes and qwen3_xml ------------------------------------------------------------------


def _tagged(
    text: str, tools: Mapping[str, Mapping[str, Any]], format: str
) -> Iterator[Call | None]:
    """A call, or None for a broken one, for each tag. A bare `<function=` counts as a call, as it
    does for vLLM's parser; what stands between calls is prose."""
    at = 0
    while tag := _TAG.search(text, at):
        at = tag.end()
        if tag.group() == CLOSE:
            yield None  # a call that ends and never began
        elif tag.group() == _FUNCTION:
            if format != "hermes":
                call, at = _xml_call(text, tag.start(), tools)
                yield call
        elif text.startswith(_FUNCTION, body := _skip_space(text, at)) and format != "hermes":
            call, at = _xml_call(text, body, tools)
            end = _skip_space(text, at)
            if text.startswith(CLOSE, end):
                at = end + len(CLOSE)
                yield call
            else:
                yield None
        else:
            calls, at = _hermes_calls(text, at, loose=format == "auto")
            yield from calls if format != "qwen3_xml" else [None]


def _hermes_calls(text: str, start: int, *, loose: bool) -> tuple[list[Call | None], int]:
    """The call of the tag that opened before `start`, and where it ends. `loose` takes ToolRL's
    dialect too: "parameters" for "arguments", and several calls in one tag, a line each."""
    keys = ("arguments", "parameters") if loose else ("arguments",)
    end = text.find(CLOSE, start)
    if end < 0:
        return [None], len(text)
    first_end = end
    for _ in range(4):  # a value may quote the closing tag
        try:
            return [_named_call(parse(text[start:end].strip()), keys)], end + len(CLOSE)
        except StrictJSONError:
            end = text.find(CLOSE, end + 1)
            if end < 0 or OPEN in text[first_end:end]:
                break
    calls: list[Call | None] = [None]
    lines = [line for line in text[start:first_end].splitlines() if line.strip()]
    if loose and 1 < len(lines) <= MAX_CALLS:
        found = [_named_call(_parsed(line.strip()), keys) for line in lines]
        calls = found if all(found) else calls
    return calls, first_end + len(CLOSE)


def _xml_call(
    text: str, start: int, tools: Mapping[str, Mapping[str, Any]]
) -> tuple[Call | None, int]:
    """The call that begins with `<function=` at `start`, and where it ends."""
    name_end = text.find(">", start)
    name = text[start + len(_FUNCTION) : name_end].strip() if name_end >= 0 else ""
    if not name or "<" in name:
        return None, start + len(_FUNCTION)
    properties = _properties(find_tool(name, tools) or {})
    arguments: dict[str, JSON] = {}
    is_broken = False
    at = _skip_space(text, name_end + 1)
    while text.startswith(_PARAMETER, at):
        key_end = text.find(">", at)
        value_end = text.find(_PARAMETER_END, key_end)
        if key_end < 0 or value_end < 0:
            return None, at + len(_PARAMETER)
        key = text[at + len(_PARAMETER) : key_end].strip()
        value = text[key_end + 1 : value_end].removeprefix("\n").removesuffix("\n")
        is_broken = is_broken or not key or key in arguments or _PARAMETER in value
        arguments[key] = coerce(value, properties.get(key)) if key in properties else value
        at = _skip_space(text, value_end + len(_PARAMETER_END))
    if not text.startswith(_FUNCTION_END, at):
        return None, at
    call = None if is_broken else Call(name=name, arguments=arguments)
    return call, at + len(_FUNCTION_END)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


# --- JSON: llama and openai ----------------------------------------------------------------------


def _llama(text: str) -> Iterator[Call | None]:
    before, tag, body = text.partition(PYTHON_TAG)
    body = (body if tag else before).strip()
    if not tag and body[:1] not in ("{", "["):
        return
    whole = _parsed(body)
    if whole is not None:
        begun = [item for item in _items(whole) if tag or _is_begun(item)]
        yield from (_named_call(item, ("parameters", "arguments")) for item in begun)
        return
    for part in re.split(r"(?<=\})\s*;\s*(?=\{)", body.rstrip("; \n")):
        value = _parsed(part)
        if value is not None or tag or shows_call(part):
            yield _named_call(value, ("parameters", "arguments"))


def _json_calls(text: str) -> list[Call | None]:
    """The calls of a text that is one JSON document of OpenAI's making, or a plain list of names
    with arguments; nothing if it is not JSON."""
    value = _parsed(text) if text[:1] in ("{", "[") else None
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    return [_openai_call(item) for item in _items(value) if _is_begun(item)]


def _is_begun(item: JSON) -> bool:
    """Whether a JSON value means to be a call; an answer in JSON does not."""
    return isinstance(item, Mapping) and not _CALL_KEYS.isdisjoint(item)


def _parsed(text: str) -> JSON:
    try:
        return parse(text)
    except StrictJSONError:
        return None


def _openai_call(item: JSON) -> Call | None:
    """{"type": "function", "function": {"name", "arguments": JSON text}}, or the inner part."""
    if isinstance(item, Mapping) and isinstance(item.get("function"), Mapping):
        item = item["function"]
        if "arguments" not in item:
            return None  # a tool copied from the prompt has parameters here
    if not isinstance(item, Mapping) or not {"arguments", "parameters"} & set(item):
        return None
    arguments = item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str):
        item = {**item, "arguments": _parsed(arguments) if arguments.strip() else {}}
        if not isinstance(item["arguments"], dict):
            return None
    return _named_call(item, ("arguments", "parameters"))


def _named_call(value: JSON, keys: Sequence[str]) -> Call | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    if "description" in value:
        return None  # a tool copied from the prompt
    given = next((value[key] for key in keys if key in value), None)
    arguments = {} if given is None else given
    if not value["name"].strip() or not isinstance(arguments, Mapping):
        return None
    return Call(name=value["name"].strip(), arguments=arguments)


# --- coercion of untyped values ------------------------------------------------------------------

_SAME_TYPE = {"float": "number", "dict": "object", "tuple": "array", "list": "array", "any": ""}
_SAME_TYPE |= {"int": "integer", "double": "number", "bool": "boolean", "str": "string"}


def type_names(schema: JSON) -> frozenset[str]:
    """The JSON types that a parameter's schema admits, BFCL's names among them; empty if it says
    nothing ("any")."""
    if not isinstance(schema, Mapping):
        return frozenset()
    names: set[str] = set()
    for kind in _items(schema.get("type") or []):
        name = str(kind).lower()
        names.add(_SAME_TYPE.get(name, name))
    for part in ("anyOf", "oneOf"):
        for inner in _items(schema.get(part) or []):
            names |= type_names(inner) or {""}
    return frozenset() if "" in names else frozenset(names)


def coerce(text: str, schema: JSON) -> JSON:
    """An untyped value as its schema wants it: "5" is 5 for an integer and "5" for a string. What
    does not fit stays text, and is then of the wrong type."""
    types, bare = type_names(schema), text.strip()
    if types == {"string"}:
        return text
    if not types:
        return _guess(text, bare, schema)
    if bare in ("null", "None") and ("null" in types or "string" not in types):
        return None
    if "boolean" in types and bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    if types & {"integer", "number"} and _INTEGER.fullmatch(bare):
        return int(bare)
    if "number" in types and _NUMBER.fullmatch(bare) and math.isfinite(float(bare)):
        return float(bare)
    wanted = tuple(kind for name, kind in (("array", list), ("object", dict)) if name in types)
    if wanted and isinstance(value := _parsed(bare), wanted):
        return value
    return text


def _guess(text: str, bare: str, schema: JSON) -> JSON:
    for member in _items(schema.get("enum") or []) if isinstance(schema, Mapping) else []:
        if str(member) == bare:
            return member
    value = _parsed(bare)
    if isinstance(value, str) or (value is None and bare != "null"):
        return text
    return value


def _properties(parameters: Mapping[str, Any]) -> Mapping[str, JSON]:
    properties = parameters.get("properties")
    return properties if isinstance(properties, Mapping) else {}
