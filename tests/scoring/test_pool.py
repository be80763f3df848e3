"""The pool's rules: who is blamed for a failure, and that everybody else is scored all the same."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from rlpost.errors import PluginError, ScoringError
from rlpost.reward import RewardSpec, recorded
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Score, Task, Trajectory

TASK = Task(id="t1", messages=[{"role": "user", "content": "q"}], answer="gold", meta={"n": 3})

REWARDS = """
import asyncio, os, sys, time
from rlpost.types import Score

def plain(task, rollout):
    good = rollout.reply == task.answer
    return Score(value=float(good), parts={"same": float(good)}, reason="" if good else "differs")

def picky(task, rollout, *, level=1.0):
    what = rollout.reply
    if what == "loop":
        while True: pass
    if what == "exit": os._exit(7)
    if what == "raise": raise KeyError("x")
    if what == "nan": return float("nan")
    if what.startswith("once:"):             # breaks in the first process that meets it
        path = what.removeprefix("once:")
        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(1)
    if what == "close":
        os.closerange(3, 64)
    return level

def spoiled(task, rollout):                   # leaves its process in a bad state
    if rollout.reply == "spoil": globals()["_broken"] = True
    if globals().get("_broken"): raise RuntimeError("broken state")
    return 1.0

def ranked(task, rollouts):
    return [index / len(rollouts) for index in range(len(rollouts))]

def short_list(task, rollouts): return [1.0]

def fragile(task, rollouts):
    for rollout in rollouts:
        if rollout.reply == "exit": os._exit(1)
        if rollout.reply.startswith("once:"): picky(task, rollout)
    return [1.0] * len(rollouts)

async def compared(task, rollouts):
    await asyncio.sleep(0.01)
    if rollouts[0].reply == "net": raise ConnectionRefusedError("no judge here")
    return [len(r.reply) / 10 for r in rollouts]

def half_wrong(task, rollouts):
    return [float("nan") if r.reply == "nan" else 1.0 for r in rollouts]

def eyes(task, rollout):
    assert rollout.trajectory is None and task.meta["n"] == 3
    assert rollout.messages[-1]["content"] == rollout.reply and rollout.stop_reason == "length"
    return rollout.info["known"]

def who(task, rollout): return Score(value=1.0, reason=str(os.getpid()))

def signed(task, rollout): return -1.0

async def waits(task, rollout):
    await asyncio.sleep(0.05)
    what = rollout.reply
    if what == "loop":
        while True: pass
    if what == "hang": await asyncio.sleep(1000)
    if what == "net": raise ConnectionRefusedError("no judge here")
    if what == "raise": raise KeyError("x")
    return 1.0

def chatty(task, rollout):
    sys.stdout.write("x" * 1_000_000); sys.stderr.write("y" * 1_000_000); print("z" * 1_000_000)
    return 1.0

def napping(task, rollout):
    time.sleep(0.2)
    return 1.0

def unmarked(task, rollout): return 1.0 if task.meta.get("mark") is None else 0.0
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pool_rewards.py").write_text(textwrap.dedent(REWARDS))
    return tmp_path


def specs(folder, *names, **fields):
    return [
        RewardSpec(use=f"pool_rewards:{name}", name=name, base_dir=str(folder), **fields)
        for name in names
    ]


def replies(*texts, task=TASK):
    return [recorded(task, text) for text in texts]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_each_rollout_gets_its_score_in_order(folder):
    async with ScoringPool(specs(folder, "plain", "ranked")) as pool:
        scored = await pool.score(replies("gold", "no", "gold"))
    assert [r.status for r in scored] == ["ok"] * 3
    assert [r.score.value for r in scored] == pytest.approx([0.5, 1 / 6, 5 / 6])
    assert scored[0].score.parts == {"plain": 1.0, "plain.same": 1.0, "ranked": 0.0}
    assert [r.score.reason for r in scored] == ["", "differs", ""]


async def test_a_failure_costs_exactly_its_own_rollout(folder):
    texts = ["a", "loop", "b", "exit", "raise", "nan", "close", "c"]
    async with ScoringPool(specs(folder, "picky"), deadline=0.4) as pool:
        scored = await pool.score(replies(*texts))
        calls = pool.statistics()["calls"]["picky"]
    good = [r.reply for r in scored if r.status == "ok"]
    assert good == ["a", "b", "c"]
    reasons = {
        r.reply: (r.status, r.score.value, r.score.reason) for r in scored if r.reply not in good
    }
    assert reasons == {
        "loop": ("reply_error", 0.0, "picky:timeout"),
        "exit": ("reply_error", 0.0, "picky:crashed"),
        "raise": ("reply_error", 0.0, "picky:error"),
        "nan": ("reply_error", 0.0, "picky:invalid_result"),
        "close": ("reply_error", 0.0, "picky:crashed"),
    }
    assert calls["timeout"] == 2 and calls["error"] == 2 and calls["ok"] == 3


async def test_a_reply_error_keeps_the_parts_that_are_known(folder):
    async with ScoringPool(specs(folder, "plain", "picky")) as pool:
        (scored,) = await pool.score(
            replies("raise", task=Task(id="t", messages=[], answer="raise"))
        )
    assert scored.score.value == 0.0
    assert scored.score.parts == {"plain": 1.0, "plain.same": 1.0, "picky": 0.0}


async def test_a_failure_that_does_not_come_again_is_forgiven(folder):
    async with ScoringPool(specs(folder, "picky")) as pool:
        scored = await pool.score(replies("a", f"once:{folder / 'seen'}", "b"))
    assert [r.status for r in scored] == ["ok"] * 3


async def test_a_retry_runs_in_a_fresh_worker(folder):
    async with ScoringPool(specs(folder, "spoiled")) as pool:
        scored = await pool.score(replies("a", "spoil", "b", "c"))
    assert [r.status for r in scored] == ["ok", "reply_error", "ok", "ok"]


async def test_a_group_reward_that_returns_the_wrong_number_costs_its_group(folder):
    async with ScoringPool(specs(folder, "short_list", "half_wrong")) as pool:
        judged = await pool.judge(replies("a", "nan"))
    assert [row[0].status for row in judged] == ["invalid_result"] * 2
    assert "list of 2 values" in judged[0][0].detail
    assert [row[1].status for row in judged] == ["ok", "invalid_result"]


async def test_an_endpoint_out_of_reach_leaves_the_rollout_unscored(folder):
    async with ScoringPool(specs(folder, "waits"), deadline=0.5) as pool:
        scored = await pool.score(replies("a", "net", "hang", "loop", "raise", "b"))
    found = [(r.reply, r.status, r.score and r.score.value) for r in scored]
    assert found == [
        ("a", "ok", 1.0),
        ("net", "error", None),
        ("hang", "timeout", None),
        ("loop", "reply_error", 0.0),
        ("raise", "reply_error", 0.0),
        ("b", "ok", 1.0),
    ]


async def test_async_rewards_of_many_groups_wait_together(folder):
    async with ScoringPool(specs(folder, "waits")) as pool:
        start = time.monotonic()
        groups = await asyncio.gather(*(pool.score(replies("a", "b")) for _ in range(60)))
        took = time.monotonic() - start
    assert all(r.status == "ok" for group in groups for r in group)
    assert took < 3.0  # one after the other they would take 6.0 s


async def test_rewards_see_no_tokens(folder):
    from dataclasses import replace

    trajectory = Trajectory(token_ids=[1], loss_mask=[1], logprobs=[0.0], policy_version=4)
    rollout = replace(
        recorded(TASK, "x"), trajectory=trajectory, stop_reason="length", info={"known": 0.25}
    )
    async with ScoringPool(specs(folder, "eyes")) as pool:
        (scored,) = await pool.score([rollout])
    assert (scored.status, scored.score.value) == ("ok", 0.25)
    assert scored.trajectory is trajectory


async def test_values_are_mapped_from_their_range(folder):
    async with ScoringPool(specs(folder, "signed", range=(-3.0, 1.0))) as pool:
        (scored,) = await pool.score(replies("x"))
    assert scored.score.value == pytest.approx(0.5)


async def test_prints_neither_block_nor_show(folder, capfd):
    async with ScoringPool(specs(folder, "chatty"), deadline=5.0) as pool:
        scored = await pool.score(replies(*"abcdefgh"))
    assert all(r.status == "ok" for r in scored)
    assert capfd.readouterr() == ("", "")


async def test_the_clock_starts_with_the_work_and_not_with_the_waiting(folder):
    async with ScoringPool(specs(folder, "napping"), deadline=0.6) as pool:
        groups = await asyncio.gather(*(pool.score(replies("a", "b")) for _ in range(3)))
    assert all(r.status == "ok" for group in groups for r in group)  # the last waited for 0.8 s


async def test_processes_work_side_by_side(folder):
    async with ScoringPool(specs(folder, "napping"), processes=3) as pool:
        start = time.monotonic()
        await asyncio.gather(*(pool.score(replies("a")) for _ in range(12)))
        assert time.monotonic() - start < 2.0  # one process would take 2.4 s


async def test_a_full_pool_makes_the_next_group_wait(folder):
    async with ScoringPool(specs(folder, "napping"), waiting=2) as pool:
        groups = [asyncio.create_task(pool.score(replies("a"))) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert pool.statistics()["waiting"] == 2
        await asyncio.gather(*groups)


async def test_lockstep_stops_the_run_for_a_time_out(folder):
    async with ScoringPool(specs(folder, "picky"), deadline=0.2, on_timeout="stop") as pool:
        with pytest.raises(ScoringError, match=r"'picky' timed out twice on task t1"):
            await pool.score(replies("a", "loop"))
        assert (await pool.score(replies("b")))[0].status == "ok"


async def test_a_reward_that_does_not_import_is_told_at_the_start(folder):
    (folder / "broken_reward.py").write_text("import no_such_library\n")
    bad = RewardSpec(use="broken_reward:f", name="f", base_dir=str(folder))
    pool = ScoringPool([bad])
    with pytest.raises(PluginError, match=r"broken_reward\.py, line 1\); install no_such_library"):
        await pool.start()


@pytest.mark.parametrize(
    ("arguments", "message"), [({"levl": 1}, "did you mean 'level'"), ({"level": 0.5}, "")]
)
async def test_arguments_are_checked_at_the_start(folder, arguments, message):
    pool = ScoringPool(specs(folder, "picky", arguments=arguments))
    if message:
        with pytest.raises(PluginError, match=message):
            await pool.start()
    else:
        async with pool:
            assert (await pool.score(replies("a")))[0].score.value == 0.5


async def test_what_cannot_be_pickled_is_not_the_replys_fault(folder):
    from dataclasses import replace

    rollout = replace(recorded(TASK, "x"), info={"known": lambda: 0})
    async with ScoringPool(specs(folder, "plain")) as pool:
        (scored,) = await pool.score([rollout])
        assert (scored.status, scored.score) == ("error", None)
        assert "cannot be sent" in pool.failures[0].detail
        assert (await pool.score(replies("gold")))[0].score.value == 1.0


async def test_a_killed_keeper_is_replaced_and_everybody_is_scored(folder):
    async with ScoringPool(specs(folder, "napping"), deadline=5.0) as pool:
        group = asyncio.create_task(pool.score(replies("a", "b", "c")))
        await asyncio.sleep(0.1)
        os.kill(pool._lanes[0][0].slots[0].process.process.pid, signal.SIGKILL)
        assert [r.status for r in await group] == ["ok"] * 3
        assert pool.statistics()["restarts"] >= 1


async def test_a_worker_killed_from_outside_between_two_calls_costs_nothing(folder):
    async with ScoringPool(specs(folder, "who")) as pool:
        for _ in range(3):
            (scored,) = await pool.score(replies("a"))
            os.kill(int(scored.score.reason), signal.SIGKILL)
        assert scored.status == "ok"


async def test_nothing_runs_after_stop(folder):
    pool = ScoringPool(specs(folder, "who"), processes=2)
    await pool.start()
    (scored,) = await pool.score(replies("a"))
    pids = [slot.process.process.pid for slot in pool._lanes[0][0].slots]
    pids.append(int(scored.score.reason))
    assert all(alive(pid) for pid in pids)
    await pool.stop()
    assert not any(alive(pid) for pid in pids)


def test_nothing_runs_after_the_parent_died(folder):
    program = textwrap.dedent(f"""
        import asyncio, os
        from rlpost.reward import RewardSpec, recorded
        from rlpost.scoring.pool import ScoringPool
        from rlpost.types import Task
        async def main():
            spec = RewardSpec(use="pool_rewards:who", name="who", base_dir={str(folder)!r})
            pool = ScoringPool([spec])
            await pool.start()
            (scored,) = await pool.score([recorded(Task(id="1", messages=[]), "a")])
            print(scored.score.reason, pool._lanes[0][0].slots[0].process.process.pid, flush=True)
            os.kill(os.getpid(), 9)
        asyncio.run(main())
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    end = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)


async def test_an_empty_group_is_no_work(folder):
    async with ScoringPool(specs(folder, "plain")) as pool:
        assert await pool.score([]) == []


async def test_a_cancelled_group_does_not_disturb_the_next(folder):
    async with ScoringPool(specs(folder, "napping")) as pool:
        group = asyncio.create_task(pool.score(replies("a", "b")))
        await asyncio.sleep(0.05)
        group.cancel()
        assert (await pool.score(replies("c")))[0].score == Score(value=1.0, parts={"napping": 1.0})


async def test_a_reward_that_starts_threads_on_import_works_without_forks(folder):
    (folder / "threaded.py").write_text(
        "import threading, time, os\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
        "def f(task, rollout):\n"
        "    if rollout.reply == 'exit': os._exit(1)\n"
        "    while rollout.reply == 'loop': pass\n"
        "    if rollout.reply == 'raise': raise ValueError('no')\n"
        "    return 1.0\n"
    )
    spec = RewardSpec(use="threaded:f", name="f", base_dir=str(folder))
    async with ScoringPool([spec], deadline=0.4) as pool:
        scored = await pool.score(replies("a", "exit", "raise", "loop", "b"))
        assert not pool._lanes[0][0].slots[0].process.forks
    assert [r.status for r in scored] == ["ok", *["reply_error"] * 3, "ok"]


async def test_huge_and_odd_replies_travel_whole(folder):
    (folder / "measuring.py").write_text(
        "from rlpost.types import Score\n"
        "def f(task, rollout):\n"
        "    text = rollout.reply\n"
        "    return Score(value=1.0, reason=f'{len(text)} {ascii(text[-1:])}')\n"
    )
    spec = RewardSpec(use="measuring:f", name="f", base_dir=str(folder))
    async with ScoringPool([spec]) as pool:
        texts = ["x" * 10_000_000 + "\ud800", "", "\x00", "é" * 5_000_000]
        scored = await pool.score(replies(*texts))
    reasons = [r.score.reason for r in scored]
    assert reasons == ["10000001 '\\ud800'", "0 ''", "1 '\\x00'", "5000000 '\\xe9'"]


async def test_a_pool_without_rewards_is_refused():
    with pytest.raises(PluginError, match="no reward"):
        await ScoringPool([]).start()


async def test_a_group_reward_that_crashes_costs_its_group_and_no_other_reward(folder):
    async with ScoringPool(specs(folder, "plain", "fragile")) as pool:
        judged = await pool.judge(replies("gold", "exit", "x"))
        again = await pool.score(replies("gold", f"once:{folder / 'seen'}"))
    assert [row[0].status for row in judged] == ["ok"] * 3
    assert [(row[1].status, row[1].cause) for row in judged] == [("crashed", "reply")] * 3
    assert [r.status for r in again] == ["ok", "ok"]


async def test_async_group_rewards_judge_all_replies_at_once(folder):
    async with ScoringPool(specs(folder, "compared", "plain")) as pool:
        scored = await pool.score(replies("gold", "x"))
        lost = await pool.score(replies("net", "x"))
    assert [r.score.parts["compared"] for r in scored] == [0.4, 0.1]
    assert [(r.status, r.score) for r in lost] == [("error", None)] * 2


async def test_a_process_that_cannot_be_replaced_leaves_rollouts_unscored_until_it_can(folder):
    file = folder / "pool_rewards.py"
    async with ScoringPool(specs(folder, "plain")) as pool:
        text = file.read_text()
        file.write_text("import no_such_library\n")
        os.kill(pool._lanes[0][0].slots[0].process.process.pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
        (lost,) = await asyncio.wait_for(pool.score(replies("gold")), 60)
        assert (lost.status, lost.score) == ("error", None)
        assert "no_such_library" in pool.failures[0].detail
        file.write_text(text)
        (found,) = await asyncio.wait_for(pool.score(replies("gold")), 60)
    assert found.score.value == 1.0
