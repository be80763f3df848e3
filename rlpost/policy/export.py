"""A trained policy taken out of a run: a PEFT adapter and a merged checkpoint that plain
transformers and plain vLLM load, checked on the way, with everything that serving it needs.

    out/adapter/    adapter_model.safetensors (fp32), adapter_config.json     LoRA only
    out/merged/     the base's own tensor names, dtypes, config and tokenizer
    out/            prompt.md, schema.json, chat_template.json, LICENCE, serve.sh, export.json

The adapter that is merged is the one read back from `out/adapter`, and the log-probabilities that
are compared are those of `out/merged` read back: what is checked is what is shipped.
"""

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from rlpost.errors import RunError, UserError
from rlpost.policy import lora, publish
from rlpost.policy import model as policy_model
from rlpost.policy.canary import mean_change, probe_sequences
from rlpost.policy.checkpoint import Checkpoint

NOT_COPIED = (".safetensors", ".bin", ".pt", ".gguf", ".index.json", ".md", ".gitattributes")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # mean |difference| of a log-probability
SUMMARY = "export.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is written beside the weights. Empty fields write no file. `serve_command` may name the
    exported model as {model}; it is filled with the folder."""

    prompt: str = ""
    schema: Mapping[str, Any] | None = None
    chat_template_arguments: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    serve_command: str = "vllm serve {model}"
    provenance: Mapping[str, Any] = field(default_factory=dict)


def export(
    checkpoint: str | Path,
    base_model: str | Path,
    out: str | Path,
    *,
    surroundings: Surroundings | None = None,
    dtype: str = "",
    device: str = "cpu",
    merged: bool = True,
) -> dict[str, Any]:
    """Writes `out` from a learner's checkpoint folder and the base it was trained on; returns what
    export.json says, the differences found by the check among it.

    `dtype` is that of the merged weights, "" keeps the base's, tensor by tensor. Raises RunError if
    the merged model disagrees with the trained one, and UserError if `out` holds something else;
    then `out` is as it was.
    """
    out, base_model = Path(out), Path(base_model)
    _refuse_strangers(out)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    saved = Checkpoint(checkpoint)
    state = saved.document("learner.json")
    summary: dict[str, Any] = {
        "method": state["method"],
        "policy_version": state["version"],
        "base_model": str(base_model),
    }
    model = policy_model.load(base_model, device=device)
    size = model.config.get_text_config().vocab_size
    probes = probe_sequences(size, seed=0)
    base = _logprobs(model, probes)
    model = _apply(saved, state, model, partial)
    trained = _logprobs(model, probes)
    summary["change_from_base"] = mean_change(base, trained)
    if merged:
        if state["method"] == "lora":
            model = model.merge_and_unload()
        dtypes = _write_merged(model, base_model, partial / "merged", dtype=dtype)
        del model
        summary |= _check(partial / "merged", probes, trained, dtypes=dtypes, device=device)
    summary |= _surround(partial, out, surroundings or Surroundings(), merged=merged)
    _write_json(partial / SUMMARY, summary)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return summary


def _refuse_strangers(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / SUMMARY).is_file():
        raise UserError("the folder is not empty", place=str(out), cure="name another with --out")


def _apply(saved: Checkpoint, state: Any, model: nn.Module, partial: Path) -> Any:
    """The base with the checkpoint's weights on it; a LoRA adapter is written and read back."""
    weights = saved.tensors("weights.safetensors")
    if state["method"] == "full":
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        return model
    folder = partial / "adapter"
    folder.mkdir()
    tensors = {name.replace(f".{lora.ADAPTER}.", "."): value for name, value in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = saved.document("adapter_config.json")
    _write_json(folder / "adapter_config.json", config)
    return lora.attach(model, adapter=folder)


def _logprobs(model: Any, probes: list[list[int]]) -> list[list[float]]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        flat = policy_model.PolicyModel(inner).forward(policy_model.lay_out(probes))[0]
    return [row.tolist() for row in flat.cpu().split([len(ids) for ids in probes])]


def _write_merged(model: nn.Module, base: Path, folder: Path, *, dtype: str) -> set[torch.dtype]:
    """The base's files with its weights replaced; returns the dtypes written."""
    from huggingface_hub import save_torch_state_dict

    names = policy_model.checkpoint_names(base, model)
    tensors = publish.full_tensors(model, names, dtype=torch.float32)
    if publish.HEAD not in names:
        tensors.pop(publish.HEAD, None)  # tied: the embedding is the head
    kept = _dtypes(base)
    wanted = policy_model.DTYPES.get(dtype)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(wanted or kept[name])
    folder.mkdir()
    save_torch_state_dict(tensors, folder)
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith(NOT_COPIED):
            shutil.copy(path, folder / path.name)
    if dtype:
        config = json.loads((folder / "config.json").read_text())
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
        _write_json(folder / "config.json", config)
    return {tensor.dtype for tensor in tensors.values()}


def _dtypes(base: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor of a checkpoint, without reading the tensors."""
    from safetensors import safe_open

    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    dtypes = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                dtypes[name] = known.get(file.get_slice(name).get_dtype(), torch.float32)
    return dtypes


def _check(
    folder: Path,
    probes: list[list[int]],
    trained: list[list[float]],
    *,
    dtypes: set[torch.dtype],
    device: str,
) -> dict[str, Any]:
    """Reads the merged checkpoint back and compares it with the trained policy."""
    found = _logprobs(policy_model.load(folder, device=device), probes)
    difference = mean_change(trained, found)
    narrow = dtypes & {torch.bfloat16, torch.float16}
    limit = TOLERANCE[torch.bfloat16 if narrow else torch.float32]
    if not difference <= limit:  # NaN is no agreement either
        raise RunError(
            f"the merged model is not the trained one: its log-probabilities differ by "
            f"{difference:.3g} on average, more than {limit:g}"
        )
    return {"difference": difference, "tolerance": limit, "merged_dtype": _words(dtypes)}


def _words(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _surround(
    partial: Path, out: Path, surroundings: Surroundings, *, merged: bool
) -> dict[str, Any]:
    """Writes the files beside the weights; returns what the summary says of them."""
    model = out / "merged" if merged else out / "adapter"
    command = surroundings.serve_command.replace("{model}", shlex.quote(str(model)))
    if surroundings.prompt:
        (partial / "prompt.md").write_text(surroundings.prompt)
    if surroundings.schema is not None:
        _write_json(partial / "schema.json", surroundings.schema)
    if surroundings.chat_template_arguments:
        _write_json(partial / "chat_template.json", surroundings.chat_template_arguments)
    if surroundings.licence:
        (partial / "LICENCE").write_text(surroundings.licence.rstrip() + "\n")
    if command:
        (partial / "serve.sh").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (partial / "serve.sh").chmod(0o755)
    return {
        "serve": command,
        "chat_template_arguments": dict(surroundings.chat_template_arguments),
        "provenance": dict(surroundings.provenance),
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
