"""From a job to the specifications of its parts."""

import json
import os
from pathlib import Path

import pytest
from fakes import rollout, task

from rlpost import assembly
from rlpost.config import parse_job
from rlpost.errors import ModelError

MODEL = Path(__file__).parents[1] / "rlpost" / "template" / "model"
JOB = """[run]
name = "a"
gpus = "cpu"
[model]
path = "model"
[environment]
use = "receipts"
[[reward]]
use = "extraction"
fields = { total = "amount" }
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(MODEL)
    for name in ("MKL_CBWR", "CUDA_VISIBLE_DEVICES"):  # what assembly sets is undone afterwards
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    return lambda *sets: parse_job(JOB, path=tmp_path / "job.toml", overrides=sets)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_an_engine_keeps_the_versions_that_staleness_needs(job, staleness):
    spec = assembly.engine_spec(job(f"rollout.staleness={staleness}"), MODEL)
    assert spec.keep == staleness + 2


def test_on_the_cpu_the_engine_is_float32_with_a_bounded_cache(job):
    spec = assembly.engine_spec(job(), MODEL)
    assert (spec.device, spec.dtype) == ("cpu", "float32")
    assert spec.kv_cache_bytes == 512 << 20  # vLLM's own default takes most of the machine
    assert assembly.engine_spec(job("rollout.kv_cache_mb=64"), MODEL).kv_cache_bytes == 64 << 20


def test_on_gpus_the_engine_is_bfloat16_and_shares_a_card_only_when_colocated(job):
    apart = assembly.engine_spec(job("run.gpus={rollout=1,learner=1}"), MODEL)
    shared = assembly.engine_spec(job("run.gpus=colocated"), MODEL)
    assert (apart.device, apart.dtype, apart.kv_cache_bytes) == ("cuda", "bfloat16", None)
    assert 0 < shared.memory_fraction < 0.5 < apart.memory_fraction < 1


def test_without_adapters_the_engine_serves_none(job):
    assert assembly.engine_spec(job(), MODEL).lora_rank == 16
    assert assembly.engine_spec(job("learner.method=full"), MODEL).lora_rank == 0


def test_the_learner_gets_what_the_job_says_and_the_defaults_of_its_device(job):
    spec = assembly.learner_spec(
        job("learner.loss=dapo", "learner.kl=0.1", "lora.rank=4", "run.seed=9", "learner.warmup=2")
    )
    assert (spec.loss, spec.kl_coefficient, spec.rank, spec.seed, spec.warmup) == (
        "dapo", 0.1, 4, 9, 2,
    )  # fmt: skip
    assert (spec.micro_batch_tokens, spec.checkpointing, spec.device) == (2048, False, "cpu")
    assert assembly.learner_spec(job("learner.loss=dr_grpo"), reply_limit=77).reply_limit == 77
    gpu = assembly.learner_spec(job("run.gpus=colocated"))
    assert (gpu.micro_batch_tokens, gpu.checkpointing, gpu.dtype) == (16384, True, "bfloat16")


def test_the_start_policy_is_kept_only_where_full_fine_tuning_measures_against_it(job):
    def kept(*sets):
        return assembly.learner_spec(job(*sets)).keep_start

    assert kept("learner.method=full", "learner.kl=0.1")
    assert not kept("learner.method=full")
    assert not kept("learner.kl=0.1")  # the start of an adapter is the base, or a frozen copy


def shaped_model(folder, *parameters):
    """A folder with one safetensors file that claims so many numbers (the file has holes)."""
    header, end = {}, 0
    for index, count in enumerate(parameters):
        header[f"w{index}"] = {
            "dtype": "U8", "shape": [count], "data_offsets": [end, end + count]
        }  # fmt: skip
        end += count
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.parametrize(("size", "rate"), [(5e8, 5e-5), (1.1e9, 5e-5), (4e9, 4e-5), (9e9, 3e-5)])
def test_the_default_learning_rate_falls_with_the_models_size(tmp_path, size, rate):
    model = shaped_model(tmp_path, int(size))
    assert assembly.count_parameters(model) == size
    assert assembly.default_learning_rate("lora", model) == rate
    assert assembly.default_learning_rate("full", model) == 1e-6


def test_what_the_job_says_of_the_learning_rate_counts(job):
    assert assembly.learner_spec(job("learner.learning_rate=2e-4")).learning_rate == 2e-4


def test_an_engine_that_is_not_installed_is_refused_and_auto_says_why_it_is_not_vllm(
    job, monkeypatch
):
    import rlpost.engine

    monkeypatch.setattr(rlpost.engine, "available", lambda: ("transformers",))
    with pytest.raises(ModelError, match="'vllm' is not installed"):
        assembly.choose_engine(job("model.engine=vllm"), MODEL)
    name, why = assembly.choose_engine(job(), MODEL)
    assert name == "transformers"
    assert why == "the transformers engine serves, since vLLM is not installed here"
    monkeypatch.setattr(rlpost.engine, "available", lambda: ("vllm", "transformers"))
    assert assembly.choose_engine(job(), MODEL) == ("vllm", "")


def test_the_metrics_of_a_reward_are_bound_to_its_arguments(job):
    (measure,) = assembly.task_metrics(job())
    one = task("a", answer={"total": "3.50"})
    right, wrong = (
        measure([one], [type(r)(**{**_fields(r), "reply": reply})])
        for r, reply in ((rollout(one, 1.0), '{"total": "3.50"}'), (rollout(one, 0.0), "{"))
    )
    assert right["exact_f1"] == 1.0
    assert wrong["exact_f1"] == 0.0


def _fields(value):
    return {name: getattr(value, name) for name in value.__slots__}


def test_a_worker_on_the_cpu_rounds_alike_whatever_else_runs(job):
    """Its adapters' products must not depend on the batch: exact resume rests on it."""
    assembly.build_worker(job())
    assert os.environ["MKL_CBWR"] == "AVX2,STRICT"
    assert os.environ["OMP_NUM_THREADS"] == "1"
