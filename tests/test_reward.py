"""What a reward may return, and how the rewards of a job become one score."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.reward import RewardSpec, as_score, combine, kind, recorded
from rlpost.types import Score, Task

UNIT = st.floats(0.0, 1.0)


def spec(name, **options):
    return RewardSpec(use=name, name=name, **options)


def test_the_kind_of_a_reward_is_told_by_its_parameters():
    assert kind(lambda task, rollout: 0) == "single"
    assert kind(lambda task, rollouts: 0) == "group"
    assert kind(lambda completions, **columns: 0) == "trl"
    assert kind(lambda prompts, completions, **columns: 0) == "trl"


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1, None, "1", [1.0], 1j])
def test_what_is_no_finite_number_in_range_is_refused(value):
    with pytest.raises(ValueError, match="value"):
        as_score(value)


def test_a_part_that_is_not_finite_is_refused_by_name():
    with pytest.raises(ValueError, match="part total is nan"):
        as_score(Score(value=1.0, parts={"total": math.nan}))


def test_a_value_is_mapped_from_its_range():
    assert as_score(0, range=(-1.0, 1.0)).value == 0.5
    assert as_score(True).value == 1.0
    assert as_score(5.0, range=(0.0, 10.0)).value == 0.5


def test_weights_make_a_mean_and_parts_carry_the_rewards_name():
    parts = Score(value=1.0, parts={"date": 0.5}, reason="ok")
    score = combine([spec("a", weight=3.0), spec("b")], [parts, Score(value=0.0, reason="bad")])
    assert score.value == 0.75
    assert score.parts == {"a": 1.0, "a.date": 0.5, "b": 0.0}
    assert score.reason == "bad"  # of the reward that is not satisfied


def test_a_reward_of_weight_zero_is_shown_and_does_not_count():
    score = combine([spec("a"), spec("b", weight=0.0)], [Score(value=0.5), Score(value=1.0)])
    assert (score.value, score.parts["b"]) == (0.5, 1.0)


@pytest.mark.parametrize(("gate", "value"), [(1.0, 0.5), (0.999, 0.0), (0.0, 0.0)])
def test_nothing_counts_unless_the_gate_is_one(gate, value):
    specs = [spec("valid", gate=True, weight=5.0), spec("right")]
    assert combine(specs, [Score(value=gate), Score(value=0.5)]).value == value


def test_gates_alone_are_a_reward_of_all_or_nothing():
    gates = [spec("a", gate=True), spec("b", gate=True)]
    assert combine(gates, [Score(value=1.0), Score(value=1.0)]).value == 1.0
    assert combine(gates, [Score(value=1.0), Score(value=0.5)]).value == 0.0


@given(st.lists(st.tuples(UNIT, st.floats(0.0, 10.0), st.booleans()), min_size=1, max_size=5))
def test_a_combined_score_stays_in_range_and_grows_with_each_value(rewards):
    specs = [spec(str(n), weight=w, gate=g) for n, (_, w, g) in enumerate(rewards)]
    values = [Score(value=v) for v, _, _ in rewards]
    value = combine(specs, values).value
    assert 0.0 <= value <= 1.0 + 1e-12
    for n in range(len(values)):
        better = [*values[:n], Score(value=1.0), *values[n + 1 :]]
        assert combine(specs, better).value >= value - 1e-12


def test_a_recorded_reply_ends_the_conversation():
    task = Task(id="1", messages=[{"role": "user", "content": "hi"}])
    rollout = recorded(task, "hello")
    assert [m["content"] for m in rollout.messages] == ["hi", "hello"]
    assert rollout.score is None
