"""LoRA on every linear layer of the language model, and a report of what it reaches.

The adapter is fp32 over a bf16 or fp32 base: bf16 storage swallows small updates. The vision tower
and the head stay out; lists such as q, k, v, o would miss three quarters of a hybrid's mixing
layers. Sources: LoRA Without Regret (all linears, rank 1 to 32 suffice for RL).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rlpost.errors import ModelError

ADAPTER = "default"
NOT_PLAIN = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
OUTSIDE = (
    "visual",
    "vision_tower",
    "vision_model",
    "vision",
    "multi_modal_projector",
    "audio_tower",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Linear layers by full name: those with an adapter, and those without, with the reason."""

    reached: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def missed(self) -> tuple[str, ...]:
        """Linears of the language model that should have an adapter and have none."""
        return tuple(name for name, why in self.left_out.items() if why == "not reached")


def linears(model: nn.Module, *, head: bool = False) -> tuple[list[str], dict[str, str]]:
    """(linears that get an adapter, others with the reason), by full module name."""
    output = model.get_output_embeddings()
    wanted, left_out = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if any(part in OUTSIDE for part in name.split(".")):
            left_out[name] = "not of the language model"
        elif module is output and not head:
            left_out[name] = "the head, not asked for"
        else:
            wanted.append(name)
    return wanted, left_out


def attach(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    head: bool = False,
    adapter: str | Path | None = None,
    seed: int = 0,
) -> Any:
    """The PEFT model around `model`: the adapter in the folder `adapter`, or a fresh one that
    changes nothing yet (B = 0) with A drawn from `seed`. Only its fp32 parameters want
    gradients."""
    import peft

    wanted, _ = linears(model, head=head)
    if not wanted:
        raise ModelError("the model has no linear layer to adapt", cure='use method = "full"')
    if head and model.config.get_text_config().tie_word_embeddings:
        raise ModelError(
            "the head is tied to the embedding: an adapter on it would not fit either",
            cure="leave the head out",
        )
    if adapter is not None:
        return _load(model, Path(adapter))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=_short(model, wanted),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    _to_float32(wrapped)
    make_lean(wrapped)
    return wrapped


def _load(model: nn.Module, folder: Path) -> Any:
    """`model` with the adapter in `folder`, every tensor of which must find its place."""
    import peft
    from safetensors.torch import load_file

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"no {name}", place=str(folder), cure="give a PEFT folder")
    config = peft.PeftConfig.from_pretrained(folder)
    plain = isinstance(config, peft.LoraConfig) and config.bias == "none"
    if not plain or any(getattr(config, name) for name in NOT_PLAIN):
        raise ModelError(
            f"the adapter is not plain LoRA (none of: bias, {', '.join(NOT_PLAIN)})",
            place=str(folder),
            cure="merge it into the model first",
        )
    config.inference_mode, config.lora_dropout = False, 0.0
    config.base_model_name_or_path = None  # a folder of another machine
    try:
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise _misfit(folder, str(error).splitlines()[0]) from error
    _to_float32(wrapped)
    parameters = {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    if odd := sorted(parameters.keys() ^ tensors.keys()):
        raise _misfit(folder, f"{odd[0]} is only in one of them ({len(odd)} such tensors)")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            wanted, found = tuple(parameter.shape), tuple(tensors[name].shape)
            raise _misfit(folder, f"{name} is {found}, not {wanted}")
        with torch.no_grad():
            parameter.copy_(tensors[name])
    make_lean(wrapped)
    return wrapped


def _misfit(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit the model: {what}",
        place=str(folder),
        cure="give one that was trained on this model",
    )


def _to_float32(wrapped: nn.Module) -> None:
    wide = {torch.float32, torch.float64}
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype not in wide:
            parameter.data = parameter.data.float()


def make_lean(wrapped: nn.Module) -> None:
    """Gives every adapted linear a forward pass that scales B, not the output, and multiplies in
    the base's dtype: what the engine does with the published adapter, and one pass less over each
    activation. The weights that are trained, and their gradients, stay fp32."""
    for _, layer in layers(wrapped):
        layer.forward = partial(_adapted, layer, layer.forward)


def _adapted(layer: Any, plain: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    if layer.disable_adapters or layer.merged:
        return plain(x)
    a = layer.lora_A[ADAPTER].weight.to(x.dtype)
    b = (layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]).to(x.dtype)
    base = layer.base_layer(x)
    flat = torch.addmm(base.flatten(0, -2), F.linear(x, a).flatten(0, -2), b.T)
    return flat.view(base.shape)


def _short(model: nn.Module, wanted: list[str]) -> list[str]:
    """Last parts of the names where these match exactly `wanted`, as engines like them, else full
    names."""
    last = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    matched = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in last
    ]
    return last if matched == wanted else wanted


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the model without PEFT's prefix, LoRA layer) of every adapted linear, in order."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name.removeprefix("base_model.model."), module


def coverage(wrapped: Any, *, head: bool = False) -> Coverage:
    """Which linears of the wrapped model have an adapter, read off the modules themselves."""
    reached = [name for name, _ in layers(wrapped)]
    inner = wrapped.get_base_model()
    wanted, left_out = linears(inner, head=head)
    present = set(reached)
    everything = {name.removesuffix(".base_layer") for name in wanted}
    everything = {n for n in everything if ".lora_" not in n}
    left = {n.removesuffix(".base_layer"): why for n, why in left_out.items() if ".lora_" not in n}
    left.update(dict.fromkeys(sorted(everything - present), "not reached"))
    return Coverage(reached=tuple(reached), left_out=left)
