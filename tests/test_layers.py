"""The import rules of the house, read from the syntax tree of every file: imports go up the list of
rooms only, doors keep to themselves, and each heavy library has one room that may touch it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlpost"

# A room may import the rooms of its own group and of the groups above it, in no circle. A new file
# of the package takes its place here and in the map of README.md.
ROOMS = {
    "words": [
        *("errors", "types", "config", "job_errors", "plugins", "env", "reward"),
        *("prompt_template", "row_files", "rows"),
    ],
    "maths": ["grpo", "buffer"],
    "machines": ["engine", "policy", "scoring", "metric_table", "metrics", "run_directory"],
    "workers": ["rollout_worker", "learner", "learner_spec", "clients"],
    "loop": [
        *("controller", "update", "publisher", "records", "checkpoints"),
        *("evaluation", "health", "preparation", "assembly", "resolved_job", "outcome", "report"),
    ],
    "doors": ["cluster", "cli", "compare", "sft", "service", "batch", "route"],
}
RANK = {f"rlpost.{room}": rank for rank, rooms in enumerate(ROOMS.values()) for room in rooms} | {
    "rlpost": -1
}  # rlpost/__init__.py: the version alone, anybody may read it
DOORS = {f"rlpost.{room}" for room in ROOMS["doors"]}

# A library and the only files that may import it. vLLM's own file names end the pattern.
KEEPERS = {"ray": "rlpost/cluster/*.py", "vllm": "rlpost/engine/vllm_*.py"}
PLUGIN_PACKAGES = {"rlpost_rewards", "rlpost_envs"}
HEAVY = {
    "torch",
    "transformers",
    "vllm",
    "ray",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "matplotlib",
}


def module_of(path: Path, root: Path = ROOT) -> str:
    """`rlpost/grpo/loss.py` -> `rlpost.grpo.loss`; a package's `__init__.py` is the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Every (line, dotted name) that `source` imports anywhere, functions and type-checking blocks
    included. `from a import b` gives `a.b`, since b may be a module; `importlib.import_module` and
    `__import__` count when their argument is a literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")
                anchor = anchor[: len(anchor) - node.level + is_package]
                base = ".".join([*anchor, base] if base else anchor)
            for alias in node.names:
                yield node.lineno, base if alias.name == "*" else f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def room_of(name: str) -> str | None:
    """The room a dotted name lies in: `rlpost.grpo.loss.dapo` -> `rlpost.grpo`. None if in none."""
    parts = name.split(".")
    if parts[0] != "rlpost":
        return None
    if parts[1:2] == ["__main__"]:
        return "rlpost.cli"
    if len(parts) == 1 or parts[1].startswith("__"):
        return "rlpost"
    room = ".".join(parts[:2])
    return room if room in RANK else None


def complaint(module: str, path: Path, name: str) -> str | None:
    """Why `module` may not import `name`, or None."""
    top = name.split(".")[0]
    if top in PLUGIN_PACKAGES:
        return "the core finds plugins through entry points and never imports them"
    if top in KEEPERS and not path.match(KEEPERS[top]):
        return f"{top} is imported in {KEEPERS[top]} alone"
    if top != "rlpost":
        return None
    here, there = room_of(module), room_of(name)
    if there is None:
        # a name of rlpost/__init__.py, or a module that no room has: the second is the mistake
        part = name.split(".")[1]
        known = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()
        return "that module stands in no room" if known else None
    if here is None or here == there:
        return None
    if there == "rlpost.cli":
        return "nothing imports cli"
    if here in DOORS and there in DOORS and here != "rlpost.cli":
        return "doors do not import each other"
    if RANK[there] > RANK[here]:
        return "imports go up the list of rooms only"
    return None


def sources() -> list[Path]:
    """The package's files; what `rlpost init` copies out is the user's, not a room."""
    return [
        p for p in sorted(PACKAGE.rglob("*.py")) if "template" not in p.relative_to(PACKAGE).parts
    ]


def complaints(path: Path) -> list[str]:
    module = module_of(path)
    found = imports(path.read_text(), module, is_package=path.name == "__init__.py")
    return [
        f"{path.relative_to(ROOT)}, line {line}: {name}: {why}"
        for line, name in found
        if (why := complaint(module, path.relative_to(ROOT), name))
    ]


def test_imports_go_up_the_list_of_rooms_only():
    assert not [line for path in sources() for line in complaints(path)]


def test_every_file_of_the_package_stands_in_a_room():
    homeless = [path for path in sources() if room_of(module_of(path)) is None]
    assert not homeless, f"add these to ROOMS here and to the map in README.md: {homeless}"


def test_modules_do_not_import_each_other_in_circles():
    files = {module_of(path): path for path in sources()}
    uses = {
        module: {
            there
            for _, name in imports(path.read_text(), module, is_package=path.name == "__init__.py")
            if (there := name if name in files else name.rpartition(".")[0]) in files
            and there != module
        }
        for module, path in files.items()
    }
    order = list(TopologicalSorter(uses).static_order())  # CycleError names the circle
    assert order.index("rlpost.errors") < order.index("rlpost.config")


def test_the_words_import_nothing_heavy():
    words = {f"rlpost.{room}" for room in ROOMS["words"]} | {"rlpost"}
    found = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in sources()
        if room_of(module_of(path)) in words
        for line, name in imports(path.read_text(), module_of(path))
        if name.split(".")[0] in HEAVY
    ]
    assert not found


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("rlpost/types.py", "import rlpost.grpo.loss", "up the list"),
        ("rlpost/buffer.py", "from rlpost import learner", "up the list"),
        ("rlpost/grpo/loss.py", "from ..engine import base", "up the list"),
        ("rlpost/grpo/__init__.py", "from ..engine import base", "up the list"),
        ("rlpost/learner.py", "def f():\n    from rlpost.controller import run", "up the list"),
        ("rlpost/controller.py", "from rlpost.cli import main", "nothing imports cli"),
        ("rlpost/compare/arms.py", "from rlpost.cluster.jobs import submit", "each other"),
        ("rlpost/controller.py", "import ray", "ray is imported in"),
        ("rlpost/cli/run.py", "from ray.util import state", "ray is imported in"),
        ("rlpost/engine/base.py", "from vllm import LLM", "vllm is imported in"),
        ("rlpost/policy/vllm_names.py", "import vllm.config", "vllm is imported in"),
        (
            "rlpost/plugins.py",
            "import importlib as i; i.import_module('rlpost_envs')",
            "entry points",
        ),
        ("rlpost/plugins.py", "from rlpost_rewards.math import math", "entry points"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, why: str):
    path = Path(path)
    module = module_of(path, Path())
    found = list(imports(source, module, is_package=path.name == "__init__.py"))
    assert any(why in (complaint(module, path, name) or "") for _, name in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rlpost/grpo/loss.py", "from .advantage import group_relative"),
        ("rlpost/learner.py", "from rlpost.grpo.loss import dapo\nfrom rlpost import __version__"),
        ("rlpost/cluster/actors.py", "import ray\nfrom rlpost.controller import Controller"),
        ("rlpost/cli/run.py", "from rlpost.cluster import actors"),
        ("rlpost/engine/vllm_inprocess.py", "from vllm import LLMEngine\nfrom .base import Engine"),
        ("rlpost/engine/__init__.py", "from .base import Engine"),
        ("rlpost/controller.py", "import rayon"),
    ],
)
def test_an_allowed_import_is_left_alone(path: str, source: str):
    path = Path(path)
    module = module_of(path, Path())
    found = list(imports(source, module, is_package=path.name == "__init__.py"))
    assert found
    assert not [why for _, name in found if (why := complaint(module, path, name))]


BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_without(
    heavy: set[str], *argv: str, code: str | None = None
) -> subprocess.CompletedProcess:
    """Runs `code`, or the command line with `argv`, where importing any of `heavy` fails."""
    body = (
        code
        or f"sys.argv = ['rlpost', *{list(argv)!r}]\nfrom rlpost.cli import main\nsys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(heavy=heavy) + body],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_block_really_keeps_torch_away():
    assert "No module named 'torch'" in run_without({"torch"}, code="import torch").stderr


def has_main() -> bool:
    door = PACKAGE / "cli" / "__init__.py"
    return door.exists() and "main" in door.read_text()


@pytest.mark.skipif(not has_main(), reason="rlpost/cli has no main yet")
@pytest.mark.parametrize("argv", [["--help"], ["init", "--help"], ["check", "--help"]])
def test_help_works_without_torch(argv: list[str]):
    done = run_without(HEAVY, *argv)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.skipif(not has_main(), reason="rlpost/cli has no main yet")
def test_init_and_check_work_without_torch(tmp_path: Path):
    for argv in (["init", str(tmp_path / "demo")], ["check", str(tmp_path / "demo" / "job.toml")]):
        done = run_without({"torch", "vllm", "ray", "peft", "trl"}, *argv)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"


def test_the_words_are_importable_without_torch():
    words = [
        f"rlpost.{p.stem}" for room in ROOMS["words"] if (p := PACKAGE / f"{room}.py").exists()
    ]
    done = run_without(HEAVY, code=f"import {', '.join(words)}")
    assert done.returncode == 0, done.stderr
