"""Staleness, order, refill, requeue and resume of the buffer."""

import asyncio
import json
import random

import pytest
from fakes import group, task
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.buffer import REFILL_LIMIT, Buffer, TaskQueue


def queue(n: int = 8, seed: int = 1) -> TaskQueue:
    return TaskQueue([task(f"t{i}") for i in range(n)], seed=seed)


def buffer(*, P: int = 2, S: int = 1, tasks: int = 8, **fields: object) -> Buffer:
    return Buffer(queue(tasks), tasks_per_update=P, staleness=S, clock=lambda: 0.0, **fields)


async def admitted(b: Buffer) -> list:
    """Every ticket that is to be had now."""
    tickets = []
    while True:
        try:
            tickets.append(await asyncio.wait_for(b.admit(), 0.01))
        except TimeoutError:
            return tickets


async def test_at_most_s_plus_one_cohorts_are_in_flight():
    b = buffer(P=3, S=2)
    assert len(await admitted(b)) == 9


async def test_slots_open_only_at_release():
    b = buffer(P=2, S=0)
    tickets = await admitted(b)
    for ticket in tickets:
        await b.put(ticket, group(ticket.id, [0, 1]))
    assert len(await b.take()) == 2
    assert await admitted(b) == []  # taken, not yet proven
    await b.release(version=1)
    assert [t.version for t in await admitted(b)] == [1, 1]


async def test_nothing_is_sampled_beyond_the_last_update():
    b = buffer(P=2, S=2, cohorts=2)
    assert len(await admitted(b)) == 4


async def test_groups_are_taken_in_order_of_admission_whoever_finishes_first():
    b = buffer(P=2, S=1)
    tickets = await admitted(b)
    for ticket in reversed(tickets):
        await b.put(ticket, group(ticket.id, [0, 1]))
    assert [g.id for g in await b.take()] == [0, 1]


async def test_a_straggler_is_awaited():
    b = buffer(P=2, S=1)
    first, *others = await admitted(b)
    for ticket in others:
        await b.put(ticket, group(ticket.id, [0, 1]))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(b.take(), 0.01)
    await b.put(first, group(first.id, [0, 1]))
    assert [g.id for g in await b.take()] == [0, 1]


async def test_a_dropped_straggler_gives_its_place_and_its_task_comes_again():
    b = buffer(P=2, S=0, tasks=3)
    first, second = await admitted(b)
    await b.drop(first, "late")
    (replacement,) = await admitted(b)
    for ticket in (second, replacement):
        await b.put(ticket, group(ticket.id, [0, 1]))
    assert [g.id for g in await b.take()] == [1, 2]
    await b.put(first, group(first.id, [0, 1]))  # arrives after all: too late, and harmless
    await b.release(version=1)
    assert first.task.id in [t.task.id for t in await admitted(b)]  # the end of the epoch's queue
    assert b.dropped == {"late": 1}


async def test_a_group_with_fewer_than_two_scores_is_dropped_and_requeued():
    b = buffer(P=1, S=0)
    (ticket,) = await admitted(b)
    await b.put(ticket, group(ticket.id, [1.0, None]))
    assert b.dropped == {"unscored": 1}
    assert len(await admitted(b)) == 1


async def test_refill_goes_on_until_p_groups_are_useful():
    b = buffer(P=2, S=0, tasks=20, refill=True, min_spread=0.02)
    values = {0: [1, 1], 1: [0, 1], 2: [0, 0], 3: [0, 1]}
    seen = []
    while tickets := await admitted(b):
        for ticket in tickets:
            seen.append(ticket.id)
            await b.put(ticket, group(ticket.id, values[ticket.id]))
    assert seen == [0, 1, 2, 3]
    assert [g.id for g in await b.take()] == [1, 3]
    assert b.dropped == {"all_good": 1, "all_bad": 1}


async def test_refill_ends_at_four_times_p():
    b = buffer(P=2, S=0, tasks=50, refill=True, min_spread=0.02)
    count = 0
    while tickets := await admitted(b):
        for ticket in tickets:
            count += 1
            await b.put(ticket, group(ticket.id, [1, 1]))
    assert count == REFILL_LIMIT * 2
    assert await b.take() == []


@given(
    S=st.integers(0, 3), P=st.integers(1, 4), seed=st.integers(0, 10**6), refill=st.booleans(),
    lockstep=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_staleness_never_exceeds_s(S, P, seed, refill, lockstep):
    """Groups finish in any order, some are useless, late or unscored; updates follow one
    another."""

    async def run() -> None:
        rng = random.Random(seed)
        b = buffer(P=P, S=S, tasks=7, refill=refill, min_spread=0.02, lockstep=lockstep)
        flying: list = []
        for update in range(8):
            while not (b._cohorts and b._complete(b._cohorts[0])):
                flying += await admitted_now(b)
                assert len({t.cohort for t in flying}) <= S + 1
                assert sum(1 for _ in b.running()) + b.finished <= (S + 1) * P
                ticket = flying.pop(rng.randrange(len(flying)))
                kind = rng.random()
                if kind < 0.1 and not lockstep:
                    await b.drop(ticket, "late")
                else:
                    values = [0, 1] if kind < 0.7 else [1, 1] if kind < 0.9 else [1, None]
                    await b.put(ticket, group(ticket.id, values, version=ticket.version))
            groups = await b.take()
            assert b.staleness(groups, learner_version=update) <= S
            if lockstep:
                assert all(g.policy_version == max(0, update - S) for g in groups)
                while flying or (flying := await admitted_now(b)):
                    ticket = flying.pop(rng.randrange(len(flying)))
                    await b.put(ticket, group(ticket.id, [0, 1], version=ticket.version))
                await asyncio.wait_for(b.quiet(), 1)
            await b.release(version=update + 1)

    async def admitted_now(b: Buffer) -> list:
        tickets = []
        while b._wanting() is not None:
            tickets.append(await b.admit())
        return tickets

    asyncio.run(run())


def test_the_order_of_tasks_is_a_function_of_the_seed():
    first, second, other = queue(seed=3), queue(seed=3), queue(seed=4)
    order = [first.draw().id for _ in range(20)]
    assert order == [second.draw().id for _ in range(20)]
    assert order != [other.draw().id for _ in range(20)]
    assert sorted(order[:8]) == sorted(order[8:16]) == [f"t{i}" for i in range(8)]


@given(cut=st.integers(0, 30), give=st.lists(st.integers(0, 29), max_size=4))
@settings(deadline=None)
def test_a_restored_queue_goes_on_where_it_was(cut, give):
    whole = queue(5)
    for i in range(cut):
        drawn = whole.draw()
        if i in give:
            whole.give_back(drawn)
    copy = queue(5)
    copy.restore(json.loads(json.dumps(whole.state())))
    assert [whole.draw().id for _ in range(20)] == [copy.draw().id for _ in range(20)]


async def test_a_restored_buffer_samples_again_what_was_in_flight_and_keeps_what_was_finished():
    b = buffer(P=2, S=1)
    tickets = await admitted(b)
    await b.put(tickets[0], group(0, [0, 1]))
    state = b.state()
    copy = buffer(P=2, S=1)
    again = copy.restore(state, {f"t{i}": task(f"t{i}") for i in range(8)})
    assert [t.id for t in again] == [1, 2, 3]
    assert [t.task.id for t in again] == [t.task.id for t in tickets[1:]]
    assert copy.finished == 1
    for ticket in again:
        await copy.put(ticket, group(ticket.id, [0, 1]))
    assert [g.id for g in await copy.take()] == [0, 1]
