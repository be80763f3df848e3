import json
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost import run_directory as files
from rlpost.errors import JobError, RunError
from rlpost.run_directory import (
    RunDirectory,
    read_evaluation,
    read_events,
    read_metrics,
    read_rollouts,
)
from rlpost.types import Group, Rollout, Score, Task, Trajectory


def rollout(task, reply="{}", value=0.5, version=3, **fields):
    tokens = Trajectory(
        token_ids=[1, 2, 3], loss_mask=[0, 1, 1], logprobs=[0, -1, -1], policy_version=version
    )
    score = None if value is None else Score(value=value, parts={"date": 1.0}, reason="wrong")
    ask = {"role": "user", "content": "read"}
    messages = [*task.messages, {"role": "assistant", "content": reply}]
    fields = {"messages": messages or [ask], "status": "ok"} | fields
    return Rollout(task=task, reply=reply, trajectory=tokens, score=score, **fields)


def task(name="7"):
    return Task(id=name, messages=[{"role": "user", "content": "read"}], answer={"date": "2020"})


def test_an_event_has_time_sequence_update_and_its_fields(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.append_event("started", workers=2)
    run.append_event("checkpoint", update=4)
    first, second = read_events(tmp_path / "run")
    assert (first["sequence"], first["update"], first["kind"], first["workers"]) == (
        0,
        None,
        "started",
        2,
    )
    assert (second["sequence"], second["update"]) == (1, 4)
    assert first["time"].endswith("Z") and first["time"] <= second["time"]


def test_the_sequence_goes_on_where_the_last_writer_stopped(tmp_path):
    RunDirectory(tmp_path).append_event("a", update=9)
    RunDirectory(tmp_path).supersede_after(0)
    run = RunDirectory(tmp_path)
    assert run.append_event("b")["sequence"] == 1  # superseded events keep their numbers


def test_a_line_of_metrics_has_update_reward_and_null_for_what_is_not_finite(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_metrics(1, reward=0.25, kl=math.nan, parts={"a": math.inf})
    assert read_metrics(tmp_path) == [
        {"update": 1, "reward": 0.25, "kl": None, "parts": {"a": None}}
    ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_an_evaluation_joins_the_line_of_its_update_whatever_comes_first(tmp_path):
    run = RunDirectory(tmp_path)
    evaluation = {"score": 0.5, "metrics": {"exact_f1": 0.4}, "parts": {"date": 1.0}, "rows": 1}
    run.append_evaluation(0, evaluation, [rollout(task())])
    run.append_metrics(1, reward=0.1)
    run.append_evaluation(1, evaluation, [rollout(task())])
    run.append_evaluation(2, evaluation, [])
    run.append_metrics(2, reward=0.2)
    assert read_metrics(tmp_path) == [
        {"update": 0, "reward": None, "eval": evaluation},
        {"update": 1, "reward": 0.1, "eval": evaluation},
        {"update": 2, "reward": 0.2, "eval": evaluation},
    ]
    [record] = read_evaluation(tmp_path, 1)
    assert record["task"] == "7"
    assert read_evaluation(tmp_path, 5) == []


def test_samples_tell_prompt_answer_and_every_reply_with_its_score(tmp_path):
    one = task()
    failed = rollout(one, reply="x", value=None, status="timeout", info={"error": "10 s"})
    groups = [Group(id=i, task=one, rollouts=[rollout(one), failed]) for i in range(3)]
    RunDirectory(tmp_path).append_rollouts(12, groups, limit=2)
    assert (tmp_path / "rollouts" / "update-00012.jsonl").exists()
    records = list(read_rollouts(tmp_path))
    assert [record["group"] for record in records] == [0, 1]
    assert records[0] | {"replies": []} == {
        "update": 12,
        "group": 0,
        "task": "7",
        "messages": [{"role": "user", "content": "read"}],
        "answer": {"date": "2020"},
        "replies": [],
    }
    good, bad = records[0]["replies"]
    assert good == {
        "reply": "{}",
        "value": 0.5,
        "parts": {"date": 1.0},
        "status": "ok",
        "statuses": {"date": "ok"},
        "reason": "wrong",
        "stop_reason": "stop",
        "policy_version": 3,
        "tokens": 2,
    }
    assert (bad["value"], bad["status"], bad["error"]) == (None, "timeout", "10 s")


def test_the_turns_of_a_conversation_are_kept(tmp_path):
    one = task()
    said = [*one.messages, *({"role": "assistant", "content": c} for c in "ab")]
    RunDirectory(tmp_path).append_rollouts(
        0, [Group(id=0, task=one, rollouts=[rollout(one, reply="b", messages=said)])]
    )
    [record] = read_rollouts(tmp_path, 0)
    assert record["replies"][0]["turns"] == [{"role": "assistant", "content": c} for c in "ab"]


@pytest.mark.parametrize("torn", ['{"update": 2, "rew', '{"update": 2}', "\0\0\0\0", "\0\0\n"])
def test_a_torn_last_line_is_skipped_by_readers_and_cut_off_by_the_next_writer(tmp_path, torn):
    RunDirectory(tmp_path).append_metrics(1, reward=0.1)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + torn)
    assert [line["update"] for line in read_metrics(tmp_path)] == [1]
    run = RunDirectory(tmp_path)
    assert path.read_text() == whole
    run.append_metrics(2, reward=0.2)
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2]


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(0, 200))
def test_a_crash_at_any_byte_loses_the_torn_line_alone(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("run")
    run = RunDirectory(folder)
    for update in range(1, 6):
        run.append_metrics(update, reward=0.5, note="é")
    path = folder / "metrics.jsonl"
    raw = path.read_bytes()[:cut]
    path.write_bytes(raw)
    whole = raw.count(b"\n")
    assert [line["update"] for line in read_metrics(folder)] == list(range(1, whole + 1))
    RunDirectory(folder).append_metrics(99, reward=1.0)
    assert [line["update"] for line in read_metrics(folder)] == [*range(1, whole + 1), 99]


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n{"upd\n{"update": 3}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2"):
        read_metrics(tmp_path)


def test_what_was_written_past_the_checkpoint_is_superseded_and_skipped(tmp_path):
    run, one = RunDirectory(tmp_path), task()
    for update in (1, 2, 3):
        run.append_metrics(update, reward=update / 10)
        run.append_event("updated", update=update)
        run.append_rollouts(update, [Group(id=update, task=one, rollouts=[rollout(one)])])
        run.append_evaluation(update, {"score": 0.5}, [rollout(one)])
    run.append_event("started")
    run.supersede_after(1)
    run.supersede_after(1)  # a crash in between is mended by doing it again
    run.append_metrics(2, reward=0.9)
    run.append_rollouts(2, [Group(id=77, task=one, rollouts=[rollout(one)])])
    assert [(m["update"], m["reward"]) for m in read_metrics(tmp_path)] == [(1, 0.1), (2, 0.9)]
    assert [e["update"] for e in read_events(tmp_path)] == [1, None]
    assert [r["group"] for r in read_rollouts(tmp_path)] == [1, 77]
    assert read_evaluation(tmp_path, 3) == []
    everything = read_metrics(tmp_path, superseded=True)
    assert [m.get("superseded", False) for m in everything] == [False, True, True, False]
    assert len(list((tmp_path / "rollouts").iterdir())) == 4  # nothing was deleted


def test_a_superseded_line_is_not_joined_by_later_values(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_metrics(2, reward=0.1)
    run.supersede_after(1)
    run.append_metrics(2, reward=0.2)
    run.append_metrics(2, eval={"score": 1.0})
    old, new = read_metrics(tmp_path, superseded=True)
    assert "eval" not in old
    assert new == {"update": 2, "reward": 0.2, "eval": {"score": 1.0}}


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.append_metrics(1, reward=0.1)
    real = files.os.write
    monkeypatch.setattr(files.os, "write", lambda fd, data: real(fd, data[:5]))
    with pytest.raises(RunError, match="free some space and resume"):
        run.append_metrics(2, reward=0.2)
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    run.append_metrics(2, reward=0.3)  # the update was not taken for written
    assert [m["reward"] for m in read_metrics(tmp_path)] == [0.1, 0.3]


def test_a_reader_never_sees_half_a_line_while_a_writer_writes(tmp_path):
    run = RunDirectory(tmp_path)
    done = threading.Event()

    def write():
        for update in range(200):
            run.append_metrics(update, text="x" * 5000)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if run._updates else ():
            json.loads(line)
    writer.join()
    assert len(read_metrics(tmp_path)) == 200


def test_numbers_of_other_libraries_and_odd_text_are_written_as_json(tmp_path):
    numpy = pytest.importorskip("numpy")
    run = RunDirectory(tmp_path)
    run.append_metrics(1, reward=numpy.float32(0.5), n=numpy.int64(3), v=numpy.ones(2), at=tmp_path)
    run.append_event("odd", text="\ud800 \u2028 é")
    [line] = read_metrics(tmp_path)
    assert (line["reward"], line["n"], line["v"], line["at"]) == (0.5, 3, [1.0, 1.0], str(tmp_path))
    assert read_events(tmp_path)[0]["text"] == "\ud800 \u2028 é"


def test_a_run_is_recognised_and_its_address_found(tmp_path):
    assert not files.is_run(tmp_path)
    run = RunDirectory(tmp_path)
    assert not files.is_run(tmp_path)
    run.append_event("started")
    assert files.is_run(tmp_path)
    assert files.read_address(tmp_path) is None
    run.write_address("http://127.0.0.1:9/metrics")
    assert files.read_address(tmp_path) == "http://127.0.0.1:9/metrics"


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot be made"):
        RunDirectory(tmp_path / "file" / "run")
