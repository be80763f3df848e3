"""Sequences laid end to end in one row, the prompt that neighbours have in common computed once.

The G rollouts of a group share their prompt, so a row holds [prompt][reply 1]…[reply G] and every
reply attends to the prompt and to itself. Attention runs per group over exactly these pairs: no
square of the row's length, no padding in the linear layers, nothing leaks between sequences. It is
registered with transformers as an attention implementation of its own, and gets the row's plan as
a keyword, so that a layer that is computed again in the backward pass sees the same plan.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from rlpost.grpo.packing import prompt_length
from rlpost.types import MicroBatch

NAME = "rlpost_shared_prompt"


@dataclass(frozen=True)
class Row:
    """The plan of one row of U tokens for a micro-batch of T. `groups` has, for each group, the
    length of its prompt and those of its replies, in the order in which they lie in the row."""

    tokens: torch.Tensor  # [U], index into the micro-batch's tokens
    place: torch.Tensor  # [T], where each token of the micro-batch is in the row
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: MicroBatch) -> "Row":
        """Neighbours with the same prompt, the tokens before the first trained one, share it."""
        starts = torch.as_tensor(batch.starts).tolist()
        ids = torch.as_tensor(batch.token_ids).tolist()
        mask = torch.as_tensor(batch.loss_mask).tolist()
        tokens: list[int] = []
        place: list[int] = []
        groups: list[tuple[int, list[int]]] = []
        leader: list[int] = []
        at = 0  # where the leader's prompt lies in the row
        for begin, end in itertools.pairwise(starts):
            prompt = prompt_length(mask[begin:end])
            head = ids[begin : begin + prompt]
            if not groups or not head or head != leader:
                leader, at = head, len(tokens)
                groups.append((prompt, []))
                tokens += range(begin, begin + prompt)
            place += range(at, at + prompt)
            place += range(len(tokens), len(tokens) + end - begin - prompt)
            tokens += range(begin + prompt, end)
            groups[-1][1].append(end - begin - prompt)
        return cls(
            tokens=torch.tensor(tokens),
            place=torch.tensor(place),
            groups=tuple((prompt, tuple(replies)) for prompt, replies in groups),
        )

    def visible(
        self, prompt: int, queries: int, window: int | None, device: torch.device
    ) -> torch.Tensor:
        """Which of `prompt + queries` keys each query after the prompt sees [queries, keys]."""
        key = (prompt, queries, window)
        if key not in self.masks:
            distance = torch.arange(prompt, prompt + queries, device=device)[:, None]
            distance = distance - torch.arange(prompt + queries, device=device)[None]
            seen = distance >= 0
            self.masks[key] = seen & (distance < window) if window else seen
        return self.masks[key]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, U, D]
    key: torch.Tensor,  # [1, H or fewer, U, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row: Row | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a row by its plan -> [1, U, H, D]; without a plan, transformers' own sdpa."""
    if row is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling,
            sliding_window=sliding_window, **others,
        )  # fmt: skip
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    sizes = [prompt + sum(replies) for prompt, replies in row.groups]
    parts = [tensor[0].transpose(0, 1).split(sizes) for tensor in (query, key, value)]
    outputs = []
    for (prompt, replies), *qkv in zip(row.groups, *parts, strict=True):
        outputs += _attend_group(row, prompt, replies, qkv, scaling, sliding_window)
    return torch.cat(outputs)[None], None


def _attend_group(
    row: Row,
    prompt: int,
    replies: Sequence[int],
    qkv: Sequence[torch.Tensor],  # three of [prompt + replies, H, D]
    scaling: float | None,
    window: int | None,
) -> list[torch.Tensor]:
    heads = [tensor[:prompt].transpose(0, 1)[None] for tensor in qkv]  # [1, H, prompt, D]
    outputs = []
    if prompt:
        seen = row.visible(0, prompt, window, qkv[0].device) if window else None
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=seen, is_causal=seen is None, scale=scaling
        )
        outputs.append(out[0].transpose(0, 1))
    if not sum(replies):
        return outputs
    tails = [  # [replies, H, longest, D]: padded at the end, where no earlier token looks
        pad_sequence(tensor[prompt:].split(list(replies)), batch_first=True).transpose(1, 2)
        for tensor in qkv
    ]
    query, *pair = tails
    key, value = (
        torch.cat([head.expand(len(replies), -1, -1, -1), tail], 2)
        for head, tail in zip(heads[1:], pair, strict=True)
    )
    seen = row.visible(prompt, query.shape[2], window, query.device)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    rows = out.transpose(1, 2)  # [replies, longest, H, D]
    return [*outputs, *(rows[i, :length] for i, length in enumerate(replies))]


def register() -> None:
    """Makes `attend` known to transformers as NAME; rows without a plan get sdpa and its masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
