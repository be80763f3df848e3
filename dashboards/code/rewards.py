"""The Rewards board: is the judge well, and what does it reward?"""

from panels import ORANGE, RED, Panel, Query, board, lines, number


def share(test: str) -> str:
    """Share of a run's judgements whose outcome passes the test, such as `="reply_error"`."""
    of = f"sum by (run_id) (rate(rlpost_reward_calls_total{{run, outcome{test}}}[rate]))"
    return of + " / sum by (run_id) (rate(rlpost_reward_calls_total{run}[rate]))"


TOP: list[Panel] = [
    number(
        "Judgements", "calls of rewards a second.",
        "0 while rollouts finish: the scoring pool hangs, see Restarts of scoring.",
        Query("sum by (run_id) (rate(rlpost_reward_calls_total{run}[rate]))"), unit="cps", width=6,
    ),
    number(
        "Without a score", "share of judgements that the judge itself failed (error, timeout,"
        " crash, invalid result).",
        "above 5% the run pauses: try the reward on its samples with `rlpost score`.",
        Query(share('!~"ok|reply_error"')),
        unit="percentunit", steps=[(0.01, ORANGE), (0.05, RED)], width=6,
    ),
    number(
        "Replies that break the judge", "share of judgements that failed twice on the same reply.",
        "above 5% the policy has found a way to crash its judge: mend the reward.",
        Query(share('="reply_error"')),
        unit="percentunit", steps=[(0.01, ORANGE), (0.05, RED)], width=6,
    ),
    number(
        "Seconds a judgement", "mean time in a reward.",
        "more than a rollout takes: add scoring processes or make the reward cheaper.",
        Query(
            "sum by (run_id) (rate(rlpost_reward_seconds_total{run}[rate]))"
            " / sum by (run_id) (rate(rlpost_reward_calls_total{run}[rate]))"
        ), unit="s", width=6,
    ),
]  # fmt: skip

JUDGE: list[Panel] = [
    lines(
        "Judgements by outcome", "calls a second, by reward and outcome.",
        "the outcome names the cure: timeout, a slow reward; crashed, memory or a native library;"
        " invalid_result, a NaN or a value out of range.",
        Query(
            "rate(rlpost_reward_calls_total{run}[rate])", "{{run_id}} {{reward}} {{outcome}}"
        ), unit="cps", low=0,
    ),
    lines(
        "Failures by reward", "share of a reward's judgements that left no score.",
        "one reward above 5%: only that one is sick. All at once: the scoring machine is.",
        Query(
            "sum by (run_id, reward) (rate("
            'rlpost_reward_calls_total{run, outcome!~"ok|reply_error"}[rate]))'
            " / sum by (run_id, reward) (rate(rlpost_reward_calls_total{run}[rate]))",
            "{{run_id}} {{reward}}",
        ), unit="percentunit", steps=[(0.05, RED)], low=0, high=1,
    ),
    lines(
        "Time by reward", "mean seconds a judgement, by reward.",
        "a climb is longer replies or a judge under load: see Reply length.",
        Query(
            "sum by (run_id, reward) (rate(rlpost_reward_seconds_total{run}[rate]))"
            " / sum by (run_id, reward) (rate(rlpost_reward_calls_total{run}[rate]))",
            "{{run_id}} {{reward}}",
        ), unit="s", low=0,
    ),
    lines(
        "Restarts of scoring", "scoring processes replaced a minute.",
        "steady restarts are time-outs or crashes that the reward repeats: find the reply.",
        Query("60 * rate(rlpost_scoring_restarts_total{run}[rate])"), unit="cpm", low=0, width=24,
    ),
]  # fmt: skip

PARTS: list[Panel] = [
    lines(
        "Parts", "mean of each part of the reward over an update's rollouts.",
        "format parts rise first; content parts that stay flat mean that format alone is learned.",
        Query('rlpost_reward_mean{run, split="train"}', "{{run_id}} {{part}}"), width=12,
    ),
    lines(
        "Parts on validation", "mean of each part in the last evaluation.",
        "a part that rises in training only is gamed or overfit.",
        Query('rlpost_reward_mean{run, split="validation"}', "{{run_id}} {{part}}"), width=12,
    ),
    lines(
        "Deviation of parts", "standard deviation of each part over the rollouts.",
        "near 0: the part teaches nothing any more; lower its weight or make it harder.",
        Query('rlpost_reward_std{run, split="train"}', "{{run_id}} {{part}}"), width=12, low=0,
    ),
    lines(
        "Groups without a gradient", "share of an update's groups that are all good or all bad.",
        "all good: harder rows. All bad: easier rows, SFT first, partial credit.",
        Query('rlpost_group_ratio{run, outcome!="mixed"}', "{{run_id}} {{outcome}}"),
        unit="percentunit", steps=[(0.8, ORANGE)], low=0, high=1, width=12,
    ),
]  # fmt: skip

REWARDS = board(
    "rlpost-rewards",
    "rlpost: Rewards",
    "Is the judge well, and what does it reward?",
    [("At a glance", TOP), ("The judge", JUDGE), ("What it rewards", PARTS)],
)
