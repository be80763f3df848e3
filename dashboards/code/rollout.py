"""The Rollout & engines board: who waits for whom, and do the engines serve what they claim?"""

from panels import ORANGE, RED, Panel, Query, board, heat, lines, number, quantiles

TOP: list[Panel] = [
    number(
        "Sampled", "completion tokens a second over all rollout workers.",
        "compare with the roofline panel before adding workers.",
        Query('sum by (run_id) (rate(rlpost_tokens_total{run, kind="completion"}[rate]))'),
        unit="cps",
    ),
    number(
        "Rollouts", "finished attempts a second.",
        "at 0 while the phase is training: open In flight, then the log of the workers.",
        Query("sum by (run_id) (rate(rlpost_rollouts_total{run}[rate]))"), unit="cps",
    ),
    number(
        "Truncated", "share of rollouts that ended at the reply limit.",
        "above 20% raise rollout.max_reply_tokens or look for run-on replies in the samples.",
        Query(
            "sum by (run_id) (rate(rlpost_truncated_rollouts_total{run}[rate]))"
            " / sum by (run_id) (rate(rlpost_rollouts_total{run}[rate]))"
        ), unit="percentunit", steps=[(0.2, ORANGE), (0.5, RED)],
    ),
    number(
        "Staleness", "largest staleness of the last update, in updates.",
        "it can never pass the bound; if it does, stop the run and report it.",
        Query("rlpost_staleness_updates{run}"),
    ),
    number(
        "Failed proofs", "times an engine did not prove that it serves its version.",
        "one may be a slow engine; three of one version stop the run. See the runbook, proof.",
        Query("rlpost_publish_failures_total{run}"), steps=[(1, ORANGE), (3, RED)],
    ),
    number(
        "Actors restarted", "restarts that nobody asked for since the run began.",
        "find the first one in events.jsonl: memory and GPU faults are told there.",
        Query('sum by (run_id) (rlpost_actor_restarts_total{run, reason!="planned"})'),
        steps=[(1, ORANGE), (5, RED)],
    ),
]  # fmt: skip

FLOW: list[Panel] = [
    lines(
        "Tokens", "prompt and completion tokens a second through the engines.",
        "completion falling while groups wait is good; falling while none wait is a sick engine.",
        Query(
            "sum by (run_id, kind) (rate(rlpost_tokens_total{run}[rate]))", "{{run_id}} {{kind}}"
        ), unit="cps", low=0,
    ),
    lines(
        "Rollouts by judgement", "rollouts a second, by how their judgement ended.",
        "anything but ok above 5% pauses the run: see the Rewards board for which reward.",
        Query("rate(rlpost_rollouts_total{run}[rate])", "{{run_id}} {{status}}"),
        unit="cps", low=0,
    ),
    lines(
        "Groups on the way", "groups being sampled or judged, and finished ones that wait.",
        "in flight at 0: feeding stopped. Many waiting: the learner is the slow side.",
        Query("rlpost_groups_in_flight{run}", "{{run_id}} in flight"),
        Query("rlpost_buffer_groups{run}", "{{run_id}} waiting"), low=0,
    ),
    lines(
        "Staleness in updates", "largest of an update, largest so far, and the bound of the job.",
        "above the bound is a defect: stop, keep the run directory. Always 0 with a bound of 1:"
        " the engines wait for the learner.",
        Query("rlpost_staleness_updates{run}", "{{run_id}} last"),
        Query("rlpost_staleness_max_updates{run}", "{{run_id}} largest"),
        Query("rlpost_staleness_bound_updates{run}", "{{run_id}} bound"), low=0,
    ),
    lines(
        "Groups trained", "groups a second that an update used, by outcome.",
        "only mixed ones teach: raise the group size when they are under 40%.",
        Query("rate(rlpost_groups_total{run}[rate])", "{{run_id}} {{outcome}}"),
        unit="cps", low=0,
    ),
    lines(
        "Groups dropped", "groups a second that were not trained, by reason.",
        "late: raise rollout.drop_after or lower the reply limit. unscored: see the Rewards board.",
        Query("rate(rlpost_dropped_groups_total{run}[rate])", "{{run_id}} {{reason}}"),
        unit="cps", low=0,
    ),
    lines(
        "Idle", "share of time without work, by role, per actor.",
        "rollout above 50%: fewer workers or a faster learner; learner above 50%: more workers or"
        " staleness 1.",
        Query(
            "sum by (run_id, role) (rate(rlpost_idle_seconds_total{run}[rate]))"
            " / sum by (run_id, role) (rlpost_actors{run} > 0)", "{{run_id}} {{role}}",
        ), unit="percentunit", steps=[(0.5, ORANGE)], low=0,
    ),
]  # fmt: skip

LENGTHS: list[Panel] = [
    lines(
        "Reply length", "tokens that the policy sampled in a rollout.",
        "a steady climb with a flat reward is length gaming: punish run-on replies or lower the"
        " limit.",
        *quantiles("rlpost_reply_length_tokens"), low=0,
    ),
    heat(
        "Reply lengths", "distribution of sampled tokens over time.",
        "a band at the reply limit is truncation; two bands are two kinds of reply: read samples.",
        Query(
            "sum by (le) (increase(rlpost_reply_length_tokens_bucket{run}[rate]))", "{{le}}"
        ),
    ),
    lines(
        "Prompt length", "tokens before the first reply.",
        "a change means other rows or another template: compare the run's job.toml.",
        *quantiles("rlpost_prompt_length_tokens"), low=0,
    ),
    lines(
        "Truncation", "share of rollouts that ended at the reply limit.",
        "growing: the policy forgets to stop; check that truncated replies get the lowest score.",
        Query(
            "sum by (run_id) (rate(rlpost_truncated_rollouts_total{run}[rate]))"
            " / sum by (run_id) (rate(rlpost_rollouts_total{run}[rate]))"
        ), unit="percentunit", steps=[(0.2, ORANGE), (0.5, RED)], low=0, high=1, width=24,
    ),
]  # fmt: skip

WEIGHTS: list[Panel] = [
    lines(
        "Publish", "time until every engine has a version.",
        "it stands in the way of every update: seconds on one node mean the wrong transport.",
        *quantiles("rlpost_publish_duration_seconds"), unit="s", low=0,
    ),
    lines(
        "Proof", "time to prove that every engine serves a version.",
        "longer than the publish: use fewer probe tokens.",
        *quantiles("rlpost_proof_duration_seconds"), unit="s", low=0,
    ),
    lines(
        "Published bytes", "bytes of weights a second sent to engines.",
        "an adapter is megabytes a publish; more means that whole weights travel.",
        Query("rate(rlpost_published_bytes_total{run}[rate])"), unit="Bps", low=0,
    ),
    lines(
        "Publishes", "versions sent, and those that an engine did not prove.",
        "failures that grow: see the runbook, proof; the run stops itself at three of one version.",
        Query("rlpost_publishes_total{run}", "{{run_id}} sent"),
        Query("rlpost_publish_failures_total{run}", "{{run_id}} failed"), low=0,
    ),
    lines(
        "Restarts", "actors started again, by role and reason.",
        "died again and again: memory. timeout: a hung engine or network.",
        Query(
            "sum by (run_id, role, reason) (rlpost_actor_restarts_total{run})",
            "{{run_id}} {{role}} {{reason}}",
        ), low=0,
    ),
    lines(
        "Actors", "actors whose idle time is counted, by role.",
        "fewer than the job asks for: a worker is lost, see Ray's board.",
        Query("rlpost_actors{run}", "{{run_id}} {{role}}"), low=0,
    ),
]  # fmt: skip

HARDWARE: list[Panel] = [
    lines(
        "GPU memory", "share in use, all cards of a role.",
        "above 95% the next long batch may fail: lower the memory share or the micro-batch.",
        Query(
            "rlpost_gpu_memory_used_bytes{run} / (rlpost_gpu_memory_size_bytes{run} > 0)",
            "{{run_id}} {{role}}",
        ), unit="percentunit", steps=[(0.95, ORANGE)], low=0, high=1,
    ),
    lines(
        "GPUs busy", "share of time with a kernel running, by role.",
        "low with little idle time: the CPU (tokenizer, rewards, Python) is the limit.",
        Query("rlpost_gpu_busy_ratio{run}", "{{run_id}} {{role}}"),
        unit="percentunit", low=0, high=1,
    ),
    lines(
        "Of the roofline", "measured speed over what the hardware allows, by work.",
        "18% of decode is usual inside an RL loop; far below, raise the batch or the memory share.",
        Query("rlpost_roofline_ratio{run}", "{{run_id}} {{work}}"),
        unit="percentunit", low=0, high=1,
    ),
]  # fmt: skip

ROLLOUT = board(
    "rlpost-rollout",
    "rlpost: Rollout & engines",
    "Who waits for whom, and do the engines serve what they claim?",
    [
        ("At a glance", TOP),
        ("Flow", FLOW),
        ("Lengths", LENGTHS),
        ("Weights and actors", WEIGHTS),
        ("Hardware", HARDWARE),
    ],
)
