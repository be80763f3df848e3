"""The policy as the learner computes it: a micro-batch in, log-probabilities and entropies out.

Hidden states are kept at the positions that predict a trained token only, and the head runs over
them in chunks that are computed again in the backward pass: the full [T, V] logits never exist.
Index t speaks about token t; the shift by one is in `predicted` and nowhere else. Temperature is
1.

A micro-batch goes through the model in one of two layouts. "packed" is one row, the prompt that
neighbours share computed once (shared_prompt.py); "padded" is one row a sequence, padded at the
right, where a causal model never looks, so that no mask is needed. `packing_probe` finds out
whether packing leaks between sequences in this model, as it does through a recurrent state.
"""

import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlpost.errors import ModelError, RunError
from rlpost.policy import shared_prompt
from rlpost.types import MicroBatch

Layout = Literal["packed", "padded"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# mean |difference| of log-probabilities that rounding may make in any model; single tokens differ
# more: a real 0.5B in bf16 reached 0.3 on a GPU where nothing leaked
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.1}
LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}  # elements of a chunk: 64 and 512 MB in fp32


def load(folder: str | Path, *, dtype: str = "float32", device: str = "cpu") -> nn.Module:
    """The checkpoint in `folder` as a causal language model with sdpa attention and no dropout.

    A vision-language checkpoint is loaded as the class that it names, because an adapter trained
    on its text class alone does nothing in an engine that serves the whole. Raises ModelError if
    the folder has no model that transformers knows without running code from it.
    """
    import transformers

    shared_prompt.register()
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ModelError("no config.json", place=str(folder), cure="give a model folder")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        whole = getattr(config, "text_config", None) is not None
        kind = (
            transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM
        )
        for part in (config, getattr(config, "text_config", None) or config):
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.0
        model = kind.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=shared_prompt.NAME,
            trust_remote_code=False,
            use_safetensors=True,  # a pickle runs code
        )
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the model does not load: {reason}",
            place=str(folder),
            cure="use a causal language model that transformers supports itself",
        ) from error
    return model.to(device)


def backbone(model: nn.Module) -> nn.Module:
    """The module that turns token ids into hidden states, the vision tower left aside."""
    inner = getattr(model, model.base_model_prefix, model)
    return getattr(inner, "language_model", inner)


def predicted(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens to predict [M], the positions whose hidden state predicts them [M]), flat indices:
    THE shift by one. A sequence's first token is preceded by nothing and is never predicted."""
    mask_T = torch.as_tensor(batch.loss_mask).bool().clone()
    mask_T[torch.as_tensor(batch.starts)[:-1]] = False
    targets_M = mask_T.nonzero().squeeze(-1)
    return targets_M, targets_M - 1


class PolicyModel:
    """A causal language model and the layout it is fed in.

    `forward(batch)` gives (logprobs [T], entropy [T]) in float32 (float64 for a float64 model),
    0.0 where the loss mask is 0. `autocast` runs fp32 master weights in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: Layout = "padded",
        checkpointing: bool = False,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.layout, self.autocast = model, layout, autocast
        self._backbone = backbone(model)
        self._head = model.get_output_embeddings()
        text = model.config.get_text_config()
        self._softcap = getattr(text, "final_logit_softcapping", None)
        self._logit_scale = 1.0 / getattr(text, "logits_scaling", 1.0)
        model.config.use_cache = text.use_cache = False
        model.train(checkpointing)  # layers recompute in training mode only; dropout is 0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, batch: MicroBatch, *, layout: Layout | None = None) -> tuple[Any, Any]:
        """(logprobs [T], entropy [T]) of the tokens where the loss mask is 1."""
        targets_M, sources_M = predicted(batch)
        token_ids_T = torch.as_tensor(batch.token_ids).to(self.device)
        with self._precision():
            packed = (layout or self.layout) == "packed"
            run = self._hidden_packed if packed else self._hidden_padded
            hidden_MD = run(batch, token_ids_T, sources_M)
            targets_M = targets_M.to(self.device)
            logprobs_M, entropy_M = self._score(hidden_MD, token_ids_T[targets_M])
        zeros_T = torch.zeros(token_ids_T.numel(), dtype=logprobs_M.dtype, device=self.device)
        return (
            zeros_T.index_put((targets_M,), logprobs_M),
            zeros_T.index_put((targets_M,), entropy_M),
        )

    def _hidden_packed(
        self, batch: MicroBatch, token_ids_T: torch.Tensor, sources_M: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [M, D] at the sources, from one row of distinct tokens."""
        if self._backbone.config._attn_implementation != shared_prompt.NAME:
            raise RunError("a model that was not loaded by `load` cannot take packed rows")
        row = shared_prompt.Row.of(batch)
        positions_U = torch.as_tensor(batch.position_ids)[row.tokens].to(self.device)
        token_ids_U = token_ids_T[row.tokens.to(self.device)]
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)  # "mask is made"
        hidden_UD = self._run(token_ids_U[None], positions_U[None], unused, row=row)[0]
        return hidden_UD.index_select(0, row.place[sources_M].to(self.device))

    def _hidden_padded(
        self, batch: MicroBatch, token_ids_T: torch.Tensor, sources_M: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [M, D] at the sources, from one padded row a sequence."""
        lengths = torch.as_tensor(batch.starts).diff()
        columns = torch.arange(int(lengths.max()))
        real_NL = (columns[None] < lengths[:, None]).to(self.device)
        token_ids_NL = token_ids_T.new_zeros(real_NL.shape)
        token_ids_NL[real_NL] = token_ids_T
        positions_NL = columns.to(self.device)[None].expand(real_NL.shape)
        hidden_TD = self._run(token_ids_NL, positions_NL)[real_NL]
        return hidden_TD.index_select(0, sources_M.to(self.device))

    def _run(
        self,
        token_ids_NL: torch.Tensor,
        positions_NL: torch.Tensor,
        mask: torch.Tensor | None = None,
        **plan: Any,
    ) -> torch.Tensor:
        output = self._backbone(
            input_ids=token_ids_NL,
            position_ids=positions_NL,
            attention_mask=mask,
            use_cache=False,
            **plan,
        )
        return output.last_hidden_state

    def _score(
        self, hidden_MD: torch.Tensor, targets_M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = max(16, LOGITS_AT_ONCE[self.device.type] // self._head.out_features)
        pairs = [
            checkpoint(self._score_chunk, hidden, targets, use_reentrant=False)
            if torch.is_grad_enabled()
            else self._score_chunk(hidden, targets)
            for hidden, targets in zip(hidden_MD.split(rows), targets_M.split(rows), strict=True)
        ]
        logprobs, entropies = zip(*pairs, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score_chunk(
        self, hidden_CD: torch.Tensor, targets_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_CV = self._head(hidden_CD)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        logits_CV = logits_CV * self._logit_scale if self._logit_scale != 1.0 else logits_CV
        if self._softcap:
            logits_CV = torch.tanh(logits_CV / self._softcap) * self._softcap
        all_CV = torch.log_softmax(logits_CV, dim=-1)
        logprobs_C = all_CV.gather(-1, targets_C[:, None]).squeeze(-1)
        with torch.no_grad() if not self.entropy_gradient else nullcontext():
            entropy_C = -(all_CV.exp() * all_CV).sum(-1)
        return logprobs_C, entropy_C

    entropy_gradient = False  # only an entropy bonus pays for the second [C, V] product

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What `packing_probe` measured: means of |difference| of log-probabilities, in nats."""

    influence: float  # of what else is in a packed row on a sequence; 0 where nothing leaks
    gap: float  # packed against one by one
    noise: float  # one padded batch against one by one: the model's own rounding
    rounding: float  # what rounding may do in any model of this dtype

    @property
    def right(self) -> bool:
        """Whether sequences may be packed. A leak moves a sequence when its neighbour changes, and
        rounding does not, since every shape stays the same: that limit is narrow (measured: 0
        without a leak, 0.9 in a hybrid). The gap, between shapes, only has to exclude a row that is
        put together wrongly."""
        narrow, wide = max(self.rounding / 10, self.noise), max(self.rounding, 3 * self.noise)
        return self.influence <= narrow and self.gap <= wide

    def __str__(self) -> str:
        return (
            f"log-probabilities differ by {self.gap:.2g} on average (rounding alone"
            f" {self.noise:.2g}), and move by {self.influence:.2g} when a neighbour changes"
        )


@torch.no_grad()
def packing_probe(policy: PolicyModel) -> Packing:
    """Compares sequences in one packed row with themselves beside other neighbours, one by one, and
    in a padded batch: two without a common token, and two that share a prompt."""
    generator = torch.Generator().manual_seed(0)
    size = policy.model.config.get_text_config().vocab_size
    lengths = (48, 7, 23, 31, 9, 48, 31)
    first, second, prompt, reply, other, new_first, new_reply = (
        torch.randint(size, (n,), generator=generator).tolist() for n in lengths
    )
    prompts = [1, 1, len(prompt), len(prompt)]
    sequences = [first, second, prompt + reply, prompt + other]
    neighbours = [new_first, second, prompt + new_reply, prompt + other]
    packed = _by_sequence(policy, sequences, prompts, layout="packed")
    beside = _by_sequence(policy, neighbours, prompts, layout="packed")
    padded = _by_sequence(policy, sequences, prompts, layout="padded")
    alone = [
        _by_sequence(policy, [ids], [n], layout="padded")[0]
        for ids, n in zip(sequences, prompts, strict=True)
    ]
    kept = (1, 3)  # these stay the same while the sequences before them change
    return Packing(
        influence=_mean_gap([packed[i] for i in kept], [beside[i] for i in kept]),
        gap=_mean_gap(packed, alone),
        noise=_mean_gap(padded, alone),
        rounding=ROUNDING[policy.autocast or policy.model.get_output_embeddings().weight.dtype],
    )


def _by_sequence(
    policy: PolicyModel,
    sequences: Sequence[Sequence[int]],
    prompts: Sequence[int],
    *,
    layout: Layout,
) -> list[torch.Tensor]:
    """The log-probabilities of each sequence behind its prompt."""
    batch = lay_out(sequences, prompts=prompts)
    rows = policy.forward(batch, layout=layout)[0].split([len(ids) for ids in sequences])
    return [row[n:] for row, n in zip(rows, prompts, strict=True)]


def _mean_gap(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return float((torch.cat(list(ours)) - torch.cat(list(theirs))).abs().mean())


def lay_out(
    sequences: Sequence[Sequence[int]], *, prompts: Sequence[int] | None = None
) -> MicroBatch:
    """A micro-batch in which every token is scored but the first of each sequence, or the first
    `prompts` of it."""
    lengths = [len(ids) for ids in sequences]
    flat_T = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
    zeros_T = torch.zeros(flat_T.numel())
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    unscored_N = torch.tensor(prompts or [1] * len(lengths))
    mask_T = (positions_T >= unscored_N.repeat_interleave(torch.tensor(lengths))).long()
    return MicroBatch(
        token_ids=flat_T,
        position_ids=positions_T,
        starts=starts,
        loss_mask=mask_T,
        advantages=zeros_T,
        logprobs=zeros_T,
    )


def choose_layout(policy: PolicyModel, *, wish: str = "auto") -> tuple[Layout, str]:
    """The layout of this model, and why: packed wherever it is exact, since it computes a prompt
    once and pads nothing. Raises ModelError if "packed" is wished for and leaks."""
    if wish == "padded":
        return "padded", "asked for"
    found = packing_probe(policy)
    if found.right:
        return "packed", f"packed and one by one agree: {found}"
    leak = f"packing leaks between sequences: {found}"
    if wish == "packed":
        raise ModelError(leak, cure='use layout = "auto"')
    return "padded", leak


def checkpoint_names(folder: str | Path, model: nn.Module | None = None) -> list[str]:
    """The tensors of the checkpoint in `folder`, by the names of its safetensors files, sorted;
    without those that the class of `model` leaves aside on purpose (a draft head, say)."""
    from safetensors import safe_open

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = list(json.loads(index.read_text())["weight_map"])
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names = list(file.keys())
    else:
        raise ModelError(
            "no model.safetensors", place=str(folder), cure="convert the checkpoint to safetensors"
        )
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    known = set(model.state_dict()) if model is not None else set()
    return sorted(
        name
        for name in names
        if name in known or not any(re.search(pattern, name) for pattern in ignored)
    )
