"""A random policy near the current one: an engine that follows it really loads what it is sent.

A fresh LoRA has B = 0: without a canary, an engine that ignores every adapter passes any test.
"""

import math
from collections.abc import Callable, Mapping

import torch

VERSION = -2
"""The version a canary is published under: no policy version is negative but the base's -1."""

CHANGE = 0.5  # mean |change of a log-probability| that is aimed at
NEAR = (0.7, 1.4)  # of CHANGE: good enough

Weights = Mapping[str, torch.Tensor]


def find(weights: Weights, seed: int, *, lora: bool, score: Callable[[Weights], float]) -> Weights:
    """Other values for `weights` under which `score` (the mean change they cause) is about CHANGE.
    The same seed and weights give the same canary."""
    low, high, scale = 0.0, math.inf, 0.02
    for _ in range(12):
        canary = perturb(weights, seed, scale, lora=lora)
        change = score(canary)
        if NEAR[0] * CHANGE <= change <= NEAR[1] * CHANGE:
            break
        low, high = (scale, high) if change < CHANGE else (low, scale)
        scale = 2 * scale if high == math.inf else math.sqrt(max(low, high / 16) * high)
    return canary


def perturb(weights: Weights, seed: int, scale: float, *, lora: bool) -> Weights:
    """LoRA: A as large as at its start and B of deviation `scale`, both random. Full: every tensor
    moved by `scale` times its own root mean square."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, weight in weights.items():
        weight = weight.detach()
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        if not lora:
            changed[name] = weight + scale * weight.float().square().mean().sqrt() * noise
        elif ".lora_A." in name:
            changed[name] = noise / math.sqrt(3 * weight.shape[1])
        else:
            changed[name] = scale * noise
    return changed


def probe_sequences(vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids on which a canary's change is measured."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (4, 32), generator=generator).tolist()


def mean_change(before: list[list[float]], after: list[list[float]]) -> float:
    """Mean |difference| of log-probabilities, first tokens left out."""
    changes = [
        abs(a - b)
        for row_before, row_after in zip(before, after, strict=True)
        for b, a in zip(row_before[1:], row_after[1:], strict=True)
    ]
    return sum(changes) / max(len(changes), 1)
