"""Does a reward take the arguments that the job gives it: names, and types where it says them.

A wrong argument would otherwise show as an error on every row, long after the job was started.
"""

import collections.abc
import difflib
import inspect
import json
import types
import typing
from collections.abc import Callable
from typing import Any

from rlpost.errors import PluginError
from rlpost.reward import RewardSpec

_ABSTRACT: dict[Any, tuple[type, ...]] = {
    collections.abc.Sequence: (list, tuple),
    collections.abc.Iterable: (list, tuple),
    collections.abc.Collection: (list, tuple),
    collections.abc.Mapping: (dict,),
    float: (int, float),
    tuple: (list, tuple),
}
_PLAIN = (str, int, float, bool, list, dict, tuple, type(None))
_SAID = {dict: "an object", list: "a list", str: "text", bool: "a boolean"}


def check_arguments(spec: RewardSpec, function: Callable[..., Any]) -> None:
    """Raises PluginError, one line, for a function that does not take (task, rollout), an unknown
    or missing keyword argument, or a value that its annotation rules out."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise PluginError(
            f"the reward {spec.use!r} does not take (task, rollout)",
            cure="write def name(task, rollout, *, …)",
        )
    named = [p for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = [p.name for p in named]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in spec.arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                cure = f"did you mean {near[0]!r}?" if near else f"it takes {_listed(known)}"
                raise PluginError(f"the reward {spec.use!r} has no argument {name!r}", cure=cure)
    for parameter in named:
        given = parameter.name in spec.arguments or parameter.name == "base_dir"  # which we give
        if parameter.default is parameter.empty and not given:
            raise PluginError(
                f"the reward {spec.use!r} needs the argument {parameter.name!r}",
                cure=f"write {parameter.name} = … in its [[reward]] table",
            )
    _check_types(spec, function)


def _check_types(spec: RewardSpec, function: Callable[..., Any]) -> None:
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # annotations are the author's own affair: names that only a checker knows
        return
    for name, value in spec.arguments.items():
        if name in hints and not fits(value, hints[name]):
            shown = json.dumps(value, default=str)[:60]
            raise PluginError(
                f"the argument {name!r} of the reward {spec.use!r} cannot be {shown}",
                cure=f"it is {_said(hints[name])}",
            )


def fits(value: Any, hint: Any) -> bool:
    """Whether a TOML or JSON value may stand where `hint` is written. Text is no list, a boolean no
    number; what is not understood fits."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is typing.Annotated:
        return fits(value, inner[0])
    kind = origin or hint
    allowed = _ABSTRACT.get(kind, (kind,))
    if not isinstance(kind, type) or not set(allowed) <= set(_PLAIN):
        return True
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        return False
    if isinstance(value, dict) and len(inner) == 2:
        return all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
    if isinstance(value, list | tuple) and len(inner) == 1:
        return all(fits(each, inner[0]) for each in value)
    return True


def _said(hint: Any) -> str:
    if hint in _SAID:
        return _SAID[hint]
    text = str(hint).replace("typing.", "").replace("collections.abc.", "")
    return text.removeprefix("<class '").removesuffix("'>")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
