import json

import pytest
import torch
from torch import nn

from rlpost.errors import ModelError
from rlpost.policy import lora
from rlpost.policy.model import PolicyModel, lay_out, load
from tests.families import FAMILIES, make, vision_language

SEQUENCES = [[5, 6, 7, 8, 9], [100, 20, 30]]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("qwen3"))


def test_every_linear_layer_of_the_language_model_is_reached(folder):
    model = load(folder)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    report = lora.coverage(lora.attach(model, rank=4))
    assert list(report.reached) == linears
    assert report.missed == ()
    assert report.left_out == {"lm_head": "the head, not asked for"}


def test_the_hybrids_delta_net_projections_are_reached(tmp_path):
    report = lora.coverage(lora.attach(load(make("qwen3_5", tmp_path)), rank=4))
    mixing = {name.rsplit(".", 1)[-1] for name in report.reached if "linear_attn" in name}
    assert mixing == {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}


def test_the_vision_tower_is_left_alone(tmp_path):
    model = load(vision_language(tmp_path))
    report = lora.coverage(lora.attach(model, rank=4))
    assert not any("visual" in name for name in report.reached)
    assert any("visual" in name for name in report.left_out)
    assert report.missed == ()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and not any("visual" in name for name in trained)


def test_a_missed_linear_is_reported(qwen3):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    report = lora.coverage(peft.get_peft_model(load(qwen3), config))
    assert len(report.missed) == 10
    assert "model.layers.0.mlp.up_proj" in report.missed


def test_a_fresh_adapter_changes_nothing_and_every_part_of_it_learns(folder):
    plain = PolicyModel(load(folder)).forward(lay_out(SEQUENCES))[0]
    wrapped = lora.attach(load(folder), rank=4)
    found = PolicyModel(wrapped.get_base_model()).forward(lay_out(SEQUENCES))[0]
    assert torch.equal(found, plain)
    found.sum().backward()
    for name, parameter in wrapped.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        if "lora_B" in name:
            assert parameter.grad.abs().max() > 0, name


def test_the_adapter_is_fp32_over_a_bf16_base(qwen3):
    wrapped = lora.attach(load(qwen3, dtype="bfloat16"), rank=4)
    dtypes = {("lora_" in name, p.dtype) for name, p in wrapped.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    logprobs, _ = PolicyModel(wrapped.get_base_model()).forward(lay_out(SEQUENCES))
    logprobs.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)


def test_the_same_seed_draws_the_same_adapter(qwen3):
    first, second, other = (
        dict(lora.attach(load(qwen3), rank=4, seed=seed).named_parameters()) for seed in (1, 1, 2)
    )
    name = next(n for n in first if "lora_A" in n)
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_attaching_leaves_the_global_generator_alone(qwen3):
    model = load(qwen3)
    torch.manual_seed(3)
    lora.attach(model, rank=4, seed=9)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_an_imported_adapter_gives_the_policy_it_was_saved_with(qwen3, tmp_path):
    wrapped = lora.attach(load(qwen3), rank=4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = PolicyModel(wrapped.get_base_model()).forward(lay_out(SEQUENCES))[0]
    wrapped.save_pretrained(tmp_path)
    again = lora.attach(load(qwen3), adapter=tmp_path)
    found = PolicyModel(again.get_base_model()).forward(lay_out(SEQUENCES))[0]
    assert torch.equal(found, expected)
    assert any(p.requires_grad for p in again.parameters())


def test_an_adapter_of_another_shape_is_refused_in_one_line(qwen3, tmp_path):
    other = make("qwen2", tmp_path / "other")
    lora.attach(load(other), rank=4).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit") as caught:
        lora.attach(load(qwen3), adapter=tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_an_adapter_that_would_be_loaded_in_part_only_is_refused(qwen3, tmp_path):
    from safetensors.torch import load_file, save_file

    lora.attach(load(qwen3), rank=4).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="only in one of them"):
        lora.attach(load(qwen3), adapter=tmp_path)


def test_adapters_with_more_than_lora_are_refused(qwen3, tmp_path):
    lora.attach(load(qwen3), rank=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["use_dora"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not plain LoRA"):
        lora.attach(load(qwen3), adapter=tmp_path)


def test_an_adapter_folder_that_is_not_there_is_named(qwen3, tmp_path):
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        lora.attach(load(qwen3), adapter=tmp_path / "nowhere")


def test_an_adapter_on_a_tied_head_is_refused(qwen3):
    with pytest.raises(ModelError, match="tied"):
        lora.attach(load(qwen3), head=True)


def test_an_untied_head_gets_its_adapter_when_asked(tmp_path):
    wrapped = lora.attach(load(make("llama", tmp_path)), head=True, rank=4)
    assert "lm_head" in lora.coverage(wrapped, head=True).reached
    batch = lay_out(SEQUENCES)
    with torch.no_grad():
        before = PolicyModel(wrapped.get_base_model()).forward(batch)[0]
        layer = dict(lora.layers(wrapped))["lm_head"]
        layer.lora_B["default"].weight.normal_()
        after = PolicyModel(wrapped.get_base_model()).forward(batch)[0]
    assert (before - after).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lean_forward_pass_is_pefts_own(qwen3, dtype):
    wrapped = lora.attach(load(qwen3, dtype=dtype), rank=4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    policy, batch = PolicyModel(wrapped.get_base_model()), lay_out(SEQUENCES)
    lean = policy.forward(batch)[0]
    with wrapped.disable_adapter():
        base = policy.forward(batch)[0]
    for _, layer in lora.layers(wrapped):
        del layer.forward
    own = policy.forward(batch)[0]
    tolerance = 1e-5 if dtype == "float32" else 0.2
    assert (lean - own).abs().max() < tolerance < (lean - base).abs().max()
    assert torch.equal(base, PolicyModel(load(qwen3, dtype=dtype)).forward(batch)[0])
