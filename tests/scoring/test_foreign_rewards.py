"""TRL reward functions run as they are."""

import textwrap

import pytest

from rlpost.errors import PluginError, RowError
from rlpost.reward import RewardSpec, recorded
from rlpost.scoring import foreign
from rlpost.scoring.pool import ScoringPool
from rlpost.types import Task

TASK = Task(
    id="7", messages=[{"role": "user", "content": "2+2?"}], answer="4", meta={"hint": "even"}
)


def judge(function, reply="4", **arguments):
    return foreign.adapt(function, "f")(TASK, recorded(TASK, reply), **arguments)


def test_columns_come_as_lists_of_one():
    def f(prompts, completions, answer, hint, **kwargs):
        assert prompts == [TASK.messages] and hint == ["even"] and kwargs["id"] == ["7"]
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    assert judge(f) == 1.0
    assert judge(f, "5") == 0.0


def test_a_function_for_messages_gets_messages():
    def f(completions, **kwargs):
        return [float(c[0]["content"] == "4") for c in completions]

    assert judge(f) == 1.0
    assert judge(f, "") == 0.0


def test_a_function_for_text_is_never_given_a_list():
    def f(completions, **kwargs):
        return [len(c) / 10 for c in completions]

    assert judge(f, "abcd") == 0.4


def test_the_job_may_say_which_form_it_is():
    def f(completions, **kwargs):
        return [len(c) / 10 for c in completions]

    assert judge(f, "abcd", completions_as="messages") == 0.1
    with pytest.raises(PluginError, match="completions_as is 'txt'"):
        judge(f, completions_as="txt")


def test_none_adds_nothing_and_constants_are_passed_on():
    assert judge(lambda completions, **kwargs: [None]) == 0.0
    assert judge(lambda completions, scale: [scale], scale=0.25) == 0.25


def test_trl_harness_arguments_do_no_harm():
    def f(completions, trainer_state, log_metric, **kwargs):
        log_metric("x", 1.0)
        return [1.0 if trainer_state is None else 0.0]

    assert judge(f) == 1.0


def test_what_a_row_lacks_is_the_rows_fault():
    with pytest.raises(RowError, match=r"no column 'hints'; did you mean 'hint'"):
        judge(lambda completions, hints: [1.0])


def test_an_unknown_argument_is_the_jobs_fault():
    with pytest.raises(PluginError, match="no argument 'scal'"):
        judge(lambda completions, scale=1.0: [scale], scal=2)


def test_a_function_that_wants_tokens_is_refused():
    with pytest.raises(PluginError, match="rewards see text, not tokens"):
        foreign.adapt(lambda completions, completion_ids: [1.0], "f")


def test_the_error_that_is_shown_is_not_the_one_about_the_form():
    def wants_text(completions, **kwargs):
        return [{"a": 1}[c] for c in completions]

    with pytest.raises(KeyError, match="4"):
        judge(wants_text)

    def wants_messages(completions, **kwargs):
        return [{"a": 1}[c[0]["content"]] for c in completions]

    with pytest.raises(KeyError, match="4"):
        judge(wants_messages)


async def test_a_trl_function_in_the_pool_costs_only_the_reply_that_breaks_it(tmp_path):
    (tmp_path / "from_trl.py").write_text(
        textwrap.dedent("""
        def exact(completions, answer, **kwargs):
            return [1 / (c != "break") * (c == a) for c, a in zip(completions, answer)]
        async def later(prompts, completions, **kwargs):
            return [float(len(c) < 3) for c in completions]
        """)
    )
    specs = [
        RewardSpec(use=f"from_trl:{name}", name=name, base_dir=str(tmp_path))
        for name in ("exact", "later")
    ]
    async with ScoringPool(specs) as pool:
        scored = await pool.score([recorded(TASK, text) for text in ("4", "break", "x")])
    assert [r.status for r in scored] == ["ok", "reply_error", "ok"]
    assert [r.score.value for r in scored] == [1.0, 0.0, 0.5]


async def test_trls_own_rewards_run(tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "trl_own.py").write_text("from trl.rewards import think_format_reward as thinks\n")
    spec = RewardSpec(use="trl_own:thinks", name="thinks", base_dir=str(tmp_path))
    replies = ["<think>\nhm\n</think>\n4", "4"]
    async with ScoringPool([spec]) as pool:
        scored = await pool.score([recorded(TASK, text) for text in replies])
    assert [r.status for r in scored] == ["ok", "ok"]
    assert [r.score.value for r in scored] == [1.0, 0.0]
