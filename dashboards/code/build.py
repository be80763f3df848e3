"""Writes the boards' JSON and the rule tests that lie beside this folder.

Usage: python dashboards/code/build.py           writes what has changed
       python dashboards/code/build.py --check   writes nothing; exit 1 and the names if any has
"""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from rollout import ROLLOUT
from rule_tests import rule_tests
from training import TRAINING

from rewards import REWARDS

FOLDER = Path(__file__).resolve().parents[1]
BOARDS = {"training.json": TRAINING, "rollout.json": ROLLOUT, "rewards.json": REWARDS}


def texts() -> dict[str, str]:
    """Each generated file's name and text."""
    made = {
        name: json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, board in BOARDS.items()
    }
    rules = (FOLDER / "rules.yml").read_text(encoding="utf-8")
    return made | {"rules_test.yml": rule_tests(rules)}


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("build: it takes --check or nothing", file=sys.stderr)
        return 2
    changed = []
    for name, text in texts().items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            changed.append(name)
            if not arguments:
                path.write_text(text, encoding="utf-8")
    if changed:
        print(f"build: {'differ from the code' if arguments else 'wrote'}: {', '.join(changed)}")
    return int(bool(changed and arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
