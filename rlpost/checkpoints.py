"""The checkpoints of a run: the learner's folder and the controller's state under one manifest.

    checkpoints/update-00010/learner/…           whole by its own manifest (policy/checkpoint.py)
    checkpoints/update-00010/controller.json     cursor, buffer with its finished groups, best,
    proof checkpoints/update-00010/manifest.json       hashes of both; written last, before the
    rename

A reader takes the newest folder whose manifest holds, and says why it passed over a newer one.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlpost.clients import LearnerClient
from rlpost.errors import CheckpointError
from rlpost.types import Group, Rollout, Score, Task, Trajectory

CONTROLLER, LEARNER, MANIFEST, BEST = "controller.json", "learner", "manifest.json", "best.json"


def name_of(update: int) -> str:
    return f"update-{update:05d}"


async def save(
    root: Path,
    update: int,
    state: Mapping[str, Any],
    learner: LearnerClient,
    *,
    keep: int,
    best: int | None,
) -> Path:
    """Writes `root/update-NNNNN`, whole or absent; afterwards the `keep` newest and the best
    remain."""
    final, partial = root / name_of(update), root / f"{name_of(update)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text = json.dumps(state, default=_plain)
    await learner.save(str(partial / LEARNER))
    await asyncio.to_thread(_finish, root, partial, final, text)
    if best is not None and (root / name_of(best)).is_dir():
        write_whole(root / BEST, json.dumps({"update": best}).encode())
    _prune(root, keep=keep, best=best)
    return final


def _finish(root: Path, partial: Path, final: Path, text: str) -> None:
    write_whole(partial / CONTROLLER, text.encode())
    hashes = {name: _hash(partial / name) for name in (CONTROLLER, f"{LEARNER}/{MANIFEST}")}
    write_whole(partial / MANIFEST, json.dumps({"format": 1, "sha256": hashes}).encode())
    if final.exists():  # the same update, saved before it was left: absent for two renames only
        aside = root / f"{final.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    sync_folder(root)


def newest(
    root: Path, *, note: Callable[..., None] = lambda *_, **__: None
) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint and its state. Raises CheckpointError if there is none."""
    for folder in sorted(root.glob("update-?????"), reverse=True):
        try:
            return folder, read(folder)
        except CheckpointError as error:
            note("checkpoint_passed_over", checkpoint=folder.name, reason=str(error))
    raise CheckpointError(f"{root} holds no whole checkpoint; start the job anew without --resume")


def best(root: Path) -> Path:
    """The checkpoint of the best evaluation, else the newest whole one. Raises CheckpointError."""
    try:
        folder = root / name_of(int(json.loads((root / BEST).read_text())["update"]))
        read(folder)
        return folder
    except (OSError, ValueError, KeyError, CheckpointError):
        return newest(root)[0]


def read(folder: Path) -> dict[str, Any]:
    """The controller's state of a whole checkpoint. Raises CheckpointError naming the file at
    fault."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
        for name in (CONTROLLER, f"{LEARNER}/{MANIFEST}"):
            if _hash(folder / name) != hashes[name]:
                raise CheckpointError(f"{folder / name} is damaged: its hash is not the manifest's")
        state = json.loads((folder / CONTROLLER).read_text())
        learner = json.loads((folder / LEARNER / MANIFEST).read_text())["sha256"]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has a damaged manifest or state: {error!r}") from None
    for name, expected in learner.items():
        if not (folder / LEARNER / name).is_file() or _hash(folder / LEARNER / name) != expected:
            raise CheckpointError(f"{folder / LEARNER / name} is damaged or missing")
    state["buffer"]["cohorts"] = [
        [
            (id, task, version, _group(group) if group else None, dropped)
            for id, task, version, group, dropped in cohort
        ]
        for cohort in state["buffer"]["cohorts"]
    ]
    return state


def _group(value: Mapping[str, Any]) -> Group:
    rollouts = tuple(_rollout(item) for item in value["rollouts"])
    return Group(id=value["id"], task=Task(**value["task"]), rollouts=rollouts)


def _rollout(value: Mapping[str, Any]) -> Rollout:
    fields = dict(value)
    fields["task"] = Task(**value["task"])
    fields["trajectory"] = Trajectory(**value["trajectory"]) if value["trajectory"] else None
    fields["score"] = Score(**value["score"]) if value["score"] else None
    return Rollout(**fields)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} does not belong into a checkpoint")


def _prune(root: Path, *, keep: int, best: int | None) -> None:
    folders = sorted(root.glob("update-?????"), reverse=True)
    kept = {folder.name for folder in folders[:keep]}
    if best is not None:
        kept.add(name_of(best))
    for folder in folders:
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob("update-?????.*"):  # replaced, or left half-written by a kill
        shutil.rmtree(folder, ignore_errors=True)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """The old content or the new one, never a part: temporary name, fsync, rename."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
