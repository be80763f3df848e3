"""GRPO on real receipts: before and after on SROIE's dev rows, exact (SROIE's rule) and type-aware.

    python benchmarks/sroie.py --data shared/data/sroie --model MODEL --out OUT [--set learner.…]

Runs benchmarks/sroie/job.toml through `rlpost run`, then answers every dev row greedily with the
model as it was and with the adapter of the best checkpoint, on one engine, and prints one table.
The dev rows are opened only for that: the checkpoint is chosen on validation rows cut from train.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

JOB = Path(__file__).parent / "sroie" / "job.toml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with train and dev.jsonl")
    parser.add_argument("--model", required=True, type=Path, help="a model folder")
    parser.add_argument("--out", required=True, type=Path, help="the run directory to write")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--rows", type=int, default=10_000, help="dev rows at most")
    args = parser.parse_args()
    overrides = [
        f"data.train={(args.data / 'train.jsonl').resolve()}",
        f"model.path={args.model.resolve()}",
        *args.overrides,
    ]
    began = time.monotonic()
    command = [sys.executable, "-m", "rlpost", "run", str(JOB), "--out", str(args.out)]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, check=False)
    seconds = time.monotonic() - began
    if done.returncode not in (0, 1, 130) or not list(args.out.glob("checkpoints/update-*")):
        return done.returncode or 1
    result = asyncio.run(compare(args.data / "dev.jsonl", overrides, args.out, rows=args.rows))
    result["run_seconds"] = round(seconds, 1)
    result["training_seconds"] = training_seconds(args.out)
    result["card"] = card()
    (args.out / "sroie.json").write_text(json.dumps(result, indent=1))
    show(result)
    return done.returncode


async def compare(dev: Path, overrides: list[str], run: Path, *, rows: int) -> dict[str, Any]:
    """Greedy replies to the dev rows under the base and under the best checkpoint's adapter."""
    from rlpost import assembly, checkpoints
    from rlpost.clients import LocalRollout
    from rlpost.config import read_job
    from rlpost.engine.base import BASE_VERSION, Publication
    from rlpost.evaluation import evaluate
    from rlpost.policy.renderer import Renderer
    from rlpost.preparation import model_folder, read_tasks

    job = read_job(JOB, overrides=overrides)
    limit = job.rollout.max_reply_tokens or 220
    renderer = Renderer(model_folder(job), thinking=job.model.thinking)
    rows_read = read_tasks(job, str(dev.resolve()))[:rows]
    room = job.model.max_length - limit
    tasks = [task for task in rows_read if len(renderer.prompt(task.messages)) <= room]
    worker = assembly.build_worker(job)
    client = LocalRollout(worker)
    await client.start()
    metrics = assembly.task_metrics(job)
    before = await evaluate(
        [client], tasks, version=BASE_VERSION, max_reply_tokens=limit, metrics=metrics
    )
    best = checkpoints.best(run / "checkpoints")
    adapter = await asyncio.to_thread(_adapter, job, best)
    await client.publish(Publication(version=1, kind="lora", **adapter), None)
    after = await evaluate([client], tasks, version=1, max_reply_tokens=limit, metrics=metrics)
    await client.stop()
    samples = [
        {
            "id": old.task.id,
            "gold": old.task.answer,
            "before": old.reply,
            "after": new.reply,
        }
        for old, new in list(zip(before.rollouts, after.rollouts, strict=True))[:3]
    ]
    return {
        "rows": len(tasks),
        "too_long": len(rows_read) - len(tasks),
        "checkpoint": best.name,
        "before": before.summary(),
        "after": after.summary(),
        "samples": samples,
    }


def _adapter(job: Any, checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's adapter as the learner would publish it."""
    from dataclasses import replace

    from rlpost import assembly, checkpoints
    from rlpost.learner import Learner

    spec = replace(assembly.learner_spec(job), device="cpu")
    learner = Learner(spec)
    learner.start()
    learner.load(checkpoint / checkpoints.LEARNER)
    whole = learner.publication()
    return {"payload": whole.payload, "adapter_config": whole.adapter_config}


def training_seconds(run: Path) -> float:
    """Seconds of all updates, evaluations between them not counted."""
    from rlpost.run_directory import read_metrics

    lines = [line for line in read_metrics(run) if line.get("seconds")]
    return round(sum(line["seconds"]["update"] for line in lines), 1)


def card() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def show(result: dict[str, Any]) -> None:
    print(
        f"\nSROIE dev, {result['rows']} receipts ({result['too_long']} too long),"
        f" {result['checkpoint']}, {result['card']},"
        f" training {result['training_seconds']} s of {result['run_seconds']} s"
    )
    names = [*result["before"]["metrics"], *result["before"]["parts"]]
    for name in names:
        pair = [
            {**result[when]["metrics"], **result[when]["parts"]}.get(name, float("nan"))
            for when in ("before", "after")
        ]
        print(f"  {name:32s} {pair[0]:.3f} -> {pair[1]:.3f}")
    for sample in result["samples"]:
        print(json.dumps(sample, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
