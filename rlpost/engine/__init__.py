"""Engines: token ids in, completions out. Nothing heavy is imported until one is opened."""

import importlib
import importlib.util

from rlpost.engine.base import Engine, EngineSpec
from rlpost.errors import EngineError

ENGINES = {
    "vllm": "rlpost.engine.vllm_inprocess:VLLMInProcess",
    "transformers": "rlpost.engine.transformers:TransformersEngine",
}  # best first; vLLM's engine process ("vllm_async") will stand beside the one in this process


def available() -> list[str]:
    """Names of the engines whose library is installed, best first; the library is not imported."""
    return [name for name in ENGINES if importlib.util.find_spec(name) is not None]


def open_engine(name: str, spec: EngineSpec) -> Engine:
    """The engine called `name`, not started. Raises EngineError if it is unknown or not
    installed."""
    if name not in available():
        reason = "its library is not installed" if name in ENGINES else "there is no such engine"
        raise EngineError(f"engine {name}: {reason} (available: {', '.join(available())})")
    module, _, kind = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), kind)(spec)
