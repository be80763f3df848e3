"""Bad input end to end: one line with file, line, field and cure, exit 2, nothing started."""

import json
import shutil
from pathlib import Path

import pytest

from rlpost.cli import main
from rlpost.cli.init import copy_demo

TEMPLATE = Path(__file__).parents[2] / "rlpost" / "template"
JOB = """[run]
name = "small"
gpus = "cpu"
[model]
path = "model"
max_length = 128
[data]
train = "rows.jsonl"
[[reward]]
use = "my_reward:judge"
[rollout]
max_reply_tokens = 16
"""
REWARD = "def judge(task, rollout):\n    return 1.0 if rollout.reply == task.answer else 0.0\n"


@pytest.fixture
def job(tmp_path):
    """A job that is right, over the demo's model: each test breaks one thing."""
    (tmp_path / "model").symlink_to(TEMPLATE / "model")
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "my_reward.py").write_text(REWARD)
    write_rows(tmp_path, [{"prompt": f"say {n}", "answer": f"word {n}"} for n in range(12)])
    return tmp_path


def write_rows(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def change(folder, old, new):
    text = (folder / "job.toml").read_text()
    assert old in text
    (folder / "job.toml").write_text(text.replace(old, new))


def refused(capsys, folder, *arguments, verb="check"):
    """What a verb says on stderr when it refuses the job: checked to be lines without traceback."""
    assert main([verb, str(folder / "job.toml"), *arguments]) == 2
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    assert told.out == ""
    lines = told.err.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


def test_a_right_job_passes_and_says_what_it_found(job, capsys):
    assert main(["check", str(job)]) == 0
    told = capsys.readouterr().out
    assert "10 training and 2 validation tasks" in told
    assert told.splitlines()[-1] == "ok: the job can run"


def test_a_metric_that_no_reward_measures_is_refused_with_the_nearest(job, capsys):
    (line,) = refused(capsys, job, "--set", "eval.metric=exact_f1")
    assert line == (
        "eval.metric = 'exact_f1' is not measured by this job's rewards (--set"
        " eval.metric=exact_f1); there are score, judge"
    )


@pytest.mark.parametrize("metric", ["exact_f1", "whole_row", "extraction.typed.total", "score"])
def test_what_the_demos_reward_measures_may_be_the_metric(tmp_path, metric):
    copy_demo(tmp_path / "demo")
    small = ("--set", "environment.count=20", "--set", f"eval.metric={metric}")
    assert main(["check", str(tmp_path / "demo"), *small]) == 0


def test_a_metric_with_a_typing_error_gets_a_suggestion(tmp_path, capsys):
    copy_demo(tmp_path / "demo")
    path = tmp_path / "demo" / "job.toml"
    text = path.read_text().replace("[eval]\n", '[eval]\nmetric = "exakt_f1"\n')
    path.write_text(text)
    line = text.splitlines().index('metric = "exakt_f1"') + 1
    (told,) = refused(capsys, tmp_path / "demo", "--set", "environment.count=20")
    assert f"job.toml, line {line}" in told
    assert told.endswith("did you mean exact_f1?")


def test_explain_prints_every_value_with_its_reason(job, capsys):
    assert main(["check", str(job), "--explain"]) == 0
    told = capsys.readouterr().out
    assert '* run.name = "small"' in told
    assert '  learner.loss = "cispo"   # token mean over the update, ratio capped' in told


def test_json_gives_one_object_of_notes_and_values(job, capsys):
    assert main(["check", str(job), "--explain", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    (seed,) = [value for value in told["values"] if value["key"] == "run.seed"]
    reason = "every random choice of the run derives from it"
    assert seed == {"key": "run.seed", "value": 1, "written": False, "reason": reason}


def test_json_gives_mistakes_as_one_object(job, capsys):
    change(job, "max_reply_tokens", "max_reply_token")
    assert main(["check", str(job), "--json"]) == 2
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert (answer["ok"], answer["exit"], told.err) == (False, 2, "")
    assert answer["errors"] == [
        "rollout.max_reply_token is not a field of [rollout] (job.toml, line 12);"
        " did you mean max_reply_tokens?"
    ]


# ── one mistake each ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", ["check", "run"])
def test_an_unknown_field(job, capsys, verb):
    change(job, "max_reply_tokens", "max_reply_token")
    (line,) = refused(capsys, job, verb=verb)
    assert "(job.toml, line 12); did you mean max_reply_tokens?" in line


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_job_file_that_is_not_there(tmp_path, capsys, verb):
    (line,) = refused(capsys, tmp_path, verb=verb)
    assert line.endswith("job.toml is not there; `rlpost init DIR` writes a job file")


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_rows_file_that_is_not_there(job, capsys, verb):
    (job / "rows.jsonl").unlink()
    (line,) = refused(capsys, job, verb=verb)
    assert "the rows rows.jsonl are not there" in line
    assert "(job.toml, line 8); name a .jsonl" in line


def test_a_prompt_template_that_is_not_there(job, capsys):
    change(job, 'train = "rows.jsonl"', 'train = "rows.jsonl"\nprompt = "promt.md"')
    (line,) = refused(capsys, job)
    assert "data.prompt = 'promt.md' is not there (job.toml, line 9)" in line


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"prompt": "x", ', "rows.jsonl, line 5"),
        ("[1, 2]", "rows.jsonl, line 5"),
        ('{"answer": "x"}', "rows.jsonl, line 5"),
        ('{"prompt": 3, "answer": "x"}', "rows.jsonl, line 5"),
        ('{"messages": [{"role": "user"}], "answer": "x"}', "rows.jsonl, line 5"),
    ],
)
def test_a_malformed_row(job, capsys, row, says):
    rows = [{"prompt": f"say {n}", "answer": "w"} for n in range(8)]
    write_rows(job, [*rows[:4], row, *rows[4:]])
    (line,) = refused(capsys, job)
    assert says in line


def test_two_rows_of_one_id(job, capsys):
    write_rows(job, [{"id": "same", "prompt": f"say {n}", "answer": "w"} for n in range(4)])
    lines = refused(capsys, job)
    assert all("same" in line and "rows.jsonl, line" in line for line in lines)


def test_a_row_without_the_column_that_the_reward_needs(job, capsys):
    change(job, 'use = "my_reward:judge"', 'use = "json_schema"')
    lines = refused(capsys, job)
    assert len(lines) == 1
    assert "json_schema" in lines[0]
    assert "schema" in lines[0].partition("json_schema")[2]
    assert "(job.toml, line 10)" in lines[0]


def test_an_answer_without_the_field_that_the_reward_scores(job, capsys):
    change(job, 'use = "my_reward:judge"', 'use = "extraction"\nfields = { total = "amount" }')
    change(job, "[[reward]]", 'answer = ["answer"]\n[[reward]]')
    lines = refused(capsys, job)
    assert "reward extraction scores total, which data.answer lacks (job.toml, line 12)" in lines[0]


def test_a_prompt_longer_than_the_limit(job, capsys):
    long = {"id": "tome", "prompt": "word " * 300, "answer": "w"}
    write_rows(job, [long, *({"prompt": f"say {n}", "answer": "w"} for n in range(8))])
    (line,) = refused(capsys, job)
    assert "1 of 9 prompts are longer than 112 tokens" in line
    assert "tome (" in line
    assert "set model.max_length to" in line


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothing_of_the_kind\n" + REWARD, "my_reward.py"),
        ("def judge(task, rollout:\n", "my_reward.py"),
        ("def juge(task, rollout):\n    return 0\n", "did you mean"),
        (REWARD.replace("(task, rollout)", "(task, rollout, *, fields)"), "needs the argument"),
        ("def judge(task, rollout):\n    return float('nan')\n", "nan"),
        ("def judge(task, rollout):\n    return 7.0\n", "7"),
        ("def judge(task, rollout):\n    return 'good'\n", "value is str, not a number"),
        ("def judge(task, rollout):\n    raise KeyError('total')\n", "KeyError"),
    ],
)
def test_a_reward_that_cannot_work(job, capsys, source, says):
    (job / "my_reward.py").write_text(source)
    (line,) = refused(capsys, job)
    assert says in line
    assert "my_reward" in line or "judge" in line
    assert "line" in line  # of the job, or of the reward's file


def test_a_reward_module_that_is_not_there(job, capsys):
    change(job, "my_reward:judge", "my_rewart:judge")
    (line,) = refused(capsys, job)
    assert "there is no module 'my_rewart'" in line
    assert "(job.toml, line 10); did you mean" in line


def test_a_misspelt_key_of_a_reward_table(job, capsys):
    change(job, 'use = "my_reward:judge"', 'use = "my_reward:judge"\nwieght = 2')
    (line,) = refused(capsys, job)
    assert "takes no argument wieght (job.toml, line 11); did you mean weight?" in line


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_model_that_is_not_there(job, capsys, verb):
    change(job, 'path = "model"', 'path = "modle"')
    (line,) = refused(capsys, job, verb=verb)
    assert "model.path modle is not there" in line
    assert "(job.toml, line 5); name a folder beside the job or a hub id" in line


def test_a_folder_that_holds_no_model(job, capsys):
    (job / "empty").mkdir()
    change(job, 'path = "model"', 'path = "empty"')
    (line,) = refused(capsys, job)
    assert "model.path empty holds no config.json (job.toml, line 5)" in line


def test_a_hub_model_that_is_not_in_the_cache(job, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change(job, 'path = "model"', 'path = "nobody/nothing"')
    (line,) = refused(capsys, job)
    assert "nobody/nothing is neither a folder nor on the hub" in line
    assert "(job.toml, line 5); download it first, or name its folder" in line


def bare_model(job, name="other"):
    """A copy of the demo's model to take parts out of."""
    (job / name).mkdir()
    for file in (TEMPLATE / "model").iterdir():
        shutil.copy(file, job / name / file.name)
    change(job, 'path = "model"', f'path = "{name}"')
    return job / name


def test_a_model_without_a_chat_template(job, capsys):
    model = bare_model(job)
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (line,) = refused(capsys, job)
    assert "has no chat template (job.toml, line 5); take an instruct model" in line


def test_a_model_without_a_tokenizer(job, capsys):
    model = bare_model(job)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    (line,) = refused(capsys, job)
    assert "has no tokenizer" in line or "no tokenizer could be loaded" in line
    assert "(job.toml, line 5)" in line


def test_a_template_that_does_not_show_tools_to_the_model(job, capsys):
    model = bare_model(job)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "find_order", "parameters": {}}}
    row = {"prompt": "say", "answer": "w", "tools": [tool]}
    write_rows(job, [{**row, "id": str(n)} for n in range(6)])
    (line,) = refused(capsys, job)
    assert "does not show tools to the model" in line
    assert "; take a model with a tool template" in line


def test_every_mistake_is_told_at_once(job, capsys):
    """Model, reward and rows are each wrong: one run of check finds them all."""
    change(job, 'path = "model"', 'path = "modle"')
    change(job, 'use = "my_reward:judge"', 'use = "my_reward:judeg"')
    rows = [{"prompt": f"say {n}", "answer": "w"} for n in range(4)]
    write_rows(job, [rows[0], "{", rows[1], "[]", *rows[2:]])
    lines = refused(capsys, job)
    assert len(lines) == 4
    for part in ("modle", "judeg", "rows.jsonl, line 2", "rows.jsonl, line 4"):
        assert sum(part in line for line in lines) == 1


# ── isolation ──────────────────────────────────────────────────────────────────────────────────


def test_untrusted_code_without_a_sandbox_is_refused_and_the_cure_works(job, capsys, monkeypatch):
    from rlpost.scoring import sandbox

    monkeypatch.setattr(sandbox, "missing_sandbox", lambda: "bubblewrap is not installed")
    untrusted = "[scoring]\ntrusted = false\n[rollout]"
    change(job, "[rollout]", untrusted)
    (line,) = refused(capsys, job)
    assert "(job.toml, line 12)" in line
    assert line.endswith("install bubblewrap, or write allow_untrusted = true under [scoring]")
    change(job, "trusted = false", "trusted = false\nallow_untrusted = true")
    assert main(["check", str(job)]) == 0
    assert "allowed by the job" in capsys.readouterr().out
