"""Our losses against TRL's, run as the oracle: same batch, same float64 model, loss to 1e-6.

TRL builds the batch itself (`_generate_and_score_completions` with only the sampling replaced), so
masks, advantages, correction weights and reference log-probabilities are its own; then the policy
moves away from the one that sampled, so that ratios differ from 1 and clips bite, and both sides
compute the loss. `pytest -s` prints the table.
"""

import itertools
import math

import pytest
import torch

from rlpost.grpo.advantage import advantages
from rlpost.grpo.loss import KINDS, LossSpec, Totals, policy_loss
from rlpost.grpo.packing import lay
from rlpost.policy import model as policy_model
from rlpost.types import Group, MicroBatch, Rollout, Score, Task, Trajectory
from tests.families import make

CORRECTIONS = (
    "direct",
    "none",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
)
CAP, KL, LIMIT = 1.1, 0.05, 16
REWARDS = [0.0, 0.3, 0.9, 1.0, 0.2, 0.25, 0.8, 0.1]
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(trainer, its inputs) over a tiny float64 Qwen3 whose weights moved after the batch was
    sampled."""
    trl = pytest.importorskip("trl", reason="TRL is the oracle")
    import datasets
    import transformers

    folder = make("qwen3", tmp_path_factory.mktemp("qwen3"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("out")),
        beta=KL,
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=LIMIT,
        gradient_checkpointing=False,
        report_to=[],
        scale_rewards="batch",
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=arguments,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        reward_funcs=lambda completions, **_: REWARDS,
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}]),
    )
    trainer._generate = sampler(model)
    trainer._get_per_token_logps_and_entropies = in_float64  # TRL's own head computes in float32
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_clip_max = CAP
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    move(trainer.ref_model, 0.02, seed=1)
    inputs = {
        mode: with_mode(trainer, mode) for mode in CORRECTIONS if mode not in ("direct", "none")
    }
    for mode, batch in inputs.items():  # the cap is really at work in every variant
        bound = CAP if "truncate" in mode else 0.0
        assert (batch["importance_sampling_ratio"] == bound).any(), mode
    move(model, 0.02, seed=2)
    return trainer, inputs


def in_float64(model, input_ids, attention_mask, logits_to_keep, **_):
    """TRL's log-probabilities and entropies of the completions, by the plain formula."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    all_NCV = logits[:, -logits_to_keep - 1 : -1].log_softmax(-1)
    logprobs_NC = all_NCV.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
    return logprobs_NC, -(all_NCV.exp() * all_NCV).sum(-1), None


def with_mode(trainer, mode):
    trainer.vllm_importance_sampling_mode = mode
    return trainer._generate_and_score_completions([{"prompt": "x"}] * 8)


def sampler(model):
    """Stands in for TRL's generation: eight completions of two prompts, of many lengths; some of
    their tokens are a tool's, and the engine's log-probabilities are the model's with noise."""
    generator = torch.Generator().manual_seed(0)
    prompts = [PROMPTS[index // 4] for index in range(8)]
    completions, masks, logprobs = [], [], []
    for index, prompt in enumerate(prompts):
        length = 4 + index
        ids = torch.randint(3, 384, (length,), generator=generator)
        batch = policy_model.lay_out([prompt + ids.tolist()])
        own = policy_model.PolicyModel(model).forward(batch)[0].detach()[len(prompt) :]
        completions.append(ids.tolist())
        masks.append([0 if index % 3 == 0 and 1 <= t < 3 else 1 for t in range(length)])
        logprobs.append((own + 0.1 * torch.randn(length, generator=generator)).tolist())
    return lambda _: (prompts, completions, masks, [""] * 8, logprobs, {}, None, [])


def move(model, scale, *, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(scale * parameter.abs().mean() * noise)


def micro_batch(inputs, *, rows=range(8)):
    """TRL's padded tensors as one of our micro-batches: (batch without old or reference, pick)."""
    mask_NC = inputs["completion_mask"] * inputs["tool_mask"]
    pairs, old, reference = [], [], []
    for row in rows:
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        real = inputs["completion_mask"][row].bool()
        front = torch.zeros(len(prompt), dtype=torch.float64)
        pairs.append(
            (
                Trajectory(
                    token_ids=prompt + inputs["completion_ids"][row][real].tolist(),
                    loss_mask=[0] * len(prompt) + mask_NC[row][real].tolist(),
                    logprobs=torch.cat(
                        [front, inputs["sampling_per_token_logps"][row][real].double()]
                    ),
                    policy_version=0,
                ),
                float(inputs["advantages"][row]),
            )
        )
        old.append(torch.cat([front, inputs["old_per_token_logps"][row][real]]))
        reference.append(torch.cat([front, inputs["ref_per_token_logps"][row][real]]))
    return lay(pairs), torch.cat(old), torch.cat(reference)


def ours(policy, inputs, spec, *, direct, rows=range(8), totals=None):
    plain, old_T, reference_T = micro_batch(inputs, rows=rows)
    fields = {name: getattr(plain, name) for name in plain.__slots__}
    fields |= {"old_logprobs": None if direct else old_T, "reference_logprobs": reference_T}
    batch = MicroBatch(**fields)
    logprobs_T, entropy_T = policy.forward(batch)
    totals = totals or Totals.of([batch], longest=LIMIT)
    return policy_loss(logprobs_T, entropy_T, batch, spec=spec, totals=totals)


def theirs(trainer, inputs, spec, *, direct):
    trainer.loss_type = "grpo" if spec.kind == "gspo" else spec.kind
    trainer.importance_sampling_level = "sequence" if spec.kind == "gspo" else "token"
    trainer.epsilon_low = spec.clip_low
    trainer.epsilon_high = spec.ratio_cap if spec.kind == "cispo" else spec.clip_high
    trainer.beta = spec.kl_coefficient
    trainer.args.use_bias_correction_kl = spec.kl_unbiased
    trainer.vllm_importance_sampling_correction = spec.correction != "none"
    trainer._entropy_bonus_enabled = spec.entropy_coefficient != 0
    trainer.entropy_coef = spec.entropy_coefficient
    trainer.use_adaptive_entropy = False
    batch = dict(inputs)
    if direct:  # learner over engine: TRL has no name for it, but takes any denominator
        batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
    return trainer._compute_loss(trainer.model, batch)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


CASES = list(itertools.product(KINDS, CORRECTIONS, (0.0, KL)))


@pytest.mark.parametrize(("kind", "correction", "kl"), CASES)
def test_loss_and_gradient_equal_those_of_trl(oracle, kind, correction, kl):
    compare(oracle, kind, correction, kl)


def test_plain_kl_equals_that_of_trl(oracle):
    compare(oracle, "dapo", "direct", KL, unbiased=False)


def compare(oracle, kind, correction, kl, *, unbiased=True):
    trainer, inputs = oracle
    direct = correction == "direct"
    mode = correction if correction in inputs else "token_truncate"
    spec = LossSpec(
        kind=kind,
        clip_low=0.03,
        clip_high=0.04,
        ratio_cap=1.02,
        correction="none" if direct else correction,
        correction_cap=CAP,
        kl_coefficient=kl,
        kl_unbiased=unbiased,
        entropy_coefficient=0.01 if kl else 0.0,
        guard=math.inf,
    )
    policy = policy_model.PolicyModel(trainer.model, checkpointing=True)
    policy.entropy_gradient = True
    loss, statistics = ours(policy, inputs[mode], spec, direct=direct)
    expected = theirs(trainer, inputs[mode], spec, direct=direct)
    mine, trl = gradient(trainer.model, loss), gradient(trainer.model, expected)
    print(
        f"{kind:8} {correction:18} kl {kl:4} loss {loss.item():+.9f} trl {expected.item():+.9f} "
        f"|d| {(loss - expected).abs().item():.1e} |dgrad| {(mine - trl).abs().max().item():.1e}"
    )
    assert statistics.clipped_low + statistics.clipped_high > 0  # the clip was really at work
    assert abs(loss.item() - expected.item()) < 1e-6
    assert float((mine - trl).abs().max()) < 1e-6
    assert float(trl.abs().max()) > 1e-4  # and there was a gradient to compare


def test_splitting_an_update_into_micro_batches_changes_nothing(oracle):
    trainer, inputs = oracle
    model = trainer.model
    policy = policy_model.PolicyModel(model)
    parts = [range(0, 1), range(1, 4), range(4, 8)]
    for kind in KINDS:
        spec = LossSpec(kind=kind, correction="token_truncate", kl_coefficient=KL)
        whole = micro_batch(inputs["token_truncate"])[0]
        totals = Totals.of([whole], longest=LIMIT)
        one, one_statistics = ours(
            policy, inputs["token_truncate"], spec, direct=False, totals=totals
        )
        shares = [
            ours(policy, inputs["token_truncate"], spec, direct=False, rows=rows, totals=totals)
            for rows in parts
        ]
        assert abs(sum(loss.item() for loss, _ in shares) - one.item()) < 1e-6
        assert sum(s.tokens for _, s in shares) == one_statistics.tokens


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
def test_advantages_equal_those_of_trl(oracle, scale):
    trainer, _ = oracle
    trainer.scale_rewards = scale
    expected = with_mode(trainer, "token_truncate")["advantages"].tolist()
    task = Task(id="t", messages=[])
    groups = [
        Group(
            id=g,
            task=task,
            rollouts=[
                Rollout(task=task, reply="", score=Score(value=v))
                for v in REWARDS[4 * g : 4 * g + 4]
            ],
        )
        for g in range(2)
    ]
    mine = [value for row in advantages(groups, scale=scale) for value in row]
    assert mine == pytest.approx(expected, abs=1e-6)
