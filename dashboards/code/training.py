"""The Training board: does the policy get better, and can its numbers be believed?"""

from panels import ORANGE, RED, Panel, Query, board, lines, number, quantiles

TOP: list[Panel] = [
    number(
        "Phase", "what each run does now.",
        "`paused` waits for you: the reason is in the run's events.jsonl and in its log.",
        Query("rlpost_phase{run} == 1", "{{run_id}}: {{phase}}"),
    ),
    number(
        "Updates", "optimizer steps done, and the most that the job allows.",
        "compare the pace with the ETA; early stopping may end a run before its plan.",
        Query("rlpost_update{run}", "{{run_id}} done"),
        Query("rlpost_planned_updates{run}", "{{run_id}} planned"),
    ),
    number(
        "Time left", "expected seconds to the last planned update at the pace so far.",
        "nothing; if it grows, look at the duration of an update below.",
        Query("rlpost_eta_seconds{run}"), unit="s",
    ),
    number(
        "Since the last update", "age of the last finished update; large before the first one.",
        "red means stalled: open Rollout & engines and find the stage whose count stands still.",
        Query("time() - (rlpost_last_update_timestamp_seconds{run} > 0)"),
        unit="s", steps=[(300, ORANGE), (900, RED)],
    ),
    number(
        "Held-out score", "the last greedy evaluation over validation rows.",
        "believe this one before the training reward; the best checkpoint is kept by it.",
        Query('rlpost_eval{run, metric="score"}'), unit="percentunit",
    ),
    number(
        "Checks that fire", "health checks of the run that fire now.",
        "above 0, read the panel Health below and the runbook of the same name.",
        Query("sum by (run_id) (rlpost_health{run})"), steps=[(1, RED)],
    ),
]  # fmt: skip

REWARD: list[Panel] = [
    lines(
        "Reward", "mean reward of an update's rollouts (train) and score on validation rows.",
        "both should rise. Train up and validation flat or down is overfitting or a gamed reward:"
        " read samples of both.",
        Query('rlpost_reward_mean{run, part="value"}', "{{run_id}} {{split}}"),
    ),
    lines(
        "Held-out metrics", "every metric of the last evaluation.",
        "a format metric that rises while the content's falls tells that format is being gamed.",
        Query("rlpost_eval{run}", "{{run_id}} {{metric}}"),
    ),
    lines(
        "Groups by outcome", "share of an update's groups; only mixed ones carry a gradient.",
        "all good above 80%: harder tasks or stop. All bad above 80%: easier tasks, SFT first, or a"
        " reward that gives partial credit. The two need opposite cures.",
        Query("rlpost_group_ratio{run}", "{{run_id}} {{outcome}}"),
        unit="percentunit", steps=[(0.8, ORANGE)], low=0, high=1,
    ),
    lines(
        "Reward deviation", "standard deviation of the combined reward over the rollouts.",
        "near 0 there is nothing to learn from: see Groups by outcome.",
        Query('rlpost_reward_std{run, part="value"}'),
    ),
    lines(
        "Evaluations", "evaluations made, and the update of the last one.",
        "flat while updates go on: [eval] every is too large, or an evaluation hangs.",
        Query("rlpost_evaluations_total{run}", "{{run_id}} made"),
        Query("rlpost_eval_update{run}", "{{run_id}} last at update"),
    ),
    lines(
        "Policy version", "version that the learner holds: one more per step that moved weights.",
        "behind the update count means skipped updates: see Skipped updates.",
        Query("rlpost_policy_version{run}", "{{run_id}} version"),
        Query("rlpost_update{run}", "{{run_id}} update"),
    ),
]  # fmt: skip

POLICY: list[Panel] = [
    lines(
        "Entropy", "entropy over the trained tokens, in nats a token.",
        "a slow fall is learning; a cliff to a fifth of its start is collapse: lower the learning"
        " rate, or use a clip with a higher upper bound.",
        Query("rlpost_entropy{run}"), low=0,
    ),
    lines(
        "KL to the start policy", "distance to where training began, when last measured, in nats a"
        " token.",
        "a jump of 3 deviations is a warning, of 4.5 critical: lower the learning rate, go back to"
        " the checkpoint before the jump.",
        Query("rlpost_kl{run}"), low=0,
    ),
    lines(
        "Gradient norm", "norm before clipping.",
        "spikes that come back are outliers of reward or length; a level that stays up needs a"
        " lower learning rate.",
        Query("rlpost_grad_norm{run}"), low=0,
    ),
    lines(
        "Loss", "the loss of an update; its level says little in policy gradient.",
        "look only for jumps and gaps; judge by reward, entropy and KL.",
        Query("rlpost_loss{run}"),
    ),
    lines(
        "Learning rate", "rate of the last update.",
        "a step down that the job did not plan is an action of health: see Health.",
        Query("rlpost_learning_rate{run}"), unit="sci",
    ),
    lines(
        "Clipped tokens", "share of trained tokens whose weight was clipped or capped, and at which"
        " bound.",
        "above 20% the update is too large for its data: lower the rate or the staleness.",
        Query("rlpost_clip_ratio{run}", "{{run_id}} any"),
        Query("rlpost_clip_low_ratio{run}", "{{run_id}} lower"),
        Query("rlpost_clip_high_ratio{run}", "{{run_id}} upper"),
        unit="percentunit", steps=[(0.2, ORANGE)], low=0,
    ),
    lines(
        "Skipped updates", "updates that moved no weight, by reason.",
        "non_finite: look at that update's rewards and lower the rate. no_signal: every group was"
        " all good or all bad.",
        Query("increase(rlpost_skipped_updates_total{run}[rate])", "{{run_id}} {{reason}}"), low=0,
    ),
    lines(
        "Guarded sequences", "sequences left out because learner and engine disagree on them.",
        "more than a few a minute: treat it as a mismatch, see the row below.",
        Query("increase(rlpost_guarded_sequences_total{run}[rate])"), low=0,
    ),
    lines(
        "Trained tokens", "tokens that carried a gradient, a second.",
        "compare with the tokens sampled: a wide gap means groups without a gradient or drops.",
        Query("rate(rlpost_trained_tokens_total{run}[rate])"), unit="cps", low=0,
    ),
]  # fmt: skip

AGREEMENT: list[Panel] = [
    lines(
        "KL between engine and learner", "nats a token between the policy that sampled and the one"
        " that is trained.",
        "above 0.01 look for a dtype, kernel or template that differs; above 0.1 stop: the gradient"
        " is of another policy.",
        Query("rlpost_rollout_kl{run}"), steps=[(0.01, ORANGE), (0.1, RED)],
    ),
    lines(
        "Probability gap", "mean |learner - engine| of the sampled tokens' probabilities.",
        "normal is below 0.005; above 0.01 compare dtypes and check that publishes are proven.",
        Query("rlpost_probability_gap{run}"), steps=[(0.005, ORANGE), (0.01, RED)], low=0,
    ),
    lines(
        "Log-probability gap", "mean |learner - engine| of log-probabilities.",
        "fp32 gives 1e-6 to 1e-5, bf16 7e-3 to 2e-2: a level above its dtype's is a mismatch.",
        Query("rlpost_logprob_gap{run}"), low=0,
    ),
    lines(
        "Importance weight", "mean weight learner / engine before capping; 1 on policy.",
        "a drift from 1 is staleness or mismatch: compare with the staleness on the other board.",
        Query("rlpost_importance_weight_mean{run}"),
    ),
    lines(
        "Effective sample size", "of the weights, as a share of the tokens.",
        "below 0.3 few tokens carry the update: lower staleness or the learning rate.",
        Query("rlpost_effective_sample_ratio{run}"),
        unit="percentunit", low=0, high=1, base=RED, steps=[(0.3, ORANGE), (0.7, "green")],
    ),
    lines(
        "Proof of policy", "slope of the engine's change on the learner's (1 updated, 0 stale), and"
        " the power of that regression.",
        "while power is below 0.8 it is undecided. A slope near 0 with high power: engines serve an"
        " old version, stop the run.",
        Query("rlpost_proof_slope{run}", "{{run_id}} slope"),
        Query("rlpost_proof_power{run}", "{{run_id}} power"),
    ),
]  # fmt: skip

RUNNING: list[Panel] = [
    lines(
        "Duration of an update", "wall-clock time, publish included.",
        "when it grows, idle time on the other board says which side waits.",
        *quantiles("rlpost_update_duration_seconds"), unit="s", low=0,
    ),
    lines(
        "Health", "1 while a check fires, by check and severity.",
        "open the heading of the same name in dashboards/RUNBOOKS.md.",
        Query(
            "sum by (run_id, check, severity) (rlpost_health{run})",
            "{{run_id}} {{check}} {{severity}}",
        ), low=0, high=1,
    ),
    lines(
        "Actions of health", "what health did to the run since it began.",
        "each has an event with its reason; undo one by changing [health] and resuming.",
        Query("rlpost_health_actions_total{run}", "{{run_id}} {{action}}"), low=0,
    ),
    lines(
        "Checkpoints", "checkpoints written, and those that could not be.",
        "a failure: free the disk or mend its rights before the next kill costs work.",
        Query("rlpost_checkpoints_total{run}", "{{run_id}} written"),
        Query("rlpost_checkpoint_failures_total{run}", "{{run_id}} failed"), low=0,
    ),
    lines(
        "Work at risk", "time since the last whole checkpoint: what a kill would cost.",
        "if that is too much, lower run.checkpoint_every.",
        Query("time() - (rlpost_last_checkpoint_timestamp_seconds{run} > 0)"), unit="s", low=0,
    ),
    lines(
        "Duration of a checkpoint", "time to write one.",
        "above the duration of an update: a slow disk, or keep fewer.",
        *quantiles("rlpost_checkpoint_duration_seconds"), unit="s", low=0,
    ),
    lines(
        "Free disk", "free share of the file system of the run directory.",
        "below 10% remove old runs or lower keep_checkpoints; at 3% the next checkpoint may fail.",
        Query("rlpost_disk_free_bytes{run} / rlpost_disk_size_bytes{run}"),
        unit="percentunit", low=0, high=1, base=RED, steps=[(0.03, ORANGE), (0.1, "green")],
    ),
    lines(
        "Dropped by sinks", "points that TensorBoard or W&B did not take; training went on.",
        "mend the sink; metrics.jsonl in the run directory has every number.",
        Query("increase(rlpost_sink_dropped_total{run}[rate])", "{{run_id}} {{sink}}"), low=0,
    ),
]  # fmt: skip

TRAINING = board(
    "rlpost-training",
    "rlpost: Training",
    "Does the policy get better, and can its numbers be believed? One run or all of them.",
    [
        ("At a glance", TOP),
        ("Reward", REWARD),
        ("Policy", POLICY),
        ("Engine and learner agree", AGREEMENT),
        ("The run", RUNNING),
    ],
)
