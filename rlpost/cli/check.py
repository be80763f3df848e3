"""`rlpost check`: every mistake in job, rows and reward at once, without a GPU and without
torch."""

import argparse
import asyncio
import difflib
import json
from collections.abc import Sequence
from typing import Any

from rlpost.config import Job, explain, read_job
from rlpost.errors import JobError, UserError, UserErrors
from rlpost.preparation import Prepared, model_folder, placed, prepare
from rlpost.reward import recorded
from rlpost.scoring.probes import gold_forms
from rlpost.types import Rollout, Task


def register(verbs: Any) -> None:
    """Adds the verb to the parser."""
    check = verbs.add_parser(
        "check", help="find every mistake before it costs a GPU", description=__doc__
    )
    check.add_argument("job", help="job.toml, or its folder")
    check.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", dest="overrides"
    )
    check.add_argument(
        "--explain", action="store_true", help="print every value and why it is the default"
    )
    check.add_argument("--json", action="store_true", help="one JSON object on stdout")
    check.set_defaults(run=check_file)


def check_file(args: argparse.Namespace) -> int:
    job = read_job(args.job, overrides=args.overrides)
    notes = check_job(job, quick=False)
    values = list(explain(job)) if args.explain else []
    if args.json:
        told = [
            {"key": key, "value": value, "written": written, "reason": reason}
            for key, value, written, reason in values
        ]
        print(json.dumps({"ok": True, "notes": notes, "values": told}, default=str))
        return 0
    for key, value, written, reason in values:
        mark = "*" if written else " "
        print(
            f"{mark} {key} = {json.dumps(value, default=str)}{f'   # {reason}' if reason else ''}"
        )
    for note in notes:
        print(note)
    print("ok: the job can run" + ("   (* written in the job)" if values else ""))
    return 0


def check_job(job: Job, *, quick: bool) -> list[str]:
    """Reads rows, resolves plugins, measures prompts, tries the rewards on real rows; returns notes
    worth reading. Raises UserError(s) with everything that is wrong."""
    errors: list[UserError] = []
    renderer = None
    try:
        renderer = _renderer(job)
    except UserErrors as several:
        errors += several.errors
    except UserError as error:
        errors.append(error if error.place else placed(error, job.at("model", "path")))
    try:
        prepared = prepare(job, renderer=renderer)
    except UserErrors as several:
        raise _all([*errors, *several.errors]) from None
    except UserError as error:
        raise _all([*errors, error]) from None
    if errors:
        raise _all(errors)
    notes = [*_describe(job, prepared), *_try_rewards(job, prepared, quick=quick)]
    _check_metric(job, prepared)
    return notes


def _all(errors: Sequence[UserError]) -> UserError:
    """Every mistake once, whoever found it first: the tokenizer and the rows both miss a model."""
    told = list({str(error): error for error in errors}.values())
    return told[0] if len(told) == 1 else UserErrors(told)


def _renderer(job: Job) -> Any:
    """The tokenizer and its template. Where transformers is not installed (a laptop), lengths go
    unmeasured."""
    folder = model_folder(job)
    try:
        from rlpost.policy.renderer import Renderer

        return Renderer(folder, thinking=job.model.thinking)
    except ModuleNotFoundError:
        return None


def _describe(job: Job, prepared: Prepared) -> list[str]:
    rows = f"{len(prepared.train)} training and {len(prepared.validation)} validation tasks"
    prompt, reply = prepared.longest_prompt, prepared.max_reply_tokens
    notes = [f"{rows}; longest prompt {prompt} tokens, replies up to {reply}"]
    if prepared.too_long:
        ids = ", ".join(prepared.too_long)
        notes.append(f"left out, too long for model.max_length: {len(prepared.too_long)} ({ids})")
    return notes


def _try_rewards(job: Job, prepared: Prepared, *, quick: bool) -> list[str]:
    """The findings of trying each reward on real rows; a reward that cannot work is the user's
    mistake."""
    from rlpost.scoring import sandbox
    from rlpost.scoring.trial import try_reward

    rules = job.scoring
    try:
        sandbox.choose(job.rewards, trusted=rules.trusted, allow_untrusted=rules.allow_untrusted)
    except UserError as error:
        raise placed(error, job.at("scoring", "trusted")) from None
    findings = asyncio.run(
        try_reward(
            job.rewards,
            list(prepared.train[: 2 if quick else 8]),
            deadline=rules.deadline,
            quick=quick,
            trusted=rules.trusted,
            allow_untrusted=rules.allow_untrusted,
            memory_bytes=rules.memory_mb << 20,
        )
    )
    wrong = [finding for finding in findings if finding.severity == "error"]
    if wrong:
        tables = {spec.name: str(index) for index, spec in enumerate(job.rewards)}
        mistakes: list[UserError] = [
            UserError(
                f"reward {finding.reward}: {finding.text}",
                **job.at("reward", tables.get(finding.reward, "0"), "use"),
                cure=finding.cure,
            )
            for finding in wrong
        ]
        raise mistakes[0] if len(mistakes) == 1 else UserErrors(mistakes)
    return [f"{finding.severity}: {finding.reward}: {finding.text}" for finding in findings]


def _check_metric(job: Job, prepared: Prepared) -> None:
    """eval.metric must be measured: what is measured is what two gold replies bring."""
    metric = job.eval.metric
    if metric == "score":
        return
    from rlpost.assembly import task_metrics
    from rlpost.evaluation import summarise

    rollouts = asyncio.run(_judge_gold(job, prepared.train[:2]))
    result = summarise(rollouts, version=0, metrics=task_metrics(job))
    known = ["score", *result.metrics, *result.parts]
    if metric in known or result.unscored == result.rows:  # unjudged gold tells no names of parts
        return
    close = difflib.get_close_matches(metric, known, n=1)
    raise JobError(
        f"eval.metric = {metric!r} is not measured by this job's rewards",
        **job.at("eval", "metric"),
        cure=f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}",
    )


async def _judge_gold(job: Job, tasks: Sequence[Task]) -> list[Rollout]:
    from rlpost.scoring.pool import ScoringPool

    rules = job.scoring
    async with ScoringPool(
        job.rewards,
        deadline=rules.deadline,
        memory_bytes=rules.memory_mb << 20,
        trusted=rules.trusted,
        allow_untrusted=rules.allow_untrusted,
    ) as pool:
        forms = [(gold_forms(task) or [""])[0] for task in tasks]
        return await pool.score(
            [recorded(task, form) for task, form in zip(tasks, forms, strict=True)]
        )
