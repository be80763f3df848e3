"""Run directories become targets of file service discovery."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "dashboards" / "code" / "targets.py"


def tell(tmp_path, *runs):
    """The program, copied so that it writes below tmp_path."""
    copy = tmp_path / "dashboards" / "code" / "targets.py"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(PROGRAM, copy)
    command = [sys.executable, str(copy), *map(str, runs)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_becomes_a_target_with_its_name(tmp_path):
    run = tmp_path / "runs" / "receipts-1"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text('{"address": "http://127.0.0.1:4711/metrics", "pid": 1}\n')
    (run / "job.toml").write_text('[run]\nname = "receipts"\n')
    assert tell(tmp_path, run).returncode == 0
    written = json.loads((tmp_path / "dashboards/targets/receipts-1.json").read_text())
    assert written == [{"targets": ["127.0.0.1:4711"], "labels": {"run_id": "receipts"}}]


def test_a_directory_without_an_address_is_told_in_one_line(tmp_path):
    told = tell(tmp_path, tmp_path)
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert "name the directory of a run that has started" in told.stderr
