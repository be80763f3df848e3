"""What a scoring process may not do, and how much of that is in force on this machine.

Two levels. "limits": resource limits on the process (memory, file size, open files, CPU seconds), a
watch on memory and process count from outside, and death of the whole family at the end. "sandbox":
the same inside bubblewrap: no network, none of the host's files but Python itself and the reward's
own source, a user id that is not root (only so does the process limit bind), an empty environment.
"""

import functools
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlpost.errors import PluginError
from rlpost.reward import RewardSpec

_FIRST_UID, _UIDS = 61_000, 4_000  # belong to nobody
_KEPT = ("LANG", "LC_ALL", "TZ", "PYTHONHASHSEED")


_counter = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one scoring process may use. Bytes, processes and seconds."""

    memory_bytes: int = 4 << 30  # heap (RLIMIT_DATA) and, from outside, resident memory
    file_bytes: int = 64 << 20  # of any file it writes
    processes: int = 64  # it and its children; threads count as well inside the sandbox
    open_files: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Which isolation is in force. `str()` is the one line that says so."""

    name: str  # "limits" or "sandbox"
    reason: str  # why it is not the other

    def __str__(self) -> str:
        if self.name == "sandbox":
            return "rewards run in bubblewrap: no network, no files of this machine, not as root"
        return f"rewards run as ordinary processes with resource limits ({self.reason})"


def choose(
    specs: Sequence[RewardSpec], *, trusted: bool | None, allow_untrusted: bool = False
) -> Level:
    """The level for a pool of these rewards.

    `trusted` True: "limits". False: the sandbox, and where there is none PluginError, unless
    `allow_untrusted`. None: code that came as text (a `python` snippet, a grader file) is shut in
    where that is possible and nothing else of the job would miss the network or its files.
    """
    if sys.platform != "linux":
        raise PluginError(f"scoring processes need Linux, not {sys.platform}")
    snippets = [spec.name for spec in specs if _is_snippet(spec)]
    if trusted or (trusted is None and not snippets):
        return Level(name="limits", reason="the job trusts them")
    if trusted is None and (open_ones := [spec.name for spec in specs if _needs_more(spec)]):
        return Level(name="limits", reason=f"{open_ones[0]} may need what a sandbox lacks")
    missing = missing_sandbox()
    if not missing:
        return Level(name="sandbox", reason="the code is not trusted")
    if trusted is None:
        return Level(name="limits", reason=f"{snippets[0]} cannot be shut in: {missing}")
    if allow_untrusted:
        return Level(name="limits", reason=f"{missing}; allowed by the job")
    raise PluginError(
        f"this reward's code is not trusted and cannot be shut in: {missing}",
        cure="install bubblewrap, or write allow_untrusted = true under [scoring]",
    )


def _is_snippet(spec: RewardSpec) -> bool:
    if not spec.use.endswith(".json"):
        return spec.use == "python"
    try:
        grader = Path(spec.base_dir, spec.use).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False  # who loads it says what is wrong with it
    return re.search(r'"type"\s*:\s*"python"', grader) is not None


def _needs_more(spec: RewardSpec) -> bool:
    """Whether a reward may ask a model or read files that its arguments do not name."""
    return spec.use == "judge" or ":" in spec.use or "endpoint" in spec.arguments


def new_uid() -> int:
    """A user id for one more sandbox. Each has its own, as the process limit counts by user: a fork
    bomb in one must not keep its neighbours from starting a process."""
    return _FIRST_UID + (os.getpid() * 31 + next(_counter)) % _UIDS


@functools.cache
def missing_sandbox() -> str:
    """Why bubblewrap cannot be used here, or "" when a trial run of it worked."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (package bubblewrap)"
    probe = "import os, rlpost.scoring.worker as w; w.leave_root(61000); assert os.getuid() != 0"
    try:
        done = subprocess.run(
            [*wrapping([]), sys.executable, "-c", probe],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not run here: {error}"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return "" if done.returncode == 0 else f"bubblewrap does not run here: {last}"


def wrapping(specs: Sequence[RewardSpec]) -> list[str]:
    """The bwrap command line in front of a worker's own. Root keeps just the right to change its
    user id, which the worker does first of all; anyone else gets a user namespace."""
    command = ["bwrap", "--die-with-parent", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        uid = str(_FIRST_UID)
        command += ["--unshare-user", "--uid", uid, "--gid", uid]
    for name in ("bin", "lib", "lib32", "lib64", "sbin"):
        path = Path("/", name)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            command += ["--ro-bind", str(path), str(path)]
    command += ["--proc", "/proc", "--dev", "/dev"]
    command += ["--size", str(64 << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    for folder in sorted({Path(spec.base_dir).resolve() for spec in specs}):
        for path in [*reversed(list(folder.parents)[:-1]), folder]:
            command += ["--dir", str(path)]  # "../labels.txt" leads through it
    for path in _visible(specs):
        for parent in reversed(list(path.parents)[:-1]):
            command += ["--dir", str(parent)]  # made by hand: bwrap's own are closed to others
        command += ["--ro-bind", str(path), str(path)]
    return [*command, "--chdir", "/tmp"]


def environment(*, shut_in: bool) -> dict[str, str]:
    """The environment of a scoring process: one thread a process, no GPU, the parent's module path;
    in the sandbox nothing else, as the environment is where secrets are."""
    inherited = dict(os.environ)
    if shut_in:
        inherited = {name: inherited[name] for name in _KEPT if name in inherited}
        inherited |= {"PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    paths = [path for path in sys.path if path and os.path.exists(path)]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",  # a library that starts threads on import cannot be forked
        "OPENBLAS_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


def apply(limits: Limits, *, processes: bool) -> None:
    """Puts this process under `limits`. `processes` limits their number too: only inside the
    sandbox, where the user id is the sandbox's own; elsewhere it would count everything the user
    runs."""
    _limit(resource.RLIMIT_DATA, limits.memory_bytes)
    _limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    _limit(resource.RLIMIT_NOFILE, limits.open_files)
    _limit(resource.RLIMIT_CORE, 0)
    if processes:
        _limit(resource.RLIMIT_NPROC, limits.processes)


def limit_cpu(seconds: float) -> None:
    """Lets this process use `seconds` more of CPU time: a stop of last resort, should the parent be
    too busy to notice. Only the soft limit moves, so the next call can move it again."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    wanted = int(used.ru_utime + used.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or wanted < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (wanted, hard))


def _limit(which: int, wanted: int) -> None:
    _, hard = resource.getrlimit(which)
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(which, (value, value))


def _visible(specs: Sequence[RewardSpec]) -> list[Path]:
    """What a sandboxed process may read: Python, what is installed, this package, the Python files
    (not the data) beside the job, and the files that arguments name."""
    paths = {Path("/usr"), Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve()}
    paths |= {Path(sysconfig.get_path("purelib")), Path(sys.executable).resolve().parent.parent}
    paths |= {Path(sys.executable).parent.parent}
    paths |= {package for package in _our_packages() if package.is_dir()}
    for name in ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives"):
        if os.path.exists(name):
            paths.add(Path(name))
    for folder in {Path(spec.base_dir).resolve() for spec in specs}:
        paths |= set(folder.glob("*.py"))
        paths |= {init.parent for init in folder.glob("*/__init__.py")}
        paths |= {folder / spec.use for spec in specs if spec.use.endswith(".json")}
    paths |= {file for spec in specs for file in _named_files(spec)}
    inside = sorted(path for path in paths if path.exists())
    return [p for p in inside if not any(q != p and q in p.parents for q in inside)]


def _named_files(spec: RewardSpec) -> list[Path]:
    """The files that are arguments of a reward, such as `remotes` or `labels`. A folder is none: a
    plain word may be the name of one by chance, and a folder may hold anything."""
    found = []
    for value in spec.arguments.values():
        if isinstance(value, str) and 0 < len(value) < 4096 and value.isprintable():
            path = Path(os.path.normpath(Path(spec.base_dir).resolve() / value))
            try:
                if path.is_file():
                    found.append(path)
            except OSError:
                continue  # a text too long to be a name
    return found


def _our_packages() -> list[Path]:
    """This package and its sister distributions: an editable install has them outside
    site-packages, and the folder they lie in may hold anything."""
    here = Path(__file__).resolve().parent.parent
    root = here.parent
    found = [here, root / "rlpost_rewards", root / "rlpost_envs"]
    return [*found, root / "rewards" / "rlpost_rewards", root / "envs" / "rlpost_envs"]
