"""Trains the demo's model: a byte-level BPE tokenizer and a Qwen3 of about four million parameters.

    python3 benchmarks/tiny_model.py --out rlpost/template/model       # one GPU, three minutes
    python3 benchmarks/tiny_model.py --out OUT --steps 20 --documents 2000 --batch 32   # on a CPU

Needs torch, transformers, tokenizers, safetensors and numpy; rlpost need not be installed. The
corpus is `tiny_corpus.py`. The loss is over replies only: the model is to answer, not to invent
receipts. At the end the saved files are loaded again as the demo loads them (bf16 on disk,
float32 in memory) and judged on receipts that were not trained on; the figures go into
PROVENANCE.md beside the weights.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes below are the parallelism
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "envs"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny_corpus import Document, Habits, draw_document  # noqa: E402
from tiny_judge import judge_model  # noqa: E402
from tiny_tokenizer import END, PAD, render_prompt, save_tokenizer, train_tokenizer  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
VOCABULARY = 4096  # at most; the corpus decides how many merges are worth having
LONGEST = 768  # tokens of a document; longer ones are left out
ROOM = 256  # tokens a document may take on average in a full batch


def main() -> None:
    arguments = parse_arguments()
    habits = Habits(**{habit.name: getattr(arguments, habit.name) for habit in fields(Habits)})
    device = "cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu"
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    tokenizer = train_tokenizer(
        (
            draw_document(arguments.seed, index, habits=habits)
            for index in range(arguments.vocabulary_documents)
        ),
        entries=VOCABULARY,
    )
    corpus = encode_corpus(tokenizer, arguments, habits)
    seconds = time.monotonic() - began
    print(f"{tokenizer.get_vocab_size()} tokens, {len(corpus)} documents, {seconds:.0f} s")

    torch.manual_seed(arguments.seed)
    model = Qwen3ForCausalLM(Qwen3Config(**config_of(tokenizer))).to(device)
    print(f"{model.num_parameters():,} parameters on {device}")
    train(model, corpus, arguments, pad=tokenizer.token_to_id(PAD))
    save(model, tokenizer, out)
    figures = judge_model(out, device=device, tasks=arguments.judged, seed=arguments.judge_seed)
    figures["training seconds"] = round(time.monotonic() - began)
    print(json.dumps(figures, indent=2))
    write_provenance(out, arguments, habits, figures, model.num_parameters())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--documents", type=int, default=600_000, help="of the corpus")
    parser.add_argument(
        "--vocabulary-documents", type=int, default=20_000, help="for the tokenizer"
    )
    parser.add_argument("--batch", type=int, default=512, help="documents of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--judged", type=int, default=256, help="receipts of the final evaluation")
    parser.add_argument("--judge-seed", type=int, default=900_001)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--long-share", type=float, default=0.0, help="of receipts of many lines")
    parser.add_argument("--compile", action="store_true", help="torch.compile the trunk")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    for habit in fields(Habits):
        parser.add_argument(f"--{habit.name.replace('_', '-')}", type=float, default=habit.default)
    return parser.parse_args()


def config_of(tokenizer: Tokenizer) -> dict:
    """The model's configuration; the vocabulary is padded to a multiple of 64."""
    return {
        **SHAPE,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "rope_theta": 10_000.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "use_sliding_window": False,
    }


# ── corpus: documents -> token ids ────────────────────────────────────────────────────────────


class Corpus:
    """Token ids of all documents end to end. Document i is `ids[starts[i]:starts[i+1]]`, and its
    reply begins at `replies[i]` tokens from its own start."""

    def __init__(self, documents: list[tuple[list[int], int]]):
        lengths = [len(ids) for ids, _ in documents]
        self.ids = np.concatenate([np.asarray(ids, dtype=np.int16) for ids, _ in documents])
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.replies = np.asarray([reply for _, reply in documents])

    def __len__(self) -> int:
        return len(self.replies)

    def batches(
        self, size: int, *, seed: int, pad: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless batches of similar lengths: ids [B, L] and targets [B, L], -100 where nothing
        is learned. Right padding needs no mask: under a causal mask no token sees it."""
        rng = np.random.default_rng(seed)
        lengths = np.diff(self.starts)
        while True:
            order = rng.permutation(len(self))
            pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
            for pool in pools:
                by_length = pool[np.argsort(lengths[pool], kind="stable")]
                rows = list(_chunks(by_length, lengths[by_length], size))
                for row in rng.permutation(len(rows)):
                    yield self._batch(rows[row], lengths, pad)

    def _batch(
        self, rows: np.ndarray, lengths: np.ndarray, pad: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = -(-int(lengths[rows].max()) // 16) * 16  # few shapes
        ids = np.full((len(rows), width), pad, dtype=np.int64)
        targets = np.full((len(rows), width), -100, dtype=np.int64)
        for line, row in enumerate(rows):
            length, reply = lengths[row], self.replies[row]
            ids[line, :length] = self.ids[self.starts[row] : self.starts[row + 1]]
            targets[line, reply - 1 : length - 1] = ids[
                line, reply:length
            ]  # position t predicts t + 1
        return torch.from_numpy(ids), torch.from_numpy(targets)


def _chunks(rows: np.ndarray, lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows in batches of `size`, or of fewer where padded ones would take too much memory."""
    start = 0
    while start < len(rows):
        take = min(size, len(rows) - start)
        while take > 1 and take * lengths[start + take - 1] > size * ROOM:
            take //= 2
        yield rows[start : start + take]
        start += take


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], int]:
    """Token ids, and where the reply begins. Prompt and reply are encoded apart, as in sampling."""
    prompt = tokenizer.encode(render_prompt(document.messages, document.tools)).ids
    return prompt + tokenizer.encode(document.reply + END).ids, len(prompt)


def encode_corpus(tokenizer: Tokenizer, arguments: argparse.Namespace, habits: Habits) -> Corpus:
    """All documents in order, drawn and encoded by several processes."""
    size = 2000
    jobs = [
        (
            tokenizer.to_str(),
            arguments.seed,
            habits,
            arguments.long_share,
            range(start, min(start + size, arguments.documents)),
        )
        for start in range(0, arguments.documents, size)
    ]
    if arguments.processes == 1:
        return Corpus([document for job in jobs for document in _encode_range(*job)])
    with multiprocessing.get_context("fork").Pool(arguments.processes) as pool:
        return Corpus(
            [document for chunk in pool.starmap(_encode_range, jobs) for document in chunk]
        )


def _encode_range(
    tokenizer_json: str, seed: int, habits: Habits, long_share: float, numbers: range
) -> list[tuple[list[int], int]]:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    drawn = (draw_document(seed, n, habits=habits, long_share=long_share) for n in numbers)
    encoded = (encode(tokenizer, document) for document in drawn)
    return [(ids, reply) for ids, reply in encoded if len(ids) <= LONGEST]


# ── training ──────────────────────────────────────────────────────────────────────────────────


def train(
    model: Qwen3ForCausalLM, corpus: Corpus, arguments: argparse.Namespace, *, pad: int
) -> None:
    """AdamW, warm-up then cosine to a tenth; float32 weights, bf16 autocast on a GPU."""
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
    )
    warmup = min(100, arguments.steps // 5 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, warmup, arguments.steps)
    )
    trunk = torch.compile(model.model, dynamic=True) if arguments.compile else model.model
    batches = corpus.batches(arguments.batch, seed=arguments.seed, pad=pad)
    model.train()
    began, losses = time.monotonic(), []
    for step in range(1, arguments.steps + 1):
        ids, targets = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, H]
            learned = targets != -100
            logits = model.lm_head(hidden[learned])  # [tokens of replies, vocabulary]
        loss = cross_entropy(logits.float(), targets[learned])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step in (1, 10, arguments.steps):
            mean = torch.stack(losses).mean().item()
            print(f"step {step:5d}  loss {mean:.4f}  {time.monotonic() - began:.0f} s", flush=True)
            losses.clear()


def _rate(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + float(np.cos(np.pi * min(1.0, done))))


# ── files ─────────────────────────────────────────────────────────────────────────────────────


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """bf16 safetensors, configuration and tokenizer, readable by any transformers from 4.51 on."""
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().to(torch.bfloat16).cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **config_of(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_window_layers": SHAPE["num_hidden_layers"],
        "sliding_window": None,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    ends = [tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)]
    generation = {
        "eos_token_id": ends,
        "pad_token_id": ends[1],
        "do_sample": True,
        "temperature": 1.0,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, out)


def write_provenance(
    out: Path, arguments: argparse.Namespace, habits: Habits, figures: dict, parameters: int
) -> None:
    """Where the model comes from, so that anybody can make it again."""
    changed = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(arguments).items()
        if name not in ("out", "processes", "cpu", "compile") and value != _defaults()[name]
    ]
    command = " ".join(["python3 benchmarks/tiny_model.py --out rlpost/template/model", *changed])
    card = (
        torch.cuda.get_device_name() if torch.cuda.is_available() and not arguments.cpu else "CPU"
    )
    rates = ", ".join(f"{name} {rate:g}" for name, rate in asdict(habits).items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    text = f"""# Where this model comes from

A Qwen3-architecture language model of {parameters:,} parameters, trained from random weights by
`benchmarks/tiny_model.py` of rlpost on synthetic documents that `benchmarks/tiny_corpus.py`
draws. No text, weights or tokenizer of anybody else went into it. Licence: Apache-2.0.

    {command}

- Seed {arguments.seed}, {arguments.documents:,} documents, {arguments.steps:,} steps of at most
  {arguments.batch} documents, learning rate {arguments.learning_rate:g}.
- Made on {card} with torch {torch.__version__}; other hardware gives other bits and, within
  noise, the same figures.
- Annotators of the corpus disagree on purpose, at these rates (`Habits`): {rates}.
  The skill is there; what is left to learn is the convention.

Judged on {arguments.judged} receipts of seed {arguments.judge_seed}, none of them trained on. A
score is the share of right fields, and 0 unless the reply is JSON of the asked form.

| figure | value |
|---|---|
{rows}
"""
    (out / "PROVENANCE.md").write_text(text)


def _defaults() -> dict:
    argv, sys.argv = sys.argv, [sys.argv[0], "--out", "x"]
    try:
        return vars(parse_arguments())
    finally:
        sys.argv = argv


if __name__ == "__main__":
    main()
