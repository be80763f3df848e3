"""`rlpost run` without its cluster: what it refuses, writes, shows and returns."""

import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlpost.cli import main
from rlpost.cli import run as verb
from rlpost.errors import ClusterError, JobError, RunError
from rlpost.metrics import RunMetrics
from rlpost.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "rlpost" / "template"
JOB = """[run]
name = "small"
gpus = "cpu"
updates = 2
[model]
path = "model"
max_length = 128
[data]
train = "rows.jsonl"
[[reward]]
use = "my_reward:judge"
[rollout]
max_reply_tokens = 16
"""


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "model").symlink_to(TEMPLATE / "model")
    (folder / "job.toml").write_text(JOB)
    (folder / "my_reward.py").write_text(
        "def judge(task, rollout):\n    return 1.0 if rollout.reply == task.answer else 0.0\n"
    )
    rows = [json.dumps({"prompt": f"say {n}", "answer": f"word {n}"}) for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


class FakeActors:
    """The doors of `rlpost.cluster.actors`; the controller of it does what a test says."""

    def __init__(self, outcome=None, *, error=None, steps=(), interrupts=0):
        self.outcome = outcome or {"phase": "done", "update": 2, "updates": 2, "evals": []}
        self.error, self.steps, self.interrupts = error, list(steps), interrupts
        self.calls = []
        self.ray = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))

    def connect(self):
        self.calls.append("connect")

    def check_resources(self, job):
        self.calls.append("check_resources")

    def start_controller(self, job, source, folder):
        self.calls.append(("start", source, folder))
        directory = RunDirectory(folder)
        for update in range(3):
            directory.append_metrics(update, reward=0.1 * update)
        directory.append_evaluation(0, {"score": 0.1, "metrics": {}, "parts": {}, "rows": 0}, [])

        def method(name, value):
            return SimpleNamespace(remote=lambda *given: self.calls.append((name, *given)) or value)

        return SimpleNamespace(
            run=method("run", "outcome"), stop=method("stop", None),
            progress=method("progress", "progress"),
        )  # fmt: skip

    def wait(self, reference, *, seconds):
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        return not self.steps

    def get(self, reference):
        if reference == "progress":
            return self.steps.pop(0) if self.steps else {"phase": "done", "update": 2}
        if self.error:
            raise self.error
        return self.outcome


@pytest.fixture
def cluster(monkeypatch):
    """Puts a FakeActors where `rlpost run` looks for the real ones."""

    def put(**fields):
        fake = FakeActors(**fields)
        import rlpost.cluster

        monkeypatch.setitem(sys.modules, "rlpost.cluster.actors", fake)
        monkeypatch.setattr(rlpost.cluster, "actors", fake, raising=False)
        return fake

    return put


# ── the course of a run ────────────────────────────────────────────────────────────────────────


def test_a_run_writes_its_job_and_its_report_and_returns_zero(job, cluster, capsys):
    fake = cluster(steps=[{"phase": "training", "update": 1, "reward": 0.5, "eta": 60.0}])
    assert main(["run", str(job), "--set", "run.seed=7"]) == 0
    folder = job / "runs" / "small-1"
    assert (folder / "job.toml").is_file()
    assert json.loads((folder / "source.json").read_text())["overrides"] == ["run.seed=7"]
    assert (folder / "report.md").is_file()
    told = capsys.readouterr()
    assert re.search(r"training  1/2  reward 0\.500  1\.0 min left", told.err)
    assert "export:  rlpost export" in told.out
    assert fake.calls[-1] == "shutdown"


def test_the_next_run_gets_the_next_number(job, cluster):
    cluster()
    (job / "runs" / "small-7").mkdir(parents=True)
    assert main(["run", str(job)]) == 0
    assert (job / "runs" / "small-8").is_dir()


def test_json_prints_one_object_and_nothing_else(job, cluster, capsys):
    cluster()
    assert main(["run", str(job), "--json"]) == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert (answer["ok"], answer["update"]) == (True, 2)
    assert answer["run"].endswith("small-1")
    assert told.err == ""


def test_ctrl_c_asks_the_controller_to_stop_and_says_how_to_go_on(job, cluster, capsys):
    stopped = {"phase": "stopped", "update": 1, "updates": 2, "evals": [], "interrupted": True}
    fake = cluster(outcome=stopped, interrupts=1)
    assert main(["run", str(job)]) == 130
    assert ("stop",) in fake.calls
    told = capsys.readouterr().err
    assert "stopping after this update; Ctrl-C again ends at once" in told
    assert "stopped after update 1 of 2; go on with: rlpost run --resume" in told
    assert "Traceback" not in told


def test_a_second_ctrl_c_ends_at_once(job, cluster, capsys):
    fake = cluster(interrupts=2)
    assert main(["run", str(job)]) == 130
    assert fake.calls[-1] == "shutdown"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_like_ctrl_c_even_where_it_was_ignored(job, cluster, capsys, sent):
    """As in `rlpost run job.toml &` of a script; and Ray's start changes SIGTERM's handler."""
    stopped = {"phase": "stopped", "update": 1, "updates": 2, "evals": [], "interrupted": True}
    fake = cluster(outcome=stopped)
    fake.connect = lambda: signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def wait(reference, *, seconds):
        fake.wait = lambda reference, *, seconds: True
        os.kill(os.getpid(), sent)

    fake.wait = wait
    before = signal.signal(sent, signal.SIG_IGN)
    try:
        assert main(["run", str(job)]) == 130
        assert signal.getsignal(sent) is signal.SIG_IGN  # as it was found
    finally:
        signal.signal(sent, before)
    assert ("stop",) in fake.calls
    assert "go on with: rlpost run --resume" in capsys.readouterr().err


def test_a_failed_run_returns_one_and_its_reason_on_one_line(job, cluster, capsys):
    cluster(error=RunError("12% of the last 64 rollouts got no score"))
    assert main(["run", str(job)]) == 1
    assert "error: 12% of the last 64 rollouts got no score" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_returns_three(job, cluster, capsys):
    fake = cluster()

    def connect():
        raise ClusterError("no Ray cluster at 10.0.0.1:6379: refused")

    fake.connect = connect
    assert main(["run", str(job)]) == 3
    assert "error: no Ray cluster at 10.0.0.1:6379" in capsys.readouterr().err


# ── resume ─────────────────────────────────────────────────────────────────────────────────────


def test_resume_takes_the_job_from_the_run_directory(job, cluster):
    cluster()
    assert main(["run", str(job), "--set", "run.seed=7"]) == 0
    fake = cluster()
    (job / "job.toml").write_text("broken [")  # what was changed since does not matter
    folder = job / "runs" / "small-1"
    assert main(["run", "--resume", str(folder), "--set", "run.updates=9"]) == 0
    ((_, source, where),) = [call for call in fake.calls if call[0] == "start"]
    assert (source[0], source[2], where) == (JOB, ("run.seed=7", "run.updates=9"), folder)
    assert ("run", True) in fake.calls


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume", "nowhere"], "nowhere is no run directory"),
        ([], "no job is named; rlpost run job.toml, or --resume RUN"),
    ],
)
def test_what_cannot_be_resumed_is_refused(cluster, capsys, arguments, says):
    fake = cluster()
    assert main(["run", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert fake.calls == []


def test_resume_and_a_job_together_are_refused(job, cluster, capsys):
    cluster()
    main(["run", str(job)])
    capsys.readouterr()
    assert main(["run", str(job), "--resume", str(job / "runs" / "small-1")]) == 2
    assert "--resume takes the job from the run directory" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_not_written_over(job, cluster, capsys):
    fake = cluster()
    (job / "mine").mkdir()
    (job / "mine" / "thesis.txt").write_text("x")
    assert main(["run", str(job), "--out", str(job / "mine")]) == 2
    assert "is not empty; name another --out, or --resume it" in capsys.readouterr().err
    assert fake.calls == []


# ── refused before any engine starts ───────────────────────────────────────────────────────────


def test_a_job_that_check_refuses_never_reaches_the_cluster(job, cluster, capsys):
    fake = cluster()
    (job / "my_reward.py").write_text("def judge(task, rollout):\n    return float('nan')\n")
    assert main(["run", str(job)]) == 2
    assert "nan" in capsys.readouterr().err
    assert fake.calls == []
    assert not (job / "runs").exists()


def test_no_free_gpu_is_one_line_and_leaves_no_run_directory(job, cluster, capsys, monkeypatch):
    import importlib

    real = importlib.import_module("rlpost.cluster.actors")
    fake = cluster()
    for there, free, says in (
        (0, 0.0, "run.gpus asks for 2 GPUs and there are 0"),
        (1, 1.0, "run.gpus asks for 2 GPUs and there are 1"),
        (2, 1.0, "run.gpus asks for 2 GPUs and 1 of 2 are free"),
    ):
        monkeypatch.setattr(real.ray, "cluster_resources", lambda there=there: {"GPU": there})
        monkeypatch.setattr(real.ray, "available_resources", lambda free=free: {"GPU": free})
        fake.check_resources = real.check_resources
        gpus = "run.gpus={rollout=1,learner=1}"
        assert main(["run", str(job), "--set", gpus]) == 2
        told = capsys.readouterr().err
        (line,) = [line for line in told.splitlines() if line.startswith("error:")]
        assert says in line
        assert f"(--set {gpus}); " in line
        assert not (job / "runs").exists()


def test_a_busy_metrics_port_is_named_with_its_cure():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JobError, match=str(port)) as caught:
            RunMetrics("t").serve(port=port)
    assert caught.value.cure


# ── the README ─────────────────────────────────────────────────────────────────────────────────


def test_the_readmes_exit_codes_are_those_of_the_errors():
    """Every code that the README tells is one that an error of ours returns, and no other is."""
    from rlpost import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    codes = {c.exit_code for c in classes if issubclass(c, errors.RlpostError)}
    assert codes == {1, 2, 3, 130}
    text = (ROOT / "README.md").read_text()
    match = re.search(r"[Ee]xit (?:codes?|status).{0,600}", text, re.DOTALL)
    if not match:
        pytest.skip("the README does not tell exit codes yet")
    told = {int(n) for n in re.findall(r"(?<![\w.])(0|1|2|3|130)(?![\w.])", match[0])}
    assert told == codes | {0}


def test_the_progress_line_is_only_printed_when_something_changed(capsys):
    bar = verb._Bar(5, quiet=False)
    for _ in range(3):
        bar.show({"phase": "training", "update": 1, "reward": 0.25})
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_directory_that_cannot_be_written_is_the_users_mistake(job, cluster, capsys):
    cluster()
    blocked = job / "file"
    shutil.copy(job / "rows.jsonl", blocked)
    assert main(["run", str(job), "--out", str(blocked / "run")]) == 2
    assert "name another with --out" in capsys.readouterr().err
