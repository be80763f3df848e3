"""Hostile rewards: each costs its own rollout alone, under the right status, and nothing hangs."""

import asyncio
import os
import resource
import textwrap
import time

import pytest

from rlpost.reward import RewardSpec, recorded
from rlpost.scoring.pool import ScoringPool
from rlpost.scoring.sandbox import Limits
from rlpost.types import Score, Task

HOSTILE = '''
import ctypes, os, signal, sys, threading, time

def judge(task, rollout):
    """Does what the reply says."""
    if rollout.reply in DEEDS:
        return DEEDS[rollout.reply]()
    return 1.0

def endless():
    while True:
        pass

def deaf():                       # a loop that wants no signal to end it
    for number in range(1, 32):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    while True:
        pass

def swallow():                    # a loop that catches everything
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass

def memory():
    hoard = []
    while True:
        hoard.append(bytearray(8 << 20))

def forks():                      # bounded, in case nobody stops it
    for _ in range(300):
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
    return 1.0

def grandchild():                 # leaves a detached process behind and is content
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(os.environ["RLPOST_TEST_MARK"], "w") as file:
                file.write(str(os.getpid()))
            time.sleep(60)
        os._exit(0)
    time.sleep(0.3)
    os._exit(5)

def flood():
    for _ in range(200):
        sys.stdout.write("x" * 100_000)
        sys.stderr.write("x" * 100_000)
        os.write(1, b"y" * 100_000)
    return 1.0

def deep():
    return deep()

def raises_odd():
    class Odd(Exception):
        def __str__(self): raise RuntimeError("no text")
    raise Odd

class Evil:
    def __float__(self): raise RuntimeError("no number")

def many_parts():
    from rlpost.types import Score
    return Score(value=1.0, parts={str(n): 1.0 for n in range(100_000)})

def nan_part():
    from rlpost.types import Score
    return Score(value=1.0, parts={"a": float("nan")})

def forged():                     # writes into every file descriptor it finds
    for number in range(3, 64):
        try: os.write(number, b"\\x07\\x00\\x00\\x00[1,1,0]" * 9)
        except OSError: pass
    return 1.0

DEEDS = {
    "endless": endless, "deaf": deaf, "swallow": swallow, "memory": memory, "forks": forks,
    "grandchild": grandchild, "flood": flood, "deep": deep, "odd": raises_odd, "forged": forged,
    "sleep": lambda: time.sleep(1000),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit": lambda: sys.exit(3),
    "hard exit": lambda: os._exit(0),
    "suicide": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "huge": lambda: bytearray(1 << 45),
    "nan": lambda: float("nan"), "inf": lambda: float("-inf"), "two": lambda: 2.0,
    "none": lambda: None, "text": lambda: "1.0", "list": lambda: [1.0], "evil": lambda: Evil(),
    "many parts": many_parts, "nan part": nan_part,
    "raise": lambda: 1 / 0,
}
'''
STATUS_OF = {
    "endless": "timeout", "deaf": "timeout", "swallow": "timeout", "sleep": "timeout",
    "memory": "crashed", "huge": "crashed", "forks": "crashed", "grandchild": "crashed",
    "segfault": "crashed", "abort": "crashed", "exit": "crashed", "hard exit": "crashed",
    "suicide": "crashed",
    "raise": "error", "deep": "error", "odd": "error",
    "nan": "invalid_result", "inf": "invalid_result", "two": "invalid_result",
    "none": "invalid_result", "text": "invalid_result", "list": "invalid_result",
    "evil": "invalid_result", "many parts": "invalid_result", "nan part": "invalid_result",
    "flood": "ok",
}  # fmt: skip
LIMITS = Limits(memory_bytes=512 << 20, processes=24)
TASK = Task(id="1", messages=[{"role": "user", "content": "q"}], answer="a")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    (tmp_path / "hostile_reward.py").write_text(textwrap.dedent(HOSTILE))
    monkeypatch.setenv("RLPOST_TEST_MARK", str(tmp_path / "mark"))
    return RewardSpec(use="hostile_reward:judge", name="judge", base_dir=str(tmp_path))


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("deed", sorted(STATUS_OF))
async def test_a_hostile_call_costs_its_own_rollout_under_its_status(spec, deed, record_property):
    texts = ["good", deed, "good", "good"]
    async with ScoringPool([spec], deadline=1.0, limits=LIMITS) as pool:
        start = time.monotonic()
        judged = await asyncio.wait_for(pool.judge([recorded(TASK, t) for t in texts]), 60)
        took = time.monotonic() - start
        processes = pool._lanes[0][0].slots[0].process.usage()[1]
    statuses = [row[0].status for row in judged]
    assert statuses == ["ok", STATUS_OF[deed], "ok", "ok"], judged[1][0].detail
    record_property("figure", ("hostile rewards", "each its own rollout, under its status", 1, 1))
    assert took < 30
    assert processes <= 2  # the keeper and a scorer: what a call started is gone


async def test_a_detached_child_dies_with_its_call(spec, tmp_path):
    async with ScoringPool([spec], deadline=2.0, limits=LIMITS) as pool:
        await pool.score([recorded(TASK, "grandchild")])
        pid = int((tmp_path / "mark").read_text())
        assert not is_alive(pid)


async def test_forged_frames_score_nothing_but_their_own_rollout(spec):
    async with ScoringPool([spec], deadline=1.0, limits=LIMITS) as pool:
        texts = ["good", "forged", "good"]
        scored = await asyncio.wait_for(pool.score([recorded(TASK, t) for t in texts]), 60)
    assert [r.status for r in scored] == ["ok", "reply_error", "ok"]


async def test_all_of_them_in_one_group_leave_the_good_ones_scored(spec):
    texts = [t for deed in ("raise", "nan", "exit", "segfault", "sleep") for t in (deed, "good")]
    async with ScoringPool([spec], deadline=0.5, limits=LIMITS) as pool:
        scored = await asyncio.wait_for(pool.score([recorded(TASK, t) for t in texts]), 60)
    good = Score(value=1.0, parts={"judge": 1.0})
    assert [r.score for r in scored if r.reply == "good"] == [good] * 5
    assert [r.status for r in scored if r.reply != "good"] == ["reply_error"] * 5
    assert all(r.score.value == 0.0 for r in scored if r.reply != "good")


@pytest.mark.slow
async def test_memory_stays_flat_over_ten_thousand_calls(spec):
    """Two runs of the same mixture, the parent's and the workers' memory compared between them."""
    deeds = ["good"] * 96 + ["raise", "nan", "exit", "evil"]

    async def run(pool, groups):
        for _ in range(groups):
            batch = [recorded(TASK, text) for text in deeds]
            await asyncio.gather(*(pool.score(batch[i : i + 10]) for i in range(0, 100, 10)))

    async with ScoringPool([spec], deadline=5.0, limits=LIMITS) as pool:
        await run(pool, 10)  # warm
        process = pool._lanes[0][0].slots[0].process
        own, theirs = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, process.usage()[0]
        files = len(os.listdir("/proc/self/fd"))
        await run(pool, 100)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - own < 16 << 10  # KiB
        assert process.usage()[0] - theirs < 16 << 20
        assert len(os.listdir("/proc/self/fd")) <= files + 2
