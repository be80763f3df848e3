"""The job as it runs: nothing is left to a default, and it reads back as TOML."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.cli.init import copy_demo
from rlpost.config import Job, read_job
from rlpost.policy.renderer import Renderer
from rlpost.preparation import model_folder, prepare
from rlpost.resolved_job import resolve, revision, write_toml


@pytest.fixture(scope="module")
def resolved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resolved") / "demo"
    copy_demo(folder)
    job = read_job(folder, overrides=["environment.count=20", "learner.warmup=3"])
    return resolve(prepare(job, renderer=Renderer(model_folder(job), thinking=False)))


def test_every_table_and_key_of_a_job_is_there(resolved):
    assert set(resolved) == set(Job.model_fields)
    for name, field in Job.model_fields.items():
        if name != "reward":
            keys = {info.alias or key for key, info in field.annotation.model_fields.items()}
            assert keys <= set(resolved[name]), name


def test_what_a_job_leaves_open_is_filled_in(resolved):
    assert resolved["learner"]["warmup"] == 3  # of the command line
    assert resolved["model"]["dtype"] == "float32"
    assert resolved["model"]["license"].startswith("Apache")
    assert resolved["rollout"]["staleness"] == 1
    for table, key in (
        ("learner", "learning_rate"), ("learner", "micro_batch_tokens"),
        ("rollout", "max_reply_tokens"), ("rollout", "max_running"), ("rollout", "kv_cache_mb"),
    ):  # fmt: skip
        assert resolved[table][key] > 0
    (reward,) = resolved["reward"]
    assert reward["name"] == "extraction"
    assert reward["fields"]["total"] == "amount"  # an argument of the reward's own


def test_it_reads_back_as_toml(resolved):
    back = tomllib.loads(write_toml(resolved))
    told = {
        name: {key: value for key, value in table.items() if value is not None}
        for name, table in resolved.items()
        if name != "reward"
    }
    assert {name: back[name] for name in told} == told
    assert back["reward"][0]["range"] == [0.0, 1.0]


PLAIN = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False),
              st.text(st.characters(codec="utf-8"))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip


@given(PLAIN)
def test_any_value_survives_toml(value):
    assert tomllib.loads(write_toml({"t": {"key": value}}))["t"]["key"] == value


def test_the_revision_is_known_only_in_the_hubs_cache(tmp_path):
    assert revision(tmp_path / "models--a--b" / "snapshots" / "0123abc") == "0123abc"
    assert revision(tmp_path / "model") is None
