import json
import os
import subprocess
import sys

import pytest
import torch

from rlpost.errors import RunError, UserError
from rlpost.learner import Learner, LearnerSpec
from rlpost.policy import export as exporting
from rlpost.policy.canary import mean_change, probe_sequences
from rlpost.policy.export import Surroundings, export
from tests.families import make

PROBES = probe_sequences(384, seed=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, base, tmp_path_factory):
    """(a learner whose weights are far from the base, its checkpoint)"""
    learner = Learner(LearnerSpec(model=str(base), method=request.param, rank=4))
    learner.start()
    learner.canary(seed=1)
    with torch.no_grad():
        for name, parameter in learner._trained.items():
            parameter.copy_(learner._canary[name])
    return learner, learner.save(tmp_path_factory.mktemp("run") / "learner")


def plain_logprobs(model):
    rows = []
    with torch.no_grad():
        for ids in PROBES:
            logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            picked = logits[:-1].gather(-1, torch.tensor(ids)[1:, None]).squeeze(-1)
            rows.append([0.0, *picked.tolist()])
    return rows


def test_merged_checkpoint_is_the_trained_policy_in_plain_transformers(trained, base, tmp_path):
    import transformers

    learner, checkpoint = trained
    summary = export(checkpoint, base, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged")
    assert mean_change(learner.logprobs(PROBES), plain_logprobs(model)) < 1e-4
    assert summary["change_from_base"] > 0.2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/merged")
    assert tokenizer.chat_template


def test_bf16_export_keeps_the_policy_within_its_tolerance(trained, base, tmp_path):
    _, checkpoint = trained
    summary = export(checkpoint, base, tmp_path / "out", dtype="bfloat16")
    assert summary["merged_dtype"] == "bfloat16"
    assert 0 < summary["difference"] < summary["tolerance"]
    assert json.loads((tmp_path / "out/merged/config.json").read_text())["dtype"] == "bfloat16"


def test_adapter_folder_is_the_trained_policy_in_plain_peft(base, tmp_path):
    import peft
    import transformers

    learner = Learner(LearnerSpec(model=str(base), rank=4))
    learner.start()
    learner.canary(seed=2)
    with torch.no_grad():
        for name, parameter in learner._trained.items():
            parameter.copy_(learner._canary[name])
    export(learner.save(tmp_path / "learner"), base, tmp_path / "out", merged=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out/adapter")
    assert mean_change(learner.logprobs(PROBES), plain_logprobs(model)) < 1e-5
    assert not (tmp_path / "out/merged").exists()


def test_a_merge_that_changes_nothing_is_caught(trained, base, tmp_path, monkeypatch):
    _, checkpoint = trained

    def copies_the_base(model, base, folder, **_):
        import shutil

        shutil.copytree(base, folder)
        return {torch.float32}

    monkeypatch.setattr(exporting, "_write_merged", copies_the_base)
    with pytest.raises(RunError, match="not the trained one"):
        export(checkpoint, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_everything_that_serving_needs_lies_beside_the_weights(trained, base, tmp_path):
    _, checkpoint = trained
    out = tmp_path / "out"
    export(
        checkpoint, base, out,
        surroundings=Surroundings(
            prompt="Read it.", schema={"type": "object"}, licence="Apache-2.0",
            chat_template_arguments={"enable_thinking": False},
            serve_command="vllm serve {model} --max-model-len 512",
        ),
    )  # fmt: skip
    assert (out / "prompt.md").read_text() == "Read it."
    assert json.loads((out / "schema.json").read_text()) == {"type": "object"}
    assert json.loads((out / "chat_template.json").read_text()) == {"enable_thinking": False}
    assert (out / "LICENCE").read_text() == "Apache-2.0\n"
    assert f"vllm serve {out / 'merged'} --max-model-len 512" in (out / "serve.sh").read_text()


def test_a_folder_with_something_else_in_it_is_left_alone(trained, base, tmp_path):
    _, checkpoint = trained
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(checkpoint, base, tmp_path / "out")
    assert (tmp_path / "out/thesis.tex").read_text() == "mine"


def test_an_export_can_be_made_again(trained, base, tmp_path):
    _, checkpoint = trained
    first = export(checkpoint, base, tmp_path / "out")
    assert export(checkpoint, base, tmp_path / "out") == first


@pytest.mark.slow
@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_plain_vllm_loads_what_was_exported(base, tmp_path, what):
    """In a process of its own, with vLLM's own classes: nothing of rlpost helps it."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    learner = Learner(LearnerSpec(model=str(base), rank=8))
    learner.start()
    learner.canary(seed=2)
    with torch.no_grad():
        for name, parameter in learner._trained.items():
            parameter.copy_(learner._canary[name])
    export(learner.save(tmp_path / "learner"), base, tmp_path / "out")
    replies = plain_vllm(tmp_path / "out/merged" if what == "merged" else base, tmp_path, what)
    for ids, (tokens, found) in zip(PROBES, replies, strict=True):
        assert len(tokens) == 8
        assert learner.logprobs([ids + tokens])[0][-8:] == pytest.approx(found, abs=1e-4)


PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter, probes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, seed=0,
          kv_cache_memory_bytes=64 << 20, enable_lora=bool(adapter), max_lora_rank=8)
request = LoRARequest("exported", 1, adapter) if adapter else None
outputs = llm.generate([{"prompt_token_ids": ids} for ids in probes],
                       SamplingParams(max_tokens=8, logprobs=0, temperature=0, ignore_eos=True),
                       lora_request=request, use_tqdm=False)
replies = [(list(o.outputs[0].token_ids), o.outputs[0].logprobs) for o in outputs]
print("FOUND", json.dumps([
    [tokens, [row[token].logprob for row, token in zip(rows, tokens)]] for tokens, rows in replies
]))
"""


def plain_vllm(model, folder, what):
    adapter = str(folder / "out/adapter") if what == "adapter" else ""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_VLLM, str(model), adapter, json.dumps(PROBES)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("FOUND "))
