"""Environments over rows: right tasks from the public formats, one clear line for a wrong row."""

import json
import os
import re
from pathlib import Path

import pytest
from rlpost_envs.classify import Classify
from rlpost_envs.function_calls import FunctionCalls
from rlpost_envs.gsm8k import Gsm8k
from rlpost_envs.jsonl import Rows

from rlpost import plugins
from rlpost.env import Env
from rlpost.errors import JobError, RowError, UserErrors
from rlpost.types import Task

DATA = Path(os.environ.get("RLPOST_DATA", Path(__file__).parents[2] / "../shared/data"))


@pytest.fixture
def rows(tmp_path):
    """Writes objects (or raw lines) as a JSONL file and returns its path."""

    def write(*lines):
        file = tmp_path / "rows.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        file.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return str(file)

    return write


def data(name):
    if not (DATA / name).is_file():
        pytest.skip(f"no {name} under RLPOST_DATA ({DATA})")
    return str(DATA / name)


@pytest.mark.parametrize("name", plugins.names("rlpost.envs"))
def test_every_environment_of_ours_resolves_by_its_name(name):
    assert callable(plugins.resolve("rlpost.envs", name))


# jsonl


def test_rows_of_the_data_table_become_the_tasks():
    task = Task(id="1", messages=[{"role": "user", "content": "hi"}])
    env = Rows([task])
    assert isinstance(env, Env) and env.tasks() == [task]
    assert env.episode(task).start() == task.messages and env.episode(task).step("x").done


def test_a_file_of_ready_rows_keeps_answer_and_meta(rows):
    (task,) = Rows(path=rows({"prompt": "2 + 2?", "answer": "4", "source": "a"})).tasks()
    assert task.messages == [{"role": "user", "content": "2 + 2?"}]
    assert task.answer == "4" and task.meta["source"] == "a"


def test_rows_are_named_exactly_once(rows):
    with pytest.raises(JobError, match="no rows are named"):
        Rows()
    with pytest.raises(JobError, match="named twice"):
        Rows([], path=rows({"prompt": "x", "answer": "y"}))


def test_a_malformed_line_is_named_by_its_number(rows):
    with pytest.raises(RowError, match=r"line 2"):
        Rows(path=rows({"prompt": "x", "answer": "y"}, "{oops"))


# classify


def test_the_prompt_shows_the_text_and_all_labels_sorted(rows):
    env = Classify(
        path=rows({"text": "pay me", "label": "refund"}, {"text": "hi", "label": "greet"})
    )
    first = env.tasks()[0]
    assert env.labels == ["greet", "refund"]
    assert "Labels: greet, refund" in first.messages[0]["content"]
    assert first.messages[0]["content"].endswith("Text: pay me")
    assert first.answer == "refund" and first.meta["text"] == "pay me"


def test_a_row_may_have_several_labels(rows):
    env = Classify(path=rows({"text": "x", "label": ["b", "a"]}, {"text": "y", "label": "c"}))
    assert env.labels == ["a", "b", "c"]
    assert env.tasks()[0].answer == ["b", "a"]


def test_other_column_names_and_a_fixed_list_of_labels_are_kept(rows):
    path = rows({"said": "x", "intent": "b"})
    env = Classify(path=path, text="said", label="intent", labels=["b", "a"])
    assert "Labels: b, a" in env.tasks()[0].messages[0]["content"]


def test_braces_in_a_text_are_left_alone(rows):
    (task, _) = Classify(
        path=rows({"text": "{labels} {", "label": "a"}, {"text": "x", "label": "b"})
    ).tasks()
    assert task.messages[0]["content"].endswith("Text: {labels} {")


def test_all_wrong_rows_of_a_file_are_named_at_once(rows):
    path = rows({"text": "", "label": "a"}, {"text": "x"}, {"text": "y", "label": "c"})
    with pytest.raises(UserErrors) as raised:
        Classify(path=path, labels=["a", "b"])
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert "'text' holds no text" in lines[0] and "line 1" in lines[0]
    assert "'label' holds no label" in lines[1] and "line 2" in lines[1]
    assert "'c' is not in labels" in lines[2] and "line 3" in lines[2]


def test_one_label_is_no_choice(rows):
    with pytest.raises(JobError, match="at least two labels"):
        Classify(path=rows({"text": "x", "label": "a"}), labels=["a"])


def test_clinc150_gives_a_task_a_row_with_every_label_in_the_prompt():
    env = Classify(path=data("clinc150/val.jsonl"))
    tasks = env.tasks()
    assert len(tasks) == 3000 and len(env.labels) == 150
    assert all(label in tasks[7].messages[0]["content"] for label in env.labels)
    assert all(task.answer in env.labels for task in tasks)


# gsm8k


def test_the_gold_is_the_number_behind_the_mark_and_the_steps_are_kept(rows):
    path = rows({"question": "How many?", "answer": "1 + 1 = 2\n#### 1,200"})
    (task,) = Gsm8k(path=path).tasks()
    assert task.answer == "1,200" and task.meta["solution"] == "1 + 1 = 2"
    assert task.messages[0]["content"].startswith("How many?\n")


@pytest.mark.parametrize("answer", ["42", 42])
def test_an_answer_without_the_mark_is_the_gold(rows, answer):
    (task,) = Gsm8k(path=rows({"question": "q", "answer": answer})).tasks()
    assert task.answer == "42"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q"}, "'answer' holds no text"),
        ({"answer": "#### 3"}, "'question' holds no text"),
        ({"question": "q", "answer": "steps ####"}, "nothing follows ####"),
        ({"question": "q", "answer": True}, "'answer' holds no text"),
    ],
)
def test_a_wrong_problem_is_named_with_its_line(rows, row, words):
    with pytest.raises(RowError, match=rf"{words}.*line 2"):
        Gsm8k(path=rows({"question": "q", "answer": "#### 1"}, row))


def test_every_gold_of_gsm8k_is_a_number():
    tasks = Gsm8k(path=data("gsm8k/train.jsonl")).tasks()
    assert len(tasks) == 3000
    assert all(re.fullmatch(r"-?[\d,]*\.?\d+", task.answer) for task in tasks)


# function calls

FUNCTION = {
    "name": "geo.area",
    "description": "Area.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float", "enum": ["float"]},
            "type": {"type": "string"},
            "path": {"type": "array", "items": {"type": "tuple"}},
            "what": {"type": "any"},
        },
        "required": ["base"],
    },
}
ASKED = [{"role": "user", "content": "Area?"}]


def test_a_leaderboard_row_becomes_openai_tools_and_accepted_calls(rows):
    row = {
        "id": "simple_1",
        "question": [ASKED],
        "function": [FUNCTION],
        "ground_truth": [{"geo.area": {"base": [10, 10.0], "unit": ["m", ""]}}],
    }
    (task,) = FunctionCalls(path=rows(row)).tasks()
    calls = [{"name": "geo.area", "arguments": {"base": [10, 10.0], "unit": ["m", ""]}}]
    assert task.id == "simple_1" and task.messages == ASKED
    assert task.answer == {"calls": calls, "order": "any"}
    assert task.tools[0]["type"] == "function"
    properties = task.tools[0]["function"]["parameters"]["properties"]
    assert task.tools[0]["function"]["parameters"]["type"] == "object"
    assert properties["base"] == {"type": "number", "enum": ["float"]}
    assert properties["type"] == {"type": "string"}  # an argument that is called type
    assert properties["path"] == {"type": "array", "items": {"type": "array"}}
    assert properties["what"] == {}


def test_no_ground_truth_means_that_no_call_is_right(rows):
    row = {"question": [ASKED], "function": [FUNCTION], "ground_truth": []}
    (task,) = FunctionCalls(path=rows(row)).tasks()
    assert task.answer["calls"] == []


def test_an_openai_row_keeps_its_order_of_calls(rows):
    answer = {"calls": [{"name": "geo.area", "arguments": {"base": [1]}}], "order": "fixed"}
    row = {
        "messages": ASKED,
        "tools": [{"type": "function", "function": FUNCTION}],
        "answer": answer,
    }
    (task,) = FunctionCalls(path=rows(row)).tasks()
    assert task.answer == answer


def test_the_last_assistant_message_is_the_gold_where_no_answer_is_given(rows):
    called = {"function": {"name": "geo.area", "arguments": '{"base": 3}'}}
    last = {"role": "assistant", "content": None, "tool_calls": [called]}
    row = {"messages": [*ASKED, last], "tools": [FUNCTION]}
    (task,) = FunctionCalls(path=rows(row)).tasks()
    assert task.messages == ASKED
    assert task.answer["calls"] == [{"name": "geo.area", "arguments": {"base": [3]}}]


def test_a_system_prompt_is_put_in_front_only_where_there_is_none(rows):
    own = [{"role": "system", "content": "own"}, *ASKED]
    tail = {"tools": [FUNCTION], "answer": {"calls": []}}
    path = rows({"messages": ASKED, **tail}, {"messages": own, **tail})
    first, second = FunctionCalls(path=path, system="ours").tasks()
    assert first.messages == [{"role": "system", "content": "ours"}, *ASKED]
    assert second.messages == own


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": ASKED}, "'tools' is no list"),
        ({"messages": [], "tools": [], "answer": {"calls": []}}, "there are no messages"),
        ({"messages": ASKED, "tools": []}, "'answer' is not"),
        ({"messages": ASKED, "tools": [{}], "answer": {"calls": []}}, "a function has no name"),
        (
            {
                "messages": ASKED,
                "tools": [],
                "answer": {"calls": [{"name": "f", "arguments": {"x": 1}}]},
            },
            "f.x has no list of accepted values",
        ),
        ({"question": [ASKED], "function": [FUNCTION]}, "'ground_truth' is no list"),
        (
            {"question": [ASKED, ASKED], "function": [], "ground_truth": []},
            "'question' has 2 turns",
        ),
        (
            {"question": [ASKED], "function": [FUNCTION], "ground_truth": [{"a": {}, "b": {}}]},
            "is not {name:",
        ),
    ],
)
def test_a_wrong_tool_row_is_named_with_its_line(rows, row, words):
    good = {"messages": ASKED, "tools": [FUNCTION], "answer": {"calls": []}}
    with pytest.raises(RowError, match=re.escape(words)) as raised:
        FunctionCalls(path=rows(good, row))
    assert raised.value.line == 2


def test_an_unknown_order_is_refused(rows):
    with pytest.raises(JobError, match='write "any" or "fixed"'):
        FunctionCalls(path=rows({}), order="some")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("simple_python", 225),
        ("multiple", 115),
        ("parallel", 121),
        ("parallel_multiple", 113),
        ("irrelevance", 154),
    ],
)
def test_every_row_of_the_leaderboard_becomes_a_task(name, count):
    tasks = FunctionCalls(path=data(f"bfcl/{name}.jsonl")).tasks()
    assert len(tasks) == count
    offered = [{tool["function"]["name"] for tool in task.tools} for task in tasks]
    called = [{call["name"] for call in task.answer["calls"]} for task in tasks]
    assert all(c <= o for c, o in zip(called, offered, strict=True))
    assert all(bool(c) == (name != "irrelevance") for c in called)
    told = json.dumps([task.tools for task in tasks])
    assert '"type": "dict"' not in told and '"type": "float"' not in told
