"""`rlpost samples`: the rollouts of a run with their scores, as they were judged."""

import argparse
import json
from pathlib import Path
from typing import Any

from rlpost.errors import UserError


def register(verbs: Any) -> None:
    """Adds the verb to the parser."""
    samples = verbs.add_parser(
        "samples", help="read rollouts with their scores", description=__doc__
    )
    samples.add_argument("run_folder", metavar="RUN", help="a run directory")
    samples.add_argument("--update", type=int, help="of one update only")
    samples.add_argument("--reason", help="only replies judged so, such as not_json")
    samples.add_argument("--below", type=float, help="only replies that score less")
    samples.add_argument("--limit", type=int, default=20, help="replies at most (default 20)")
    samples.add_argument("--json", action="store_true", help="one JSON object a line")
    samples.set_defaults(run=show)


def show(args: argparse.Namespace) -> int:
    """Prints matching replies, newest update first."""
    from rlpost.run_directory import read_rollouts

    run = Path(args.run_folder)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} is no run directory", cure="name one that `rlpost run` wrote")
    shown = 0
    for group in sorted(read_rollouts(run), key=lambda g: -int(g["update"])):
        if args.update is not None and group["update"] != args.update:
            continue
        for reply in group["replies"]:
            value = reply.get("value")
            if args.reason and reply.get("reason") != args.reason:
                continue
            if args.below is not None and not (value is not None and value < args.below):
                continue
            if shown >= args.limit:
                return 0
            shown += 1
            if args.json:
                print(json.dumps({"update": group["update"], "task": group["task"], **reply}))
            else:
                score = "no score" if value is None else f"{value:.3f}"
                where = f"update {group['update']}  task {group['task']}"
                print(f"{where}  {score}  {reply.get('reason', '')}")
                print(f"    {reply['reply']}\n")
    return 0
