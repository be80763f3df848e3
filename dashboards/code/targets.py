"""Tells Prometheus of runs where no service does it: a file a run in dashboards/targets/.

Usage: python dashboards/code/targets.py RUN_DIRECTORY...

A run's address changes when it is resumed: call it again then.
"""

import json
import os
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

FOLDER = Path(__file__).resolve().parents[1] / "targets"


def target(run: Path) -> dict[str, object]:
    """The entry of one run for file service discovery. OSError, KeyError or ValueError if the
    directory is not that of a run."""
    address = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["address"]
    job = tomllib.loads((run / "job.toml").read_text(encoding="utf-8"))
    return {"targets": [urlsplit(address).netloc], "labels": {"run_id": job["run"]["name"]}}


def main(runs: list[str]) -> int:
    if not runs:
        print("targets: name at least one run directory", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    for name in runs:
        run = Path(name).resolve()
        try:
            entry = target(run)
        except (OSError, KeyError, ValueError) as error:
            print(f"targets: {name} has no address of a run that serves metrics ({error});"
                  " name the directory of a run that has started", file=sys.stderr)  # fmt: skip
            return 2
        path = FOLDER / f"{run.name}.json"
        fresh = path.with_suffix(".new")  # renamed whole: Prometheus may read at any moment
        fresh.write_text(json.dumps([entry]) + "\n", encoding="utf-8")
        os.replace(fresh, path)
        print(f"targets: {path.name}: {entry['targets']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
