"""The proof of policy, its arithmetic alone. `test_proof_of_engines.py` tries it on real
engines."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpost.policy.proof import BASE, Proof, Slope, bit_sum, compare


def bits(value, code="<f", kind="<I"):
    return struct.unpack(kind, struct.pack(code, value))[0]


def test_the_sum_is_that_of_the_bit_patterns():
    values = [1.0, -2.5, 3e-5, 1e30]
    assert bit_sum(torch.tensor(values)) == sum(map(bits, values))
    half = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert bit_sum(half) == 0x3F80 + 0xC000


def test_the_sum_wraps_at_64_bits():
    tensor = torch.full((3,), -1, dtype=torch.int64)
    assert bit_sum(tensor) == (3 * (2**64 - 1)) % 2**64


def test_zeros_of_both_signs_and_padding_add_nothing():
    tensor = torch.randn(5, 7)
    padded = torch.nn.functional.pad(tensor, (0, 3, 0, 2))
    assert bit_sum(padded) == bit_sum(tensor)
    assert bit_sum(torch.tensor([-0.0, 0.0])) == 0
    assert bit_sum(torch.tensor([1e-40])) == 0  # a matrix product may flush it


def test_split_and_stacked_copies_add_up():
    tensor = torch.randn(12, 5).to(torch.bfloat16)
    parts = tensor.split([4, 3, 5])
    assert sum(map(bit_sum, parts)) == bit_sum(tensor) == bit_sum(tensor.t())


def test_one_flipped_bit_changes_the_sum():
    tensor = torch.randn(64, 64)
    before = bit_sum(tensor)
    tensor.view(torch.int32)[3, 5] ^= 1
    assert bit_sum(tensor) != before


@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), max_size=30))
def test_the_sum_does_not_depend_on_the_order(values):
    assert bit_sum(torch.tensor(values)) == bit_sum(torch.tensor(values[::-1]))


def test_compare_names_what_is_missing_extra_and_different():
    assert compare({"a": 1, "b": 2}, {"b": 2, "a": 1}) == []
    assert compare({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "missing: a",
        "extra: c",
        "different: b",
    ]
    assert compare({}, {}) != []  # nothing to compare with proves nothing


def publications(count, *, slope, noise, step=3e-3, tokens=512, seed=0):
    """(engine, before, after) of `count` updates; the engine follows with `slope` and bf16-like
    noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(tokens, generator=generator, dtype=torch.float64)

    for _ in range(count):
        before = -2 + normal()
        move = step * normal()
        yield [
            each.tolist()
            for each in (before + slope * move + noise * normal(), before, before + move)
        ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("slope", "verdict"), [(1.0, "updated"), (0.0, "stale"), (2.0, "stale")])
def test_updates_below_the_noise_are_told_apart_after_a_few(slope, verdict, seed):
    found = Slope()
    for each in publications(12, slope=slope, noise=1e-2, seed=seed):
        found.add(*each)
        assert found.verdict in (verdict, "undecided")
    assert found.verdict == verdict and found.slope == pytest.approx(slope, abs=0.5)


def test_it_is_undecided_while_its_power_is_low():
    found = Slope()
    assert found.verdict == "undecided" and math.isnan(found.slope)
    found.add(*next(publications(1, slope=0.0, noise=2e-2, tokens=64)))
    assert found.verdict == "undecided" and found.power < 0.9


def test_a_learner_that_did_not_move_decides_nothing():
    found = Slope()
    same = [-1.0, -2.0, -3.0, -4.0]
    found.add(same, same, same)
    assert found.verdict == "undecided" and math.isnan(found.slope) and found.power == 0.0


def test_without_noise_one_publication_decides():
    found = Slope()
    found.add(*next(publications(1, slope=1.0, noise=1e-6)))
    assert found.verdict == "updated" and found.power == pytest.approx(1.0)
    found.add(*next(publications(1, slope=0.0, noise=1e-6)))
    assert found.verdict == "stale"  # the newest decides: earlier successes do not outvote it


def test_a_sync_that_breaks_late_is_found_within_the_window():
    found = Slope()
    for each in publications(16, slope=1.0, noise=1e-2, tokens=1024):
        found.add(*each)
    assert found.verdict == "updated"
    for each in publications(6, slope=0.0, noise=1e-2, tokens=1024, seed=1):
        found.add(*each)
    assert found.verdict == "stale"


def test_logprobs_that_are_not_finite_are_no_success():
    found = Slope()
    engine, before, after = next(publications(1, slope=1.0, noise=1e-6))
    found.add([math.nan] * len(engine), before, after)
    assert found.verdict == "stale"


def test_heavy_tails_lower_the_power_not_the_truth():
    wrong = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        found = Slope()
        for engine, before, after in publications(4, slope=1.0, noise=5e-3, seed=seed):
            outliers = 0.3 * (torch.rand(len(engine), generator=generator) < 0.01)
            sign = torch.randn(len(engine), generator=generator).sign()
            found.add((torch.tensor(engine) + outliers * sign).tolist(), before, after)
        wrong += found.verdict == "stale"
    assert wrong == 0


class FakeEngine:
    """Plain numbers, for the proof's own bookkeeping."""

    def __init__(self):
        self.fingerprints, self.scores, self.asked = {}, {}, 0

    async def fingerprint(self, *, version=None):
        return self.fingerprints[version]

    async def score(self, sequences, *, version=None):
        self.asked += 1
        return self.scores[version]


class FakeLearner:
    def __init__(self):
        self.now, self.asked = [], 0

    async def logprobs(self, sequences):
        self.asked += 1
        return self.now

    async def canary_logprobs(self, sequences):
        return self.now


PROBES = [[1, 2, 3, 4, 5, 6]]


async def test_the_learner_is_asked_once_per_version_however_many_engines():
    proof, learner = Proof(), FakeLearner()
    engines = [FakeEngine(), FakeEngine()]
    for version in (0, 1):
        learner.now = [[0.0, *(-1.0 - 0.1 * version * i for i in range(5))]]
        for name, engine in enumerate(engines):
            engine.fingerprints[version] = {BASE: version}
            engine.scores[version] = learner.now
            report = await proof.prove(
                engine, learner, version, PROBES, expected={BASE: version}, name=str(name)
            )
            assert report.holds
    assert learner.asked == 2
    assert all(proof.slopes[name].slope == pytest.approx(1.0) for name in "01")


async def test_the_first_version_has_no_slope_and_holds_by_its_fingerprint():
    proof, learner, engine = Proof(), FakeLearner(), FakeEngine()
    learner.now = [[0.0, -1.0, -2.0, -1.0, -2.0, -1.0]]
    engine.fingerprints[0] = {"a": 1}
    report = await proof.prove(engine, learner, 0, PROBES, expected={"a": 1})
    assert report.holds and report.verdict == "undecided" and engine.asked == 0
    report = await proof.prove(engine, learner, 0, PROBES, expected={"a": 2})
    assert not report.holds and list(report.problems) == ["different: a"]
    assert "different: a" in str(report)


async def test_changed_probes_are_compared_only_with_what_was_observed_on_them():
    proof, learner, engine = Proof(), FakeLearner(), FakeEngine()
    engine.fingerprints = {0: {"a": 1}, 1: {"a": 1}, 2: {"a": 1}}
    learner.now = [[0.0, -1.0, -2.0, -1.0, -2.0, -1.0]]
    await proof.prove(engine, learner, 0, PROBES, expected={"a": 1})
    other = [[6, 5, 4, 3, 2, 1]]
    assert (await proof.prove(engine, learner, 1, other, expected={"a": 1})).holds
    assert engine.asked == 0  # nothing older was seen on these probes
    engine.scores[2] = [[0.0, -1.1, -2.2, -1.3, -2.4, -1.5]]
    learner.now = engine.scores[2]
    report = await proof.prove(engine, learner, 2, other, expected={"a": 1})
    assert engine.asked == 1 and report.verdict == "updated"


@pytest.mark.parametrize("truth", ["updated", "stale"])
@pytest.mark.parametrize("seed", range(5))
def test_the_learners_own_rounding_never_turns_a_verdict(truth, seed):
    """Noise of the learner stands in both differences: it draws every slope towards 1/2."""
    generator = torch.Generator().manual_seed(seed)
    slope = Slope()
    wrong = {"updated": "stale", "stale": "updated"}[truth]
    for _ in range(200):
        before, change, noise_before, noise_after, noise_engine = (
            torch.randn(1500, generator=generator, dtype=torch.float64) for _ in range(5)
        )
        size, noise = 2e-3, 1e-2  # an update far below the rounding
        served = before + (size * change if truth == "updated" else 0)
        slope.add(
            (served + noise * noise_engine).tolist(),
            (before + noise * noise_before).tolist(),
            (before + size * change + noise * noise_after).tolist(),
        )
        assert slope.verdict != wrong
