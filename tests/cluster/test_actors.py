"""The real thing, small: Ray actors, vLLM on the CPU (or the transformers engine where it is not
installed), the learner and the demo's model. Five starts are shared by all tests."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rlpost.cli.init import copy_demo
from rlpost.policy.checkpoint import Checkpoint
from rlpost.run_directory import read_address, read_events, read_metrics, read_rollouts

pytestmark = [
    pytest.mark.slow, pytest.mark.xdist_group("cluster"), pytest.mark.timeout(900),
]  # fmt: skip

UPDATES = 8
SMALL = (
    f"run.updates={UPDATES}", "run.lockstep=true", "run.checkpoint_every=1",
    "rollout.staleness=1", "rollout.tasks_per_update=4", "rollout.group_size=4", "eval.rows=4",
    "eval.every=4", "environment.count=40",
)  # fmt: skip
SAME = ("reward", "loss", "grad_norm", "entropy", "version", "staleness", "tokens", "ratio_mean",
        "logprob_gap", "parts", "groups", "reply_tokens", "learning_rate")  # fmt: skip


@dataclass
class Ended:
    """What is left of a command: its code, its words and the processes it had."""

    code: int
    out: str
    err: str
    survivors: list
    scraped: str = ""


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def rlpost(*arguments, folder, at=None, act=None, scrape=None):
    """Runs `rlpost` to its end; once `at()` holds, `act(process)` is done to it. `scrape` is a run
    directory whose metrics are read as soon as they are served."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "rlpost", *map(str, arguments)], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=ignore_interrupts,  # as a shell does to what it starts in the background
    )  # fmt: skip
    handle, family, text, acted = psutil.Process(process.pid), {}, "", at is None
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        for child in _children(handle):
            family[child.pid] = child
        if scrape:
            text = _scrape(scrape) or text
        if not acted and at():
            acted = True
            act(process, list(family.values()))
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
    out, err = process.communicate(timeout=30)
    assert acted, f"the moment to act never came:\n{err[-2000:]}"
    _, alive = psutil.wait_procs(list(family.values()), timeout=90)  # Ray's agents look rarely
    survivors = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    return Ended(process.returncode, out, err, survivors, text)


def _children(handle):
    try:
        return handle.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _scrape(run):
    try:
        address = read_address(run)
        return urllib.request.urlopen(address, timeout=2).read().decode() if address else ""
    except OSError:
        return ""


def updates_done(run):
    """The last update in a run's metrics, while it is being written."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max(json.loads(line)["update"] for line in lines)
    except (OSError, ValueError):
        return -1


def sets():
    return [word for one in SMALL for word in ("--set", one)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster") / "demo"
    copy_demo(folder)
    return folder


@pytest.fixture(scope="module")
def whole(demo):
    """(run directory, Ended) of a run that nothing disturbs."""
    run = demo.parent / "whole"
    ended = rlpost("run", demo, *sets(), "--out", run, folder=demo.parent, scrape=run)
    assert ended.code == 0, ended.err[-3000:]
    return run, ended


@pytest.fixture(scope="module")
def broken(demo):
    """(run directory, [Ended]): stopped by SIGINT, resumed, stopped by SIGTERM, resumed, killed,
    resumed to the end."""
    run = demo.parent / "broken"
    ends = []
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        done = max(0, updates_done(run))
        what = ("--resume", run) if ends else (demo, *sets(), "--out", run)
        ends.append(
            rlpost(
                "run", *what, folder=demo.parent,
                at=lambda done=done: updates_done(run) >= done + 1,
                act=lambda process, family, sent=sent: os.kill(process.pid, sent),
            )
        )  # fmt: skip
    ends.append(rlpost("run", "--resume", run, folder=demo.parent))
    return run, ends


# ── an undisturbed run ─────────────────────────────────────────────────────────────────────────


def test_a_run_leaves_metrics_events_samples_a_report_and_checkpoints(whole):
    run, ended = whole
    lines = read_metrics(run)
    assert [line["update"] for line in lines] == list(range(UPDATES + 1))
    assert [line["update"] for line in lines if "eval" in line] == [0, 4, 8]
    assert all(line["staleness"] <= 1 for line in lines[1:])
    assert any(line["version"] > 0 for line in lines[1:])
    kinds = [event["kind"] for event in read_events(run)]
    assert kinds[:2] == ["started", "canary"]
    assert kinds[-1] == "finished"
    assert "proof_failed" not in kinds
    replies = [reply for group in read_rollouts(run) for reply in group["replies"]]
    assert len(replies) == UPDATES * 16
    assert {reply["status"] for reply in replies} == {"ok"}
    assert (run / "report.md").is_file()
    assert (run / "report.png").is_file()
    resolved = tomllib.loads((run / "resolved.toml").read_text())
    assert resolved["run"]["updates"] == UPDATES
    assert resolved["learner"]["learning_rate"] > 0
    assert resolved["model"]["license"]
    assert (run / "checkpoints" / f"update-{UPDATES:05d}").is_dir()
    assert "report:" in ended.out
    assert "Traceback" not in ended.err


def test_the_canary_was_followed_and_every_publish_proven(whole):
    run, _ = whole
    canary = next(event for event in read_events(run) if event["kind"] == "canary")
    assert canary["holds"] is True
    assert 0.9 <= canary["slope"] <= 1.1
    slopes = [line["proof_slope"] for line in read_metrics(run)[1:] if line["proof_power"] > 0.999]
    assert slopes
    assert all(0.5 < slope < 1.5 for slope in slopes)


def test_learner_and_engine_agree_on_what_was_sampled(whole):
    """float32 on both sides: the mean |learner - engine| of a log-probability is rounding."""
    run, _ = whole
    gaps = [line["logprob_gap"] for line in read_metrics(run)[1:] if not line["skipped"]]
    fresh = gaps[0]  # update 1 is on policy; later ones are one version off
    assert fresh < 1e-4


def test_prometheus_finds_the_run_while_it_runs(whole):
    run, ended = whole
    assert re.search(r"^rlpost_phase\{", ended.scraped, re.MULTILINE)
    assert 'run_id="receipts"' in ended.scraped
    assert read_address(run).startswith("http://127.0.0.1:")


def test_no_process_is_left_behind(whole, broken):
    _, ended = whole
    _, ends = broken
    left = [p for end in (ended, *ends) for p in end.survivors]
    assert [(p.pid, p.name()) for p in left] == []


# ── disturbed runs ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", [0, 1], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_with_a_checkpoint_exit_130_and_how_to_go_on(broken, which):
    run, ends = broken
    stopped = ends[which]
    assert stopped.code == 130
    assert "stopping after this update" in stopped.err
    assert re.search(r"go on with: rlpost run --resume broken\b", stopped.err)
    assert "Traceback" not in stopped.err
    kinds = [event["kind"] for event in read_events(run, superseded=True)]
    assert kinds.count("stopping") == 2


def test_a_killed_run_resumes_to_its_end(broken):
    run, (*_, killed, ended) = broken
    assert killed.code == -signal.SIGKILL
    assert ended.code == 0, ended.err[-3000:]
    lines = read_metrics(run)
    assert [line["update"] for line in lines] == list(range(UPDATES + 1))
    events = [e["kind"] for e in read_events(run, superseded=True)]
    assert events.count("resumed") == 3


def test_in_lockstep_the_broken_run_equals_the_whole_one_bit_for_bit(whole, broken):
    one, two = read_metrics(whole[0]), read_metrics(broken[0])
    for a, b in zip(one[1:], two[1:], strict=True):
        assert {key: a[key] for key in SAME} == {key: b[key] for key in SAME}, a["update"]
    assert [line.get("eval") for line in one] == [line.get("eval") for line in two]
    assert _samples(whole[0]) == _samples(broken[0])
    hashes = [_weights(run) for run in (whole[0], broken[0])]
    assert hashes[0] == hashes[1]


def _samples(run):
    return [
        (group["update"], group["group"], group["task"], reply["reply"], reply["policy_version"])
        for group in read_rollouts(run)
        for reply in group["replies"]
    ]


def _weights(run):
    """Hashes of the final adapter and of the optimizer's moments."""
    learner = Checkpoint(run / "checkpoints" / f"update-{UPDATES:05d}" / "learner")
    found = {}
    for name in ("weights.safetensors", "optimizer.safetensors"):
        for key, tensor in learner.tensors(name).items():
            data = tensor.contiguous().float().numpy().tobytes()
            found[f"{name}:{key}"] = hashlib.sha256(data).hexdigest()
    assert len(found) > 10
    return found


# ── export ─────────────────────────────────────────────────────────────────────────────────────


def test_the_export_loads_in_plain_transformers_and_peft_and_they_agree(whole):
    import peft
    import torch
    import transformers

    run, _ = whole
    ended = rlpost("export", run, "--checkpoint", "last", "--json", folder=run.parent)
    assert ended.code == 0, ended.err[-2000:]
    told = json.loads(ended.out)
    out = Path(told["out"])
    out = out if out.is_absolute() else run.parent / out
    assert told["difference"] <= told["tolerance"]
    assert (out / "prompt.md").is_file()
    assert json.loads((out / "chat_template.json").read_text()) == {"enable_thinking": False}
    base = transformers.AutoModelForCausalLM.from_pretrained(
        run.parent / "demo" / "model", dtype=torch.float32
    )
    ids = torch.tensor([[5, 9, 14, 33, 70, 121, 200]])
    plain = base(ids).logits
    adapter = peft.PeftModel.from_pretrained(base, out / "adapter")(ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)(
        ids
    ).logits
    moved = (adapter - plain).abs().mean()
    assert moved > 0  # it was trained
    assert (adapter - merged).abs().mean() < 0.1  # the base's own bf16


# ── refused before any engine starts ───────────────────────────────────────────────────────────


def test_a_busy_metrics_port_is_the_users_mistake_and_starts_no_engine(demo):
    run = demo.parent / "busy"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = rlpost(
            "run", demo, "--set", f"run.metrics_port={port}", "--out", run, folder=demo.parent
        )
    assert ended.code == 2, ended.err[-2000:]
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert str(port) in line
    assert "; " in line
    assert "Traceback" not in ended.err
    assert read_events(run) == []
    assert ended.survivors == []
