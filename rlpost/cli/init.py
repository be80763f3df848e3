"""`rlpost init`: the first files of a job: the demo's, those for the rows of a file, or a
reward's."""

import argparse
import keyword
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpost.cli import first_job, openai_job, reward_scaffold
from rlpost.errors import JobError

TEMPLATE = Path(__file__).parents[1] / "template"
DEMO_FILES = ("job.toml", "prompt.md", "model")
DEFAULT_MODEL = "Qwen/Qwen3.5-4B"
BUILT_IN = (
    "extraction", "json_schema", "judge", "label", "math", "python", "text", "tool_call",
)  # fmt: skip
OTHER_MODULES = ("rlpost", "rlpost_rewards", "rlpost_envs", "pytest")


def register(verbs: Any) -> None:
    """Adds the verb to the parser."""
    init = verbs.add_parser(
        "init",
        help="write the first files of a job",
        description="Writes a job to start from: the demo, or one for the rows of a file, or a"
        " reward of your own with its test. Files that are there are never overwritten.",
    )
    init.add_argument("folder", metavar="DIR", nargs="?", help="where the files go")
    init.add_argument(
        "--from",
        dest="rows",
        metavar="FILE",
        nargs="+",
        help="rows: .jsonl, .csv or .parquet; or: openai train.jsonl grader.json",
    )
    init.add_argument(
        "--answer", metavar="A,B", help="the columns with the gold (default: guessed)"
    )
    init.add_argument("--reward", metavar="NAME", help="a built-in reward, or one of your own")
    init.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="PATH", help="folder or hub id (%(default)s)"
    )
    init.set_defaults(run=write_first_files)


def write_first_files(args: argparse.Namespace) -> int:
    """Runs the verb; returns its exit code."""
    rows, openai = _sources(args)
    folder = Path(args.folder)
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder} is a file", cure="name a folder")
    if rows:
        names, notes = _from_openai(folder, args, *openai) if openai else _from_rows(folder, args)
        commands = [f"rlpost check {folder}/job.toml", f"rlpost run {folder}/job.toml"]
    elif args.answer:
        raise JobError("--answer names columns, but of no file", cure="add --from FILE")
    elif args.reward:
        names, notes = _reward(folder, args.reward)
        commands = [f"python -m pytest {folder}/test_{args.reward}.py"]
    else:
        names, notes = list(copy_demo(folder)), []
        commands = [f"rlpost run {folder}/job.toml"]
    print(f"wrote {', '.join(str(folder / name) for name in names)}")
    for note in notes:
        print(f"note: {note}")
    print("next: " + " && ".join(commands))
    return 0


def _sources(args: argparse.Namespace) -> tuple[Path | None, tuple[Path, Path] | None]:
    """(file of rows, files of OpenAI's form). `--from FILE DIR` leaves the folder behind the
    file."""
    given = list(args.rows or ())
    wanted = 3 if given[:1] == ["openai"] else 1
    if args.folder is None and len(given) == wanted + 1:
        args.folder = given.pop()
    if args.folder is None:
        raise JobError("init needs a folder", cure="rlpost init DIR")
    if not given:
        return None, None
    if len(given) != wanted:
        shown = "openai train.jsonl grader.json" if wanted == 3 else "rows.csv"
        raise JobError(
            f"--from {' '.join(given)} is not understood", cure=f"rlpost init DIR --from {shown}"
        )
    if wanted == 1:
        args.rows = given[0]
        return Path(given[0]), None
    return Path(given[1]), (Path(given[1]), Path(given[2]))


def copy_demo(folder: Path) -> Sequence[str]:
    """Copies the built-in demo job with its model into a folder that is empty or not there."""
    missing = [name for name in DEMO_FILES if not (TEMPLATE / name).exists()]
    if missing:
        raise JobError(
            f"this installation has no demo: {', '.join(missing)} is not in it",
            cure="install rlpost from its repository, or start with --from FILE",
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise JobError(f"{folder} is not empty", cure="name another folder: nothing is overwritten")
    _make(folder)
    for name in DEMO_FILES:
        if (TEMPLATE / name).is_dir():
            shutil.copytree(TEMPLATE / name, folder / name)
        else:
            shutil.copyfile(TEMPLATE / name, folder / name)
    return DEMO_FILES


def _from_rows(folder: Path, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    answer = [name.strip() for name in (args.answer or "").split(",") if name.strip()]
    own = args.reward if args.reward and args.reward not in BUILT_IN else None
    if own and ":" not in own:
        _check_name(own)
    job = first_job.draft(folder, Path(args.rows), answer, args.reward)
    notes = first_job.notes(job, guessed=not answer)
    files: dict[str, str] = {}
    if own and ":" not in own:
        job = replace(job, reward=f"{own}:{own}")
        files = reward_scaffold.files(own)
        notes.append(f"{own}.py is yours to write; python -m pytest {folder} tries it")
    files = first_job.files(job, model=args.model) | files
    _write(folder, files)
    return list(files), notes


def _from_openai(
    folder: Path, args: argparse.Namespace, rows: Path, grader: Path
) -> tuple[list[str], list[str]]:
    for option in ("answer", "reward"):
        if getattr(args, option):
            raise JobError(
                f"--{option} has no place beside --from openai",
                cure="the grader says what is right; leave it out",
            )
    job = openai_job.read(folder, rows, grader)
    files = openai_job.files(job, model=args.model)
    _write(folder, files)
    return list(files), [*first_job.notes(job.draft, guessed=False), *job.notes]


def _reward(folder: Path, name: str) -> tuple[list[str], list[str]]:
    _check_name(name)
    files = reward_scaffold.files(name)
    _write(folder, files)
    return list(files), [f'in the job, under [[reward]]: use = "{name}:{name}"']


def _check_name(name: str) -> None:
    """A reward of one's own becomes a module: its name must be free and one that Python can
    import."""
    if name in BUILT_IN:
        raise JobError(
            f"the reward {name} is built in",
            cure=f"use it with --from FILE --reward {name}, or choose another name",
        )
    taken = name in sys.stdlib_module_names or name in OTHER_MODULES
    if taken or not name.isidentifier() or keyword.iskeyword(name):
        why = "is the name of a Python module" if taken else "is not a Python name"
        raise JobError(f"--reward {name} {why}", cure="choose one such as invoice_fields")


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name in files:
        if (folder / name).exists():
            raise JobError(
                f"{folder / name} is there already",
                cure="nothing is overwritten: name another folder, or move it away",
            )
    _make(folder)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(
            f"{folder} cannot be made: {error.strerror}", cure="choose another folder"
        ) from None
