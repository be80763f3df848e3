import json

import pytest
import torch
from safetensors.torch import load as load_payload
from safetensors.torch import load_file

from rlpost.errors import ModelError
from rlpost.policy import lora, publish
from rlpost.policy.model import PolicyModel, checkpoint_names, lay_out, load
from rlpost.policy.proof import BASE, bit_sum
from tests.families import FAMILIES, make, vision_language

SEQUENCES = [[5, 6, 7, 8, 9], [100, 20, 30]]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("qwen3"))


def trained(folder, *, alpha=32.0, dtype="float32"):
    wrapped = lora.attach(load(folder, dtype=dtype), rank=4, alpha=alpha)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def logprobs(wrapped):
    with torch.no_grad():
        return PolicyModel(wrapped.get_base_model()).forward(lay_out(SEQUENCES))[0]


def test_plain_peft_computes_the_same_policy_from_a_publication(folder, tmp_path):
    import peft

    wrapped = trained(folder)
    made = publish.publish_lora(wrapped, version=3, dtype=torch.float32, base_sum=7)
    (tmp_path / "adapter_model.safetensors").write_bytes(made.payload)
    (tmp_path / "adapter_config.json").write_text(json.dumps(made.adapter_config))
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    assert (logprobs(again) - logprobs(wrapped)).abs().max() < 2e-5
    assert (made.version, made.kind, made.fingerprint[BASE]) == (3, "lora", 7)


def test_the_engines_own_scaling_is_one(qwen3):
    made = publish.publish_lora(trained(qwen3), version=0, dtype=torch.float32, base_sum=0)
    assert made.adapter_config["lora_alpha"] == made.adapter_config["r"] == 4
    assert made.adapter_config["use_rslora"] is False


def test_the_scaling_is_multiplied_in_fp32_before_the_cast(qwen3):
    wrapped = trained(qwen3, alpha=12.0)  # scaling 3: rounding first would give other bits
    name, layer = next(lora.layers(wrapped))
    tensors = publish.adapter_tensors(wrapped, dtype=torch.bfloat16)
    b = layer.lora_B["default"].weight
    assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], (b * 3).bfloat16())
    assert not torch.equal((b * 3).bfloat16(), b.bfloat16() * 3)


def test_the_fingerprint_is_that_of_the_payload(qwen3):
    wrapped = trained(qwen3)
    for dtype in (torch.float32, torch.bfloat16):
        made = publish.publish_lora(wrapped, version=0, dtype=dtype, base_sum=1)
        tensors = load_payload(made.payload)
        assert {t.dtype for t in tensors.values()} == {dtype}
        expected = {name: bit_sum(tensor) for name, tensor in tensors.items()}
        assert made.fingerprint == {**expected, BASE: 1}
        assert len(tensors) == 28


def test_a_full_publication_is_the_checkpoint_and_the_head(folder):
    model, names = load(folder), checkpoint_names(folder)
    made = publish.publish_full(model, names, version=1, dtype=torch.float32)
    payload, file = load_payload(made.payload), load_file(folder / "model.safetensors")
    assert set(payload) == {*file, "lm_head.weight"}
    for name, tensor in file.items():
        assert torch.equal(payload[name], tensor), name
    if "lm_head.weight" not in file:  # the head is tied, and engines keep a copy of it
        assert torch.equal(payload["lm_head.weight"], file["model.embed_tokens.weight"])
    assert made.fingerprint == {name: bit_sum(tensor) for name, tensor in payload.items()}


def test_a_publication_does_not_change_when_the_learner_goes_on(qwen3):
    model, names = load(qwen3), checkpoint_names(qwen3)
    tensors = publish.full_tensors(model, names, dtype=torch.float32)
    before = publish.fingerprint(tensors)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert publish.fingerprint(tensors) == before
    assert publish.fingerprint(publish.full_tensors(model, names, dtype=torch.float32)) != before


def test_the_sum_of_the_base_counts_the_tied_head_and_every_tensor(folder):
    model, names = load(folder), checkpoint_names(folder)
    file = load_file(folder / "model.safetensors")
    file.setdefault("lm_head.weight", file["model.embed_tokens.weight"])
    for dtype in (torch.float32, torch.bfloat16):
        expected = sum(bit_sum(tensor.to(dtype)) for tensor in file.values()) % 2**64
        assert publish.sum_base(model, names, dtype=dtype) == expected


def test_a_vision_language_class_is_published_under_its_checkpoints_names(tmp_path):
    folder = vision_language(tmp_path)
    model, names = load(folder), checkpoint_names(folder)
    tensors = publish.full_tensors(model, names, dtype=torch.float32)
    assert set(names) <= set(tensors)
    assert any(name.startswith("model.language_model.layers.") for name in names)
    wrapped = lora.attach(model, rank=4)
    adapter = publish.adapter_tensors(wrapped, dtype=torch.float32)
    assert all(n.startswith("base_model.model.model.language_model.layers.") for n in adapter)


def test_a_tensor_that_the_loaded_model_does_not_know_is_named(qwen3):
    with pytest.raises(ModelError, match=r"model\.layers\.9\.fused"):
        publish.full_tensors(load(qwen3), ["model.layers.9.fused"], dtype=torch.float32)
