"""The transformers engine: plain PyTorch, where vLLM cannot be installed or does not know the
family.
 Waiting requests of one version are sampled together, left-padded, with a KV cache; each has a
random generator of its own, so that its numbers do not depend on its neighbours. What a batch still
changes is the order of sums inside a matrix product: logprobs agree to about 1e-6 in float32, and a
token changes only where two candidates are closer than that. With `max_running = 1` runs repeat bit
for bit. Requests are admitted when a batch begins, and scoring is done one sequence at a time,
without a cache.
"""

import gc
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpost.engine.base import EngineSpec, Publication, Sampling
from rlpost.engine.stepped import Request, Served, SteppedEngine, Stepper
from rlpost.errors import EngineError
from rlpost.policy.proof import BASE, bit_sum
from rlpost.types import Completion

HEAD = "lm_head.weight"
PEFT_PREFIX = "base_model.model."


class TransformersEngine(SteppedEngine):
    """The engine contract over a transformers causal LM. `spec.extra` goes to `from_pretrained`."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec, _TransformersStepper(spec))


@dataclass(slots=True)
class _Row:
    """One request of the running batch."""

    request: Request
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False


@dataclass(slots=True)
class _Batch:
    """Rows of one version; tensors have one line per row, finished ones included."""

    served: Served
    rows: list[_Row]
    inputs: torch.Tensor  # [rows, n]: the padded prompts, then [rows, 1]
    mask: torch.Tensor  # [rows, all tokens so far]
    cache: Any = None


class _TransformersStepper(Stepper):
    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        self._model: Any = None  # the causal LM, wrapped by PEFT once an adapter was loaded
        self._tokenizer: Any = None
        self._names: list[str] = []  # of the checkpoint's tensors, the head included
        self._waiting: deque[Request] = deque()
        self._batch: _Batch | None = None
        self._unseeded = torch.Generator().manual_seed(spec.seed)

    def open(self) -> None:
        self._dtype = getattr(torch, self.spec.dtype)
        self._device = torch.device(self.spec.device)
        self._tokenizer = AutoTokenizer.from_pretrained(self.spec.model)
        model = AutoModelForCausalLM.from_pretrained(
            self.spec.model, dtype=self._dtype, **dict(self.spec.extra)
        )
        self._model = model.to(self._device).eval()
        self._names = list(model.state_dict())
        self.vocabulary = model.get_input_embeddings().num_embeddings

    def close(self) -> None:
        self._model = self._batch = None
        self._waiting.clear()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # -- sampling ----------------------------------------------------------------------------------

    def admit(self, request: Request) -> None:
        self._waiting.append(request)

    def abort(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        for row in self._batch.rows if self._batch else ():
            row.done = row.done or row.request is request

    @torch.inference_mode()
    def step(self) -> None:
        if self._batch is None or all(row.done for row in self._batch.rows):
            self._batch = None
            request = self._waiting[0]
            if request.scored:
                self._waiting.popleft()
                self.answer(request, self._score(request))
                return
            self._batch = self._gather(request)
        self._sample(self._batch)

    def _gather(self, first: Request) -> _Batch:
        """A batch of waiting completions of the version that has waited longest, in order."""
        served = first.served
        assert served is not None
        chosen = [each for each in self._waiting if each.served is served and not each.scored]
        chosen = chosen[: self.spec.max_running]
        self._waiting = deque(each for each in self._waiting if each not in chosen)
        longest = max(len(each.prompt) for each in chosen)
        inputs = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros(len(chosen), longest, dtype=torch.long)
        for line, each in enumerate(chosen):
            inputs[line, longest - len(each.prompt) :] = torch.tensor(each.prompt)
            mask[line, longest - len(each.prompt) :] = 1
        rows = [_Row(each, self._generator(each.sampling)) for each in chosen]
        return _Batch(served, rows, inputs.to(self._device), mask.to(self._device))

    def _generator(self, sampling: Sampling) -> torch.Generator:
        seed = sampling.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, (), generator=self._unseeded))
        return torch.Generator().manual_seed(seed)  # on the CPU: the same numbers on every device

    def _sample(self, batch: _Batch) -> None:
        """One more token for every row."""
        positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)[:, -batch.inputs.shape[1] :]
        with self._serving(batch.served):
            out = self._model(
                input_ids=batch.inputs,
                attention_mask=batch.mask,
                position_ids=positions,
                past_key_values=batch.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        batch.cache = out.past_key_values
        logits = out.logits[:, -1].float().cpu()  # [rows, V]
        tokens = torch.zeros(len(batch.rows), 1, dtype=torch.long)
        for line, row in enumerate(batch.rows):
            if not row.done:
                tokens[line] = self._choose(row, logits[line])
                self._finish(row)
        batch.inputs = tokens.to(self._device)
        batch.mask = torch.cat([batch.mask, torch.ones_like(batch.inputs)], dim=1)

    def _choose(self, row: _Row, logits: torch.Tensor) -> int:
        """Samples by the exponential race: argmax of p / e, e exponential, is a draw from p."""
        temperature = row.request.sampling.temperature
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)  # [V]
        if temperature:
            race = torch.empty_like(logprobs).exponential_(generator=row.generator)
            token = int((logprobs - race.log()).argmax())
        else:
            token = int(logprobs.argmax())
        row.token_ids.append(token)
        row.logprobs.append(float(logprobs[token]))
        return token

    def _finish(self, row: _Row) -> None:
        request, sampling = row.request, row.request.sampling
        stopped = row.token_ids[-1] in sampling.stop_token_ids
        limit = min(sampling.max_tokens, self.spec.max_length - len(request.prompt))
        if not stopped and len(row.token_ids) < limit:
            return
        row.done = True
        assert request.served is not None
        self.answer(
            request,
            Completion(
                token_ids=row.token_ids,
                logprobs=row.logprobs,
                text=self._tokenizer.decode(row.token_ids, skip_special_tokens=True),
                finish_reason="stop" if stopped else "length",
                versions=[(0, request.served.version)],
            ),
        )

    def _score(self, request: Request) -> list[float]:
        tokens = torch.tensor([request.prompt], device=self._device)
        assert request.served is not None
        with self._serving(request.served):
            logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens[0, 1:, None])[:, 0]
        return [0.0, *logprobs.tolist()]

    @contextmanager
    def _serving(self, served: Served) -> Iterator[None]:
        """The model computes with this version inside the block."""
        if served.adapter is not None:
            if self._model.active_adapter != served.adapter:
                self._model.set_adapter(served.adapter)
            yield
        elif hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                yield
        else:
            yield

    # -- versions ----------------------------------------------------------------------------------

    def load_adapter(self, publication: Publication, name: str) -> str:
        from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

        known = set(LoraConfig.__dataclass_fields__) - {"inference_mode"}
        given = publication.adapter_config.items()
        config = LoraConfig(**{key: value for key, value in given if key in known})
        if config.r > self.spec.lora_rank:
            raise EngineError(f"the adapter's rank {config.r} is above {self.spec.lora_rank}")
        try:
            if isinstance(self._model, PeftModel):
                self._model.add_adapter(name, config)
            else:
                self._model = get_peft_model(
                    self._model, config, adapter_name=name, autocast_adapter_dtype=False
                )
            tensors = load(publication.payload)
            result = set_peft_model_state_dict(self._model, tensors, adapter_name=name)
        except (ValueError, KeyError, RuntimeError) as error:
            raise EngineError(f"PEFT refused the adapter {name}: {error}") from error
        for parameter_name, parameter in self._model.named_parameters():
            if f".{name}." in parameter_name:
                parameter.data = parameter.data.to(self._device, self._dtype)
        self._model.eval().requires_grad_(False)
        if result.unexpected_keys:
            self._model.delete_adapter(name)
            raise EngineError(f"the model has no place for {result.unexpected_keys[0]}")
        return name

    def unload_adapter(self, served: Served) -> None:
        if self._model.active_adapter == served.adapter:  # PEFT warns when it must choose another
            self._model.set_adapter(next(n for n in self._model.peft_config if n != served.adapter))
        self._model.delete_adapter(served.adapter)

    def load_full(self, publication: Publication) -> None:
        tensors = load(publication.payload)
        result = self._model.load_state_dict(tensors, strict=False)
        missing = [name for name in result.missing_keys if name != HEAD]
        if missing or result.unexpected_keys:
            name = [*missing, *result.unexpected_keys][0]
            raise EngineError(f"the published tensors do not match the model: {name}")

    def fingerprint(self, served: Served) -> dict[str, int]:
        """Read from the modules that compute, in the dtype that is served."""
        base: dict[str, int] = {}
        adapter: dict[str, int] = {}
        for name, tensor in self._model.state_dict().items():
            plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
            if ".lora_" not in name:
                if plain in self._names:
                    base[plain] = bit_sum(tensor.to(self._dtype))
            elif served.adapter and f".{served.adapter}." in name:
                key = name.replace(f".{served.adapter}.", ".")
                adapter[key] = bit_sum(tensor.to(self._dtype))
        if served.adapter is None:
            return base
        return adapter | {BASE: sum(base.values()) % (1 << 64)}
