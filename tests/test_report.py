import json
import re

import pytest

from rlpost.outcome import read_outcome
from rlpost.report import headline, summary_table, write_report
from rlpost.run_directory import RunDirectory
from rlpost.types import Rollout, Score, Task

JOB = """[run]
name = "receipts"
[model]
path = "./model"
license = "Apache-2.0"
[eval]
metric = "exact_f1"
"""


def rollout(number, value, reply, reason="ok", status="ok"):
    task = Task(
        id=f"t{number}",
        messages=[{"role": "user", "content": f"RECEIPT {number} ``` | [bold]"}],
        answer={"total": "9.00"},
    )
    score = None if value is None else Score(value=value, reason=reason)
    return Rollout(task=task, reply=reply, score=score, status=status)


def evaluation(score, exact, total):
    return {
        "score": score,
        "metrics": {"exact_f1": exact},
        "parts": {
            "extraction": score,
            "extraction.parses": 1.0,
            "extraction.exact.total": total,
            "extraction.typed.total": total + 0.1,
        },
        "rows": 3,
    }


@pytest.fixture
def run(tmp_path):
    """Four updates, evaluated at 0, 2 and 4, of which 2 was the best."""
    directory = RunDirectory(tmp_path / "run")
    directory.write_job(JOB)
    directory.append_event("started", update=0, learner={"revision": "abc"})
    before = [
        rollout(0, 0.0, "```no```", "not_json"),
        rollout(1, 0.5, "{}", "wrong_values"),
        rollout(2, None, "", status="timeout"),
        rollout(3, 1.0, '{"total": "9.00"}'),
    ]
    after = [rollout(n, 1.0, '{"total": "9.00"}') for n in range(3)]
    after.append(rollout(3, 0.5, "{}", "wrong_values"))
    for update in range(5):
        if update:
            directory.append_metrics(
                update, reward=0.2 + update / 10, dropped={"late": 1}, skipped="",
                seconds={"update": 2.0, "wait": 0.5},
            )  # fmt: skip
        if update % 2 == 0:
            exact = {0: 0.37, 2: 0.8, 4: 0.7}[update]
            result = evaluation(exact, exact, exact)
            directory.append_evaluation(update, result, after if update == 2 else before)
            directory.append_event("evaluated", update=update, better=update < 4)
    directory.append_event("early_stop", update=4, patience=1)
    return directory.path


def test_before_is_the_start_and_after_the_update_that_was_kept(run):
    outcome = read_outcome(run)
    assert (outcome.before, outcome.after, outcome.kept) == (0, 2, 2)
    assert outcome.overall["exact_f1"] == (0.37, 0.8)
    assert outcome.overall["parses"] == (1.0, 1.0)
    assert outcome.fields["total"] == {
        "exact": (0.37, 0.8),
        "typed": (pytest.approx(0.47), pytest.approx(0.9)),
    }
    assert "extraction" not in outcome.overall  # one reward's value is the score


def test_without_events_the_best_by_the_jobs_metric_is_what_was_kept(run):
    (run / "events.jsonl").unlink()
    assert read_outcome(run).kept == 2


def test_samples_are_the_best_middle_and_worst_gain_among_tasks_judged_twice(run):
    samples = read_outcome(run).samples
    assert [(s.after["task"], s.values) for s in samples] == [
        ("t0", (0.0, 1.0)),
        ("t1", (0.5, 1.0)),
        ("t3", (1.0, 0.5)),
    ]


def test_reasons_count_the_replies_below_one_before_and_after(run):
    assert read_outcome(run).reasons == {
        "wrong_values": (1, 1),
        "not_json": (1, 0),
        "timeout (judge)": (1, 0),
    }


def test_the_report_has_curve_tables_samples_times_job_and_licence(run):
    path = write_report(run)
    text = path.read_text()
    assert path == run / "report.md"
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert text.index("report.png") < text.index("## Before and after")
    assert (
        "exact_f1 on 3 validation rows: 0.370 before, 0.800 after 2 of 4 updates (+0.430)" in text
    )
    assert "| total | 0.370 → 0.800 | 0.470 → 0.900 |" in text
    assert "### t0 (gained most: 0.000 → 1.000)" in text
    assert "| not_json | 1 | 0 |" in text
    assert "Groups dropped while training: 1 late." in text
    assert "| update | 2.00 s | 8.0 s |" in text
    assert "early_stop (patience 1)" in text
    assert "Licence: Apache-2.0" in text and "revision `abc`" in text
    assert 'license = "Apache-2.0"\n' in text


def test_the_report_names_what_was_changed_on_the_command_line(run):
    (run / "source.json").write_text('{"overrides": ["eval.every=2"]}')
    assert "Changed by --set: `eval.every=2`." in write_report(run).read_text()


def test_the_report_follows_the_resolved_job_and_names_its_file(run):
    RunDirectory(run).write_resolved(
        '[eval]\nmetric = "score"\n[model]\npath = "m"\nlicense = "MIT"\nrevision = "def"\n'
    )
    text = write_report(run).read_text()
    assert "score on 3 validation rows" in text
    assert "revision `def`. Licence: MIT" in text
    assert "Every value, defaults included: [resolved.toml](resolved.toml)." in text


def test_no_reply_can_break_out_of_its_block(run):
    text = write_report(run).read_text()
    assert "````\n```no```\n````" in text
    fences = re.findall(r"^`{3,}(?:toml)?$", text, re.M)
    assert len(fences) % 2 == 0


def test_the_terminal_shows_fields_and_three_samples_with_both_replies(run):
    text = summary_table(run)
    assert re.search(r"total\s+0\.370 → 0\.800\s+0\.470 → 0\.900", text)
    assert re.search(r"exact_f1\s+0\.370\s+0\.800\s+\+0\.430", text)
    assert "t0 (gained most)" in text and "t3 (gained least)" in text
    assert re.search(r"before\s+0\.000\s+```no```", text)
    assert re.search(r'after\s+1\.000\s+\{"total": "9.00"\}', text)
    assert "\x1b[" not in text
    assert "\x1b[" in summary_table(run, color=True)


def test_replies_are_shown_as_they_are_and_not_as_markup(run):
    directory = RunDirectory(run)
    directory.append_evaluation(
        2, evaluation(0.8, 0.8, 0.8), [rollout(1, 1.0, "[red]x[/red] [/nothing]")]
    )
    assert "[red]x[/red] [/nothing]" in summary_table(run)


def test_a_run_that_gained_nothing_says_so(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.append_evaluation(0, evaluation(0.5, 0.5, 0.5), [rollout(0, 0.5, "a")])
    directory.append_metrics(1, reward=0.5)
    directory.append_evaluation(1, evaluation(0.4, 0.4, 0.4), [rollout(0, 0.4, "b")])
    outcome = read_outcome(tmp_path)
    assert (outcome.kept, outcome.after) == (0, 1)
    assert "the start is what was kept" in headline(outcome)
    assert "0.500 before, 0.400 after 1 of 1 updates (-0.100)" in headline(outcome)


def test_a_run_that_ended_early_still_has_a_report(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    assert "no evaluation was made" in write_report(tmp_path / "run").read_text()
    directory.append_event("paused", update=0, reason="the engine broke")
    directory.append_evaluation(0, evaluation(0.5, 0.5, 0.5), [rollout(0, 0.5, "a")])
    text = write_report(tmp_path / "run").read_text()
    assert "nothing was evaluated since" in text
    assert "paused (reason the engine broke)" in text
    assert "nothing was evaluated since" in summary_table(tmp_path / "run").replace("\n", " ")


def test_what_a_resume_left_is_not_in_the_report(run):
    RunDirectory(run).supersede_after(1)
    assert read_outcome(run).evaluations.keys() == {0}


def test_a_score_that_is_null_is_shown_as_missing(tmp_path):
    directory = RunDirectory(tmp_path)
    nothing = {"score": float("nan"), "metrics": {}, "parts": {}, "rows": 1}
    directory.append_evaluation(0, nothing, [rollout(0, None, "", status="error")])
    directory.append_evaluation(1, nothing, [rollout(0, None, "", status="error")])
    write_report(tmp_path)
    assert re.search(r"score\s+-\s+-", summary_table(tmp_path))
    assert (
        json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["eval"]["score"]
        is None
    )
