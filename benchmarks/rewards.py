"""How fast rewards are: schema scoring and pool overhead, and math against math-verify.

    python benchmarks/rewards.py [--rounds 7] [--rollouts 4000] [--json]

prints a Markdown table with each figure beside its target, and exits with 1 where one is missed.
Everything is measured side by side: each round runs every contestant once, the ratio is taken
within the round, and the median over rounds is printed, so that a busy machine slows both sides
alike. Contestants without the pool are plain calls in this process, with nothing around them.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.reward import RewardSpec, recorded
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Rollout, Task

GROUP = 8
IN_FLIGHT = 16  # groups that a rollout worker has at its pool at once
ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("RLPOST_DATA", ROOT.parent / "shared" / "data"))
TARGETS = {  # figure -> (whether more is better, the least or most that will do)
    "jsonschema.validate / schema through the pool": (True, 15.0),
    "prebuilt validator / schema through the pool": (True, 1.0),
    "pool overhead": (False, 30.0),
    "math-verify alone / math reward": (True, 20.0),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "company": {"type": "string", "minLength": 1},
        "date": {"type": "string", "pattern": "^[0-9/.-]+$"},
        "address": {"type": "string"},
        "total": {"type": "string", "pattern": "^[0-9.,]+$"},
    },
    "required": ["company", "date", "address", "total"],
    "additionalProperties": False,
}


def constant(task: Task, rollout: Rollout) -> float:
    """The reward that does nothing: what remains is the pool."""
    return 1.0


def receipts(count: int) -> list[list[Rollout]]:
    """Groups of replies to receipts: nine in ten follow the schema."""
    rng = random.Random(1)
    groups = []
    for number in range(count // GROUP):
        messages = [
            {"role": "user", "content": "Extract the fields. " + "RECEIPT LINE 12.50\n" * 30}
        ]
        task = Task(id=str(number), messages=messages, schema=SCHEMA)
        replies = []
        for _ in range(GROUP):
            value: dict[str, Any] = {
                "company": f"SHOP {rng.randrange(10_000)} SDN BHD",
                "date": "25/12/2018",
                "address": "NO 12, JALAN PERMAS, 81750 JOHOR BAHRU",
                "total": f"{rng.randrange(9999) / 100:.2f}",
            }
            if rng.random() < 0.1:
                del value["total"]
            replies.append(recorded(task, json.dumps(value)))
        groups.append(replies)
    return groups


async def through(pool: ScoringPool, groups: Sequence[Sequence[Rollout]]) -> float:
    """Seconds per rollout through the whole pool, some groups always in flight."""
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one(group: Sequence[Rollout]) -> None:
        async with gate:
            scored = await pool.score(group)
            assert all(rollout.status == "ok" for rollout in scored)

    start = time.perf_counter()
    await asyncio.gather(*(one(group) for group in groups))
    return (time.perf_counter() - start) / sum(map(len, groups))


def plainly(function: Callable[[Rollout], Any], rollouts: Sequence[Rollout]) -> float:
    """Seconds per call in this process."""
    start = time.perf_counter()
    for rollout in rollouts:
        function(rollout)
    return (time.perf_counter() - start) / len(rollouts)


async def schema_and_overhead(rounds: int, count: int, processes: int) -> dict[str, float]:
    import jsonschema

    groups = receipts(count)
    flat = [rollout for group in groups for rollout in group]
    validator = jsonschema.Draft202012Validator(SCHEMA)

    def validate(rollout: Rollout) -> float:
        try:
            jsonschema.validate(json.loads(rollout.reply), rollout.task.schema)
        except jsonschema.ValidationError:
            return 0.0
        return 1.0

    def prebuilt(rollout: Rollout) -> float:
        return float(validator.is_valid(json.loads(rollout.reply)))

    name = "json_schema"
    nothing = RewardSpec(
        use="rewards:constant", name="constant", base_dir=str(Path(__file__).parent)
    )
    async with (
        ScoringPool([RewardSpec(use=name, name=name)], processes=processes) as schema,
        ScoringPool([nothing], processes=processes) as empty,
    ):
        cpu: list[float] = []

        async def overhead() -> float:
            start = time.process_time()
            wall = await through(empty, groups)
            cpu.append((time.process_time() - start) / len(flat))
            return wall

        contestants: dict[str, Callable[[], Awaitable[float]]] = {
            "pool": lambda: through(schema, groups),
            "empty": overhead,
            "validate": lambda: _now(plainly(validate, flat[: max(80, count // 20)])),
            "prebuilt": lambda: _now(plainly(prebuilt, flat)),
        }
        times = await measure(contestants, rounds)
    return {
        "schema through the pool": median(times["pool"]) * 1e6,
        "prebuilt Python validator, in-process": median(times["prebuilt"]) * 1e6,
        "jsonschema.validate, in-process": median(times["validate"]) * 1e6,
        "pool overhead": median(times["empty"]) * 1e6,
        "of it CPU of the parent": median(cpu[1:]) * 1e6,
        "jsonschema.validate / schema through the pool": ratio(times["validate"], times["pool"]),
        "prebuilt validator / schema through the pool": ratio(times["prebuilt"], times["pool"]),
    }


async def math_speed(rounds: int, count: int) -> dict[str, float]:
    """Our math reward in-process against math-verify alone, on GSM8K's golds as their own
    replies."""
    from math_verify import parse, verify
    from rlpost_rewards.math import math

    file = DATA / "gsm8k" / "test.jsonl"
    if not file.is_file():
        print(f"math left out: {file} is not there (set RLPOST_DATA)", file=sys.stderr)
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()[:count]]
    rollouts = [
        recorded(Task(id=str(n), messages=[], answer=row["answer"]), row["answer"])
        for n, row in enumerate(rows)
    ]

    def alone(rollout: Rollout) -> bool:
        gold = rollout.task.answer.rpartition("####")[2]
        return verify(parse(gold), parse(rollout.reply.rpartition("####")[2]))

    few = rollouts[: max(20, count // 20)]
    contestants: dict[str, Callable[[], Awaitable[float]]] = {
        "ours": lambda: _now(plainly(lambda r: math(r.task, r), rollouts)),
        "math-verify": lambda: _now(plainly(alone, few)),
    }
    times = await measure(contestants, rounds)
    return {
        "math reward, in-process": median(times["ours"]) * 1e6,
        "math-verify alone, in-process": median(times["math-verify"]) * 1e6,
        "math-verify alone / math reward": ratio(times["math-verify"], times["ours"]),
    }


async def _now(value: float) -> float:
    return value


async def measure(
    contestants: dict[str, Callable[[], Awaitable[float]]], rounds: int
) -> dict[str, list[float]]:
    """Each contestant once a round, after one round to warm up that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            taken = await run()
            if number:
                times[name].append(taken)
    return times


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of slow / fast within the round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def table(figures: Mapping[str, float]) -> str:
    """A Markdown table; times are in microseconds per rollout, ratios have a slash in their
    name."""
    lines = ["| figure | value | target |", "|---|---|---|"]
    for name, value in figures.items():
        target = ""
        if name in TARGETS:
            more, limit = TARGETS[name]
            target = f"{'≥' if more else '<'} {_shown(name, limit)}"
            target += "" if reached(name, value) else " **missed**"
        lines.append(f"| {name} | {_shown(name, value)} | {target} |")
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    return f"{value:.1f}×" if "/" in name else f"{value:.1f} µs"


def reached(name: str, value: float) -> bool:
    more, limit = TARGETS[name]
    return value >= limit if more else value < limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rollouts", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    figures = asyncio.run(schema_and_overhead(args.rounds, args.rollouts, args.processes))
    figures |= asyncio.run(math_speed(args.rounds, min(1000, args.rollouts)))
    if args.json:
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    else:
        print(table(figures))
        print(f"\n{os.cpu_count()} CPUs, load {load:.2f} before, {args.rounds} rounds of")
        print(
            f"{args.rollouts} rollouts in groups of {GROUP}, {args.processes} scoring process(es)"
        )
    return 0 if all(reached(name, figures[name]) for name in TARGETS if name in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
