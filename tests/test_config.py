"""The job file: defaults, and complaints that name file, line, field and cure."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.config import Job, explain, parse_job, read_job
from rlpost.errors import JobError, UserError, UserErrors
from rlpost.job_errors import key_lines

JOB = """[run]
name = "r"
updates = 5
[model]
path = "m"
[data]
train = "x.jsonl"
[[reward]]
use = "extraction"
fields = { a = "text" }
[rollout]
group_size = 4
"""


def parse(text=JOB, *sets, folder="/somewhere"):
    return parse_job(text, path=Path(folder) / "job.toml", overrides=sets)


def changed(old, new):
    assert old in JOB
    return JOB.replace(old, new)


def complaint(text, *sets):
    with pytest.raises(UserError) as caught:
        parse(text, *sets)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ── defaults ───────────────────────────────────────────────────────────────────────────────────

DEFAULTS = {  # design.md, sections 6 and 8
    "run.seed": 1, "run.updates": 150, "run.lockstep": False, "run.checkpoint_every": 10,
    "run.keep_checkpoints": 2, "run.keep_samples": 4, "run.metrics_port": 0,
    "run.gpus": {"rollout": 1, "learner": 1},
    "model.dtype": "auto", "model.thinking": False, "model.max_length": 4096,
    "model.engine": "auto", "model.license": None,
    "lora.rank": 16, "lora.alpha": 32.0,
    "data.train": "x.jsonl", "data.heldout": None, "data.validation": 0.15, "data.split_by": None,
    "data.prompt": None, "data.answer": None, "data.schema": None, "data.tools": None,
    "data.too_long": "refuse",
    "data.id": None, "environment.use": "jsonl",
    "reward[0].weight": 1.0, "reward[0].gate": False, "reward[0].range": (0.0, 1.0),
    "reward[0].name": None,
    "scoring.processes": 1, "scoring.deadline": 10.0, "scoring.memory_mb": 4096,
    "scoring.trusted": None, "scoring.allow_untrusted": False, "scoring.unscored_limit": 0.05,
    "rollout.tasks_per_update": 32, "rollout.group_size": 8, "rollout.staleness": None,
    "rollout.temperature": 1.0, "rollout.max_reply_tokens": None, "rollout.refill": False,
    "rollout.drop_after": None, "rollout.truncated": "lowest", "rollout.max_running": None,
    "rollout.kv_cache_mb": None,
    "learner.method": "lora", "learner.learning_rate": None, "learner.warmup": 5,
    "learner.clip_norm": 1.0, "learner.loss": "cispo", "learner.clip_low": None,
    "learner.clip_high": None, "learner.ratio_cap": 3.0, "learner.correction": "none",
    "learner.correction_cap": 3.0, "learner.sequence_guard": 0.5, "learner.baseline": "mean",
    "learner.scale": "batch", "learner.parts": "sum", "learner.min_spread": 0.02,
    "learner.kl": 0.0, "learner.kl_every": 10, "learner.entropy": 0.0,
    "learner.micro_batch_tokens": None, "learner.checkpoint_activations": None,
    "eval.every": 10, "eval.metric": "score", "eval.patience": 4, "eval.rows": 200,
    "health.on_critical": "pause", "health.non_finite_limit": 3, "health.proof_limit": 3,
}  # fmt: skip
WRITTEN = {"run.name": "r", "run.updates": 5, "model.path": "m", "data.train": "x.jsonl",
           "reward[0].use": "extraction", "rollout.group_size": 4}  # fmt: skip


def test_every_unwritten_value_has_its_default():
    told = {key: value for key, value, *_ in explain(parse())}
    assert told == DEFAULTS | WRITTEN


def test_what_the_user_wrote_is_told_from_what_is_default_and_every_default_has_a_reason():
    values = list(explain(parse()))
    assert {key for key, _, written, _ in values if written} == set(WRITTEN)
    assert [key for key, *_, reason in values if not reason and key not in WRITTEN] == []


def test_staleness_is_one_apart_and_zero_on_one_card():
    assert parse().staleness == 1
    assert parse(JOB, "run.gpus=cpu").staleness == 1
    assert parse(JOB, "run.gpus=colocated").staleness == 0
    assert parse(JOB, "run.gpus=colocated", "rollout.staleness=2").staleness == 2


def test_the_dtype_is_float32_on_the_cpu_and_bfloat16_on_gpus_unless_said():
    assert parse().dtype == "bfloat16"
    assert parse(JOB, "run.gpus=cpu").dtype == "float32"
    assert parse(JOB, "run.gpus=cpu", "model.dtype=bfloat16").dtype == "bfloat16"


def test_a_job_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse().run.updates = 3


def test_paths_of_a_job_lie_beside_it(tmp_path):
    (tmp_path / "job.toml").write_text(JOB)
    assert read_job(tmp_path).beside("x.jsonl") == tmp_path / "x.jsonl"
    assert read_job(tmp_path / "job.toml").folder == tmp_path


def test_other_keys_of_a_reward_are_its_arguments_and_its_name_is_the_functions():
    text = changed('use = "extraction"', 'use = "my_reward:fields"\nweight = 2\nday_first = true')
    (spec,) = parse(text).rewards
    assert spec.arguments == {"day_first": True, "fields": {"a": "text"}}
    assert (spec.name, spec.weight, spec.base_dir) == ("fields", 2.0, "/somewhere")
    (spec,) = parse(changed('"extraction"', '"graders/tone.json"')).rewards
    assert spec.name == "graders/tone"


# ── complaints ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("group_size = 4", "group_sise = 4",
         "rollout.group_sise is not a field of [rollout] (job.toml, line 12);"
         " did you mean group_size?"),
        ("[rollout]", "[rolout]", "rolout is not a field of a job (job.toml, line 11);"
         " did you mean rollout?"),
        ("group_size = 4", "group_size = 1", "rollout.group_size: input should be greater than or"
         " equal to 2, not 1 (job.toml, line 12); change it"),
        ("group_size = 4", 'group_size = "many"', "not 'many' (job.toml, line 12)"),
        ("updates = 5", 'gpus = "tpu"', "run.gpus: say {rollout = 1, learner = 1}, \"colocated\" or"
         " \"cpu\", not 'tpu' (job.toml, line 3)"),
        ("updates = 5", "gpus = { rolout = 1 }", "run.gpus.rolout is not a field of [run.gpus]"
         " (job.toml, line 3); did you mean rollout?"),
        ("updates = 5", "gpus = { rollout = 0 }", "run.gpus.rollout: input should be greater"),
        ("updates = 5", "gpus = { learner = 2 }", "run.gpus.learner = 2: more than one is not built"
         " yet (job.toml, line 3); set it to 1"),
        ('path = "m"', "", "model.path is missing (job.toml, line 4); add path under [model]"),
        ('use = "extraction"', "", "reward.0.use is missing (job.toml, line 8);"
         " add use under [[reward]]"),
        ("[[reward]]", "[reward]", "(job.toml, line 8); write [[reward]]"),
        ('use = "extraction"', 'use = "extraction"\nweight = -1', "(job.toml, line 10)"),
        ('use = "extraction"', 'use = "extraction"\nrange = [1, 0]',
         "range must be [low, high] with low < high (job.toml, line 8)"),
        ('name = "r"', 'name = "a/b"', "run.name: string should match"),
        ("[rollout]", "[rollout", "not TOML: Expected ']' at the end of a table declaration"
         " (job.toml, line 11); mend the line"),
        ("updates = 5", "updates = 5\nupdates = 6", "not TOML: Cannot overwrite a value"),
        ("[rollout]", "[sft]\nepochs = 2\n[rollout]", "[sft] (the SFT warm start) is not built yet"
         " (job.toml, line 11); leave [sft] out"),
        ("[data]", "[data]\nanswer = 3", "data.answer: input should be a valid string, not 3"
         " (job.toml, line 7)"),
        ('train = "x.jsonl"', "", "no rows (job.toml, line 6); say train"),
        ("group_size = 4", "max_reply_tokens = 4096", "leaves no room for a prompt in"
         " model.max_length (4096) (job.toml, line 12); lower it"),
        ("[rollout]", '[[reward]]\nuse = "extraction"\n[rollout]',
         "two rewards are named extraction (job.toml, line 11); give one a name"),
        ('use = "extraction"', 'use = "extraction"\nweight = 0',
         "every reward has weight 0 (job.toml, line 8)"),
        ("updates = 5", "lockstep = true\n[rollout]\ndrop_after = 3\n#", "lockstep awaits every"
         " group (job.toml, line 5); leave rollout.drop_after out"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_place_and_cure(old, new, says):
    text = changed(old, new)
    if new.startswith("lockstep"):
        text = text.replace("[rollout]\ngroup_size = 4\n", "")
    said = complaint(text)
    assert says in said
    assert "\n" not in said


def test_a_job_without_a_reward_is_told_how_to_write_one():
    text = JOB.replace('[[reward]]\nuse = "extraction"\nfields = { a = "text" }\n', "")
    assert complaint(text) == "reward is missing (job.toml); add [[reward]]"


def test_several_mistakes_are_told_at_once_each_with_its_line():
    text = changed("group_size = 4", 'group_sise = 4\n[learner]\nloss = "ppo"\nkl = -1')
    with pytest.raises(UserErrors) as caught:
        parse(text)
    assert [error.line for error in caught.value.errors] == [12, 14, 15]
    assert len(str(caught.value).splitlines()) == 3


def test_a_file_that_is_not_there_is_told_how_to_be_written(tmp_path):
    with pytest.raises(JobError, match=r"job\.toml is not there; `rlpost init DIR`"):
        read_job(tmp_path)


def test_a_file_that_is_not_text_is_said_to_be_unreadable(tmp_path):
    (tmp_path / "job.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="cannot be read"):
        read_job(tmp_path)


@given(st.text(max_size=60))
def test_whatever_is_in_the_file_the_complaint_is_a_users_mistake(text):
    with pytest.raises(UserError):
        parse(text)


# ── --set ──────────────────────────────────────────────────────────────────────────────────────


def test_set_takes_toml_values_and_bare_words():
    job = parse(
        JOB, "learner.learning_rate=3e-6", "run.name=other", "run.gpus={rollout=2,learner=1}",
        'data.answer=["a","b"]', "reward.0.weight=0.5", "run.lockstep=true", "data.split_by = a b",
    )  # fmt: skip
    assert job.learner.learning_rate == 3e-6
    assert (job.run.name, job.run.gpus.rollout, job.run.lockstep) == ("other", 2, True)
    assert job.data.answer == ["a", "b"]
    assert job.reward[0].weight == 0.5
    assert job.data.split_by == "a b"


def test_the_last_set_of_a_key_counts():
    assert parse(JOB, "run.updates=3", "run.updates=4").run.updates == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("nope", "--set nope is not table.key=value; such as --set learner.learning_rate=3e-6"),
        ("run", "is not table.key=value"),
        ("run.nam=3", "run.nam is not a field of [run] (--set run.nam=3); did you mean name?"),
        ("run.updates=0", "(--set run.updates=0)"),
        ("run.name.x=1", "run.name is not a table"),
        ("run.name.x.y=1", "run.name.x is not a table"),
        ("reward.7.weight=1", "there is no 7 in that list"),
        ("reward.x.weight=1", "there is no x in that list"),
        ("sft.epochs=2", "[sft] (the SFT warm start) is not built yet"),
        ("rollout.max_reply_tokens=9999", "(--set rollout.max_reply_tokens=9999); lower it"),
    ],
)
def test_a_mistake_in_set_is_blamed_on_it_and_not_on_a_line_of_the_file(given, says):
    said = complaint(JOB, given)
    assert says in said
    assert "line" not in said


# ── lines ──────────────────────────────────────────────────────────────────────────────────────


def test_lines_are_found_in_nested_and_list_tables():
    lines = key_lines(
        'a.b = 1\n[x.y]\nz = 1\n[[reward]]\nuse = "a"\n[reward.fields]\nc = "t"\n[[reward]]\n'
        '  "use" = "b"\n  [ reward.fields ] # of the second\nd = 1\n'
    )
    assert lines["a", "b"] == 1
    assert lines["x", "y", "z"] == 3
    assert lines["reward", "0"] == 4
    assert lines["reward", "0", "fields", "c"] == 7
    assert lines["reward", "1", "use"] == 9
    assert lines["reward", "1", "fields", "d"] == 11


def test_a_job_knows_where_its_keys_were_written():
    job = parse(JOB, "eval.rows=3")
    assert job.at("reward", "0", "fields") == {"place": "job.toml", "line": 10}
    assert job.at("reward", "0", "nothing") == {"place": "job.toml", "line": 8}  # its table's
    assert job.at("eval", "rows") == {"place": "--set eval.rows=3", "line": None}
    assert job.at("scoring") == {"place": "job.toml", "line": None}


def test_every_field_of_a_job_can_be_set():
    """A default that no --set reaches would be a constant in disguise."""
    for name, about in Job.model_fields.items():
        if name == "reward":
            continue
        for key, field in about.annotation.model_fields.items():
            said = complaint(JOB, f"{name}.{field.alias or key}={{oops=[]}}")
            assert name in said
