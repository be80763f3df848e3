"""vLLM's fused and renamed modules are led back to the checkpoint's names; no engine is started."""

import importlib.util
import io
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save, save_file

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from rlpost.engine.vllm_lora_cpu import GroupedProducts
from rlpost.engine.vllm_weights import _Names, checkpoint_names, tensor_names

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}


class Model:
    packed_modules_mapping = PACKED


class VisionModel(Model):
    hf_to_vllm_mapper = SimpleNamespace(
        orig_to_new_prefix={
            "model.visual.": "visual.",
            "lm_head.": "language_model.lm_head.",
            "model.language_model.": "language_model.model.",
            "mtp.": None,
        }
    )


def test_a_fused_module_is_split_by_its_output_sizes():
    names = _Names(Model(), set())
    assert names.parts("model.layers.0.self_attn.qkv_proj.base_layer", [8, 4, 4]) == [
        ("model.layers.0.self_attn.q_proj", [0]),
        ("model.layers.0.self_attn.k_proj", [1]),
        ("model.layers.0.self_attn.v_proj", [2]),
    ]
    assert names.parts("model.layers.0.mlp.down_proj", [8]) == [
        ("model.layers.0.mlp.down_proj", [0])
    ]


def test_the_first_of_two_names_covers_three_of_four_slices():
    names = _Names(Model(), set())
    assert names.parts("layers.0.linear_attn.in_proj_qkvz", [4, 4, 8, 8]) == [
        ("layers.0.linear_attn.in_proj_qkv", [0, 1, 2]),
        ("layers.0.linear_attn.in_proj_z", [3]),
    ]
    assert names.parts("layers.0.linear_attn.in_proj_ba", [2, 2])[1][0].endswith("in_proj_a")


def test_a_vision_class_is_led_back_to_the_checkpoints_prefixes():
    checkpoint = {"model.language_model.norm.weight", "model.visual.patch.weight"}
    names = _Names(VisionModel(), checkpoint)
    assert names.of("language_model.model.norm.weight") == "model.language_model.norm.weight"
    assert names.of("visual.patch.weight") == "model.visual.patch.weight"
    assert names.of("language_model.lm_head.weight") == "lm_head.weight"  # tied: no name there
    assert names.of("unknown.weight") == "unknown.weight"  # stays visible as an extra


def test_names_are_read_from_headers_alone(tmp_path):
    tensors = {"a.weight": torch.zeros(2), "b": torch.zeros(1, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_names(str(tmp_path)) == {"a.weight", "b"}
    assert tensor_names(io.BytesIO(save(tensors))) == {"a.weight", "b"}


class Wrapper:
    """What GroupedProducts uses of vLLM's CPU wrapper."""

    def __init__(self):
        self.token_lora_indices = None

    def update_metadata(self, indices):
        self.token_lora_indices = torch.tensor(indices)


@pytest.mark.parametrize("indices", [[-1, -1, -1, -1], [1, 1, 1, 1], [0, -1, 2, 0], [2, 2, -1, -1]])
def test_each_row_gets_its_own_adapter_and_a_row_without_one_none(indices):
    torch.manual_seed(0)
    a = [torch.randn(3, 1, 2, 5) for _ in range(2)]
    b = [torch.randn(3, 1, size, 2) for size in (4, 3)]
    x, y = torch.randn(4, 5), torch.randn(4, 7)
    expected = y.clone()
    for row, slot in enumerate(indices):
        if slot >= 0:
            parts = [b[i][slot, 0] @ (a[i][slot, 0] @ x[row]) for i in range(2)]
            expected[row] += 0.5 * torch.cat(parts)
    wrapper = Wrapper()
    GroupedProducts(wrapper)
    wrapper.update_metadata(indices)
    wrapper.add_lora_linear(y, x, a, b, 0.5, (4, 3))
    torch.testing.assert_close(y, expected)
