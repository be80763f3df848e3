from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rlpost.errors import ModelError
from rlpost.policy import model as policy_model
from rlpost.policy import shared_prompt
from rlpost.policy.model import PolicyModel, choose_layout, lay_out, load, packing_probe, predicted
from tests.families import FAMILIES, make, vision_language

SEQUENCES = [[5, 6, 7, 8, 9] * 8, [100, 20, 30], [7, 7, 9, 300]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return request.param, make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("qwen3"))


@torch.no_grad()
def reference(model, sequences):
    """(log-probabilities, entropies) by the model's own forward pass, one sequence at a time."""
    rows, entropies = [], []
    for ids in sequences:
        all_LV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows += [torch.zeros(1), all_LV[:-1].gather(-1, torch.tensor(ids)[1:, None]).squeeze(-1)]
        entropies += [torch.zeros(1), -(all_LV.exp() * all_LV).sum(-1)[:-1]]
    return torch.cat(rows), torch.cat(entropies)


def test_both_layouts_equal_the_models_own_logits(family):
    name, folder = family
    model = load(folder)
    policy = PolicyModel(model)
    logprobs, entropies = reference(model, SEQUENCES)
    for layout in ("padded", "packed"):
        if (name, layout) == ("qwen3_5", "packed"):
            continue
        found, entropy = policy.forward(lay_out(SEQUENCES), layout=layout)
        assert (found - logprobs).abs().max() < 2e-5
        assert (entropy - entropies).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_allows_packing_except_in_the_hybrid(family, dtype):
    name, folder = family
    found = packing_probe(PolicyModel(load(folder, dtype=dtype)))
    assert found.right is (name != "qwen3_5")
    if name == "qwen3_5":  # the state of one sequence reaches the next
        assert found.influence > 0.1
    else:
        assert found.influence == 0.0


def test_the_demos_model_is_packed_in_bfloat16():
    folder = Path(__file__).parents[2] / "rlpost" / "template" / "model"
    layout, reason = choose_layout(PolicyModel(load(folder, dtype="bfloat16")))
    assert layout == "packed", reason
    assert "rounding alone" in reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_that_lets_sequences_see_each_other_is_caught(qwen3, monkeypatch, dtype):
    right = shared_prompt.Row.of

    def blind(batch):
        row = right(batch)
        return replace(row, groups=((0, (len(row.tokens),)),))  # causal over the whole row

    monkeypatch.setattr(shared_prompt.Row, "of", blind)
    found = packing_probe(PolicyModel(load(qwen3, dtype=dtype)))
    assert not found.right
    assert found.influence > 0.1


def test_a_row_that_is_put_together_wrongly_is_caught_though_nothing_leaks(qwen3, monkeypatch):
    right = shared_prompt.Row.of

    def shifted(batch):
        row = right(batch)
        return replace(row, place=(row.place + 1).clamp(max=len(row.tokens) - 1))

    monkeypatch.setattr(shared_prompt.Row, "of", shifted)
    found = packing_probe(PolicyModel(load(qwen3, dtype="bfloat16")))
    assert not found.right


def test_rounding_that_depends_on_the_shape_is_no_leak(qwen3, monkeypatch):
    """As on a GPU in bfloat16, where single tokens differ by 0.3 between batch shapes."""
    policy = PolicyModel(load(qwen3))
    exact = policy.forward

    def rounded(batch, *, layout=None):
        logprobs, entropy = exact(batch, layout=layout)
        generator = torch.Generator().manual_seed(len(batch.token_ids) + len(layout))
        noise = 0.06 * torch.randn(logprobs.shape, generator=generator)
        return logprobs + noise * (logprobs != 0), entropy

    monkeypatch.setattr(policy, "forward", rounded)
    monkeypatch.setitem(policy_model.ROUNDING, torch.float32, 1e-9)  # its own noise must do
    layout, reason = choose_layout(policy)
    assert layout == "packed", reason


def test_packing_the_hybrid_is_refused_by_name(tmp_path):
    policy = PolicyModel(load(make("qwen3_5", tmp_path)))
    layout, reason = choose_layout(policy)
    assert layout == "padded"
    assert "leaks" in reason
    with pytest.raises(ModelError, match="leak"):
        choose_layout(policy, wish="packed")


def test_packing_is_chosen_wherever_it_is_exact(qwen3):
    layout, reason = choose_layout(PolicyModel(load(qwen3)))
    assert layout == "packed"
    assert "agree" in reason


def test_a_first_token_is_never_predicted_from_its_neighbour():
    batch = lay_out([[1, 2, 3], [4, 5]])
    batch.loss_mask.fill_(1)
    targets, sources = predicted(batch)
    assert targets.tolist() == [1, 2, 4]
    assert sources.tolist() == [0, 1, 3]


def test_gradients_are_the_same_with_chunks_and_checkpoints(qwen3, monkeypatch):
    def gradient(*, checkpointing, logits_at_once):
        monkeypatch.setitem(policy_model.LOGITS_AT_ONCE, "cpu", logits_at_once)
        model = load(qwen3, dtype="float64")
        policy = PolicyModel(model, checkpointing=checkpointing)
        policy.entropy_gradient = True
        logprobs, entropy = policy.forward(lay_out(SEQUENCES))
        (logprobs.sum() + entropy.sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(checkpointing=False, logits_at_once=1 << 30)
    for checkpointing in (False, True):
        chunked = gradient(checkpointing=checkpointing, logits_at_once=384 * 16)
        assert torch.allclose(chunked, whole, rtol=1e-6, atol=1e-7)


def test_the_logits_of_all_tokens_never_exist_at_once(qwen3, monkeypatch):
    monkeypatch.setitem(policy_model.LOGITS_AT_ONCE, "cpu", 384 * 16)
    model = load(qwen3)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda *a: seen.append(a[-1].shape))
    policy = PolicyModel(model)
    batch = lay_out([list(range(40)), list(range(30))])
    policy.forward(batch)[0].sum().backward()
    assert max(shape[0] for shape in seen) == 16
    assert sum(shape[0] for shape in seen) >= 2 * 68  # each row forward, and again for backward


def test_prompt_tokens_cost_no_head(qwen3):
    model = load(qwen3)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda *a: seen.append(a[-1].shape[0]))
    batch = lay_out([list(range(40))])
    batch.loss_mask[:38] = 0
    logprobs, _ = PolicyModel(model).forward(batch)
    assert seen == [2]
    assert (logprobs != 0).nonzero().squeeze(-1).tolist() == [38, 39]


def test_full_master_weights_stay_fp32_while_products_are_bf16(qwen3):
    model = load(qwen3)
    policy = PolicyModel(model, autocast=torch.bfloat16)
    exact = PolicyModel(load(qwen3)).forward(lay_out(SEQUENCES))[0]
    found, _ = policy.forward(lay_out(SEQUENCES))
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().mean() < 0.1
    found.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)


def test_code_from_a_model_folder_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": '
        '{"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}'
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="does not load"):
        load(tmp_path)


def test_checkpoint_names_are_those_of_the_files(family):
    from safetensors.torch import load_file

    _, folder = family
    names = policy_model.checkpoint_names(folder)
    assert names == sorted(load_file(folder / "model.safetensors"))
    assert "model.embed_tokens.weight" in names


def test_dropout_of_the_config_is_switched_off(qwen3, tmp_path):
    import json
    import shutil

    shutil.copytree(qwen3, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["attention_dropout"] = 0.5
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    policy = PolicyModel(load(tmp_path / "m"), checkpointing=True)
    first, second = (policy.forward(lay_out(SEQUENCES))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not any(isinstance(m, nn.Dropout) and m.p > 0 for m in policy.model.modules())


def test_a_vision_language_model_is_computed_as_its_whole_class_does(tmp_path):
    model = load(vision_language(tmp_path))
    assert type(model).__name__ == "Qwen3_5ForConditionalGeneration"
    logprobs, _ = reference(model, SEQUENCES)
    found, _ = PolicyModel(model).forward(lay_out(SEQUENCES))
    assert (found - logprobs).abs().max() < 2e-5


def test_tensors_that_the_class_leaves_aside_are_not_published(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make("qwen3_5", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.layers.0.weight"] = torch.ones(2)  # the draft head of real checkpoints
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    assert "mtp.layers.0.weight" in policy_model.checkpoint_names(folder)
    assert set(policy_model.checkpoint_names(folder, model)) == set(tensors) - {
        "mtp.layers.0.weight"
    }
