"""Adapter products for vLLM on the CPU, in place of its own.
 vLLM's CPU fallback (`vllm.lora.ops.torch_ops`, 0.32) copies the adapter once per token, which at
rank 16 makes a small model seven times slower, and takes index -1, "no adapter", as Python does: a
request for the base that shares a step with an adapter's request gets the adapter of the last slot.
Here the rows of each adapter are multiplied together, and rows without one are left alone.
"""

from collections.abc import Sequence
from typing import Any

import torch


class GroupedProducts:
    """Replaces `update_metadata` and `add_lora_linear` of one of vLLM's PunicaWrapperCPU
    objects."""

    def __init__(self, wrapper: Any):
        self._wrapper = wrapper
        self._update = wrapper.update_metadata
        self._groups: list[tuple[int, torch.Tensor | None]] = []  # (slot, its rows; None: all)
        wrapper.update_metadata = self.update_metadata
        wrapper.add_lora_linear = self.add_lora_linear

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Called before every step: which rows of the batch belong to which slot."""
        self._update(*args, **kwargs)
        slots = self._wrapper.token_lora_indices  # [tokens], -1 where there is no adapter
        different = slots.unique().tolist()
        if different == [-1] or not different:
            self._groups = []
        elif len(different) == 1:
            self._groups = [(different[0], None)]
        else:
            self._groups = [
                (slot, (slots == slot).nonzero()[:, 0]) for slot in different if slot >= 0
            ]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
        **_: Any,
    ) -> None:
        """y [tokens, out] += scale * x [tokens, in] @ A.T @ B.T, slice by slice, in place. A
        product with A is kept in float32, as in vLLM's own kernels."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self._groups:
            inputs = (x if rows is None else x[rows]).float()
            start = 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                inner = scale * (inputs @ a[slot, 0].float().T)  # [rows, rank]
                delta = inner.to(y.dtype) @ b[slot, 0].to(y.dtype).T  # [rows, size]
                if rows is None:
                    y[:, start : start + size] += delta
                else:
                    y[:, start : start + size].index_add_(0, rows, delta)
                start += size


def group_products(manager: Any) -> None:
    """Gives every CPU wrapper of vLLM's adapter manager the grouped products; others stay as they
    are."""
    for wrapper in manager.punica_wrapper_mapping.values():
        if type(wrapper).__name__ == "PunicaWrapperCPU":
            GroupedProducts(wrapper)
