"""The demo's model, its corpus and its job: what the template folder promises."""

import itertools
import json
import random
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rlpost.config import read_job
from rlpost.reward import recorded
from rlpost.types import Task

ROOT = Path(__file__).parents[2]
TEMPLATE_FOLDER = ROOT / "rlpost" / "template"
MODEL = TEMPLATE_FOLDER / "model"
sys.path.insert(0, str(ROOT / "benchmarks"))

from rlpost_envs.receipts import (  # noqa: E402
    DEFAULT_FIELDS,
    LAYOUTS,
    PROMPT,
    Receipts,
    draw_receipt,
    schema_of,
)
from tiny_corpus import Habits, annotate, draw_document  # noqa: E402
from tiny_judge import score_reply  # noqa: E402
from tiny_tokenizer import END, render_prompt  # noqa: E402

NONE = Habits(**{habit.name: 0.0 for habit in fields(Habits)})


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def task_of(receipt):
    answer = {field: receipt.values[field] for field in DEFAULT_FIELDS}
    return Task(id="x", messages=[], answer=answer, schema=schema_of(DEFAULT_FIELDS))


# the corpus


def test_the_corpus_shares_no_page_with_the_demo():
    corpus = {draw_receipt("corpus/7", index, vendors=10**9).text for index in range(5000)}
    job = read_job(TEMPLATE_FOLDER / "job.toml")
    count, seed = (job.environment.arguments[name] for name in ("count", "seed"))
    demo = Receipts(count=count, seed=seed).tasks()
    assert len(demo) == count
    assert not any(task.messages[0]["content"].split("\n\n", 1)[1] in corpus for task in demo)


def test_a_document_depends_on_seed_and_index_alone():
    first = [draw_document(1, index, habits=Habits()) for index in range(60)]
    assert first == [draw_document(1, index, habits=Habits()) for index in range(60)]
    assert first != [draw_document(2, index, habits=Habits()) for index in range(60)]
    assert {document.kind for document in first} == {"receipt", "label", "call", "sum"}


def test_an_annotator_without_habits_writes_the_gold():
    for index in range(200):
        receipt = draw_receipt(4, index)
        reply = annotate(receipt, DEFAULT_FIELDS, random.Random(index), NONE)
        assert json.loads(reply) == task_of(receipt).answer


@pytest.mark.parametrize("habit", [h.name for h in fields(Habits) if h.name != "lean"])
def test_every_habit_alone_costs_something(habit):
    always = Habits(**{f.name: float(f.name == habit) for f in fields(Habits)})
    scores = []
    for index in range(200):
        receipt = draw_receipt(4, index)
        reply = annotate(receipt, DEFAULT_FIELDS, random.Random(index), always)
        scores.append(score_reply(reply, task_of(receipt))[0])
    assert min(scores) < 1.0
    assert sum(scores) / len(scores) < 0.99


def test_habits_lean_by_layout_and_keep_their_range():
    habits = Habits()
    seen = [habits.of(layout.name) for layout in LAYOUTS]
    assert all(0 <= p <= 1 for probabilities in seen for p in probabilities.values())
    assert len({probabilities["printed_date"] for probabilities in seen}) == 2
    assert max(p["printed_date"] for p in seen) > 0.5 > min(p["printed_date"] for p in seen)


def test_annotators_as_set_leave_between_a_third_and_two_thirds_to_learn():
    scores = []
    for index in range(600):
        receipt = draw_receipt(5, index)
        reply = annotate(receipt, DEFAULT_FIELDS, random.Random(index), Habits())
        scores.append(score_reply(reply, task_of(receipt))[0])
    assert 0.35 < sum(scores) / len(scores) < 0.6


def test_the_judge_of_the_script_agrees_with_the_extraction_reward():
    reward = pytest.importorskip("rlpost_rewards.extraction")
    types = {"company": "text", "date": "date", "invoice": "id", "total": "amount"}
    for index in range(300):
        receipt = draw_receipt(6, index)
        reply = annotate(receipt, DEFAULT_FIELDS, random.Random(index), Habits())
        task = task_of(receipt)
        value = reward.extraction(task, recorded(task, reply), fields=types, day_first=True).value
        assert value == pytest.approx(score_reply(reply, task)[0], abs=0.2)
        assert (value > 0) == (score_reply(reply, task)[0] > 0)


# tokenizer and template

TOOLS = [{"type": "function", "function": {"name": "é", "parameters": {"type": "object"}}}]
ASKED = [{"role": "user", "content": "hi {x} <think>"}]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", [ASKED, [{"role": "system", "content": "Be kind."}, *ASKED]])
def test_training_prompts_are_what_the_template_renders(tokenizer, messages, tools):
    rendered = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert rendered == render_prompt(messages, tools)


def test_thinking_opens_a_thought_only_when_asked(tokenizer):
    off, on = (
        tokenizer.apply_chat_template(
            ASKED, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        for thinking in (False, True)
    )
    assert on == off + "<think>\n"


def test_a_conversation_is_a_prefix_of_its_continuation(tokenizer):
    call = {"type": "function", "function": {"name": "é", "arguments": {"a": 1}}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "<think>hm</think>done"},
        {"role": "user", "content": "thanks"},
    ]
    ids = [
        tokenizer.apply_chat_template(messages[:n], tools=TOOLS, return_dict=False)
        for n in range(1, len(messages) + 1)
    ]
    assert all(b[: len(a)] == a for a, b in itertools.pairwise(ids))
    assert '<tool_call>{"name": "é", "arguments": {"a": 1}}</tool_call>' in tokenizer.decode(
        ids[-1]
    )


def test_any_text_survives_the_tokenizer(tokenizer):
    text = '{"tötal": 12.50}\n\t価格 €  ok <tool_call>'
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.tokenize("2025-03-14") == list("2025-03-14")


def test_receipts_and_answers_are_short(tokenizer):
    tasks = Receipts(count=200, seed=11).tasks()
    prompts = [len(tokenizer.encode(render_prompt(task.messages))) for task in tasks]
    golds = [len(tokenizer.encode(json.dumps(task.answer) + END)) for task in tasks]
    job = read_job(TEMPLATE_FOLDER / "job.toml")
    assert max(prompts) + job.rollout.max_reply_tokens <= job.model.max_length
    assert max(golds) < 60 and sum(prompts) / len(prompts) < 130


# the template folder


def test_the_demo_job_is_valid_and_says_its_dtype():
    job = read_job(TEMPLATE_FOLDER / "job.toml")
    assert job.model.dtype == "float32" and job.model.thinking is False
    assert job.run.gpus == "cpu"
    assert (job.rollout.tasks_per_update, job.rollout.group_size) == (16, 8)


def test_the_demo_asks_as_the_environment_does():
    asked = Receipts(count=5, prompt=str(TEMPLATE_FOLDER / "prompt.md")).tasks()
    assert asked == Receipts(count=5).tasks()
    assert (TEMPLATE_FOLDER / "prompt.md").read_text() == PROMPT + "\n"


def test_the_model_is_small_tied_and_documented():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["tie_word_embeddings"]
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 16 * 2**20
    provenance = (MODEL / "PROVENANCE.md").read_text()
    assert "Apache-2.0" in provenance and "benchmarks/tiny_model.py" in provenance


def test_the_weights_fit_the_configuration_and_are_bf16():
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    weights = load_file(MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert 4e6 <= model.num_parameters() <= 8e6
    assert model.config.rope_parameters["rope_theta"] == 10_000.0
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"].float())


def test_batches_learn_each_reply_from_the_token_before_it_and_stay_within_their_room():
    import numpy as np
    from tiny_model import ROOM, Corpus

    rng = np.random.default_rng(0)
    documents = []
    for number in range(100):
        length = int(rng.integers(8, 700))
        documents.append(([number, *range(1000, 1000 + length - 1)], length - 5))
    seen = []
    for ids, targets in itertools.islice(Corpus(documents).batches(8, seed=1, pad=0), 100):
        assert ids.numel() <= 8 * (ROOM + 16) or len(ids) == 1
        for line, target in zip(ids.tolist(), targets.tolist(), strict=True):
            document, reply = documents[line[0]]
            seen.append(line[0])
            learned = {t: token for t, token in enumerate(target) if token != -100}
            assert learned == {t - 1: document[t] for t in range(reply, len(document))}
        if len(seen) >= 100:
            break
    assert sorted(seen[:100]) == list(range(100))


@pytest.mark.slow
def test_the_shipped_tokenizer_is_what_the_script_makes_today():
    from tiny_model import VOCABULARY
    from tiny_tokenizer import train_tokenizer

    documents = (draw_document(7, index, habits=Habits()) for index in range(20_000))
    made = train_tokenizer(documents, entries=VOCABULARY)
    assert json.loads(made.to_str()) == json.loads((MODEL / "tokenizer.json").read_text())
