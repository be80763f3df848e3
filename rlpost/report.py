"""report.md with its picture, and the table that ends `rlpost run`.

Both are made from the run directory alone, so they can be made again at any time.
"""

import contextlib
import io
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rlpost.outcome import Outcome, Pair, Sample, read_outcome, reply_of, value_of
from rlpost.run_directory import JOB, REPORT, RESOLVED

PICTURE = "report.png"
SOURCE = "source.json"  # the job as it was given, with what --set changed
NOTEWORTHY = ("paused", "early_stop", "resumed", "proof_failed", "stopping", "dropped", "finished")
SHOWN = 20  # events
SAMPLE_CHARACTERS = 1200  # of a prompt or a reply in report.md
TERMINAL_CHARACTERS = 300  # of a reply in the terminal


# ── report.md ──────────────────────────────────────────────────────────────────────────────────


def write_report(run_dir: str | Path) -> Path:
    """Writes report.md and report.png into the run directory; returns the former's path."""
    outcome = read_outcome(run_dir)
    sections = [f"# {outcome.name}", headline(outcome)]
    if _draw(outcome):
        sections.append(f"![Held-out score and training reward by update]({PICTURE})")
    sections += [
        _section("Before and after", [_overall_table(outcome), _field_table(outcome)]),
        _section("Three tasks of the validation rows", map(_sample_text, outcome.samples)),
        _section("What was still wrong", [_reason_table(outcome), _judgement_table(outcome)]),
        _section("Time", [_time_table(outcome)]),
        _section("Events", [_event_list(outcome)]),
        _section("Model", [_model_text(outcome)]),
        _section("The job", [_job_text(outcome)]),
    ]
    path = outcome.path / REPORT
    path.write_text("\n\n".join(filter(None, sections)) + "\n", "utf-8", "backslashreplace")
    return path


def headline(outcome: Outcome) -> str:
    """What the run came to, in one or two sentences."""
    done = max((line["update"] for line in outcome.metrics), default=0)
    if outcome.before is None:
        return f"{done} updates were done; no evaluation was made."
    metric = outcome.metric if outcome.metric in outcome.overall else "score"
    before, after = outcome.overall[metric]
    rows = outcome.evaluations[outcome.before].get("rows", "?")
    text = f"{metric} on {rows} validation rows: {_number(before)}"
    if outcome.after == outcome.before:
        return f"{text} at the start; {done} updates were done and nothing was evaluated since."
    change = _change(before, after)
    text += f" before, {_number(after)} after {outcome.after} of {done} updates ({change})."
    if outcome.kept == outcome.before:
        return f"{text} No evaluation was better than the start: the start is what was kept."
    return (
        f"{text} These rows were never trained on, but the update to keep was chosen on them,"
        " which flatters it a little."
    )


def _section(title: str, parts: Iterable[str]) -> str:
    texts = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *texts]) if texts else ""


def _overall_table(outcome: Outcome) -> str:
    rows = [
        [name, _number(old), _number(new), _change(old, new)]
        for name, (old, new) in outcome.overall.items()
    ]
    return _table(["", "before", "after", "change"], rows)


def _field_table(outcome: Outcome) -> str:
    kinds = _kinds(outcome)
    rows = [
        [name, *(_arrow(found.get(kind)) for kind in kinds)]
        for name, found in outcome.fields.items()
    ]
    return _table(["field", *kinds], rows)


def _kinds(outcome: Outcome) -> list[str]:
    return list(dict.fromkeys(kind for found in outcome.fields.values() for kind in found))


def _sample_text(sample: Sample) -> str:
    before, after = reply_of(sample.before), reply_of(sample.after)
    prompt = "\n".join(_content(message) for message in sample.after["messages"])
    parts = [
        f"### {sample.after['task']} ({sample.why}: {_arrow(sample.values)})",
        _fenced(_cut(prompt, SAMPLE_CHARACTERS)),
        f"Gold: {_code(_compact(sample.after['answer']))}",
        f"Before ({_number(before['value'])}, {before['reason'] or before['status']}):",
        _fenced(_cut(before["reply"], SAMPLE_CHARACTERS)),
        f"After ({_number(after['value'])}, {after['reason'] or after['status']}):",
        _fenced(_cut(after["reply"], SAMPLE_CHARACTERS)),
    ]
    return "\n\n".join(parts)


def _reason_table(outcome: Outcome) -> str:
    rows = [[reason, str(old), str(new)] for reason, (old, new) in outcome.reasons.items()]
    text = _table(["validation replies below 1, by reason", "before", "after"], rows)
    last = outcome.metrics[-1] if outcome.metrics else {}
    dropped = ", ".join(f"{n} {why}" for why, n in (last.get("dropped") or {}).items())
    skipped = Counter(line["skipped"] for line in outcome.metrics if line.get("skipped"))
    notes = [f"Groups dropped while training: {dropped}."] if dropped else []
    if skipped:
        listed = ", ".join(f"{n} {why}" for why, n in skipped.items())
        notes.append(f"Updates that moved no weight: {listed}.")
    return "\n\n".join(filter(None, [text, *notes]))


def _judgement_table(outcome: Outcome) -> str:
    """Every reward with the ways its judgements ended, as a failed judge is not a bad reply."""
    rows = [
        [reward, status, str(old), str(new)]
        for (reward, status), (old, new) in outcome.judgements.items()
    ]
    return _table(["reward", "judgement", "before", "after"], rows)


def _time_table(outcome: Outcome) -> str:
    timed = [line["seconds"] for line in outcome.metrics if isinstance(line.get("seconds"), dict)]
    rows = []
    for phase in dict.fromkeys(name for seconds in timed for name in seconds):
        values = [s[phase] for s in timed if isinstance(s.get(phase), int | float)]
        if values:
            rows.append([phase, f"{statistics.median(values):.2f} s", f"{sum(values):.1f} s"])
    wall = _wall_seconds(outcome)
    if wall is not None:
        rows.append(["from the first event to the last", "", f"{wall:.1f} s"])
    return _table(["", "median of an update", "in all"], rows)


def _wall_seconds(outcome: Outcome) -> float | None:
    times = [datetime.fromisoformat(event["time"]) for event in outcome.events]
    return (max(times) - min(times)).total_seconds() if times else None


def _event_list(outcome: Outcome) -> str:
    told = [event for event in outcome.events if event["kind"] in NOTEWORTHY]
    lines = []
    for event in told[-SHOWN:]:
        rest = {k: v for k, v in event.items() if k not in ("time", "sequence", "update", "kind")}
        detail = ", ".join(f"{name} {_compact(value)}" for name, value in rest.items())
        line = f"- {event['time']} update {event['update']}: {event['kind']}"
        lines.append(f"{line} ({detail})" if detail else line)
    return "\n".join(lines)


def _model_text(outcome: Outcome) -> str:
    model = outcome.job.get("model", {})
    if not model:
        return ""
    license = model.get("license") or _found_in_events(outcome, "license")
    revision = model.get("revision") or _found_in_events(outcome, "revision")
    text = f"Start: {_code(str(model.get('path')))}"
    text += f", revision {_code(str(revision))}" if revision else ""
    unknown = "not stated by the model; look it up before you pass it on"
    return f"{text}. Licence: {license or unknown}."


def _found_in_events(outcome: Outcome, name: str) -> Any:
    for event in outcome.events:
        for place in (event, event.get("learner")):
            if isinstance(place, Mapping) and place.get(name):
                return place[name]
    return None


def _job_text(outcome: Outcome) -> str:
    parts = []
    with contextlib.suppress(OSError):
        parts.append(_fenced((outcome.path / JOB).read_text(encoding="utf-8").strip(), "toml"))
    with contextlib.suppress(OSError, ValueError):  # only `rlpost run` writes it
        kept = json.loads((outcome.path / SOURCE).read_text(encoding="utf-8"))
        if kept.get("overrides"):
            parts.append(f"Changed by --set: {', '.join(map(_code, kept['overrides']))}.")
    if (outcome.path / RESOLVED).is_file():
        parts.append(f"Every value, defaults included: [{RESOLVED}]({RESOLVED}).")
    return "\n\n".join(parts)


# ── the picture ────────────────────────────────────────────────────────────────────────────────


def _draw(outcome: Outcome) -> bool:
    """Held-out curve above, training reward below; False where there is nothing to draw."""
    rewards = [(m["update"], m["reward"]) for m in outcome.metrics if m.get("reward") is not None]
    evaluations = outcome.evaluations
    if not rewards and not evaluations:
        return False
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(8, 6), layout="constrained")
    held, trained = figure.subplots(2, 1, sharex=True)
    for metric in dict.fromkeys((outcome.metric, "score")):
        points = [(u, value_of(e, metric)) for u, e in evaluations.items()]
        if points:
            held.plot(*zip(*points, strict=True), marker="o", label=metric)
    if outcome.kept is not None:
        held.axvline(
            outcome.kept, color="grey", linestyle=":", label=f"kept: update {outcome.kept}"
        )
        held.legend()
    held.set_title(f"{outcome.name}: validation rows, never trained on")
    held.set_ylabel("score")
    trained.set_title("training reward, mean of an update")
    if rewards:
        updates, values = zip(*rewards, strict=True)
        trained.plot(updates, values, alpha=0.35)
        trained.plot(updates, _smooth(values), label="mean of the last 5")
        trained.legend()
    trained.set_xlabel("update")
    trained.set_ylabel("reward")
    for axes in (held, trained):
        axes.grid(alpha=0.3)
    figure.savefig(outcome.path / PICTURE, dpi=120)
    return True


def _smooth(values: Sequence[float], window: int = 5) -> list[float]:
    return [statistics.fmean(values[max(0, n - window + 1) : n + 1]) for n in range(len(values))]


# ── the terminal ───────────────────────────────────────────────────────────────────────────────


def summary_table(run_dir: str | Path, *, width: int = 100, color: bool = False) -> str:
    """What the terminal shows at the end: field by field, before and after, and three samples."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    outcome = read_outcome(run_dir)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=color, highlight=False)
    console.print(Text(headline(outcome)))
    overall = Table("", "before", "after", "change", box=box.SIMPLE_HEAD)
    for name, (old, new) in outcome.overall.items():
        overall.add_row(Text(name), _number(old), _number(new), _change(old, new))
    fields = Table("field", *_kinds(outcome), box=box.SIMPLE_HEAD)
    for name, found in outcome.fields.items():
        fields.add_row(Text(name), *(_arrow(found.get(kind)) for kind in _kinds(outcome)))
    for table in (overall, fields):
        if table.row_count:
            console.print(table)
    for sample in outcome.samples:
        told = Table.grid(padding=(0, 2))
        told.add_row("gold", "", Text(_cut(_compact(sample.after["answer"]), TERMINAL_CHARACTERS)))
        for word, record in (("before", sample.before), ("after", sample.after)):
            reply = reply_of(record)
            shown = " ".join(_cut(reply["reply"], TERMINAL_CHARACTERS).split())
            told.add_row(word, _number(reply["value"]), Text(shown or "(empty)"))
        console.print(Text(f"{sample.after['task']} ({sample.why})", style="bold"))
        console.print(told)
        console.print()
    return out.getvalue().rstrip()


# ── texts ──────────────────────────────────────────────────────────────────────────────────────


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _change(old: float | None, new: float | None) -> str:
    return "" if old is None or new is None else f"{new - old:+.3f}"


def _arrow(pair: Pair | None) -> str:
    return "" if pair is None else f"{_number(pair[0])} → {_number(pair[1])}"


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} … ({len(text)} characters)"


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else _compact(content)


def _fenced(text: str, language: str = "") -> str:
    """A code block that no run of backticks in the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * (longest + 1)
    flat = " ".join(text.split())
    return f"{ticks} {flat} {ticks}" if longest else f"{ticks}{flat}{ticks}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
