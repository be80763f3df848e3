"""Proof of policy: the engine serves the version it claims.

Rules of the fingerprint, the same on both sides: one number per checkpoint tensor, taken in the dtype
that the engine serves, keyed by the checkpoint's names (`lm_head.weight` counts even when it is tied).
An adapter version reports its A and B under PEFT's names and one number `BASE` over the base tensors.
"""

import torch

BASE = "base"  # key of the one number over all base tensors in an adapter version's fingerprint

_CHUNK = 1 << 22  # elements summed at once: 32 MB of int64
_EXPONENT = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80}  # bits that are all 0 in a subnormal
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of the elements' bit patterns, as unsigned integers of their width, modulo 2^64.

    Exact, independent of layout and order, so that split, stacked and padded copies add up: zeros add
    nothing, and neither does -0.0, nor a float32 or bfloat16 subnormal: a matrix product, which is how
    packed weights are read back, may flush these. The tensor stays where it is.
    """
    flat = tensor.detach().reshape(-1)
    width = flat.element_size()
    exponent = _EXPONENT.get(tensor.dtype, 0x7FFF if tensor.dtype == torch.float16 else -1)
    total = 0
    for start in range(0, flat.numel(), _CHUNK):
        bits = flat[start : start + _CHUNK].contiguous().view(_INTEGER[width]).to(torch.int64)
        if width < 8:
            bits &= (1 << (8 * width)) - 1
        bits = torch.where((bits & exponent) == 0, 0, bits)
        total += int(bits.sum())  # wraps modulo 2^64 by itself
    return total % (1 << 64)
