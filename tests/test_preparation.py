"""From a job to tasks, limits and probes."""

import json
from pathlib import Path

import pytest

from rlpost.config import parse_job
from rlpost.errors import PluginError, RowError, UserError, UserErrors
from rlpost.policy.renderer import Renderer
from rlpost.preparation import (
    LEAST_REPLY,
    PROBE_TOKENS,
    PROBES,
    WITHOUT_GOLD,
    model_folder,
    open_env,
    placed,
    prepare,
    resolve_rewards,
)

MODEL = Path(__file__).parents[1] / "rlpost" / "template" / "model"
JOB = """[run]
name = "p"
gpus = "cpu"
[model]
path = "model"
max_length = 200
[data]
train = "rows.jsonl"
validation = 0.25
[[reward]]
use = "my_reward:judge"
"""
ROWS = [{"id": f"r{n}", "prompt": f"say {n}", "answer": f"word {n}"} for n in range(12)]


@pytest.fixture(scope="module")
def renderer():
    return Renderer(MODEL)


@pytest.fixture
def job(tmp_path):
    """Makes the job of a folder, with rows and --set."""
    (tmp_path / "model").symlink_to(MODEL)
    (tmp_path / "my_reward.py").write_text("def judge(task, rollout):\n    return 1.0\n")

    def make(*sets, rows=ROWS, text=JOB):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return parse_job(text, path=tmp_path / "job.toml", overrides=sets)

    return make


def test_no_task_is_on_both_sides_and_none_is_lost(job, renderer):
    prepared = prepare(job(), renderer=renderer)
    train, validation = ({t.id for t in side} for side in (prepared.train, prepared.validation))
    assert train & validation == set()
    assert train | validation == {f"r{n}" for n in range(12)}
    assert len(validation) == 3


def test_the_split_is_a_function_of_the_seed(job, renderer):
    first, again, other = (
        [t.id for t in prepare(job(f"run.seed={seed}")).validation] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_at_most_eval_rows_are_evaluated(job):
    assert len(prepare(job("eval.rows=2")).validation) == 2


def test_the_reply_limit_is_twice_the_golds_length(job, renderer):
    long = "word " * 30
    rows = [*ROWS, {"id": "long", "prompt": "x", "answer": long}]
    prepared = prepare(job(rows=rows), renderer=renderer)
    assert prepared.max_reply_tokens == 2 * renderer.count(long)


def test_short_golds_still_leave_room_for_a_reply_and_none_leaves_the_usual(job, renderer):
    tiny = [{**row, "answer": "a"} for row in ROWS]
    assert prepare(job(rows=tiny), renderer=renderer).max_reply_tokens == LEAST_REPLY
    bare = [{"id": row["id"], "prompt": row["prompt"]} for row in ROWS]
    made = prepare(job("model.max_length=900", rows=bare), renderer=None)
    assert made.max_reply_tokens == WITHOUT_GOLD


def test_what_the_job_says_of_the_reply_limit_counts(job, renderer):
    assert prepare(job("rollout.max_reply_tokens=33"), renderer=renderer).max_reply_tokens == 33


def test_the_longest_prompt_is_measured_in_the_models_own_tokens(job, renderer):
    prepared = prepare(job(), renderer=renderer)
    lengths = [
        len(renderer.prompt(task.messages)) for task in (*prepared.train, *prepared.validation)
    ]
    assert prepared.longest_prompt == max(lengths)


def test_probes_are_few_short_and_end_where_replies_stand(job, renderer):
    prepared = prepare(job(), renderer=renderer)
    assert len(prepared.probes) == PROBES
    assert all(2 < len(probe) <= PROBE_TOKENS for probe in prepared.probes)
    assert "word" in renderer.tokenizer.decode(prepared.probes[0])


def test_too_few_rows_are_refused(job):
    with pytest.raises(RowError, match="1 tasks are too few to train and validate"):
        prepare(job(rows=ROWS[:1]))


def test_ids_that_an_environment_gives_twice_are_refused(job, tmp_path):
    (tmp_path / "my_env.py").write_text(
        "from rlpost.env import SingleTurn\nfrom rlpost.types import Task\n"
        "def Twice(path='rows.jsonl'):\n"
        "    ask = [{'role': 'user', 'content': 'x'}]\n"
        "    return SingleTurn([Task(id='same', messages=ask)] * 3)\n"
    )
    text = JOB.replace('train = "rows.jsonl"\n', "") + '[environment]\nuse = "my_env:Twice"\n'
    with pytest.raises(RowError, match=r"two tasks have the id same.*make ids unique"):
        prepare(job(text=text))


def test_an_environments_files_lie_beside_the_job(job, tmp_path):
    (tmp_path / "my_env.py").write_text(
        "from rlpost.env import SingleTurn\n"
        "class Seen(SingleTurn):\n"
        "    def __init__(self, path, prompt):\n"
        "        super().__init__([]); self.path, self.prompt = path, prompt\n"
    )
    (tmp_path / "there.md").write_text("x")
    text = JOB.replace('train = "rows.jsonl"\n', "")
    env = open_env(
        job(text=text + '[environment]\nuse = "my_env:Seen"\npath = "d"\nprompt = "there.md"\n')
    )
    assert env.path == str(tmp_path / "d")
    assert env.prompt == str(tmp_path / "there.md")
    env = open_env(
        job(text=text + '[environment]\nuse = "my_env:Seen"\npath = "d"\nprompt = "Read {x}"\n')
    )
    assert env.prompt == "Read {x}"  # no file of that name: the text itself


def test_an_environment_that_refuses_its_arguments_is_placed(job, tmp_path):
    (tmp_path / "my_env.py").write_text(
        "def Picky(count=1):\n    raise ValueError('count must be even')\n"
    )
    text = JOB.replace('train = "rows.jsonl"\n', "") + '[environment]\nuse = "my_env:Picky"\n'
    with pytest.raises(PluginError) as caught:
        open_env(job(text=text))
    assert str(caught.value) == (
        "environment my_env:Picky refuses its arguments: count must be even (job.toml, line 11);"
        " see [environment]"
    )


def test_every_reward_that_does_not_resolve_is_told(job):
    text = JOB + '[[reward]]\nuse = "nothing"\n[[reward]]\nuse = "lable"\n'
    with pytest.raises(UserErrors) as caught:
        resolve_rewards(job(text=text))
    assert [error.line for error in caught.value.errors] == [13, 15]
    assert "did you mean 'label'?" in str(caught.value)


def test_a_grader_file_is_left_to_the_scoring_pool(job):
    resolve_rewards(job("reward.0.use=grader.json"))


def test_a_place_in_another_file_is_kept():
    where = {"place": "job.toml", "line": 3}
    told = placed(UserError("broken", place="reward.py", line=9, cure="mend"), where)
    assert str(told) == "broken (reward.py, line 9); mend"
    told = placed(PluginError("missing", place="/jobs", cure="write it"), where)
    assert str(told) == "missing, looked in /jobs (job.toml, line 3); write it"
    assert isinstance(told, PluginError)


def test_a_model_folder_is_looked_up_beside_the_job_first(job, tmp_path):
    assert model_folder(job()) == MODEL.resolve()
