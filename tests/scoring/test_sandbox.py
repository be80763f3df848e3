"""What a sandboxed reward cannot do, and what is refused where there is no sandbox."""

import os
import socket
import textwrap

import pytest

from rlpost.errors import PluginError
from rlpost.reward import RewardSpec, recorded
from rlpost.scoring import sandbox
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Task

needs_bwrap = pytest.mark.skipif(
    bool(sandbox.missing_sandbox()), reason=f"no sandbox here: {sandbox.missing_sandbox()}"
)

PRYING = """
import os, socket, sys

def pry(task, rollout):
    what = rollout.reply
    if what == "uid": return float(os.getuid() != 0)
    if what == "root":
        try: os.setuid(0)
        except OSError: return 1.0
        return 0.0
    if what == "environment": return float("RLPOST_TEST_SECRET" in os.environ)
    if what == "network": socket.create_connection(("127.0.0.1", task.answer), timeout=2)
    if what.startswith("read "): return float(len(open(what[5:]).read()) > 0)
    if what.startswith("write "): open(what[6:], "w").write("x")
    if what == "big file":
        with open("/tmp/big", "wb") as file:
            for _ in range(200): file.write(b"x" * 1_000_000)
    if what == "processes": return float(len([p for p in os.listdir("/proc") if p.isdigit()]) < 8)
    if what == "forks":
        for _ in range(200):
            if os.fork() == 0:
                os.setsid()
                import time
                time.sleep(30)
                os._exit(0)
    return 1.0
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prying.py").write_text(textwrap.dedent(PRYING))
    (tmp_path / "train.jsonl").write_text('{"answer": "of another row"}\n')
    return tmp_path


def pool_of(folder, **options):
    spec = RewardSpec(use="prying:pry", name="pry", base_dir=str(folder))
    return ScoringPool([spec], **{"trusted": False, "deadline": 5.0, **options})


async def verdicts_of(pool, task, *texts):
    judged = await pool.judge([recorded(task, text) for text in texts])
    return {text: row[0] for text, row in zip(texts, judged, strict=True)}


@needs_bwrap
async def test_the_host_cannot_be_reached_from_inside(folder, monkeypatch):
    monkeypatch.setenv("RLPOST_TEST_SECRET", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        task = Task(id="1", messages=[], answer=server.getsockname()[1])
        async with pool_of(folder) as pool:
            assert "bubblewrap" in str(pool.level)
            found = await verdicts_of(
                pool,
                task,
                "uid",
                "root",
                "environment",
                "network",
                "processes",
                "read /etc/passwd",
                f"read {folder / 'train.jsonl'}",
                f"read {folder / 'prying.py'}",
                f"write {folder / 'new.txt'}",
                f"write {sandbox.__file__}",
            )
        with pytest.raises(TimeoutError):
            server.accept()
    assert found["uid"].score.value == 1.0
    assert found["root"].score.value == 1.0
    assert found["environment"].score.value == 0.0
    assert found["processes"].score.value == 1.0
    assert found[f"read {folder / 'prying.py'}"].score.value == 1.0  # its own source it may read
    closed = [text for text, verdict in found.items() if verdict.score is None]
    assert closed == [
        "network",
        "read /etc/passwd",
        f"read {folder / 'train.jsonl'}",
        f"write {folder / 'new.txt'}",
        f"write {sandbox.__file__}",
    ]
    assert not (folder / "new.txt").exists()


@needs_bwrap
async def test_a_fork_bomb_and_a_big_file_stop_at_their_limits(folder):
    limits = sandbox.Limits(file_bytes=8 << 20, processes=16)
    async with pool_of(folder, limits=limits) as pool:
        task = Task(id="1", messages=[])
        found = await verdicts_of(pool, task, "uid", "forks", "big file", "root")
        processes = pool._lanes[0][0].slots[0].process.usage()[1]
    assert found["forks"].status == "crashed"
    assert "File too large" in found["big file"].detail
    assert found["uid"].status == found["root"].status == "ok"
    assert processes <= 4  # bwrap, its init, the keeper and a scorer: no detached child is left


def test_untrusted_code_is_refused_where_there_is_no_sandbox(folder, monkeypatch):
    monkeypatch.setattr(sandbox, "missing_sandbox", lambda: "bubblewrap is not installed")
    with pytest.raises(PluginError, match=r"not trusted .* bubblewrap is not installed; install"):
        pool_of(folder)
    level = pool_of(folder, allow_untrusted=True).level
    assert str(level) == (
        "rewards run as ordinary processes with resource limits "
        "(bubblewrap is not installed; allowed by the job)"
    )


@needs_bwrap
async def test_a_file_that_an_argument_names_can_be_read_and_no_file_beside_it(tmp_path):
    job = tmp_path / "job"
    job.mkdir()
    (job / "reading.py").write_text(
        "from pathlib import Path\n"
        "def read(task, rollout, *, lexicon, base_dir):\n"
        "    return float('tea' in Path(base_dir, rollout.reply or lexicon).read_text())\n"
    )
    for name in ("words.txt", "rows.txt"):
        (tmp_path / name).write_text("tea\n")
    spec = RewardSpec(
        use="reading:read",
        name="read",
        arguments={"lexicon": "../words.txt"},
        base_dir=str(job),
    )
    async with ScoringPool([spec], trusted=False) as pool:
        found = await verdicts_of(pool, Task(id="1", messages=[]), "", "../rows.txt")
    assert found[""].score.value == 1.0
    assert "No such file" in found["../rows.txt"].detail


@needs_bwrap
async def test_remotes_and_labels_files_are_there_in_the_sandbox(tmp_path):
    (tmp_path / "remotes.json").write_text('{"http://x/int": {"type": "integer"}}')
    (tmp_path / "labels.txt").write_text("tea\ncoffee\n")
    base = str(tmp_path)
    remotes = RewardSpec(
        use="json_schema", name="s", arguments={"remotes": "remotes.json"}, base_dir=base
    )
    labels = RewardSpec(use="label", name="l", arguments={"labels": "labels.txt"}, base_dir=base)
    task = Task(id="1", messages=[], answer="tea", schema={"$ref": "http://x/int"})
    async with ScoringPool([remotes, labels], trusted=False) as pool:
        [first], [second] = [
            [[v.score and v.score.value for v in row] for row in await pool.judge([r])]
            for r in (recorded(task, "1"), recorded(task, "coffee"))
        ]
    assert first == [1.0, 0.0]
    assert second == [0.0, 0.0]


SNIPPET = RewardSpec(
    use="python",
    name="snippet",
    arguments={"source": "import os\ndef score(task, rollout): return float(os.getuid() != 0)"},
)


@needs_bwrap
async def test_a_snippet_of_the_job_is_shut_in_unless_the_job_trusts_it():
    task = Task(id="1", messages=[])
    async with ScoringPool([SNIPPET]) as pool:
        assert pool.level.name == "sandbox"
        assert (await verdicts_of(pool, task, "x"))["x"].score.value == 1.0
    assert ScoringPool([SNIPPET], trusted=True).level.name == "limits"


def test_a_snippet_beside_a_reward_that_needs_the_network_is_not_shut_in_and_says_so():
    judge = RewardSpec(use="judge", name="opinion")
    level = ScoringPool([SNIPPET, judge]).level
    assert level.name == "limits"
    assert "opinion may need what a sandbox lacks" in str(level)


def test_only_graders_with_source_of_their_own_are_shut_in(tmp_path):
    (tmp_path / "check.json").write_text('{"type": "string_check"}')
    (tmp_path / "code.json").write_text('{"type" : "python"}')
    check, code = (
        RewardSpec(use=f"{name}.json", name=name, base_dir=str(tmp_path))
        for name in ("check", "code")
    )
    assert str(sandbox.choose([check], trusted=None)) == (
        "rewards run as ordinary processes with resource limits (the job trusts them)"
    )
    assert "the job trusts them" not in str(sandbox.choose([check, code], trusted=None))


def test_the_environment_of_the_sandbox_is_empty_but_for_a_few_names(monkeypatch):
    monkeypatch.setenv("RLPOST_TEST_SECRET", "x")
    assert "RLPOST_TEST_SECRET" in sandbox.environment(shut_in=False)
    inside = sandbox.environment(shut_in=True)
    assert "RLPOST_TEST_SECRET" not in inside
    assert inside["OMP_NUM_THREADS"] == "1"


def test_each_sandbox_of_this_process_has_its_own_user():
    assert len({sandbox.new_uid() for _ in range(100)}) == 100
    assert os.getuid() not in {sandbox.new_uid() for _ in range(100)}
