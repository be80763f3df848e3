"""Finds what a job names: "label" by entry point, "my_reward:fields" beside the job file first,
then anywhere Python can import from.

Built-in rewards and environments come through the same entry points as everybody's, so the core
never imports them. A file beside the job is loaded from its path, which keeps two jobs in two
folders apart although both call their file `reward.py`.
"""

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rlpost.errors import PluginError

PluginKind = Literal["rlpost.rewards", "rlpost.envs"]
_NOUNS = {"rlpost.rewards": "reward", "rlpost.envs": "environment"}
_loaded: dict[Path, tuple[int, ModuleType]] = {}  # file -> (mtime in ns, module)


def resolve(group: PluginKind, name: str, *, base_dir: str | Path = ".") -> Any:
    """The object that `name` stands for: an entry point of `group`, or "module:object".

    Raises PluginError, one line with the cure: unknown name (with the nearest known one), a name
    that two distributions claim (both named), a module that is not there or fails on import (file
    and line), an attribute that is missing.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        return _attribute(_module(module_name, Path(base_dir), name), attribute, name)
    point = _entry_point(group, name)
    module = _imported(point.module, f"{_NOUNS[group]} {name!r} of {_distribution(point)}")
    return _attribute(module, point.attr, f"{name!r} ({point.value})")


def origin(group: PluginKind, name: str, *, base_dir: str | Path = ".") -> str:
    """Where `name` comes from, for reports: "rlpost 0.1.0, rlpost_rewards.label:label" or a file's
    path.

    Imports nothing of a file beside the job. Raises PluginError as `resolve` does for unknown
    names.
    """
    if ":" not in name:
        point = _entry_point(group, name)
        return f"{_distribution(point)}, {point.value}"
    module_name = name.partition(":")[0]
    if file := _file_beside(module_name, Path(base_dir)):
        return str(file)
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise _no_module(module_name, Path(base_dir), name)
    return str(spec.origin or module_name)


def names(group: PluginKind) -> list[str]:
    """The names that entry points give to `group`, sorted."""
    return sorted({point.name for point in entry_points(group=group)})


def _entry_point(group: PluginKind, name: str) -> EntryPoint:
    found: dict[
        tuple[str, str], EntryPoint
    ] = {}  # an editable install may be listed twice; that is no clash
    for point in entry_points(group=group, name=name):
        found.setdefault((_distribution(point), point.value), point)
    if len(found) > 1:
        origins = " and ".join(f"{owner} ({value})" for owner, value in sorted(found))
        raise PluginError(
            f"the {_NOUNS[group]} {name!r} is claimed by {origins}",
            cure='uninstall one, or name it as "module:object"',
        )
    if found:
        return next(iter(found.values()))
    known = names(group)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    cure = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    raise PluginError(
        f"there is no {_NOUNS[group]} named {name!r}",
        cure=f'{cure} (a file of your own beside the job is written "module:object")',
    )


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def _module(module_name: str, base_dir: Path, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise PluginError(
            f"{name!r} does not name a Python module",
            cure='write "module:object" without .py, as in "my_reward:fields"',
        )
    if file := _file_beside(module_name, base_dir):
        return _from_file(module_name, file, base_dir)
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None  # a parent package is missing
    if spec is None:
        raise _no_module(module_name, base_dir, name)
    return _imported(module_name, f"{name!r}")


def _no_module(module_name: str, base_dir: Path, name: str) -> PluginError:
    beside = [file.stem for file in base_dir.glob("*.py")] if base_dir.is_dir() else []
    near = difflib.get_close_matches(module_name, beside, n=1, cutoff=0.6)
    cure = f"did you mean {near[0]!r}?" if near else f"put {module_name}.py beside the job file"
    return PluginError(
        f"{name!r}: there is no module {module_name!r}", place=str(base_dir), cure=cure
    )


def _file_beside(module_name: str, base_dir: Path) -> Path | None:
    stem = base_dir.resolve().joinpath(*module_name.split("."))
    for file in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
        if file.is_file():
            return file
    return None


def _from_file(module_name: str, file: Path, base_dir: Path) -> ModuleType:
    """Loads `file` once per content. Its siblings are importable while it loads, and afterwards
    last of all: a `types.py` beside the job must not take the place of the standard library's."""
    stamp = file.stat().st_mtime_ns
    if file in _loaded and _loaded[file][0] == stamp:
        return _loaded[file][1]
    unique = module_name
    if _taken(module_name, file):  # another job's file, or a library: leave it where it is
        unique = f"_rlpost_{len(_loaded)}_{stamp}_{module_name.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(unique, file)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses and pickle look modules up by name
    try:
        with _importable(str(base_dir.resolve())):
            spec.loader.exec_module(module)
    except BaseException as error:  # a user's file may raise anything, SystemExit included
        sys.modules.pop(unique, None)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_failure(error, str(file), file) from error
    _loaded[file] = (stamp, module)
    return module


def _taken(module_name: str, file: Path) -> bool:
    if module_name in sys.modules:
        return True
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin != str(file)


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _imported(module_name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except BaseException as error:  # a plugin may raise anything, SystemExit included
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_failure(error, what, None) from error


def _import_failure(error: BaseException, what: str, file: Path | None) -> PluginError:
    """One line for a failed import: the error, and where in the plugin's own file it arose."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SyntaxError):
        return PluginError(
            f"{what} is not valid Python: {error.msg}",
            place=error.filename or "",
            line=error.lineno,
        )
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if file is None or Path(f.filename) == file]
    own = [f for f in own if "importlib" not in f.filename and f.filename != __file__]
    place, line = (own[-1].filename, own[-1].lineno) if own else ("", None)
    cure = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        cure = f"install {error.name.split('.')[0]} where rlpost runs"
    return PluginError(
        f"{what} cannot be imported: {type(error).__name__}: {text}",
        place=place,
        line=line,
        cure=cure,
    )


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not part or not hasattr(found, part):
            public = [each for each in vars(module) if not each.startswith("_")]
            near = difflib.get_close_matches(attribute, public, n=1, cutoff=0.6)
            raise PluginError(
                f"{name}: there is no {attribute!r} in {module.__name__}",
                place=str(getattr(module, "__file__", "") or ""),
                cure=f"did you mean {near[0]!r}?" if near else "check the name after the colon",
            )
        found = getattr(found, part)
    return found
