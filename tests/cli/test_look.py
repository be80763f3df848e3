"""`rlpost samples` shows what a run directory holds, and help tells every verb."""

import json
from dataclasses import replace

import pytest
from fakes import group, rollout, task

from rlpost.cli import VERBS, main
from rlpost.run_directory import RunDirectory
from rlpost.types import Score


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    for update in (1, 2):
        directory.append_metrics(update, reward=0.5)
        bad = replace(rollout(task("a"), 0.0), reply="{", score=Score(value=0.0, reason="not_json"))
        good = replace(rollout(task("a"), 1.0), reply='{"total": "3"}')
        lost = rollout(task("a"), None)
        whole = replace(group(update, [1.0], of=task("a")), rollouts=(good, bad, lost))
        directory.append_rollouts(update, [whole])
    return directory.path


def shown(capsys, *arguments):
    assert main(["samples", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_replies_come_with_their_scores_newest_update_first(run, capsys):
    replies = shown(capsys, run)
    assert [r["update"] for r in replies] == [2, 2, 2, 1, 1, 1]
    assert [r["value"] for r in replies[:3]] == [1.0, 0.0, None]
    assert replies[1]["reason"] == "not_json"
    assert replies[0]["task"] == "a"


def test_replies_can_be_chosen_by_update_reason_and_score(run, capsys):
    assert {r["update"] for r in shown(capsys, run, "--update", 1)} == {1}
    assert {r["reply"] for r in shown(capsys, run, "--reason", "not_json")} == {"{"}
    assert {r["value"] for r in shown(capsys, run, "--below", 0.5)} == {0.0}
    assert len(shown(capsys, run, "--limit", 4)) == 4


def test_people_get_the_reply_as_it_is(run, capsys):
    assert main(["samples", str(run), "--limit", "3"]) == 0
    told = capsys.readouterr().out
    assert "update 2  task a  1.000" in told
    assert '    {"total": "3"}' in told
    assert "no score" in told


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["samples", str(tmp_path)]) == 2
    assert "is no run directory; name one that `rlpost run` wrote" in capsys.readouterr().err


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(verb in told for verb in VERBS)
    assert "rlpost init demo && rlpost run demo/job.toml" in told


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "--hight"], ["samples"]])
def test_a_wrong_command_line_is_the_users_mistake(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: rlpost" in capsys.readouterr().err
