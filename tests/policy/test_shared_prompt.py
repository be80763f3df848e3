import pytest
import torch

from rlpost.errors import RunError
from rlpost.policy.model import PolicyModel, lay_out, load
from rlpost.policy.shared_prompt import Row
from tests.families import FAMILIES, make

PROMPT = list(range(40, 70))  # longer than Gemma's window
GROUP = [[*PROMPT, 5, 6, 7], [*PROMPT, 9], [*PROMPT, 300, 301, 302, 303, 304]]
OTHERS = [[8, 9, 10, 11], [*PROMPT[:20], 1, 2]]
SEQUENCES, PROMPTS = [*GROUP, *OTHERS], [30, 30, 30, 2, 20]


@pytest.fixture(scope="module", params=[f for f in FAMILIES if f != "qwen3_5"])
def folder(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


def gradients(folder, layout, *, checkpointing=False):
    model = load(folder, dtype="float64")
    policy = PolicyModel(model, layout=layout, checkpointing=checkpointing)
    logprobs, _ = policy.forward(lay_out(SEQUENCES, prompts=PROMPTS))
    weights = torch.linspace(-1, 1, logprobs.numel(), dtype=torch.float64)
    (logprobs * weights).sum().backward()
    return logprobs, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_row_gives_the_values_and_gradients_of_single_sequences(folder, checkpointing):
    expected, gradient = gradients(folder, "padded")
    found, other = gradients(folder, "packed", checkpointing=checkpointing)
    assert (found - expected).abs().max() < 1e-5  # norms and rotary angles are fp32 by design
    assert (other - gradient).abs().max() < 1e-5 * gradient.abs().max()


def test_the_shared_prompt_is_computed_once(folder):
    row = Row.of(lay_out(SEQUENCES, prompts=PROMPTS))
    assert row.groups == ((30, (3, 1, 5)), (2, (2,)), (20, (2,)))
    assert row.tokens.numel() == 30 + 9 + 4 + 22
    ids = torch.tensor([t for s in SEQUENCES for t in s])
    assert torch.equal(ids[row.tokens][row.place], ids)  # every token is found in the row


def test_replies_do_not_see_each_other(folder):
    policy = PolicyModel(load(folder), layout="packed")
    with torch.no_grad():
        first = policy.forward(lay_out(GROUP, prompts=[30] * 3))[0]
        changed = [[*PROMPT, 99, 98, 97], *GROUP[1:]]
        second = policy.forward(lay_out(changed, prompts=[30] * 3))[0]
    assert torch.equal(first[33:], second[33:])
    assert not torch.equal(first[:33], second[:33])


def test_prompts_of_one_length_but_other_tokens_are_not_shared():
    row = Row.of(lay_out([[1, 2, 3], [1, 5, 3]], prompts=[2, 2]))
    assert row.groups == ((2, (1,)), (2, (1,)))


def test_a_sequence_without_trained_tokens_is_all_prompt():
    batch = lay_out([[1, 2, 3], [1, 2, 3]], prompts=[3, 3])
    assert Row.of(batch).groups == ((3, (0, 0)),)


def test_rows_are_refused_by_a_model_whose_attention_knows_no_plan(tmp_path):
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(make("qwen3", tmp_path))
    with pytest.raises(RunError, match="packed"):
        PolicyModel(plain).forward(lay_out(SEQUENCES), layout="packed")
