import dataclasses
import math

import pytest
import torch

from rlpost.grpo.loss import CORRECTIONS, KINDS, LossSpec, LossStatistics, Totals, k3, policy_loss
from rlpost.types import MicroBatch


def batch(lengths, *, seed=0, prompt=2, noise=0.1):
    """(random micro-batch in float64, learner log-probabilities, entropies)."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    draw = lambda: torch.randn(total, generator=generator, dtype=torch.float64)  # noqa: E731
    starts = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.cat([(torch.arange(n) >= prompt).long() for n in lengths])
    learner = -(draw().abs() + 0.1)
    made = MicroBatch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        starts=starts,
        loss_mask=mask,
        advantages=draw() * mask,
        logprobs=(learner + noise * draw()) * mask,
        old_logprobs=(learner + noise * draw()) * mask,
        reference_logprobs=(learner + noise * draw()) * mask,
    )
    return made, (learner * mask).requires_grad_(), draw().abs()


def cut(whole, parts):
    """The micro-batches made of these runs of sequences, with the tokens that each takes."""
    for first, last in parts:
        a, b = int(whole.starts[first]), int(whole.starts[last])
        fields = {
            f.name: None if getattr(whole, f.name) is None else getattr(whole, f.name)[a:b]
            for f in dataclasses.fields(whole)
        }
        fields["starts"] = whole.starts[first : last + 1] - a
        yield MicroBatch(**fields), slice(a, b)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_splitting_an_update_into_micro_batches_changes_nothing(kind, correction):
    whole, learner, entropy = batch([5, 9, 3, 7, 12])
    spec = LossSpec(
        kind=kind, correction=correction, kl_coefficient=0.1, entropy_coefficient=0.02, guard=0.09
    )
    totals = Totals.of([whole])
    loss, statistics = policy_loss(learner, entropy, whole, spec=spec, totals=totals)
    (gradient,) = torch.autograd.grad(loss, learner)
    assert 0 < statistics.guarded_sequences < 5  # the guard was at work, and not everywhere
    shares, sums = [], LossStatistics()
    for part, where in cut(whole, [(0, 1), (1, 3), (3, 5)]):
        share, more = policy_loss(learner[where], entropy[where], part, spec=spec, totals=totals)
        shares.append(share)
        sums += more
    (split_gradient,) = torch.autograd.grad(sum(shares), learner)
    assert abs(sum(s.item() for s in shares) - loss.item()) < 1e-12
    assert (gradient - split_gradient).abs().max().item() < 1e-12
    for f in dataclasses.fields(sums):
        assert getattr(sums, f.name) == pytest.approx(getattr(statistics, f.name), abs=1e-12)


def simple(values, engine, advantages, **changes):
    """One sequence whose first token is the prompt."""
    engine = [0.0, *engine]
    made = MicroBatch(
        token_ids=torch.zeros(len(engine), dtype=torch.int64),
        position_ids=torch.arange(len(engine)),
        starts=torch.tensor([0, len(engine)]),
        loss_mask=torch.tensor([0] + [1] * (len(engine) - 1)),
        advantages=torch.tensor([0.0, *advantages], dtype=torch.float64),
        logprobs=torch.tensor(engine, dtype=torch.float64),
        **changes,
    )
    learner = torch.tensor([0.0, *values], dtype=torch.float64, requires_grad=True)
    return made, learner


def run(made, learner, **knobs):
    spec = LossSpec(**{"guard": math.inf, **knobs})
    entropy = torch.zeros_like(learner)
    return policy_loss(learner, entropy, made, spec=spec, totals=Totals.of([made]))


def test_learner_and_engine_in_agreement_give_the_plain_policy_gradient():
    made, learner = simple([-1.0, -2.0], [-1.0, -2.0], [0.5, -0.25])
    for kind in ("dapo", "cispo"):
        loss, statistics = run(made, learner, kind=kind)
        (gradient,) = torch.autograd.grad(loss, learner)
        assert gradient.tolist() == pytest.approx([0.0, -0.25, 0.125])
        assert statistics.mean("ratio") == pytest.approx(1.0)
        assert statistics.effective_sample_size == pytest.approx(1.0)
        assert statistics.gap == 0.0


def test_dapo_stops_pushing_a_token_up_above_its_higher_clip_only():
    for ratio, moves in ((1.27, True), (1.29, False)):
        made, learner = simple([math.log(ratio) - 1.0], [-1.0], [1.0])
        loss, statistics = run(made, learner, kind="dapo")
        (gradient,) = torch.autograd.grad(loss, learner)
        assert (gradient[1].item() != 0) is moves
        assert statistics.clipped_high == (0.0 if moves else 1.0)


def test_a_clipped_token_still_learns_when_the_advantage_pulls_it_back():
    made, learner = simple([math.log(1.5) - 1.0], [-1.0], [-1.0])
    loss, statistics = run(made, learner, kind="dapo")
    assert torch.autograd.grad(loss, learner)[0][1].item() == pytest.approx(1.5)
    assert statistics.clipped_high == 0.0


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    made, learner = simple([math.log(10.0) - 3.0], [-3.0], [1.0])
    loss, statistics = run(made, learner, kind="cispo", ratio_cap=3.0)
    assert torch.autograd.grad(loss, learner)[0][1].item() == pytest.approx(-3.0)
    assert statistics.clipped_high == 1.0


def test_gspo_gives_every_token_of_a_sequence_the_same_ratio():
    made, learner = simple([-1.0, -2.0], [-1.1, -1.9], [1.0, 1.0])
    loss, _ = run(made, learner, kind="gspo")
    (gradient,) = torch.autograd.grad(loss, learner)
    assert gradient[1].item() == pytest.approx(gradient[2].item())
    assert gradient[1].item() != 0


def test_correction_without_old_logprobs_takes_the_learner_before_the_update():
    made, learner = simple([-1.0, -2.0], [-1.3, -1.5], [1.0, 1.0])
    before = dataclasses.replace(made, old_logprobs=learner.detach().clone())
    for correction in CORRECTIONS[1:]:
        knobs = {"kind": "dapo", "correction": correction, "correction_cap": 1.2}
        assert run(made, learner, **knobs)[0].item() == run(before, learner, **knobs)[0].item()


def test_a_sequence_far_from_the_engine_is_dropped_and_counted():
    made, learner = simple([-1.0, -4.0], [-1.0, -2.9], [1.0, 1.0])  # mean |log ratio| 0.55
    loss, statistics = run(made, learner, kind="cispo", guard=0.5)
    assert loss.item() == 0.0
    assert statistics.guarded_sequences == 1
    assert run(made, learner, kind="cispo", guard=0.6)[1].guarded_sequences == 0


def test_guarded_sequences_are_still_counted_in_the_norm():
    """Else an update with one good sequence among broken ones would take a full step on it."""
    good, learner = simple([-1.0], [-1.0], [1.0])
    alone = run(good, learner, kind="cispo")[0].item()
    spec = LossSpec(kind="cispo")
    totals = Totals(tokens=10, sequences=10, longest=1)
    zeros = torch.zeros_like(learner)
    among = policy_loss(learner, zeros, good, spec=spec, totals=totals)[0].item()
    assert among == pytest.approx(alone / 10)


def test_k3_is_zero_where_policies_agree_and_positive_elsewhere():
    learner = torch.tensor([-1.0, -1.0, -1.0])
    reference = torch.tensor([-1.0, -0.5, -2.0])
    found = k3(learner, reference, torch.ones(3))
    assert found[0].item() == 0.0
    assert (found[1:] > 0).all()


def test_kl_pulls_the_policy_towards_the_reference():
    reference = torch.tensor([0.0, -0.5], dtype=torch.float64)
    made, learner = simple([-1.0], [-1.0], [0.0], reference_logprobs=reference)
    for unbiased in (True, False):
        loss, statistics = run(made, learner, kl_coefficient=1.0, kl_unbiased=unbiased)
        assert statistics.kl > 0
        (gradient,) = torch.autograd.grad(loss, learner)
        expected = 1 - math.exp(0.5)
        if unbiased:  # the ratio is differentiable: its gradient adds k3 itself
            expected += math.exp(0.5) - 0.5 - 1
        assert gradient[1].item() == pytest.approx(expected)


def test_kl_without_a_reference_is_refused():
    made, learner = simple([-1.0], [-1.0], [1.0])
    with pytest.raises(ValueError, match="reference_logprobs"):
        run(made, learner, kl_coefficient=0.1)


def test_nan_of_the_engine_is_not_hidden_by_the_guard():
    made, learner = simple([-1.0, -1.0], [float("nan"), -1.0], [1.0, 1.0])
    assert math.isnan(run(made, learner, guard=0.5)[0].item())


def test_unknown_losses_and_corrections_are_named():
    with pytest.raises(ValueError, match="'ppo' is not one of"):
        LossSpec(kind="ppo")
    with pytest.raises(ValueError, match="'batch_mask' is not one of"):
        LossSpec(correction="batch_mask")
