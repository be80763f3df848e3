"""Tries rewards on real rows before anything is trained: do they work, and can they be gamed?

Each reward meets the gold answer and replies that a policy will give on its first day
(`probes.py`): finite, in range, repeatable, gold above garbage, fast enough; and no degenerate
reply worth having.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlpost.reward import RewardSpec, recorded
from rlpost.scoring import probes
from rlpost.scoring.judge import Verdict
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Rollout, Task

HACKABLE = 0.3  # a degenerate reply that scores more is listed
BUDGET, QUICK_BUDGET = 60.0, 20.0  # seconds for all rows; what was not reached is said


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found: "error" (it cannot work), "warning" (look at it) or "note" (a figure)."""

    reward: str
    severity: str
    text: str
    cure: str = ""


@dataclass(slots=True)
class _Trial:
    """What one reward said: (kind, task id) -> verdict, of both rounds."""

    spec: RewardSpec
    first: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    second: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def values(self, kind: str) -> list[float]:
        return [
            verdict.score.value
            for (each, _), verdict in self.first.items()
            if each == kind and verdict.score is not None
        ]


async def try_reward(
    specs: Sequence[RewardSpec],
    tasks: Sequence[Task],
    *,
    deadline: float = 10.0,
    quick: bool = False,
    trusted: bool | None = None,
    allow_untrusted: bool = False,
    memory_bytes: int = 4 << 30,
) -> list[Finding]:
    """The findings on each reward, errors first. `quick` tries every reply once instead of twice.

    Raises PluginError for a reward that cannot be loaded. Takes at most about a minute (`quick`: 20
    s) and two deadlines for a reward that hangs.
    """
    deadline = min(deadline, 3.0 if quick else 5.0)
    trials = [_Trial(spec) for spec in specs]
    tried = 0
    async with ScoringPool(
        specs,
        deadline=deadline,
        memory_bytes=memory_bytes,
        trusted=trusted,
        allow_untrusted=allow_untrusted,
    ) as pool:
        end = time.monotonic() + (QUICK_BUDGET if quick else BUDGET)
        for task in tasks:
            batch = _replies(task, tasks, specs, length=20_000 if quick else 200_000)
            if not await _sound(pool, trials, task, batch):
                break  # it hangs or breaks on its own gold: more rows would only take more time
            await _judge(pool, trials, task, batch, second=False)
            if not quick:
                await _judge(pool, trials, task, batch, second=True)
            tried += 1
            if time.monotonic() > end:
                break
        level = str(pool.level)
    findings = [finding for trial in trials for finding in _findings(trial, tasks, deadline)]
    if 0 < tried < len(tasks):
        text = f"tried on {tried} of {len(tasks)} rows, as the time was up"
        findings.append(Finding(reward=specs[0].name, severity="note", text=text))
    if specs:
        findings.append(Finding(reward=specs[0].name, severity="note", text=level))
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _replies(
    task: Task, tasks: Sequence[Task], specs: Sequence[RewardSpec], *, length: int
) -> list[tuple[str, str]]:
    gold = [(f"gold {n}", form) for n, form in enumerate(probes.gold_forms(task))]
    labels = next((found for spec in specs if (found := probes.labels_of(tasks, spec))), [])
    lazy = probes.degenerate(task, labels)
    return [*gold, *probes.ordinary(task, length=length), *lazy]


async def _sound(
    pool: ScoringPool, trials: list[_Trial], task: Task, batch: Sequence[tuple[str, str]]
) -> bool:
    """Whether the first reply (the gold, where there is one) can be judged at all by every
    reward."""
    await _judge(pool, trials, task, batch[:1], second=False)
    verdicts = [trial.first[batch[0][0], task.id] for trial in trials]
    return all(v.status not in ("timeout", "crashed") and v.cause == "reply" for v in verdicts)


async def _judge(
    pool: ScoringPool,
    trials: list[_Trial],
    task: Task,
    batch: Sequence[tuple[str, str]],
    *,
    second: bool,
) -> None:
    rollouts: list[Rollout] = [recorded(task, reply) for _, reply in batch]
    table = await pool.judge(rollouts)
    for (kind, _), row in zip(batch, table, strict=True):
        for trial, verdict in zip(trials, row, strict=True):
            (trial.second if second else trial.first)[kind, task.id] = verdict


# ── findings ───────────────────────────────────────────────────────────────────────────────────


def _findings(trial: _Trial, tasks: Sequence[Task], deadline: float) -> list[Finding]:
    found = _failures(trial)
    if not any(verdict.score for verdict in trial.first.values()):
        return [replace(finding, severity="error") for finding in found]
    return [
        *found,
        *_unrepeatable(trial),
        *_gold_against_garbage(trial, tasks),
        *_hackable(trial, tasks),
        *_times(trial, deadline),
    ]


def _failures(trial: _Trial) -> list[Finding]:
    """One finding a kind of failure, with the first reply that shows it."""
    shown: dict[tuple[str, str], Finding] = {}
    for (kind, task), verdict in (trial.first | trial.second).items():
        if verdict.score is not None or (verdict.status, verdict.cause) in shown:
            continue
        fatal = verdict.status == "invalid_result" or verdict.cause != "reply"
        fatal = fatal or kind.startswith("gold")
        cure = {
            "row": "give every row that column, or take another reward",
            "judge": "see that what it asks is up and reachable from here",
            "job": "",
        }.get(verdict.cause, "return 0.0 with a reason for a reply that cannot be read")
        if verdict.status == "invalid_result":
            low, high = trial.spec.range
            cure = f"return a finite number from {low:g} to {high:g}, or set range in the job"
        shown[verdict.status, verdict.cause] = Finding(
            reward=trial.spec.name,
            severity="error" if fatal else "warning",
            text=f"{verdict.status} on the {kind.split()[0] if 'gold' in kind else kind} reply "
            f"of row {task}: {verdict.detail}",
            cure=cure,
        )
    return list(shown.values())


def _unrepeatable(trial: _Trial) -> list[Finding]:
    for (kind, task), verdict in trial.second.items():
        before = trial.first[kind, task]
        if before.score and verdict.score and before.score.value != verdict.score.value:
            pair = f"{before.score.value:.4g}, then {verdict.score.value:.4g}"
            text = f"not repeatable: {pair} for the same reply ({kind}, row {task})"
            cure = "seed it, or set temperature 0; noise in the reward is noise in the gradient"
            return [Finding(reward=trial.spec.name, severity="warning", text=text, cure=cure)]
    return []


def _gold_against_garbage(trial: _Trial, tasks: Sequence[Task]) -> list[Finding]:
    """Row by row the best form of the gold must be worth more than empty and garbage replies."""
    name, golds, losers = trial.spec.name, [], []
    for task in tasks:
        forms = [v for (k, t), v in trial.first.items() if t == task.id and k.startswith("gold")]
        values = [verdict.score.value for verdict in forms if verdict.score]
        if not values:
            continue
        golds.append(max(values))
        bad = [trial.first.get((kind, task.id)) for kind in ("empty", "garbage")]
        worst = max((v.score.value for v in bad if v and v.score), default=0.0)
        if worst >= golds[-1]:
            losers.append((task.id, golds[-1], worst))
    if not golds:
        text = "there is no gold answer in these rows to try it with"
        return [Finding(reward=name, severity="note", text=text)]
    if not losers:
        text = f"gold scores {statistics.fmean(golds):.2f} on average, above garbage on every row"
        return [Finding(reward=name, severity="note", text=text)]
    row, gold, garbage = losers[0]
    text = (
        f"gold does not score above garbage on {len(losers)} of {len(golds)} rows "
        f"(row {row}: gold {gold:.2f}, garbage {garbage:.2f})"
    )
    own = ":" in trial.spec.use or trial.spec.use.endswith(".json") or trial.spec.weight == 0
    cure = "score one right reply with `rlpost score` and look at its reason"
    return [Finding(reward=name, severity="warning" if own else "error", text=text, cure=cure)]


def _hackable(trial: _Trial, tasks: Sequence[Task]) -> list[Finding]:
    """The degenerate replies worth more than `HACKABLE`, each with the rows it works on. A row
    whose right answer is to call nothing is left out: there any plain text is right."""
    silent = {
        task.id
        for task in tasks
        if isinstance(task.answer, dict) and task.answer.get("calls") == []
    }
    best: dict[str, list[tuple[float, str]]] = {}
    for (kind, task_id), verdict in trial.first.items():
        if kind.startswith("gold") or kind == "very long" or task_id in silent:
            continue
        if verdict.score is not None and verdict.score.value > HACKABLE:
            best.setdefault(kind, []).append((verdict.score.value, task_id))
    findings = []
    for kind, hits in best.items():
        value, row = max(hits)
        text = f"{kind} scores up to {value:.2f} (on {len(hits)} rows, such as row {row})"
        cure = "make it worth less, or gate it with another reward: a policy will find it"
        findings.append(Finding(reward=trial.spec.name, severity="warning", text=text, cure=cure))
    return findings


def _times(trial: _Trial, deadline: float) -> list[Finding]:
    taken = sorted(v.seconds for v in [*trial.first.values(), *trial.second.values()] if v.score)
    p95 = taken[min(len(taken) - 1, round(0.95 * len(taken)))]
    text = f"95% of {len(taken)} calls took at most {p95 * 1000:.3g} ms"
    slow = p95 > deadline / 4
    return [
        Finding(
            reward=trial.spec.name,
            severity="warning" if slow else "note",
            text=text,
            cure="raise scoring.deadline, or make it faster" if slow else "",
        )
    ]
