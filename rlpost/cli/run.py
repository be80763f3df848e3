"""`rlpost run`: one job, here, to its end. The controller runs under Ray; this only watches."""

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlpost.cli.check import check_job
from rlpost.config import Job, read_job
from rlpost.errors import Interrupted, JobError, UserError


def register(verbs: Any) -> None:
    """Adds the verb to the parser."""
    run = verbs.add_parser("run", help="train a job here", description=__doc__)
    run.add_argument("job", nargs="?", help="job.toml, or its folder")
    run.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides"
    )
    run.add_argument(
        "--out", metavar="DIR", help="the run directory (default: runs/NAME-N beside the job)"
    )
    run.add_argument(
        "--resume", metavar="RUN", help="go on with a run directory from its newest checkpoint"
    )
    run.add_argument("--json", action="store_true", help="one JSON object on stdout at the end")
    run.set_defaults(run=train)


def train(args: argparse.Namespace) -> int:
    """Checks the job, starts it, shows its progress, prints the outcome."""
    with _interruptible() as listen:
        job, source, folder = _open(args)
        notes = check_job(job, quick=True)
        say = _Voice(quiet=args.json)
        for note in notes:
            say.line(note)
        from rlpost.cluster import actors  # Ray is imported only when something runs

        try:
            actors.connect()
            listen()
            actors.check_resources(job)
            _write_job(folder, source)
            say.line(f"run directory: {_short(folder)}")
            outcome = _watch(actors, job, source, folder, resume=bool(args.resume), say=say)
        finally:
            actors.ray.shutdown()
        return _report(job, folder, outcome, say=say, as_json=args.json)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGINT are KeyboardInterrupt within the block, also where a shell started us in
    the background, with SIGINT ignored. Yields what says so again: Ray's start takes SIGTERM for
    itself."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # only the main thread may listen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def listen() -> None:
        for number in before:
            signal.signal(number, signal.default_int_handler)

    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open(args: argparse.Namespace) -> tuple[Job, tuple[str, str, tuple[str, ...]], Path]:
    """The job, what actors parse it from, and the run directory."""
    if args.resume:
        folder = Path(args.resume).resolve()
        try:
            kept = json.loads((folder / "source.json").read_text())
        except (OSError, ValueError):
            raise UserError(
                f"{args.resume} is no run directory", cure="name one that `rlpost run` wrote"
            ) from None
        if args.job or args.out:
            raise UserError(
                "--resume takes the job from the run directory", cure="leave JOB and --out out"
            )
        source = (kept["text"], kept["path"], (*kept["overrides"], *args.overrides))
    else:
        if not args.job:
            raise UserError("no job is named", cure="rlpost run job.toml, or --resume RUN")
        path = Path(args.job)
        path = path / "job.toml" if path.is_dir() else path
        read_job(path, overrides=args.overrides)  # complains about the file itself first
        source = (path.read_text(encoding="utf-8"), str(path.resolve()), tuple(args.overrides))
    from rlpost.config import parse_job

    job = parse_job(source[0], path=Path(source[1]), overrides=source[2])
    if not args.resume:
        folder = Path(args.out).resolve() if args.out else _next_folder(job)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty", cure="name another --out, or --resume it")
    return job, source, folder


def _next_folder(job: Job) -> Path:
    root = job.folder / "runs"
    taken = [path.name.rpartition("-")[2] for path in root.glob(f"{job.run.name}-*")]
    number = 1 + max((int(name) for name in taken if name.isdigit()), default=0)
    return root / f"{job.run.name}-{number}"


def _write_job(folder: Path, source: tuple[str, str, tuple[str, ...]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.toml").write_text(source[0], encoding="utf-8")
        kept = {"text": source[0], "path": source[1], "overrides": list(source[2])}
        (folder / "source.json").write_text(json.dumps(kept), encoding="utf-8")
    except OSError as error:
        raise JobError(
            f"the run directory {folder} cannot be written: {error.strerror}",
            cure="name another with --out",
        ) from None


def _watch(
    actors: Any, job: Job, source: Any, folder: Path, *, resume: bool, say: "_Voice"
) -> dict[str, Any]:
    controller = actors.start_controller(job, source, folder)
    running = controller.run.remote(resume)
    asked_to_stop = False
    with say.progress(job.run.updates) as bar:
        while True:
            try:
                done = actors.wait(running, seconds=0.5)
                bar.show(actors.get(controller.progress.remote()))
                if done:
                    break
            except KeyboardInterrupt:
                if asked_to_stop:
                    raise
                asked_to_stop = True
                say.line("stopping after this update; Ctrl-C again ends at once")
                controller.stop.remote()
    return actors.get(running)


def _report(
    job: Job, folder: Path, outcome: dict[str, Any], *, say: "_Voice", as_json: bool
) -> int:
    from rlpost.report import summary_table, write_report

    report = write_report(folder)
    if as_json:
        print(json.dumps({"ok": not outcome.get("interrupted"), "run": str(folder), **outcome}))
    else:
        print(summary_table(folder))
        print(f"\nreport:  {_short(report)}\nexport:  rlpost export {_short(folder)}")
    if outcome.get("interrupted"):
        raise Interrupted(
            f"stopped after update {outcome['update']} of {job.run.updates};"
            f" go on with: rlpost run --resume {_short(folder)}"
        )
    return 0


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class _Voice:
    """Lines and a progress bar on stderr: rich where it is a terminal, one line an update
    elsewhere."""

    def __init__(self, *, quiet: bool):
        self._quiet = quiet

    def line(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def progress(self, updates: int) -> "_Bar":
        return _Bar(updates, quiet=self._quiet)


class _Bar:
    """Step, reward, evaluation, ETA."""

    def __init__(self, updates: int, *, quiet: bool):
        self._updates, self._quiet = updates, quiet
        self._last: tuple[Any, ...] = ()
        self._bar: Any = None
        self._began = time.monotonic()

    def __enter__(self) -> "_Bar":
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[tail]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._updates, tail="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: dict[str, Any]) -> None:
        """Takes the controller's progress; prints only what changed."""
        phase, update = progress.get("phase", ""), progress.get("update", 0)
        reward, evals, eta = (
            progress.get("reward"),
            progress.get("evals") or [],
            progress.get("eta"),
        )
        tail = f"reward {reward:.3f}" if reward is not None else ""
        if evals:
            tail += f"  validation {evals[0][1]:.3f} → {evals[-1][1]:.3f}"
        if eta:
            tail += f"  {eta / 60:.1f} min left"
        if self._bar is not None:
            self._bar.update(self._task, completed=update, description=phase, tail=tail)
        elif not self._quiet and (state := (phase, update, len(evals))) != self._last:
            self._last = state
            seconds = time.monotonic() - self._began
            print(
                f"{seconds:6.1f} s  {phase}  {update}/{self._updates}  {tail}",
                file=sys.stderr,
                flush=True,
            )
