"""The job as it really runs: every value, whether written, a default or derived from model and
rows, as TOML for the run directory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost import assembly
from rlpost.preparation import Prepared, model_folder


def resolve(prepared: Prepared) -> dict[str, Any]:
    """{table: {key: value}} of a prepared job; `reward` is a list of tables. `model` also has the
    folder, the revision where a hub's cache tells it, and the licence. Values that stay unset are
    None."""
    job, folder = prepared.job, model_folder(prepared.job)
    values: dict[str, Any] = job.model_dump(by_alias=True)
    engine, learner = assembly.engine_spec(job, folder), assembly.learner_spec(job)
    values["model"] |= {
        "dtype": job.dtype,
        "engine": assembly.choose_engine(job, folder)[0],
        "folder": str(folder),
        "revision": revision(folder),
        "license": job.model.license or _title(assembly.licence(folder)) or None,
    }
    values["rollout"] |= {
        "staleness": job.staleness,
        "max_reply_tokens": prepared.max_reply_tokens,
        "max_running": engine.max_running,
        "kv_cache_mb": engine.kv_cache_bytes >> 20 if engine.kv_cache_bytes else None,
    }
    values["learner"] |= {
        "learning_rate": learner.learning_rate,
        "micro_batch_tokens": learner.micro_batch_tokens,
        "checkpoint_activations": learner.checkpointing,
    }
    for table, spec in zip(values["reward"], job.rewards, strict=True):
        table["name"] = spec.name
    return values


def revision(folder: Path) -> str | None:
    """The commit of a model in the hub's cache (…/snapshots/COMMIT); None for a plain folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _title(licence: str) -> str:
    """The first words of a licence's text: its name."""
    return next((line.strip() for line in licence.splitlines() if line.strip()), "")


def write_toml(values: Mapping[str, Any]) -> str:
    """The tables as TOML; None is written as a comment, since TOML has no such value."""
    blocks = []
    for name, table in values.items():
        for each in table if isinstance(table, list) else [table]:
            head = f"[[{name}]]" if isinstance(table, list) else f"[{name}]"
            lines = [
                f"# {key} is unset" if value is None else f"{_key(key)} = {_value(value)}"
                for key, value in each.items()
            ]
            blocks.append("\n".join([head, *lines]))
    return "\n\n".join(blocks) + "\n"


def _key(key: str) -> str:
    plain = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if plain else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    return str(value) if isinstance(value, int) else _string(str(value))


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
