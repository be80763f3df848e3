"""How good the tiny model is at receipts, by itself: no reward of rlpost is asked.

A reply scores the share of right fields, and 0 unless it is JSON of the asked form: the idea of the
`extraction` reward with a schema.
"""

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rlpost_envs.receipts import DEFAULT_FIELDS, Receipts
from tiny_tokenizer import END, render_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpost.types import Task

REPLY = 96  # tokens at most
SAMPLES = 8


def score_reply(reply: str, task: Task) -> tuple[float, dict[str, bool]]:
    """The score in [0, 1], and which fields are right whatever the form."""
    try:
        read = json.loads(reply.strip())
    except (ValueError, RecursionError):
        return 0.0, {}
    if not isinstance(read, dict):
        return 0.0, {}
    right = {field: _same(field, read.get(field), gold) for field, gold in task.answer.items()}
    formed = set(read) == set(task.answer) and all(_formed(f, v) for f, v in read.items())
    return (mean(right.values()) if formed else 0.0), right


def _same(field: str, read: Any, gold: Any) -> bool:
    if field == "total":
        return isinstance(read, int | float) and abs(read - gold) < 0.005
    if not isinstance(read, str):
        return False
    if field in ("company", "address"):
        return re.sub(r"\W", "", read).casefold() == re.sub(r"\W", "", gold).casefold()
    return read == gold


def _formed(field: str, value: Any) -> bool:
    if field == "total":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if field == "date":
        return isinstance(value, str) and bool(re.fullmatch(r"\d{4}-\d\d-\d\d", value))
    return isinstance(value, str) and value != ""


def judge_model(folder: Path, *, device: str, tasks: int, seed: int) -> dict[str, Any]:
    """Greedy and sampled figures over fresh receipts, the model read from `folder` in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    torch.manual_seed(seed)
    asked = Receipts(count=tasks, seed=seed).tasks()
    greedy = [
        (t, r[0]) for t, r in zip(asked, replies(model, tokenizer, asked, samples=1), strict=True)
    ]
    sampled = replies(model, tokenizer, asked, samples=SAMPLES)
    groups = [[score_reply(r, t)[0] for r in g] for t, g in zip(asked, sampled, strict=True)]
    judged = [score_reply(reply, task) for task, reply in greedy]
    figures = {
        "greedy score": round(mean(score for score, _ in judged), 3),
        "sampled score": round(mean(mean(group) for group in groups), 3),
        f"best of {SAMPLES}": round(mean(max(group) for group in groups), 3),
        "groups with a spread": round(mean(max(g) - min(g) > 0.02 for g in groups), 3),
        "greedy, asked form": round(mean(score > 0 for score, _ in judged), 3),
    }
    for field in DEFAULT_FIELDS:
        figures[f"greedy, {field} right"] = round(mean(r.get(field, False) for _, r in judged), 3)
    for task, reply in greedy[:3]:
        print(task.messages[0]["content"], "\n=>", reply, "\ngold", json.dumps(task.answer), "\n")
    return figures


@torch.no_grad()
def replies(model: Any, tokenizer: Any, tasks: list[Task], *, samples: int) -> list[list[str]]:
    """`samples` replies a task; one is greedy, several are sampled at temperature 1."""
    tokenizer.padding_side = "left"
    found: list[list[str]] = []
    for first in range(0, len(tasks), 64):
        prompts = [render_prompt(task.messages) for task in tasks[first : first + 64]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        choice = (
            {"do_sample": True, "top_k": 0, "top_p": 1.0} if samples > 1 else {"do_sample": False}
        )
        ids = model.generate(
            **batch,
            **choice,
            max_new_tokens=REPLY,
            num_return_sequences=samples,
            eos_token_id=tokenizer.convert_tokens_to_ids(END),
        )
        texts = tokenizer.batch_decode(
            ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        found += [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return found
