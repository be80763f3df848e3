"""Proof of policy: the engine serves the version it claims (design.md, promise 2).
 Three proofs. The *canary*, a random and non-zero policy, must be followed at the start: LoRA
begins at B = 0, where an adapter that does nothing passes every other test. The *fingerprint* must
equal the learner's at every publish: one number per checkpoint tensor, in the dtype that the engine
serves, keyed by the checkpoint's names (`lm_head.weight` counts even when it is tied); an adapter
version reports its A and B under PEFT's names and one number `BASE` over the base tensors. The
*slope* regresses how far the engine moved on how far the learner moved, since one update's change
drowns in bf16 noise token by token.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

BASE = "base"  # key of the one number over all base tensors in an adapter version's fingerprint

_CHUNK = 1 << 22  # elements summed at once: 32 MB of int64
_EXPONENT = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80}  # all zero in a subnormal
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

DECIDED = 0.999  # power from which a slope is believed
BORDERS = (0.5, 1.5)  # slopes between them say "updated"
CANARY_SLOPE = (0.9, 1.1)

Sequences = Sequence[Sequence[int]]
Logprobs = Sequence[Sequence[float]]
Verdict = Literal["updated", "stale", "undecided"]


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of the elements' bit patterns, as unsigned integers of their width, modulo 2^64.

    Exact, independent of layout and order, so that split, stacked and padded copies add up: zeros
    add nothing, and neither does -0.0, nor a float32 or bfloat16 subnormal: a matrix product, which
    is how packed weights are read back, may flush these. The tensor stays where it is.
    """
    flat = tensor.detach().reshape(-1)
    width = flat.element_size()
    exponent = _EXPONENT.get(tensor.dtype, 0x7FFF if tensor.dtype == torch.float16 else -1)
    total = 0
    for start in range(0, flat.numel(), _CHUNK):
        bits = flat[start : start + _CHUNK].contiguous().view(_INTEGER[width]).to(torch.int64)
        if width < 8:
            bits &= (1 << (8 * width)) - 1
        bits = torch.where((bits & exponent) == 0, 0, bits)
        total += int(bits.sum())  # wraps modulo 2^64 by itself
    return total % (1 << 64)


def compare(expected: Mapping[str, int], reported: Mapping[str, int]) -> list[str]:
    """One line per tensor whose number is missing, extra or different; empty if they are equal."""
    if not expected:
        return ["the learner gave no fingerprint to compare with"]
    lines = [f"missing: {name}" for name in expected if name not in reported]
    lines += [f"extra: {name}" for name in reported if name not in expected]
    lines += [
        f"different: {name}"
        for name, value in expected.items()
        if name in reported and reported[name] != value
    ]
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """What a regression needs of one publication's tokens, x the learner's step, y the engine's."""

    count: int = 0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    xxxx: float = 0.0
    xxxy: float = 0.0
    xxyy: float = 0.0

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(**{name: getattr(self, name) + getattr(other, name) for name in _FIELDS})


_FIELDS = ("count", "xx", "xy", "yy", "xxxx", "xxxy", "xxyy")


class Slope:
    """Regression through the origin of (engine - learner before) on (learner after - learner
    before) over probe tokens: 1 where the engine took the update, 0 where it kept the old weights.

    The newest publication decides if it can; where its power is too low, the one before is added,
    and so on over at most `window` publications, so that a sync that breaks late is not outvoted.
    Noise is estimated from the residuals, the larger of the classical and the heteroscedastic
    (White 1980) standard error, doubled since the errors of neighbouring tokens go together. The
    learner's own rounding stands on both sides and draws either slope towards the border at 1/2,
    never over it: so what counts is the distance from the border. `power` is the probability that
    noise of that size is smaller than that distance.
    """

    def __init__(self, *, window: int = 16):
        self._publications: deque[_Sums] = deque(maxlen=window)
        self.slope = math.nan  # NaN while nothing has moved
        self.power = 0.0

    def add(self, engine: Sequence[float], before: Sequence[float], after: Sequence[float]) -> None:
        """One publication: log-probabilities [n] of the same probe tokens by the engine and by the
        learner before and after the update. Values that are not finite count as a failed update."""
        values = [torch.tensor(each, dtype=torch.float64) for each in (engine, before, after)]
        x, y = values[2] - values[1], values[0] - values[1]
        y = torch.where(torch.isfinite(y), y, 0.0)
        x = torch.where(torch.isfinite(x), x, 0.0)
        xx, yy = x * x, y * y
        self._publications.append(
            _Sums(
                count=x.numel(),
                xx=float(xx.sum()),
                xy=float((x * y).sum()),
                yy=float(yy.sum()),
                xxxx=float((xx * xx).sum()),
                xxxy=float((xx * x * y).sum()),
                xxyy=float((xx * yy).sum()),
            )
        )
        self._decide()

    @property
    def verdict(self) -> Verdict:
        """ "stale" is everything that is not near 1, a step of double length included."""
        if self.power < DECIDED:
            return "undecided"
        return "updated" if BORDERS[0] < self.slope < BORDERS[1] else "stale"

    def _decide(self) -> None:
        total = _Sums()
        for publication in reversed(self._publications):
            total += publication
            self.slope, error = _regress(total)
            margin = min(abs(self.slope - border) for border in BORDERS)
            self.power = math.erf(margin / error / math.sqrt(2)) if error > 0 else 1.0
            if math.isnan(self.slope):
                self.power = 0.0
            if self.power >= DECIDED:
                return


def _regress(s: _Sums) -> tuple[float, float]:
    """Slope and its standard error; (NaN, inf) if x is 0 everywhere or too few tokens were seen."""
    if s.count < 3 or s.xx <= 0:
        return math.nan, math.inf
    slope = s.xy / s.xx
    classical = (s.yy - slope * s.xy) / (s.count - 1) / s.xx
    robust = (s.xxyy - 2 * slope * s.xxxy + slope * slope * s.xxxx) / (s.xx * s.xx)
    return slope, 2 * math.sqrt(max(classical, robust, 0.0))


class ProvableEngine(Protocol):
    """What a proof asks of an engine, or of the client of one."""

    async def fingerprint(self, *, version: int | None = None) -> Mapping[str, int]: ...

    async def score(self, sequences: Sequences, *, version: int | None = None) -> Logprobs: ...


class ProvableLearner(Protocol):
    """What a proof asks of the client of the learner: its log-probabilities now, and those of the
    canary it published last."""

    async def logprobs(self, sequences: Sequences) -> Logprobs: ...

    async def canary_logprobs(self, sequences: Sequences) -> Logprobs: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofReport:
    """What was found out about one engine and one version."""

    version: int
    holds: bool
    problems: Sequence[str]
    slope: float
    power: float
    verdict: Verdict
    seconds: float

    def __str__(self) -> str:
        word = "holds" if self.holds else f"failed: {'; '.join(self.problems[:3])}"
        more = f" and {len(self.problems) - 3} more" if len(self.problems) > 3 else ""
        return (
            f"proof of version {self.version} {word}{more} "
            f"(slope {self.slope:.3f}, power {self.power:.3f}, {self.verdict})"
        )


@dataclass(slots=True)
class _Observation:
    version: int
    probes: list[list[int]]
    values: list[float]


@dataclass(slots=True)
class Proof:
    """The proofs of a run. One Slope per engine; the learner is asked once per version.

    `prove` must be called while the learner still is at `version`. Its "before" is the newest older
    version seen on the same probes: by an earlier `prove`, or by `observe` where probes change.
    """

    slopes: dict[str, Slope] = field(default_factory=dict)
    _seen: deque[_Observation] = field(default_factory=lambda: deque(maxlen=4))

    async def observe(
        self, learner: ProvableLearner, version: int, probes: Sequences
    ) -> list[float]:
        """The learner's log-probabilities of the probe tokens, flat, kept as those of `version`."""
        wanted = [list(probe) for probe in probes]
        for seen in self._seen:
            if seen.version == version and seen.probes == wanted:
                return seen.values
        values = _flat(await learner.logprobs(wanted))
        self._seen.append(_Observation(version, wanted, values))
        return values

    async def prove(
        self,
        engine: ProvableEngine,
        learner: ProvableLearner,
        version: int,
        probes: Sequences,
        *,
        expected: Mapping[str, int],
        name: str = "engine",
    ) -> ProofReport:
        """Fingerprint and slope of `version` on the engine called `name`. `expected` is the
        publication's fingerprint."""
        started = time.perf_counter()
        problems = compare(expected, await engine.fingerprint(version=version))
        after = await self.observe(learner, version, probes)
        slope = self.slopes.setdefault(name, Slope())
        before = self._before(version, probes)
        if before is not None:
            slope.add(_flat(await engine.score(probes, version=version)), before, after)
        if slope.verdict == "stale":
            problems.append(f"the engine does not follow the learner: slope {slope.slope:.3f}")
        return _report(version, problems, slope, started)

    async def prove_canary(
        self,
        engine: ProvableEngine,
        learner: ProvableLearner,
        version: int,
        probes: Sequences,
        *,
        expected: Mapping[str, int],
    ) -> ProofReport:
        """The same for the canary that the learner published as `version`: here the slope must be
        within 0.9 to 1.1, and undecided is a failure, since a canary moves far beyond the noise."""
        started = time.perf_counter()
        problems = compare(expected, await engine.fingerprint(version=version))
        before = _flat(await learner.logprobs(probes))
        after = _flat(await learner.canary_logprobs(probes))
        slope = Slope()
        slope.add(_flat(await engine.score(probes, version=version)), before, after)
        low, high = CANARY_SLOPE
        if slope.verdict == "undecided" or not low <= slope.slope <= high:
            problems.append(f"the engine does not follow the canary: slope {slope.slope:.3f}")
        return _report(version, problems, slope, started)

    def _before(self, version: int, probes: Sequences) -> list[float] | None:
        wanted = [list(probe) for probe in probes]
        older = [each for each in self._seen if each.version < version and each.probes == wanted]
        return max(older, key=lambda each: each.version).values if older else None


def _report(version: int, problems: list[str], slope: Slope, started: float) -> ProofReport:
    return ProofReport(
        version=version,
        holds=not problems,
        problems=problems,
        slope=slope.slope,
        power=slope.power,
        verdict=slope.verdict,
        seconds=time.perf_counter() - started,
    )


def _flat(rows: Logprobs) -> list[float]:
    """Every log-probability but the first of each sequence, which nothing precedes."""
    return [value for row in rows for value in row[1:]]
