"""Replies and schemas that are made to hurt, through every built-in reward in the pool: each gets
its score, quickly, and nothing is fetched."""

import json
import socket
import time

import pytest

from rlpost.reward import RewardSpec, recorded
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Task

MESSAGES = [{"role": "user", "content": "Read it."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
CATASTROPHE = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}},
    "additionalProperties": {"type": "array", "uniqueItems": True, "minItems": 30_000},
}
REWARDS = {
    "json_schema": (Task(id="1", messages=MESSAGES, schema=CATASTROPHE), {}),
    "extraction": (
        Task(id="1", messages=MESSAGES, answer={"a": "tea", "d": "2020-01-02", "t": "1.00"}),
        {"fields": {"a": "text", "d": "date", "t": "amount"}, "day_first": True},
    ),
    "tool_call": (
        Task(
            id="1",
            messages=MESSAGES,
            tools=TOOLS,
            answer={"calls": [{"name": "add", "arguments": {"a": [1]}}], "order": "any"},
        ),
        {},
    ),
    "label": (Task(id="1", messages=MESSAGES, answer="tea"), {"labels": ["tea", "coffee"]}),
    "math": (Task(id="1", messages=MESSAGES, answer="12"), {}),
    "text": (Task(id="1", messages=MESSAGES, answer="tea"), {"check": "similarity"}),
}
TEN_MB = 10_000_000
REPLIES = {
    "lists 100,000 deep": "[" * 100_000,
    "closed lists 100,000 deep": "[" * 100_000 + "]" * 100_000,
    "objects 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a catastrophic text": json.dumps({"a": "a" * 50_000 + "!"}),
    "thousands of unique objects": json.dumps({"b": [{"x": n} for n in range(20_000)]}),
    "a power tower": "\\boxed{9^{9^{9^{9^{9}}}}}",
    "a tower of factorials": "\\boxed{((((99!)!)!)!)!}",
    "a long integer": '{"a": ' + "9" * 1_000_000 + "}",
    "10 MB of text": "tea " * (TEN_MB // 4),
    "10 MB of JSON": json.dumps({"a": "x" * TEN_MB}),
    "10 MB of small calls": '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>' * 180_000,
    "10 MB of open braces": "{" * TEN_MB,
    "10 MB of fences": "```json\n" * (TEN_MB // 8),
    "10 MB of think tags": "<think>" * (TEN_MB // 7),
    "lone surrogates": '{"a": "\ud800", "d": "\udfff\\ud800"}',
    "NaN and duplicates": '{"a": NaN, "a": Infinity, "t": -Infinity}',
    "null bytes": "\x00" * 1000,
}
SECONDS = 10.0  # the default deadline, on a busy machine


@pytest.mark.parametrize("name", REWARDS)
async def test_every_hostile_reply_gets_its_score(name, record_property):
    task, arguments = REWARDS[name]
    spec = RewardSpec(use=name, name=name, arguments=arguments)
    failed = []
    async with ScoringPool([spec], deadline=SECONDS) as pool:
        for what, reply in REPLIES.items():
            start = time.monotonic()
            [[verdict]] = await pool.judge([recorded(task, reply)])
            took = time.monotonic() - start
            if verdict.score is None or not 0.0 <= verdict.score.value < 1.0 or took > SECONDS:
                failed.append((what, verdict.status, verdict.detail, verdict.score, took))
    total = len(REPLIES)
    record_property("figure", ("hostile input", "all judged", total - len(failed), total))
    assert not failed


async def test_a_reference_to_the_network_or_a_file_is_the_rows_mistake_and_never_fetched(tmp_path):
    (tmp_path / "any.json").write_text("{}")
    spec = RewardSpec(use="json_schema", name="json_schema")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        refs = [f"http://127.0.0.1:{port}/x.json", (tmp_path / "any.json").as_uri(), "/etc/passwd"]
        async with ScoringPool([spec], deadline=SECONDS) as pool:
            for ref in refs:
                task = Task(id="1", messages=MESSAGES, schema={"$ref": ref})
                [[verdict]] = await pool.judge([recorded(task, "1")])
                assert (verdict.score, verdict.cause) == (None, "row"), (ref, verdict)
        with pytest.raises(TimeoutError):
            server.accept()
