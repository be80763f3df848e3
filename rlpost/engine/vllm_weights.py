"""Weights inside vLLM: what an engine loads, and what it really computes with.

`WeightsExtension` is mixed into vLLM's worker (`worker_extension_cls`), so the same code serves the
in-process engine and an engine process: arguments and results are plain values and file paths.
 Reading back. A GPU computes with the parameters themselves. On the CPU vLLM packs each linear
layer and frees its parameter, and a tied head becomes a second packed copy; there every layer is
applied, through its own `quant_method`, to unit vectors: products with 0 and 1 are exact, so what
comes out is the weight. Fused layers are split by their own output sizes; the rows that pad a
vocabulary are left out.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from rlpost.engine.vllm_lora_cpu import group_products
from rlpost.policy.proof import BASE, bit_sum

_CHUNK = 512  # unit vectors applied at once


class WeightsExtension:
    """Methods added to vLLM's worker. Names carry our prefix: vLLM refuses a clash with its own."""

    model_runner: Any
    vllm_config: Any

    def rlpost_prepare_adapters(self) -> None:
        """Once, before the first request. Takes the adapter wrapper off the head, which no policy
        of ours adapts: it costs a product at every step, and scoring fails in it, because it maps
        rows to adapters by sampled tokens only. On the CPU, where nothing is compiled, the
        embedding's goes too, and the rest get products that are right and fast.
        """
        on_cpu = self.vllm_config.device_config.device_type == "cpu"
        for parent in list(self.model_runner.get_model().modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, BaseLayerWithLoRA):
                    continue
                # a tied head is the wrapped embedding itself (vLLM 0.25.1)
                head = name in ("logits_processor", "lm_head")
                if head or (on_cpu and isinstance(child.base_layer, VocabParallelEmbedding)):
                    setattr(parent, name, child.base_layer)
        if on_cpu:
            group_products(self.model_runner.lora_manager._adapter_manager)

    def rlpost_reload(self, path: str) -> list[str]:
        """Replaces every weight by the safetensors file at `path`, in place; returns the names
        loaded. The file must name a tied head too: vLLM keeps the old packed head otherwise, with a
        warning only.
        """
        names: list[str] = []

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    names.append(name)
                    yield name, file.get_tensor(name)

        self.model_runner.reload_weights(weights_iterator=tensors())
        return names

    def rlpost_fingerprint(self, lora_id: int | None) -> dict[str, int]:
        """Bit sums of the base tensors by checkpoint name, or of one adapter's A and B by PEFT name
        with `BASE` beside them. An adapter that is not in a slot reports nothing but `BASE`."""
        model = self.model_runner.get_model()
        config = self.vllm_config.model_config
        names = _Names(model, checkpoint_names(config.model))
        base = base_fingerprint(model, names, config.dtype)
        if lora_id is None:
            return base
        manager = self.model_runner.lora_manager._adapter_manager
        adapter = adapter_fingerprint(manager, lora_id, names)
        return adapter | {BASE: sum(base.values()) % (1 << 64)}


def checkpoint_names(folder: str) -> set[str]:
    """Names of all tensors in the safetensors files of a model folder, read from their headers."""
    names: set[str] = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            names |= tensor_names(file)
    return names


def tensor_names(file: BinaryIO) -> set[str]:
    """Names of the tensors in an open safetensors file (format: 8 bytes of length, a JSON
    header)."""
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length)).keys() - {"__metadata__"}


class _Names:
    """From vLLM's module paths to the checkpoint's names."""

    def __init__(self, model: torch.nn.Module, checkpoint: set[str]):
        self.checkpoint = checkpoint
        self.packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        renames = getattr(mapper, "orig_to_new_prefix", None) or {}
        self._back = [(new, old) for old, new in renames.items() if new]

    def of(self, name: str) -> str:
        """The checkpoint's name of the tensor that vLLM calls `name`; `name` if it has none."""
        name = name.replace(".base_layer", "")
        if name in self.checkpoint:
            return name
        if name.rpartition("lm_head.")[2] == "weight":  # tied: no name of its own in the checkpoint
            return "lm_head.weight"
        for new, old in self._back:
            if name.startswith(new) and old + name[len(new) :] in self.checkpoint:
                return old + name[len(new) :]
        return name

    def parts(self, module_path: str, sizes: Sequence[int]) -> list[tuple[str, list[int]]]:
        """The checkpoint's modules inside a fused one, each with its slices of the output. Where
        there are fewer names than slices the first name covers the rest (Qwen3.5's in_proj_qkv of
        q, k, v)."""
        parent, _, last = module_path.replace(".base_layer", "").rpartition(".")
        fused = list(self.packed.get(last, ()))
        if len(fused) < 2 or len(sizes) < len(fused):
            return [(module_path, list(range(len(sizes))))]
        first = len(sizes) - len(fused) + 1
        groups = [list(range(first)), *([index] for index in range(first, len(sizes)))]
        return [(f"{parent}.{name}", group) for name, group in zip(fused, groups, strict=True)]


def base_fingerprint(model: torch.nn.Module, names: _Names, dtype: torch.dtype) -> dict[str, int]:
    """Bit sums of every base tensor that the model computes with, in `dtype`, by checkpoint
    name."""
    sums: dict[str, int] = {}
    for path, module in model.named_modules(
        remove_duplicate=False
    ):  # a tied head may be the embedding
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, LinearBase):
                _add_linear(sums, path, module, parameter_name, parameter, names, dtype)
            elif (
                path.removesuffix(".base_layer").endswith("lm_head") and parameter_name == "weight"
            ):
                rows = module.org_vocab_size
                value = sum(_head_sums(module, rows, dtype))
                sums[names.of(f"{path}.weight")] = value % (1 << 64)
            elif isinstance(module, VocabParallelEmbedding):
                kept = parameter[: module.org_vocab_size]
                sums[names.of(f"{path}.{parameter_name}")] = bit_sum(kept.to(dtype))
            else:
                sums[names.of(f"{path}.{parameter_name}")] = bit_sum(parameter.to(dtype))
    return sums


def _add_linear(
    sums: dict[str, int],
    path: str,
    layer: Any,
    parameter_name: str,
    parameter: torch.Tensor,
    names: _Names,
    dtype: torch.dtype,
) -> None:
    """Adds the sums of one linear layer's weight or bias, split into the checkpoint's tensors."""
    sizes = list(getattr(layer, "output_partition_sizes", None) or [layer.output_size])
    ends = torch.tensor(sizes).cumsum(0).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    slices = [0] * len(sizes)
    if (
        parameter_name == "weight" and _is_packed(layer) and parameter.ndim < 3
    ):  # freed: no dims left
        for columns in _unpacked(layer, layer.input_size_per_partition, dtype):
            for index, (start, end) in enumerate(bounds):
                slices[index] += bit_sum(columns[:, start:end])
    elif parameter.shape[0] == ends[-1]:
        slices = [bit_sum(parameter[start:end].to(dtype)) for start, end in bounds]
    else:  # a convolution packed for the CPU: other shape, same numbers
        sums[names.of(f"{path}.{parameter_name}")] = bit_sum(parameter.to(dtype))
        return
    for part, indices in names.parts(path, sizes):
        value = sum(slices[index] for index in indices) % (1 << 64)
        sums[names.of(f"{part}.{parameter_name}")] = value


def _head_sums(head: Any, rows: int, dtype: torch.dtype) -> Iterator[int]:
    if not _is_packed(head):
        yield bit_sum(head.weight[:rows].to(dtype))
        return
    for columns in _unpacked(head, head.embedding_dim, dtype):
        yield bit_sum(columns[:, :rows])


def _is_packed(layer: Any) -> bool:
    """True where products use something else than the parameter: vLLM's CPU gemm dispatch."""
    return hasattr(layer, "cpu_linear")


def _unpacked(layer: Any, inputs: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Columns of the weight, `_CHUNK` at a time [chunk, outputs], by applying the layer to unit
    vectors."""
    for start in range(0, inputs, _CHUNK):
        count = min(_CHUNK, inputs - start)
        units = torch.zeros(count, inputs, dtype=dtype)
        units[torch.arange(count), start + torch.arange(count)] = 1
        yield layer.quant_method.apply(layer, units, None).to(dtype)


def adapter_fingerprint(manager: Any, lora_id: int, names: _Names) -> dict[str, int]:
    """Bit sums of A and B in the slot of `lora_id`, by PEFT name; modules without an adapter are
    all zero there and are left out."""
    if lora_id not in manager.lora_index_to_id:
        return {}
    slot = manager.lora_index_to_id.index(lora_id)
    sums: dict[str, int] = {}
    for path, module in manager.modules.items():
        assert isinstance(module, BaseLayerWithLoRA)
        stacked_a, stacked_b = _stacks(module, "lora_a_stacked"), _stacks(module, "lora_b_stacked")
        sums_a = [bit_sum(stack[slot]) for stack in stacked_a]
        sums_b = [bit_sum(stack[slot]) for stack in stacked_b]
        for part, indices in names.parts(path, [stack.shape[-2] for stack in stacked_b]):
            prefix = "base_model.model." + names.of(f"{part}.weight").removesuffix(".weight")
            value_a, value_b = _one(sums_a, indices), sum(sums_b[i] for i in indices) % (1 << 64)
            if value_a or value_b:
                sums[f"{prefix}.lora_A.weight"] = value_a
                sums[f"{prefix}.lora_B.weight"] = value_b
    return sums


def _stacks(module: Any, name: str) -> Sequence[torch.Tensor]:
    """The buffers of one wrapper, a slot per adapter; none where experts keep theirs otherwise."""
    stacked = getattr(module, name, ())
    return stacked if isinstance(stacked, tuple | list) else (stacked,)


def _one(sums: Sequence[int], indices: Sequence[int]) -> int:
    """A is copied to every slice of its part: the sum if the copies agree, else the one that
    differs."""
    values = [sums[index] for index in indices]
    return next((value for value in values if value != values[0]), values[0])
