"""One rank of the learner: micro-batches in, a report and the next policy version out. No Ray.

What is left out of the textbook: no epochs over a batch (each rollout is trained once), no value
model, no second model for the KL: the reference is the start policy, which for LoRA is the same
model with another adapter, or none.
"""

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rlpost.engine.base import Publication
from rlpost.errors import CheckpointError, ModelError, RunError
from rlpost.grpo.loss import LossStatistics, Totals, policy_loss
from rlpost.grpo.packing import split
from rlpost.learner_spec import LearnerSpec
from rlpost.policy import canary, lora, publish
from rlpost.policy import model as policy_model
from rlpost.policy.checkpoint import (
    Checkpoint,
    moments,
    random_states,
    restore_moments,
    restore_random,
    write,
)
from rlpost.types import MicroBatch, StepReport

WEIGHTS, OPTIMIZER, RANDOM = "weights.safetensors", "optimizer.safetensors", "random.safetensors"
STATE, ADAPTER_CONFIG = "learner.json", "adapter_config.json"


def _exclusive(method: Callable[..., Any]) -> Callable[..., Any]:
    """One call at a time: looking exchanges the very weights that an update moves."""

    @functools.wraps(method)
    def call(self: "Learner", *arguments: Any, **named: Any) -> Any:
        with self._lock:
            return method(self, *arguments, **named)

    return call


class Learner:
    """Construct, `start()`, then `update` again and again. `version` counts the optimizer steps
    that moved weights; 0 is the start policy."""

    def __init__(self, spec: LearnerSpec):
        self.spec = spec
        self.version = 0
        self.layout: policy_model.Layout = "padded"
        self.layout_reason = "not started"
        self._loss = spec.loss_spec()
        self._lock = threading.RLock()
        self._start: dict[str, torch.Tensor] | None = None  # full or imported adapter: frozen copy
        self._canary: Mapping[str, torch.Tensor] | None = None

    @property
    def micro_batch_tokens(self) -> int:
        return self.spec.micro_batch_tokens

    @property
    def can_measure_kl(self) -> bool:
        """Whether the start policy is still known: always with LoRA, with full if it was asked
        for."""
        return self.spec.method == "lora" or self._start is not None

    def start(self) -> None:
        """Loads model and adapter, fixes the layout, makes the optimizer."""
        spec = self.spec
        torch.manual_seed(spec.seed)
        full = spec.method == "full"
        base_dtype = "float32" if full else spec.dtype  # full: fp32 master weights
        model = policy_model.load(spec.model, dtype=base_dtype, device=spec.device)
        self._names = policy_model.checkpoint_names(spec.model, model)
        self._engine_dtype = policy_model.DTYPES[spec.engine_dtype or spec.dtype]
        self._model = self._prepare_full(model) if full else self._prepare_lora(model)
        inner = model if full else self._model.get_base_model()
        half = full and spec.dtype == "bfloat16"
        self.policy = policy_model.PolicyModel(
            inner, checkpointing=spec.checkpointing, autocast=torch.bfloat16 if half else None
        )
        self.policy.entropy_gradient = spec.entropy_coefficient != 0
        self._trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        keep = spec.adapter if not full else spec.keep_start or spec.kl_coefficient
        if keep:
            self._start = {n: p.detach().clone() for n, p in self._trained.items()}
        self.layout, self.layout_reason = policy_model.choose_layout(self.policy, wish=spec.layout)
        self.policy.layout = self.layout
        self._optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.epsilon,
            weight_decay=spec.weight_decay,
        )

    def _prepare_full(self, model: torch.nn.Module) -> torch.nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in lora.OUTSIDE for part in name.split(".")))
        return model

    def _prepare_lora(self, model: torch.nn.Module) -> Any:
        spec = self.spec
        self._base_sum = publish.sum_base(model, self._names, dtype=self._engine_dtype)
        return lora.attach(
            model,
            rank=spec.rank,
            alpha=spec.alpha,
            head=spec.lora_head,
            adapter=spec.adapter or None,
            seed=spec.seed,
        )

    # ── training ────────────────────────────────────────────────────────────────────────────────

    @_exclusive
    def update(
        self,
        batches: Sequence[MicroBatch],
        *,
        measure_kl: bool = False,
        learning_rate_scale: float = 1.0,
    ) -> StepReport:
        """One optimizer step over all of `batches`. Afterwards `version` is one higher, or the
        report's `skipped` says why nothing moved: then weights, optimizer and version are as
        before."""
        began = time.perf_counter()
        if (measure_kl or self.spec.kl_coefficient) and not self.can_measure_kl:
            raise ModelError(
                "full fine-tuning has kept no start policy to measure the KL against",
                cure="set keep_start",
            )
        measured = measure_kl or self.spec.kl_coefficient != 0
        rate = self._learning_rate(learning_rate_scale)
        self._optimizer.zero_grad(set_to_none=True)
        loss, statistics, skipped = self._accumulate(batches, measure_kl=measured)
        norm = math.nan
        if not skipped:
            norm, skipped = self._step(rate)
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(
            policy_version=self.version,
            loss=loss,
            grad_norm=norm,
            entropy=statistics.mean("entropy"),
            clip_fraction=statistics.mean("clipped_low") + statistics.mean("clipped_high"),
            logprob_gap=statistics.mean("gap"),
            kl=statistics.mean("kl") if measured else math.nan,
            tokens=int(statistics.tokens),
            seconds=time.perf_counter() - began,
            learning_rate=rate,
            ratio_mean=statistics.mean("ratio") if statistics.tokens else 1.0,
            effective_sample_size=statistics.effective_sample_size,
            guarded_sequences=int(statistics.guarded_sequences),
            skipped=skipped,
        )

    def _accumulate(
        self, batches: Sequence[MicroBatch], *, measure_kl: bool
    ) -> tuple[float, LossStatistics, str]:
        """(loss, statistics, why to skip) with the gradients of all micro-batches added up."""
        totals = Totals.of(batches, longest=self.spec.reply_limit)
        total, statistics = 0.0, LossStatistics()
        if not totals.tokens:
            return total, statistics, "no trained tokens"
        for batch in batches:
            if measure_kl:
                batch = replace(batch, reference_logprobs=self._reference(batch))
            logprobs_T, entropy_T = self.policy.forward(batch)
            loss, sums = policy_loss(logprobs_T, entropy_T, batch, spec=self._loss, totals=totals)
            statistics += sums
            total += float(loss.detach())
            if not math.isfinite(total):
                return total, statistics, "the loss is not finite"
            loss.backward()
        if statistics.guarded_sequences >= totals.sequences:
            return total, statistics, "the sequence guard dropped every sequence"
        return total, statistics, ""

    def _step(self, rate: float) -> tuple[float, str]:
        """(gradient norm, why no weight moved)."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained.values(), self.spec.clip_norm))
        if not math.isfinite(norm):
            return norm, "the gradient is not finite"
        if norm == 0.0:
            return norm, "the gradient is zero"
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._canary = None  # it was scaled for the weights that were
        self.version += (
            1  # only after the optimizer moved: no engine may hold a version nobody trained
        )
        return norm, ""

    def _learning_rate(self, scale: float) -> float:
        """Rises over `warmup` updates, then stays."""
        share = min(1.0, (self.version + 1) / self.spec.warmup) if self.spec.warmup else 1.0
        return self.spec.learning_rate * share * scale

    @torch.no_grad()
    def _reference(self, batch: MicroBatch) -> torch.Tensor:
        with self._start_policy():
            return self.policy.forward(batch)[0]

    # ── looking ─────────────────────────────────────────────────────────────────────────────────

    @_exclusive
    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        policy: Literal["current", "start", "served"] = "current",
    ) -> list[list[float]]:
        """Log-probabilities at temperature 1: n floats for a sequence of n tokens, the first 0.0.
        "served" is the current policy as the engines hold it, rounded to their dtype: what a proof
        compares with, since an update can vanish in that rounding."""
        if policy == "start" and not self.can_measure_kl:
            raise ModelError("full fine-tuning has kept no start policy", cure="set keep_start")
        if policy == "start":
            weights: Any = self._start_policy()
        elif policy == "served":
            weights = self._weights(self._rounded())
        else:
            weights = nullcontext()
        with weights:
            return self._score(sequences)

    def _rounded(self) -> dict[str, torch.Tensor]:
        """The trained values after the trip to the engine and back."""
        scaling: dict[str, float] = {}  # B travels scaled; an imported adapter brings its own alpha
        if self.spec.method == "lora":
            scaling = {
                f"{publish.PEFT_PREFIX}{name}.lora_B.{lora.ADAPTER}.weight": layer.scaling[
                    lora.ADAPTER
                ]
                for name, layer in lora.layers(self._model)
            }
        rounded = {}
        for name, parameter in self._trained.items():
            factor = scaling.get(name, 1.0)
            cast = (parameter.detach() * factor).to(self._engine_dtype)
            rounded[name] = cast.to(parameter.dtype) / factor
        return rounded

    @torch.no_grad()
    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Longest first in micro-batches, answers in the order asked."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        lengths = [len(sequences[i]) for i in order]
        parts = split(lengths, self.spec.micro_batch_tokens, padded=self.layout == "padded")
        answers: list[list[float]] = [[] for _ in sequences]
        for part in parts:
            batch = policy_model.lay_out([list(sequences[order[i]]) for i in part])
            values = self.policy.forward(batch)[0].cpu().split([lengths[i] for i in part])
            for index, row in zip(part, values, strict=True):
                answers[order[index]] = row.tolist()
        return answers

    @_exclusive
    def publication(self) -> Publication:
        """The current weights, as the engines take them."""
        return self._publish(self.version)

    def _publish(self, version: int) -> Publication:
        if self.spec.method == "full":
            return publish.publish_full(
                self._model, self._names, version=version, dtype=self._engine_dtype
            )
        return publish.publish_lora(
            self._model,
            version=version,
            dtype=self._engine_dtype,
            base_sum=self._base_sum,
            base_model=self.spec.model,
        )

    def describe(self) -> dict[str, Any]:
        """What was started, in plain values for logs and `doctor`."""
        parameters = sum(p.numel() for p in self._model.parameters())
        text: dict[str, Any] = {
            "model": self.spec.model,
            "method": self.spec.method,
            "dtype": self.spec.dtype,
            "device": self.spec.device,
            "parameters": parameters,
            "trained_parameters": sum(p.numel() for p in self._trained.values()),
            "layout": self.layout,
            "layout_reason": self.layout_reason,
            "checkpointing": self.spec.checkpointing,
            "loss": self.spec.loss,
        }
        if self.spec.method == "lora":
            found = lora.coverage(self._model, head=self.spec.lora_head)
            text["coverage"] = {
                "reached": len(found.reached),
                "missed": list(found.missed),
                "left_out": found.left_out,
            }
        return text

    # ── other weights for a moment ──────────────────────────────────────────────────────────────

    @contextmanager
    def _weights(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Other values for the trained parameters within the block. Storages are exchanged, not
        copied, so the true weights are back bit for bit."""
        own = {name: parameter.data for name, parameter in self._trained.items()}
        try:
            for name, parameter in self._trained.items():
                parameter.data = tensors[name]
            yield
        finally:
            for name, parameter in self._trained.items():
                parameter.data = own[name]

    @contextmanager
    def _start_policy(self) -> Iterator[None]:
        if self._start is not None:
            with self._weights(self._start):
                yield
        else:  # a fresh adapter changed nothing, so the start policy is the base
            with self._model.disable_adapter():
                yield

    @_exclusive
    def canary(self, seed: int) -> Publication:
        """A random policy that differs by roughly 0.5 a log-probability from the current one,
        published under `canary.VERSION`. The learner's own weights are untouched afterwards."""
        size = self.policy.model.config.get_text_config().vocab_size
        probe = canary.probe_sequences(size, seed)
        before = self._score(probe)

        def change(weights: Mapping[str, torch.Tensor]) -> float:
            with self._weights(weights):
                return canary.mean_change(before, self._score(probe))

        lora_only = self.spec.method == "lora"
        self._canary = canary.find(self._trained, seed, lora=lora_only, score=change)
        with self._weights(self._canary):
            return self._publish(canary.VERSION)

    @_exclusive
    def canary_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """What an engine must say about `sequences` while it serves the last canary."""
        if self._canary is None:
            raise RunError("no canary was published since the last update")
        with self._weights(self._canary):
            return self._score(sequences)

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────

    @_exclusive
    def save(self, folder: str | Path) -> Path:
        """Weights (fp32), optimizer and random states as a checkpoint folder, whole or absent."""
        documents = {
            STATE: {
                "version": self.version,
                "spec": asdict(self.spec),
                "method": self.spec.method,
            }
        }
        if self.spec.method == "lora":
            documents[ADAPTER_CONFIG] = publish.adapter_config(
                self._model, base_model=self.spec.model, scaled=False
            )
        return write(
            folder,
            documents=documents,
            tensors={
                WEIGHTS: self._trained,
                OPTIMIZER: moments(self._trained, self._optimizer),
                RANDOM: random_states(self.spec.device),
            },
        )

    @_exclusive
    def load(self, folder: str | Path) -> None:
        """Everything `save` wrote; training goes on bit for bit. Raises CheckpointError naming the
        file if one is damaged or was written for other parameters; then the learner is as
        before."""
        checkpoint = Checkpoint(folder)
        state = checkpoint.document(STATE)
        weights, kept = checkpoint.tensors(WEIGHTS), checkpoint.tensors(OPTIMIZER)
        generators = checkpoint.tensors(RANDOM)
        shapes = {name: tuple(p.shape) for name, p in self._trained.items()}
        if {name: tuple(tensor.shape) for name, tensor in weights.items()} != shapes:
            raise CheckpointError(
                f"{Path(folder) / WEIGHTS} was written for other parameters than {self.spec.model} "
                f"has with method {self.spec.method} and rank {self.spec.rank}"
            )
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])
        restore_moments(kept, self._trained, self._optimizer)
        self.version, self._canary = state["version"], None
        restore_random(generators, device=self.spec.device)
