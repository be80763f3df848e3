"""OpenAI's fine-tuning files become a job that reads, grades and names what does not fit."""

import argparse
import asyncio
import json
import tomllib

import pytest

from rlpost.cli import init
from rlpost.config import read_job
from rlpost.errors import UserError
from rlpost.preparation import read_tasks, resolve_rewards
from rlpost.reward import recorded
from rlpost.scoring.pool import ScoringPool

EQUAL = {
    "type": "string_check",
    "name": "equal",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.reference_answer}}",
}
SOURCE = "def grade(sample, item):\n    return float(item['level'] == 'easy')\n"


@pytest.fixture
def folder(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": f"What is {n} + {n}?"}],
            "reference_answer": str(2 * n),
            "level": "easy",
        }
        for n in range(12)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(folder, grader, *options):
    file = folder / "grader.json"
    if grader is not None:
        file.write_text(grader if isinstance(grader, str) else json.dumps(grader))
    parser = argparse.ArgumentParser()
    init.register(parser.add_subparsers())
    arguments = ["init", folder / "job", "--from", "openai", folder / "train.jsonl", file]
    args = parser.parse_args([*map(str, arguments), *options])
    return args.run(args)


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_and_grader_become_a_job_that_grades_them(folder):
    multi = {
        "type": "multi",
        "graders": {"equal": EQUAL, "easy": {"type": "python", "name": "e", "source": SOURCE}},
        "calculate_output": "0.75 * equal + 0.25 * easy",
    }
    assert run(folder, multi) == 0
    job = read_job(folder / "job")
    resolve_rewards(job)
    tasks = read_tasks(job, job.data.train)
    assert [task.meta["reference_answer"] for task in tasks[:3]] == ["0", "2", "4"]

    async def values():
        async with ScoringPool(job.rewards, deadline=10.0) as pool:
            return await pool.score([recorded(tasks[1], reply) for reply in ("2", "3")])

    right, wrong = asyncio.run(values())
    assert (right.score.value, wrong.score.value) == (1.0, 0.25)
    assert right.score.parts == {"grader": 1.0, "grader.equal": 1.0, "grader.easy": 1.0}


def test_there_is_room_for_replies_although_no_gold_tells_their_length(folder):
    run(folder, EQUAL)
    assert read_job(folder / "job").model.max_length >= 512 + 256


def test_a_grader_inside_a_request_is_taken_out_of_it(folder):
    run(folder, {"method": {"type": "reinforcement", "reinforcement": {"grader": EQUAL}}})
    assert json.loads((folder / "job" / "grader.json").read_text()) == EQUAL


def test_a_grader_that_asks_a_model_gets_a_place_for_its_endpoint_and_time(folder, capsys):
    message = {"role": "user", "content": "Grade {{sample.output_text}}"}
    run(folder, {"type": "score_model", "name": "m", "model": "gpt-x", "input": [message]})
    written = tomllib.loads((folder / "job" / "job.toml").read_text())
    assert written["reward"][0]["endpoint"].startswith("http://")
    assert written["scoring"]["deadline"] > 30.0
    assert "gpt-x" in capsys.readouterr().out


def test_a_python_grader_is_compiled_but_not_run(folder):
    source = f"open({str(folder / 'ran')!r}, 'w')\n" + SOURCE
    assert run(folder, {"type": "python", "name": "p", "source": source}) == 0
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("grader", "words"),
    [
        (EQUAL | {"reference": "{{item.referense_answer}}"}, "did you mean reference_answer?"),
        (EQUAL | {"operation": "equals"}, "operation 'equals' is not known"),
        ({"type": "label_model"}, "types are string_check"),
        ({"type": "python", "name": "p", "source": "def grade(:"}, "grader 'p' is not Python"),
        ("{", "the grader is not JSON"),
        ([], "grader.json"),
    ],
)
def test_a_grader_that_does_not_fit_is_refused_in_one_line(folder, grader, words):
    assert words in refusal(folder, grader)
    assert not (folder / "job").exists()


def test_a_missing_grader_file_and_options_without_a_place_are_refused(folder):
    assert "cannot be read" in refusal(folder, None)
    assert "--answer has no place" in refusal(folder, EQUAL, "--answer", "level")


def test_the_folder_may_stand_behind_the_files(folder, monkeypatch):
    (folder / "grader.json").write_text(json.dumps(EQUAL))
    monkeypatch.chdir(folder)
    parser = argparse.ArgumentParser()
    init.register(parser.add_subparsers())
    args = parser.parse_args(["init", "--from", "openai", "train.jsonl", "grader.json", "job"])
    assert args.run(args) == 0
    assert (folder / "job" / "job.toml").exists()
    for words in ("init --from openai train.jsonl --answer a", "init"):
        args = parser.parse_args(words.split())
        with pytest.raises(UserError, match=r"needs a folder|is not understood"):
            args.run(args)


def test_a_grader_in_the_folder_of_the_job_stays_as_it_is(folder):
    text = json.dumps(EQUAL)
    (folder / "grader.json").write_text(text)
    parser = argparse.ArgumentParser()
    init.register(parser.add_subparsers())
    command = ["init", folder, "--from", "openai", folder / "train.jsonl", folder / "grader.json"]
    args = parser.parse_args([str(each) for each in command])
    assert args.run(args) == 0
    assert (folder / "grader.json").read_text() == text
