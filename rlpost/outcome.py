"""What a run came to, in figures: read from the run directory alone, so of a paused run too.

"Before" is the first evaluation, "after" that of the update that was kept.
"""

import contextlib
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlpost.run_directory import JOB, RESOLVED, read_evaluation, read_events, read_metrics

SAMPLES = ("gained most", "in the middle", "gained least")

Pair = tuple[float | None, float | None]  # before, after


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One validation task with its greedy reply before and after."""

    why: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def values(self) -> Pair:
        return reply_of(self.before)["value"], reply_of(self.after)["value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run in figures. `overall` and `fields` hold (before, after); `fields` is {field: {kind:
    …}}, `judgements` {(reward, status): …}."""

    path: Path
    job: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    before: int | None = None  # update
    after: int | None = None
    kept: int | None = None
    overall: Mapping[str, Pair] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, Pair]] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    reasons: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    judgements: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    @property
    def evaluations(self) -> dict[int, Mapping[str, Any]]:
        return {line["update"]: line["eval"] for line in self.metrics if line.get("eval")}

    @property
    def name(self) -> str:
        return str(self.job.get("run", {}).get("name", self.path.name))

    @property
    def metric(self) -> str:
        return str(self.job.get("eval", {}).get("metric", "score"))


def read_outcome(run_dir: str | Path) -> Outcome:
    """The figures of a run, as far as it came."""
    path = Path(run_dir)
    plain = Outcome(
        path=path, job=_read_job(path), metrics=read_metrics(path), events=read_events(path)
    )
    evaluations = plain.evaluations
    if not evaluations:
        return plain
    before, kept = min(evaluations), _kept(plain)
    after = kept if kept != before else max(evaluations)  # nothing was better: show where it ended
    overall, fields = _compare(evaluations[before], evaluations[after])
    replies = read_evaluation(path, before), read_evaluation(path, after)
    return replace(
        plain,
        before=before,
        after=after,
        kept=kept,
        overall=overall,
        fields=fields,
        samples=_samples(*replies) if after != before else [],
        reasons=_reasons(*replies),
        judgements=_judgements(*replies),
    )


def _read_job(path: Path) -> Mapping[str, Any]:
    """The job as it ran; as it was given where a run did not come that far."""
    for name in (RESOLVED, JOB):
        with contextlib.suppress(OSError, ValueError):
            return tomllib.loads((path / name).read_text(encoding="utf-8"))
    return {}


def _kept(outcome: Outcome) -> int:
    """The update that the run kept: the last that it called better, else the best by its metric."""
    evaluations = outcome.evaluations
    better = [e["update"] for e in outcome.events if e["kind"] == "evaluated" and e.get("better")]
    if better and better[-1] in evaluations:
        return int(better[-1])
    values = {update: value_of(e, outcome.metric) for update, e in evaluations.items()}
    known = {update: value for update, value in values.items() if value == value}
    return max(known, key=lambda update: (known[update], -update), default=min(evaluations))


def value_of(evaluation: Mapping[str, Any], metric: str) -> float:
    """`score`, a metric or a part of an evaluation; NaN where it was not measured."""
    for source in (evaluation, evaluation.get("metrics") or {}, evaluation.get("parts") or {}):
        if isinstance(source.get(metric), int | float):
            return float(source[metric])
    return math.nan


def _compare(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[dict[str, Pair], dict[str, dict[str, Pair]]]:
    """(overall, fields): a part called `reward.kind.field` belongs to a field, the rest to the
    whole."""
    overall: dict[str, Pair] = {"score": (before.get("score"), after.get("score"))}
    fields: dict[str, dict[str, Pair]] = {}
    for group in ("metrics", "parts"):
        old, new = before.get(group) or {}, after.get(group) or {}
        rewards = {name.partition(".")[0] for name in (*old, *new)}
        for name in dict.fromkeys((*old, *new)):
            pair = (old.get(name), new.get(name))
            words = name.split(".", 2)
            if group == "parts" and len(words) == 3:
                label = words[2] if len(rewards) == 1 else f"{words[0]}: {words[2]}"
                fields.setdefault(label, {})[words[1]] = pair
            elif group == "parts" and len(words) == 2 and len(rewards) == 1:
                overall.setdefault(words[1], pair)
            elif not (group == "parts" and len(rewards) == 1):  # one reward's value is the score
                overall.setdefault(name, pair)
    return overall, fields


def _samples(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[Sample]:
    """Three tasks that were judged both times: the best, the middle and the worst by what they
    gained."""
    old = {record["task"]: record for record in before}
    pairs = [(old[record["task"]], record) for record in after if record["task"] in old]
    pairs = [pair for pair in pairs if all(reply_of(r)["value"] is not None for r in pair)]
    pairs.sort(key=lambda pair: reply_of(pair[0])["value"] - reply_of(pair[1])["value"])
    if not pairs:
        return []
    places = sorted({0, len(pairs) // 2, len(pairs) - 1})
    names = SAMPLES if len(places) == 3 else ("gained most", "gained least")
    return [
        Sample(why=why, before=pairs[place][0], after=pairs[place][1])
        for why, place in zip(names, places, strict=False)
    ]


def reply_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    reply: Mapping[str, Any] = record["replies"][0]
    return reply


def _reasons(*evaluations: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """{reason: (before, after)} of the replies that did not score 1, the commonest first."""
    counts = []
    for records in evaluations:
        replies = [reply for record in records for reply in record["replies"]]
        wrong = [reply for reply in replies if reply["value"] is None or reply["value"] < 1.0]
        counts.append(Counter(_why(reply) for reply in wrong))
    old, new = counts
    return {reason: (old[reason], new[reason]) for reason, _ in (old + new).most_common()}


def _judgements(
    *evaluations: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], tuple[int, int]]:
    """{(reward, status): (before, after)} of the validation replies, reward by reward."""
    old, new = (
        Counter(
            pair
            for record in records
            for reply in record["replies"]
            for pair in (reply.get("statuses") or {}).items()
        )
        for records in evaluations
    )
    return {pair: (old[pair], new[pair]) for pair in sorted(old | new)}


def _why(reply: Mapping[str, Any]) -> str:
    if reply["status"] != "ok":
        return f"{reply['status']} (judge)"
    return str(reply["reason"] or "no reason given")
