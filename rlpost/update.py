"""One update: judged groups in, the learner's report out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.clients import LearnerClient
from rlpost.config import Job
from rlpost.grpo.advantage import advantages
from rlpost.grpo.packing import pack
from rlpost.types import Group, StepReport


async def update(
    groups: Sequence[Group],
    learner: LearnerClient,
    job: Job,
    *,
    info: Mapping[str, Any],
    number: int,
    version: int,
) -> StepReport:
    """Advantages, packing and one step of the learner. `info` is what the learner said at its
    start, `number` counts updates from 0, `version` is the learner's. Groups that all score alike
    carry no gradient: if none is left, the learner is not asked and no version comes."""
    rules = job.learner
    gains = advantages(
        groups,
        baseline=rules.baseline,
        scale=rules.scale,
        min_spread=rules.min_spread,
        parts=rules.parts,
        weights={spec.name: spec.weight for spec in job.rewards if not spec.gate},
        gates=[spec.name for spec in job.rewards if spec.gate],
    )
    batches = pack(
        groups,
        gains,
        tokens=int(info["micro_batch_tokens"]),
        padded=info["layout"] == "padded",
        mask_truncated=job.rollout.truncated == "mask",
    )
    if not batches:
        return _nothing_to_learn(version)
    measure = bool(info["can_measure_kl"]) and number % rules.kl_every == 0
    return await learner.update(batches, measure_kl=measure)


def _nothing_to_learn(version: int) -> StepReport:
    return StepReport(
        policy_version=version, loss=0.0, grad_norm=0.0, entropy=math.nan, clip_fraction=0.0,
        logprob_gap=math.nan, kl=math.nan, tokens=0, seconds=0.0, skipped="no_signal",
    )  # fmt: skip
