"""`rlpost export`: the trained policy as a PEFT adapter and a merged checkpoint, checked on the way
out."""

import argparse
import json
from pathlib import Path
from typing import Any

from rlpost import checkpoints
from rlpost.config import parse_job
from rlpost.errors import UserError


def register(verbs: Any) -> None:
    """Adds the verb to the parser."""
    export = verbs.add_parser("export", help="take the trained model out", description=__doc__)
    export.add_argument("run_folder", metavar="RUN", help="a run directory")
    export.add_argument("--out", metavar="DIR", help="default: RUN/export")
    export.add_argument(
        "--checkpoint", default="best", help="best (by evaluation), last, or an update's number"
    )
    export.add_argument("--json", action="store_true", help="one JSON object on stdout")
    export.set_defaults(run=export_run)


def export_run(args: argparse.Namespace) -> int:
    """Writes the export; says what was checked and how to serve it."""
    run = Path(args.run_folder)
    try:
        kept = json.loads((run / "source.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{run} is no run directory", cure="name one that `rlpost run` wrote"
        ) from None
    job = parse_job(kept["text"], path=Path(kept["path"]), overrides=kept["overrides"])
    checkpoint = _checkpoint(run / "checkpoints", args.checkpoint)
    out = Path(args.out) if args.out else run / "export"
    from rlpost.assembly import export_job

    result = export_job(job, checkpoint / checkpoints.LEARNER, out)
    result = {"checkpoint": checkpoint.name, "out": str(out), **result}
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
    return 0


def _checkpoint(root: Path, name: str) -> Path:
    if name == "best":
        return checkpoints.best(root)
    if name == "last":
        return checkpoints.newest(root)[0]
    if not name.isdigit() or not (root / checkpoints.name_of(int(name))).is_dir():
        there = ", ".join(str(int(p.name[7:])) for p in sorted(root.glob("update-?????"))) or "none"
        raise UserError(f"there is no checkpoint {name}", cure=f"best, last, or one of: {there}")
    folder = root / checkpoints.name_of(int(name))
    checkpoints.read(folder)
    return folder
