"""The learner's weights as a Publication: what an engine loads, and the number that proves it did.

LoRA: B is multiplied by the scaling in fp32 before it is cast, and alpha equals rank in the
config, so the engine's own scaling is 1 and no engine can disagree about it. Full: every tensor of
the checkpoint under the checkpoint's names, and `lm_head.weight` even when it is tied, because
engines keep a packed copy of it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from rlpost.engine.base import Publication
from rlpost.errors import ModelError
from rlpost.policy import lora
from rlpost.policy.proof import BASE, bit_sum

PEFT_PREFIX = "base_model.model."
HEAD = "lm_head.weight"


def publish_lora(
    wrapped: Any, *, version: int, dtype: torch.dtype, base_sum: int, base_model: str = ""
) -> Publication:
    """The adapter of the PEFT model `wrapped`, cast to the engine's `dtype`. `base_sum` is the bit
    sum of the untouched base (`sum_base`)."""
    tensors = adapter_tensors(wrapped, dtype=dtype)
    return Publication(
        version=version,
        kind="lora",
        payload=save(tensors),
        adapter_config=adapter_config(wrapped, base_model=base_model),
        fingerprint={**fingerprint(tensors), BASE: base_sum},
    )


def publish_full(
    model: nn.Module, names: list[str], *, version: int, dtype: torch.dtype
) -> Publication:
    """Every tensor of the checkpoint whose tensor names are `names`, cast to the engine's
    `dtype`."""
    tensors = full_tensors(model, names, dtype=dtype)
    return Publication(
        version=version, kind="full", payload=save(tensors), fingerprint=fingerprint(tensors)
    )


def adapter_tensors(
    wrapped: Any, *, dtype: torch.dtype, scaled: bool = True
) -> dict[str, torch.Tensor]:
    """A [rank, in] and B [out, rank] of each adapted layer under PEFT's names, on the CPU; B times
    the scaling unless `scaled` is False."""
    tensors = {}
    for name, layer in lora.layers(wrapped):
        a = layer.lora_A[lora.ADAPTER].weight.detach()
        b = layer.lora_B[lora.ADAPTER].weight.detach()
        if scaled:
            b = b * layer.scaling[lora.ADAPTER]
        for kind, tensor in (("lora_A", a), ("lora_B", b)):
            key = f"{PEFT_PREFIX}{name}.{kind}.weight"
            tensors[key] = tensor.to(dtype).cpu().clone().contiguous()
    return tensors


def adapter_config(wrapped: Any, *, base_model: str = "", scaled: bool = True) -> dict[str, Any]:
    """PEFT's adapter_config.json as plain values; alpha = rank when the scaling is already in B."""
    config = wrapped.peft_config[lora.ADAPTER]
    rank = next(layer.r[lora.ADAPTER] for _, layer in lora.layers(wrapped))
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank if scaled else config.lora_alpha,
        "use_rslora": False if scaled else config.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }


def full_tensors(
    model: nn.Module, names: list[str], *, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors with their current values on the CPU, the head included when
    tied."""
    state = model.state_dict()
    _refuse_missing(names, state)
    tensors = {name: _cast(state[name], dtype).cpu().clone().contiguous() for name in names}
    head = model.get_output_embeddings()
    if HEAD not in tensors and head is not None:
        tensors[HEAD] = _cast(head.weight, dtype).cpu().clone().contiguous()
    return tensors


def sum_base(model: nn.Module, names: list[str], *, dtype: torch.dtype) -> int:
    """Bit sum modulo 2^64 over all base tensors in the engine's dtype, the tied head counted as
    its own tensor too. `model` is the base before any adapter is attached."""
    state, total = model.state_dict(), 0
    _refuse_missing(names, state)
    for name in names:  # one by one: a copy of the whole model may not fit
        total += bit_sum(_cast(state[name], dtype))
    head = model.get_output_embeddings()
    if HEAD not in names and head is not None:
        total += bit_sum(_cast(head.weight, dtype))
    return total % (1 << 64)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)


def _refuse_missing(names: list[str], state: Mapping[str, torch.Tensor]) -> None:
    if missing := [name for name in names if name not in state]:
        raise ModelError(
            f"the checkpoint's {missing[0]} has another name in the loaded model "
            f"({len(missing)} such tensors)",
            cure="save the model once with this version of transformers",
        )


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The bit sum of each tensor, by its name."""
    return {name: bit_sum(tensor) for name, tensor in tensors.items()}
