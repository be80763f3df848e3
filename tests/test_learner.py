import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load as load_payload

from rlpost.errors import CheckpointError, ModelError, RunError
from rlpost.grpo.advantage import advantages
from rlpost.grpo.packing import pack
from rlpost.learner import Learner, LearnerSpec
from rlpost.policy import canary
from rlpost.policy.proof import BASE
from rlpost.types import Group, Rollout, Score, Task, Trajectory
from tests.families import FAMILIES, make

SEQUENCES = canary.probe_sequences(384, seed=11)
PROMPT = 6


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


def started(model, **changes):
    knobs = {"rank": 4, "learning_rate": 1e-3, "warmup": 0, "guard": math.inf, **changes}
    learner = Learner(LearnerSpec(model=str(model), **knobs))
    learner.start()
    return learner


def groups_for(learner, *, count=4, size=4, version=0):
    """Groups whose engine log-probabilities are the learner's own: an engine in full agreement."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for index in range(count):
        task, rollouts = Task(id=str(index), messages=[]), []
        for _ in range(size):
            length = int(torch.randint(12, 30, (1,), generator=generator))
            ids = torch.randint(384, (length,), generator=generator).tolist()
            mask = [0] * PROMPT + [1] * (length - PROMPT)
            own = learner.logprobs([ids])[0]
            trajectory = Trajectory(
                token_ids=ids,
                loss_mask=mask,
                logprobs=[value * m for value, m in zip(own, mask, strict=True)],
                policy_version=version,
            )
            score = Score(value=(ids[-1] % 8) / 8)
            rollouts.append(Rollout(task=task, reply="", trajectory=trajectory, score=score))
        groups.append(Group(id=index, task=task, rollouts=rollouts))
    return groups


def batches_for(learner, *, tokens=256, **changes):
    groups = groups_for(learner, **changes)
    return pack(groups, advantages(groups), tokens=tokens, padded=learner.layout == "padded")


def broken(batches, field, value):
    """The same micro-batches with one number of the last one replaced."""
    tensor = torch.as_tensor(getattr(batches[-1], field)).clone()
    tensor[-1] = value
    return [*batches[:-1], dataclasses.replace(batches[-1], **{field: tensor})]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_family_learns_what_it_is_rewarded_for(family, method):
    learner = started(family, method=method, keep_start=True, learning_rate=3e-4)
    batches = batches_for(learner)
    before = learner.publication()

    def objective():  # sum of advantage times log-probability: what the updates must raise
        with torch.no_grad():
            return sum(float((learner.policy.forward(b)[0] * b.advantages).sum()) for b in batches)

    start = objective()
    report = learner.update(batches, measure_kl=True)
    assert (report.policy_version, learner.version, report.skipped) == (1, 1, "")
    assert report.kl == pytest.approx(0.0, abs=1e-9)
    assert report.logprob_gap < 1e-4
    assert report.ratio_mean == pytest.approx(1.0, abs=1e-4)
    again = learner.update(batches, measure_kl=True)
    assert again.kl > 0
    assert objective() > start
    after = learner.publication()
    assert (before.version, after.version) == (0, 2)
    changed = [n for n in after.fingerprint if after.fingerprint[n] != before.fingerprint[n]]
    assert changed
    assert (BASE not in changed) if method == "lora" else ("lm_head.weight" in changed)


def test_a_report_counts_what_was_trained(qwen3):
    learner = started(qwen3)
    batches = batches_for(learner)
    report = learner.update(batches)
    assert report.tokens == sum(int(b.loss_mask.sum()) for b in batches)
    assert report.grad_norm > 0
    assert report.entropy > 1
    assert math.isnan(report.kl)
    assert report.effective_sample_size == pytest.approx(1.0, abs=1e-3)
    assert report.guarded_sequences == 0


def test_splitting_into_micro_batches_gives_the_same_weights(qwen3):
    first, second = started(qwen3), started(qwen3)
    few, many = batches_for(first, tokens=4096), batches_for(first, tokens=64)
    assert len(few) < len(many)
    one, two = first.update(few), second.update(many)
    assert one.loss == pytest.approx(two.loss, abs=1e-6)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)
    for a, b in zip(first.logprobs(SEQUENCES), second.logprobs(SEQUENCES), strict=True):
        assert a == pytest.approx(b, abs=2e-3)


def test_the_learning_rate_rises_over_the_warmup_and_then_stays(qwen3):
    learner = started(qwen3, learning_rate=1e-4, warmup=4)
    batches = batches_for(learner)
    rates = [learner.update(batches).learning_rate for _ in range(6)]
    assert rates == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4, 1e-4])
    assert learner.update(batches, learning_rate_scale=0.5).learning_rate == pytest.approx(5e-5)


def state_of(learner):
    """Copies of the trained weights and of the optimizer's moments, each in one fixed order."""
    states = [learner._optimizer.state.get(p, {}) for p in learner._trained.values()]
    moments = [state[key].clone() for state in states for key in sorted(state)]
    return [p.detach().clone() for p in learner._trained.values()], moments


def unchanged(before, after):
    return all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("logprobs", math.nan), ("advantages", math.inf), ("advantages", math.nan)],
)
def test_nan_never_reaches_the_weights(qwen3, method, field, value):
    learner = started(qwen3, method=method)
    batches = batches_for(learner)
    learner.update(batches)
    before = state_of(learner)
    report = learner.update(broken(batches, field, value))
    assert "not finite" in report.skipped
    assert report.policy_version == learner.version == 1
    assert unchanged(before, state_of(learner))
    assert learner.update(batches).skipped == ""


def test_a_gradient_that_is_not_finite_is_skipped_too(qwen3):
    learner = started(qwen3)
    batches = batches_for(learner)
    name, parameter = next(iter(learner._trained.items()))
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    before = state_of(learner)
    report = learner.update(batches)
    assert "gradient is not finite" in report.skipped, name
    assert unchanged(before, state_of(learner))
    handle.remove()
    assert learner.update(batches).skipped == ""


def test_an_update_without_gradient_is_no_version(qwen3):
    learner = started(qwen3)
    batches = batches_for(learner)
    flat = [dataclasses.replace(b, advantages=torch.zeros_like(b.advantages)) for b in batches]
    report = learner.update(flat)
    assert (report.skipped, learner.version) == ("the gradient is zero", 0)
    assert learner.update([]).skipped == "no trained tokens"
    assert learner.version == 0


def test_the_guard_alone_stops_an_update_against_an_engine_that_is_off(qwen3):
    learner = started(qwen3, guard=0.5)
    batches = batches_for(learner)
    off = [dataclasses.replace(b, logprobs=b.logprobs - b.loss_mask) for b in batches]
    report = learner.update(off)
    assert "guard" in report.skipped
    assert report.guarded_sequences == sum(len(b.starts) - 1 for b in batches)
    assert learner.version == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_canary_is_far_enough_to_see_and_leaves_the_weights_bit_for_bit(qwen3, method):
    learner = started(qwen3, method=method)
    learner.update(batches_for(learner))
    before, publication = state_of(learner), learner.publication()
    made = learner.canary(seed=4)
    assert unchanged(before, state_of(learner))
    assert learner.publication() == publication
    assert made.version == canary.VERSION
    change = canary.mean_change(learner.logprobs(SEQUENCES), learner.canary_logprobs(SEQUENCES))
    assert 0.2 < change < 1.2
    differing = [n for n in made.fingerprint if made.fingerprint[n] != publication.fingerprint[n]]
    assert set(made.fingerprint) - set(differing) == ({BASE} if method == "lora" else set())
    assert learner.canary(seed=4).payload == made.payload
    assert learner.canary(seed=5).payload != made.payload


def test_a_canary_does_not_outlive_the_weights_it_was_made_for(qwen3):
    learner = started(qwen3)
    with pytest.raises(RunError, match="no canary"):
        learner.canary_logprobs(SEQUENCES)
    learner.canary(seed=1)
    learner.update(batches_for(learner))
    with pytest.raises(RunError, match="no canary"):
        learner.canary_logprobs(SEQUENCES)


def test_the_start_policy_of_fresh_lora_is_the_base(qwen3):
    learner = started(qwen3)
    base = learner.logprobs(SEQUENCES)
    for _ in range(3):
        learner.update(batches_for(learner))
    assert learner.logprobs(SEQUENCES, policy="start") == base
    assert learner.logprobs(SEQUENCES) != base


def test_the_start_policy_of_an_imported_adapter_is_that_adapter(qwen3, tmp_path):
    first = started(qwen3)
    for _ in range(3):
        first.update(batches_for(first))
    first._model.save_pretrained(tmp_path)
    learner = started(qwen3, adapter=str(tmp_path))
    start = learner.logprobs(SEQUENCES)
    assert start == first.logprobs(SEQUENCES)
    batches = batches_for(learner)
    assert learner.update(batches, measure_kl=True).kl == pytest.approx(0.0, abs=1e-9)
    assert learner.update(batches, measure_kl=True).kl > 0
    assert learner.logprobs(SEQUENCES, policy="start") == start


def test_the_served_policy_is_the_current_one_after_the_trip_to_the_engine(qwen3, tmp_path):
    """Also when the scaling comes with an imported adapter and is no power of two."""
    first = started(qwen3, alpha=12.0)
    first.update(batches_for(first))
    first._model.save_pretrained(tmp_path)
    learner = started(qwen3, adapter=str(tmp_path), alpha=5.0, engine_dtype="bfloat16")
    payload = load_payload(learner.publication().payload)
    for name, tensor in learner._rounded().items():
        sent = payload[name.replace(".default.", ".")].float()
        assert torch.allclose(tensor * (3.0 if "lora_B" in name else 1.0), sent, rtol=1e-6), name
    assert learner.logprobs(SEQUENCES, policy="served") != learner.logprobs(SEQUENCES)
    exact = started(qwen3, adapter=str(tmp_path))
    now, served = exact.logprobs(SEQUENCES), exact.logprobs(SEQUENCES, policy="served")
    assert canary.mean_change(now, served) < 1e-5


def test_full_fine_tuning_refuses_a_kl_to_a_policy_it_did_not_keep(qwen3):
    learner = started(qwen3, method="full")
    assert learner.can_measure_kl is False
    batches = batches_for(learner)
    with pytest.raises(ModelError, match="keep_start"):
        learner.update(batches, measure_kl=True)
    with pytest.raises(ModelError, match="keep_start"):
        learner.logprobs(SEQUENCES, policy="start")
    assert started(qwen3, method="full", kl_coefficient=0.1).can_measure_kl


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_kl_coefficient_holds_the_policy_near_its_start(qwen3, method):
    def distance(coefficient):
        learner = started(qwen3, method=method, kl_coefficient=coefficient, keep_start=True)
        batches = batches_for(learner)
        for _ in range(8):
            learner.update(batches)
        return canary.mean_change(
            learner.logprobs(SEQUENCES, policy="start"), learner.logprobs(SEQUENCES)
        )

    assert distance(20.0) < 0.8 * distance(0.0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(qwen3, tmp_path, method):
    first = started(qwen3, method=method)
    batches = batches_for(first)
    first.update(batches)
    first.save(tmp_path / "c")
    reports = [first.update(batches) for _ in range(2)]
    second = started(qwen3, method=method)
    second.load(tmp_path / "c")
    assert second.version == 1
    again = [second.update(batches) for _ in range(2)]
    for one, two in zip(reports, again, strict=True):
        assert dataclasses.replace(one, seconds=0, kl=0) == dataclasses.replace(
            two, seconds=0, kl=0
        )
    assert second.publication() == first.publication()
    assert unchanged(state_of(first), state_of(second))


def test_a_damaged_or_foreign_checkpoint_changes_nothing(qwen3, tmp_path):
    learner = started(qwen3)
    folder = learner.save(tmp_path / "c")
    other = started(qwen3, rank=8)
    before = state_of(other)
    with pytest.raises(CheckpointError, match="rank 8"):
        other.load(folder)
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        learner.load(folder)
    assert unchanged(before, state_of(other))


def test_a_checkpoint_holds_safetensors_and_json_only(qwen3, tmp_path):
    folder = started(qwen3).save(tmp_path / "c")
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_logprobs_come_back_in_the_order_asked(qwen3):
    learner = started(qwen3, micro_batch_tokens=24)
    sequences = [[5, 6, 7], list(range(30)), [9], [8, 8, 8, 8, 8, 8]]
    together = learner.logprobs(sequences)
    assert [len(row) for row in together] == [3, 30, 1, 6]
    assert together[2] == [0.0]
    for ids, row in zip(sequences, together, strict=True):
        assert learner.logprobs([ids])[0] == pytest.approx(row, abs=1e-5)


def test_packed_and_padded_layouts_learn_the_same(qwen3):
    packed, padded = started(qwen3, layout="packed"), started(qwen3, layout="padded")
    batches = batches_for(packed)
    one, two = packed.update(batches), padded.update(batches)
    assert (packed.layout, padded.layout) == ("packed", "padded")
    assert one.loss == pytest.approx(two.loss, abs=1e-6)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-4)


def test_a_bf16_base_publishes_bf16_and_trains_fp32(qwen3):
    learner = started(qwen3, dtype="bfloat16")
    report = learner.update(batches_for(learner))
    assert report.skipped == ""
    assert {p.dtype for p in learner._trained.values()} == {torch.float32}
    payload = load_payload(learner.publication().payload)
    assert {t.dtype for t in payload.values()} == {torch.bfloat16}


def test_full_bf16_keeps_fp32_master_weights(qwen3):
    learner = started(qwen3, method="full", dtype="bfloat16", learning_rate=1e-6)
    before = [p.detach().clone() for p in learner._trained.values()]
    served = learner.publication()
    learner.update(batches_for(learner))
    moved = sum(int((a != b).sum()) for a, b in zip(before, learner._trained.values(), strict=True))
    assert moved > 1000  # bf16 storage would have swallowed nearly all of them
    new, old = load_payload(learner.publication().payload), load_payload(served.payload)
    assert {t.dtype for t in new.values()} == {torch.bfloat16}
    assert sum(int((new[n] != old[n]).sum()) for n in new) < moved / 2


def test_looking_from_another_thread_never_sees_borrowed_weights(qwen3):
    learner = started(qwen3)
    expected = learner.logprobs(SEQUENCES)
    with ThreadPoolExecutor(4) as pool:
        canaries = [pool.submit(learner.canary, seed) for seed in range(3)]
        seen = [pool.submit(learner.logprobs, SEQUENCES) for _ in range(12)]
        assert all(one.result() == expected for one in seen)
        assert all(one.result().version == canary.VERSION for one in canaries)


def test_describe_says_what_is_trained_and_how(qwen3):
    learner = started(qwen3)
    found = learner.describe()
    assert found["coverage"]["reached"] == 14
    assert found["coverage"]["missed"] == []
    assert found["layout"] == "packed"
    assert "agree" in found["layout_reason"]
    assert 0 < found["trained_parameters"] < found["parameters"]


def test_an_unknown_loss_is_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="'ppo'"):
        Learner(LearnerSpec(model="nowhere", loss="ppo"))
