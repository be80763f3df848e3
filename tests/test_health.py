"""What pauses a run, and what does not."""

from dataclasses import replace

import pytest
from fakes import group, task

from rlpost.errors import NonFiniteError, RunError, ScoringError
from rlpost.health import FEWEST, WINDOW, Health, critical
from rlpost.types import Score, StepReport


def health(limit=0.05, non_finite=3):
    return Health(unscored_limit=limit, non_finite_limit=non_finite)


def judged(bad, good, *, status="timeout", error="reward tone: timeout: 10 s", reason=""):
    """A group of `bad` rollouts whose judgement failed and `good` ones."""
    whole = group(0, [1.0] * (bad + good), of=task())
    score = Score(value=0.0, reason=reason) if status == "reply_error" else None
    info = {"error": error} if error else {}
    broken = [replace(r, status=status, score=score, info=info) for r in whole.rollouts[:bad]]
    return replace(whole, rollouts=(*broken, *whole.rollouts[bad:]))


def report(skipped=""):
    return StepReport(
        policy_version=1, loss=0.0, grad_norm=0.0, entropy=0.0, clip_fraction=0.0, logprob_gap=0.0,
        kl=0.0, tokens=1, seconds=0.0, skipped=skipped,
    )  # fmt: skip


def test_above_the_limit_the_error_names_share_limit_and_the_commonest_cause():
    watch = health()
    with pytest.raises(ScoringError) as caught:
        watch.after_group(judged(6, 94))
    assert str(caught.value) == (
        "6% of the last 100 rollouts got no score (limit 5%);"
        " most often: reward tone: timeout: 10 s"
    )


def test_at_the_limit_the_run_goes_on():
    health().after_group(judged(5, 95))


def test_a_few_rollouts_say_little():
    watch = health()
    watch.after_group(judged(FEWEST - 1, 0))
    with pytest.raises(ScoringError):
        watch.after_group(judged(1, 0))


def test_old_rollouts_leave_the_window():
    watch = health()
    for _ in range(4):
        watch.after_group(judged(3, 61))  # 4.7%
    for _ in range(WINDOW // 64):
        watch.after_group(judged(0, 64))
    watch.after_group(judged(12, 52))  # of 256
    with pytest.raises(ScoringError, match="5%"):
        watch.after_group(judged(2, 62))


def test_replies_that_break_their_judge_are_counted_apart():
    watch = health()
    watch.after_group(judged(3, 61, status="reply_error", error="", reason="tone:crashed"))
    watch.after_group(judged(3, 61))
    with pytest.raises(ScoringError, match=r"broke their judge \(limit 5%\).*tone:crashed"):
        watch.after_group(judged(20, 44, status="reply_error", error="", reason="tone:crashed"))


def test_non_finite_updates_in_a_row_pause_and_say_what_to_do():
    watch = health(non_finite=2)
    watch.after_update(report("the loss is not finite"))
    with pytest.raises(NonFiniteError, match=r"2 updates in a row.*lower learner.learning_rate"):
        watch.after_update(report("the gradient is not finite"))


@pytest.mark.parametrize("between", ["", "no_signal", "the gradient is zero"])
def test_an_update_that_was_finite_starts_the_count_anew(between):
    watch = health(non_finite=2)
    for _ in range(3):
        watch.after_update(report("the loss is not finite"))
        watch.after_update(report(between))


def test_after_a_pause_was_only_a_warning_the_next_window_starts_afresh():
    watch = health()
    with pytest.raises(ScoringError):
        watch.after_group(judged(64, 0))
    watch.after_group(judged(1, 62))


def test_the_first_run_error_is_the_one_that_counts():
    first = RunError("first")
    assert critical([ValueError("x"), first, RunError("second")]) is first
    assert critical([ValueError("x")]) is None
