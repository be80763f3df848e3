import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.math import math

from rlpost.errors import JobError, RowError
from rlpost.reward import recorded
from rlpost.types import Task


def scored(answer, reply, *, precision=None, **meta):
    task = Task(id="7", messages=(), answer=answer, meta=meta)
    return math(task, recorded(task, reply), precision=precision)


def test_the_last_box_goes_before_the_hashes_and_these_before_the_last_number():
    assert scored("3", "\\boxed{2} then \\boxed{3} #### 4 and 5").value == 1.0
    assert scored("4", "3 #### 2 #### 4\n").value == 1.0
    assert scored("5", "2 and 4 make 5").value == 1.0
    assert scored("2", "\\boxed{2} then \\boxed{3}").value == 0.0
    assert scored("3", "3 #### 4").value == 0.0
    assert scored("4", "2 and 4 make 5").value == 0.0


def test_the_gold_is_what_follows_the_hashes():
    assert scored("16 - 3 = 13\n#### 1,313", "It is 1313.").value == 1.0
    assert scored(1313, "1,313").value == 1.0
    assert scored(0.5, ".50").value == 1.0


@pytest.mark.parametrize(
    ("answer", "reply", "parts", "reason"),
    [
        ("3", "3", {"extracted": 1.0, "correct": 1.0}, "ok"),
        ("3", "4", {"extracted": 1.0, "correct": 0.0}, "wrong"),
        ("3", "no idea", {"extracted": 0.0, "correct": 0.0}, "no_answer"),
        ("3", "", {"extracted": 0.0, "correct": 0.0}, "no_answer"),
        ("3", "<think>3", {"extracted": 0.0, "correct": 0.0}, "open_thinking"),
    ],
)
def test_parts_and_reason_say_what_happened(answer, reply, parts, reason):
    score = scored(answer, reply)
    assert (score.value, score.parts, score.reason) == (parts["correct"], parts, reason)


def test_a_number_inside_the_thinking_is_not_an_answer():
    assert scored("3", "<think>\\boxed{3}</think>It is 4.").value == 0.0
    assert scored("3", "<think>\\boxed{4}</think>It is 3.").value == 1.0


@pytest.mark.parametrize(
    ("answer", "reply", "value"),
    [
        ("\\frac{1}{2}", "0.5", 1.0),
        ("1/2", "\\boxed{\\frac12}", 1.0),
        ("9", "\\frac{10}{9}", 0.0),
        ("x^2+1", "1+x^2", 1.0),
        ("x^2+1", "x^2-1", 0.0),
        ("(1,3)", "(1,3)", 1.0),
        ("(1,3)", "(3,1)", 0.0),
        ("$x \\geq 5$", "so $x \\leq 5$", 0.0),
        ("20%", "20%", 1.0),
        ("2 1/2", "2.5", 1.0),
        ("2 1/2", "\\boxed{2\\frac{1}{2}}", 1.0),
        ("2.5", "2 1/2", 1.0),
        ("2 1/2", "1", 0.0),
        ("12:30", "12:30", 1.0),
        ("12:30", "12", 0.0),
        ("1,2,3", "\\boxed{1,2,3}", 1.0),
        ("1,2,3", "1.2", 0.0),
        ("18 dollars", "18", 1.0),
        ("18 dollars", "**18 dollars**", 1.0),
        ("18", "\\boxed{18 dollars}", 1.0),
        ("5 million", "5", 0.0),
        ("5", "2+3", 1.0),
        ("5", "\\boxed{5\\text{ dollars}}", 1.0),
        ("10455", "\\boxed{255} so far. The final answer is $10,455$. I hope it is correct.", 1.0),
    ],
)
def test_math_verify_decides_what_is_not_a_plain_number(answer, reply, value):
    assert scored(answer, reply).value == value


def test_gold_and_prediction_keep_their_order():
    assert scored("$x = 11$", "$11$").value == 1.0
    assert scored("$a + 3z = 0$", "$0$").value == 0.0


def test_precision_is_the_rows_then_the_arguments():
    assert scored("3.14", "3.14159").value == 0.0
    assert scored("3.14", "3.14159", precision=2).value == 1.0
    assert scored("3.14159", "3.14", precision=5).value == 0.0
    assert scored("3.14", "3.14159", **{"precision": 2}).value == 1.0
    task = Task(id="7", messages=(), answer="3.14", meta={"precision": 4})
    assert math(task, recorded(task, "3.14159"), precision=2).value == 0.0


@pytest.mark.parametrize("answer", [None, True, ["3"], {"a": 3}, "", "work ####"])
def test_a_row_without_an_answer_is_named(answer):
    with pytest.raises(RowError, match="row 7"):
        scored(answer, "3")


def test_a_bad_precision_is_named():
    with pytest.raises(JobError, match="precision = -1"):
        scored("3", "3", precision=-1)


@pytest.mark.parametrize(
    "reply",
    [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "\\boxed{9^{9^{9}}}",
        "$2^{2^{2^{2^{2^2}}}}$",
        "\\boxed{(10^{10})!}",
        "$9^{9999999}$",
        "$99999999!$",
        "\\boxed{3!!!}",
    ],
)
def test_a_number_that_nobody_could_compute_is_refused_at_once(reply):
    start = time.perf_counter()
    assert scored("3", reply).reason == "too_large"
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("unit", ["9", "$", "\\boxed{", "{", "1 ", "$\\frac{", "answer is "])
def test_a_reply_of_ten_megabytes_is_scored_in_seconds(unit):
    math_verify_is_loaded = scored("x", "$y$")
    start = time.perf_counter()
    assert scored("3", unit * (10_000_000 // len(unit))).value == 0.0
    assert math_verify_is_loaded.value == 0.0 and time.perf_counter() - start < 10


def test_model_text_is_never_executed(tmp_path):
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path('{trace}').touch()"
    for form in ("{}", "${}$", "\\boxed{{{}}}", "$\\text{{{}}}$", "$\\{{{}\\}}$", "1+({})"):
        assert scored("$x+1$", form.format(code)).value == 0.0
    assert not trace.exists()


@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["{}", "\\boxed{{{:,}}}", "#### {}", "so {}."])
)
def test_a_number_equals_itself_and_not_its_neighbours(number, form):
    assert scored(str(number), form.format(number)).value == 1.0
    assert scored(str(number + 1), form.format(number)).value == 0.0
    assert scored(f"{number - 1:,}", form.format(number)).value == 0.0


@given(st.text(max_size=30))
def test_any_text_gets_a_score(text):
    score = scored("123456.5", text)
    assert score.value in (0.0, 1.0) and score.reason.isidentifier()


def test_joy_is_no_factorial_and_a_factorial_of_one_costs_nothing():
    assert scored("$\\frac{x}{2}$", "We are done!! It is $\\frac{x}{2}$.").value == 1.0
    start = time.perf_counter()
    assert scored("12", "\\boxed{((((99!)!)!)!)!}").value == 0.0
    assert time.perf_counter() - start < 2.0
