"""The command line: one module a group of verbs. Nothing here imports torch.

Exit codes: 0 done (warnings included), 1 the job failed or was paused, 2 the user's mistake, 3 the
cluster cannot be reached, 130 after Ctrl-C.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

import rlpost
from rlpost.errors import RlpostError, UserErrors

VERBS = ("init", "check", "score", "run", "export", "samples")  # in the order of the help
_MODULES = ("init", "check", "score", "run", "export", "look")


def parser() -> argparse.ArgumentParser:
    """Every verb with its options."""
    top = argparse.ArgumentParser(
        prog="rlpost",
        description="Post-train a small model on one job with rewards you can check.",
        epilog="Start: rlpost init demo && rlpost run demo/job.toml",
    )
    top.add_argument("--version", action="version", version=f"rlpost {rlpost.__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in _MODULES:
        importlib.import_module(f"rlpost.cli.{name}").register(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; an error is one line, never a traceback."""
    args = parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except RlpostError as error:
        if getattr(args, "json", False):
            lines = [str(e) for e in getattr(error, "errors", [error])]
            print(json.dumps({"ok": False, "exit": error.exit_code, "errors": lines}))
        else:
            print(_plain(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rlpost … | head`
        sys.stderr.close()
        return 0


def _plain(error: RlpostError) -> str:
    if isinstance(error, UserErrors):
        return "\n".join(f"error: {item}" for item in error.errors)
    return f"error: {error}"
