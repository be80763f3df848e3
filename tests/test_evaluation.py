"""Greedy runs over validation rows and their summary."""

import math
from dataclasses import replace

import pytest
from fakes import FakeRollout, rollout, task

from rlpost.evaluation import EVALUATION_GROUP, evaluate, summarise
from rlpost.types import Group, Score


class Worker(FakeRollout):
    def __init__(self, name):
        super().__init__()
        self.name, self.orders = name, []

    async def run(self, order):
        self.orders.append(order)
        one = rollout(order.task, float(order.task.id[1:]) / 10, version=order.version)
        return Group(id=order.group_id, task=order.task, rollouts=(one,))


async def test_every_row_is_answered_once_greedily_under_one_version():
    workers = [Worker("a"), Worker("b")]
    tasks = [task(f"t{n}") for n in range(5)]
    result = await evaluate(workers, tasks, version=4, max_reply_tokens=9)
    orders = [order for worker in workers for order in worker.orders]
    assert {(o.temperature, o.version, o.group_size, o.max_reply_tokens) for o in orders} == {
        (0.0, 4, 1, 9)
    }
    assert sorted(o.task.id for o in orders) == [t.id for t in tasks]
    assert min(o.group_id for o in orders) >= EVALUATION_GROUP  # no group of training
    assert len(workers[0].orders) == 3
    assert [r.task.id for r in result.rollouts] == [t.id for t in tasks]  # in the rows' order
    assert result.score == pytest.approx(0.2)
    assert (result.rows, result.unscored, result.version) == (5, 0, 4)


def test_means_are_over_the_scored_rows_and_the_others_are_counted():
    rollouts = [rollout(task("a"), 1.0), rollout(task("b"), 0.0), rollout(task("c"), None)]
    rollouts[1] = replace(rollouts[1], stop_reason="length")
    result = summarise(rollouts, version=2)
    assert (result.score, result.unscored, result.truncated, result.rows) == (0.5, 1, 1, 3)
    assert result.parts == {"reward": 0.5}


def test_a_part_that_some_rows_lack_is_averaged_over_those_that_have_it():
    rich = replace(rollout(task("a"), 1.0), score=Score(value=1.0, parts={"x": 0.5, "y": 1.0}))
    poor = replace(rollout(task("b"), 1.0), score=Score(value=1.0, parts={"x": 0.0}))
    assert summarise([rich, poor], version=0).parts == {"x": 0.25, "y": 1.0}


def test_where_nothing_has_a_score_the_evaluation_is_nan_and_not_zero():
    assert math.isnan(summarise([rollout(task(), None)], version=0).score)


def test_the_metrics_of_rewards_see_every_row():
    def measure(tasks, rollouts):
        return {"rows": float(len(tasks)), "replies": float(len(rollouts))}

    result = summarise([rollout(task(), 1.0), rollout(task(), None)], version=0, metrics=[measure])
    assert result.metrics == {"rows": 2.0, "replies": 2.0}


def test_a_metric_is_found_by_name_score_first_then_metrics_then_parts():
    result = summarise(
        [rollout(task(), 0.25)], version=0,
        metrics=[lambda tasks, rollouts: {"exact_f1": 0.7, "score": 9.0}],
    )  # fmt: skip
    assert [result.value(name) for name in ("score", "exact_f1", "reward")] == [0.25, 0.7, 0.25]
    with pytest.raises(KeyError):
        result.value("nothing")


def test_the_summary_is_plain_and_without_the_replies():
    told = summarise([rollout(task(), 1.0)], version=3).summary()
    assert set(told) == {"score", "metrics", "parts", "rows", "unscored", "truncated", "version"}
