"""`rlpost score`: one JSON line per row, in order, whatever the rows and the reward do."""

import argparse
import json
import textwrap

import pytest

from rlpost.cli import score
from rlpost.errors import PluginError, UserError

REWARDS = """
import os, time
from rlpost.errors import JobError, RowError
from rlpost.types import Score

def judge(task, rollout, *, bonus=0.0):
    what = rollout.reply
    if what == "loop":
        while True: pass
    if what == "exit": os._exit(1)
    if what == "raise": raise KeyError("x")
    if what == "nan": return float("nan")
    if what == "row": raise RowError(f"row {task.id} has no colour")
    if what == "job": raise JobError("bonus is odd")
    if what == "slow": time.sleep(0.3)
    good = float(what == task.answer)
    reason = "ok" if good else "differs"
    return Score(value=min(1.0, good + bonus), parts={"same": good}, reason=reason)

def signed(task, rollout): return -2.5

def seen(task, rollout):
    what = [task.messages, task.meta, task.tools, rollout.messages[-1]]
    return Score(value=1.0, reason=repr(what))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "score_rewards.py").write_text(textwrap.dedent(REWARDS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, rows, *options, reward="score_rewards:judge"):
    """(lines, stderr) of the verb over `rows`: objects, or raw lines."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    with open("rows.jsonl", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    parser = argparse.ArgumentParser()
    score.register(parser.add_subparsers())
    args = parser.parse_args(["score", reward, "--rows", "rows.jsonl", *options])
    assert args.run(args) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_each_row_has_its_line_in_order(here, capsys):
    rows = [
        {"id": "a", "completion": "x", "answer": "x"},
        {"completion": "slow"},
        {"id": 7, "completion": "y", "answer": "x"},
    ]
    lines, err = run(capsys, rows)
    assert lines == [
        {"id": "a", "value": 1.0, "parts": {"same": 1.0}, "status": "ok", "reason": "ok"},
        {"id": "2", "value": 0.0, "parts": {"same": 0.0}, "status": "ok", "reason": "differs"},
        {"id": "7", "value": 0.0, "parts": {"same": 0.0}, "status": "ok", "reason": "differs"},
    ]
    assert err.startswith("3 rows (3 ok), mean 0.3333")


def test_failures_have_no_value_and_their_own_status(here, capsys):
    rows = [{"completion": w, "answer": "x"} for w in ("loop", "exit", "raise", "nan", "row", "x")]
    lines, err = run(capsys, rows, "--deadline", "0.3")
    statuses = [line["status"] for line in lines]
    assert statuses == ["timeout", "crashed", "error", "invalid_result", "bad_row", "ok"]
    assert all(line["value"] is None and line["parts"] == {} for line in lines[:-1])
    assert lines[2]["reason"] == "KeyError: 'x' (score_rewards.py, line 11)"
    assert lines[4]["reason"] == "row 5 has no colour (line 5)"
    assert "first failure 1:" in err


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("not json", "not JSON"),
        ('{"completion": "x"', "not JSON"),
        ('{"completion": "x", "answer": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"completion": "x", "answer": ' + "9" * 5000 + "}", "not JSON"),
        ("\udcff", "not JSON"),
        ("[1]", "the row is a list"),
        ("{}", "no 'completion'"),
        ('{"completion": null}', "no 'completion'"),
        ('{"completion": 3}', "neither text nor an assistant message"),
        ('{"completion": {"role": "user", "content": "x"}}', "not assistant"),
        ('{"completion": {"role": "assistant"}}', "neither content nor tool_calls"),
        ('{"completion": {"content": 4}}', "neither text nor a list"),
        ('{"completion": {"tool_calls": {}}}', "not a list"),
        ('{"completion": "x", "id": [1]}', "'id'"),
        ('{"completion": "x", "messages": 4}', "'messages'"),
        ('{"completion": "x", "tools": {}}', "'tools'"),
    ],
)
def test_a_malformed_row_is_a_bad_row_with_its_line(here, capsys, row, reason):
    good = {"completion": "x", "answer": "x"}
    lines, _ = run(capsys, [good, "", row, good])
    assert [line["status"] for line in lines] == ["ok", "bad_row", "ok"]
    assert [line["id"] for line in lines] == ["1", "3", "4"]
    assert reason in lines[1]["reason"] and lines[1]["reason"].endswith("(line 3)")
    assert lines[1]["value"] is None


def test_a_row_reaches_the_reward_whole(here, capsys):
    tools = [{"type": "function", "function": {"name": "f"}}]
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = {
        "prompt": "hello",
        "completion": {"role": "assistant", "content": None, "tool_calls": calls},
        "tools": tools,
        "colour": "red",
    }
    (line,), _ = run(capsys, [row], reward="score_rewards:seen")
    messages, meta, seen_tools, last = eval(line["reason"])
    assert messages == [{"role": "user", "content": "hello"}]
    assert meta == {"colour": "red"} and seen_tools == tools
    assert last["tool_calls"] == calls


def test_content_parts_are_joined(here, capsys):
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    (line,), _ = run(capsys, [{"completion": {"content": parts}, "answer": "xy"}])
    assert line["value"] == 1.0


def test_arguments_reach_the_reward(here, capsys):
    (line,), _ = run(capsys, [{"completion": "n", "answer": "x"}], "--args", '{"bonus": 0.25}')
    assert line["value"] == 0.25


def test_the_value_is_the_rewards_own(here, capsys):
    (line,), _ = run(
        capsys, [{"completion": "x"}], "--range", "-3", "1", reward="score_rewards:signed"
    )
    assert line["value"] == pytest.approx(-2.5)
    (line,), _ = run(capsys, [{"completion": "x"}], reward="score_rewards:signed")
    assert line["status"] == "invalid_result"


def test_the_summary_may_be_json(here, capsys):
    _, err = run(capsys, [{"completion": "x", "answer": "x"}, "oops"], "--json")
    told = json.loads(err)
    assert (told["rows"], told["statuses"], told["mean"]) == (2, {"ok": 1, "bad_row": 1}, 1.0)


@pytest.mark.parametrize(
    ("options", "reward", "message"),
    [
        (["--args", "{"], "score_rewards:judge", "--args is not JSON"),
        (["--args", "[1]"], "score_rewards:judge", "--args is a list"),
        (["--args", '{"bonsu": 1}'], "score_rewards:judge", "did you mean 'bonus'"),
        ([], "score_rewards:juge", "did you mean 'judge'"),
        ([], "lable", "did you mean 'label'"),
        (["--rows", "none.jsonl"], "score_rewards:judge", "none.jsonl"),
        (["--deadline", "0"], "score_rewards:judge", "positive"),
        (["--range", "1", "0"], "score_rewards:judge", "is empty"),
    ],
)
def test_a_wrong_call_is_the_users_mistake(here, capsys, options, reward, message):
    with pytest.raises(UserError, match=message) as caught:
        run(capsys, [{"completion": "x"}], *options, reward=reward)
    assert "\n" not in str(caught.value)


def test_an_argument_that_the_reward_refuses_is_the_users_mistake(here, capsys):
    with pytest.raises(PluginError, match="bonus is odd"):
        run(capsys, [{"completion": "job"}])


def test_many_rows_keep_their_order(here, capsys):
    rows = [{"completion": str(n % 3), "answer": "1"} for n in range(1000)]
    lines, _ = run(capsys, rows)
    assert [line["id"] for line in lines] == [str(n) for n in range(1, 1001)]
    assert [line["value"] for line in lines] == [float(n % 3 == 1) for n in range(1000)]


def test_a_grader_file_is_a_reward(here, capsys):
    grader = {
        "type": "string_check",
        "operation": "eq",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
    }
    (here / "grader.json").write_text(json.dumps(grader))
    lines, _ = run(capsys, [{"completion": "x", "answer": "x"}], reward="grader.json")
    assert lines[0]["value"] == 1.0


def test_csv_rows_are_read_as_well(here, capsys):
    (here / "rows.csv").write_text('id,completion,answer\nq,"a, b","a, b"\n')
    lines, _ = run(capsys, [], "--rows", "rows.csv")
    assert lines == [
        {"id": "q", "value": 1.0, "parts": {"same": 1.0}, "status": "ok", "reason": "ok"}
    ]
