"""A folder that is whole or absent: safetensors and JSON, and a manifest of hashes written last.

`write` fills a temporary folder beside the target, syncs every file, writes `manifest.json`,
syncs, renames and syncs the parent. A crash at any moment leaves the old folder, or none, and a
`.partial` that the next `write` removes. `read` trusts nothing whose hash is not in the manifest.
Nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from rlpost.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1


def write(
    folder: str | Path,
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    documents: Mapping[str, Any],
) -> Path:
    """Writes `tensors` (file name -> name -> tensor) and `documents` (file name -> JSON) as
    `folder`.

    An older checkpoint of that name is replaced, and is there until the new one is whole.
    """
    folder = Path(folder)
    partial, old = (folder.with_name(f"{folder.name}.{word}") for word in ("partial", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    files = {name: save_tensors(_plain(content)) for name, content in tensors.items()}
    files.update({name: _json(content) for name, content in documents.items()})
    for name, data in files.items():
        _write_synced(partial / name, data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    _write_synced(partial / MANIFEST, _json(_manifest(hashes)))
    _sync_folder(partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def is_whole(folder: str | Path) -> bool:
    """Whether `folder` holds a checkpoint all of whose files have the hashes of its manifest."""
    try:
        Checkpoint(folder).verify()
    except CheckpointError:
        return False
    return True


class Checkpoint:
    """A checkpoint being read. Every method raises CheckpointError naming the file that is at
    fault."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self._parse(MANIFEST, self._bytes(MANIFEST))
        hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
        if manifest != _manifest(hashes):
            raise CheckpointError(
                f"{self.folder / MANIFEST} is damaged or of another format than {FORMAT}"
            )
        self.hashes: dict[str, str] = hashes

    def verify(self) -> None:
        """Reads and checks every file."""
        for name in self.hashes:
            self._checked(name)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        try:
            return load_tensors(self._checked(name))
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / name} is not safetensors: {error}") from error

    def document(self, name: str) -> Any:
        return self._parse(name, self._checked(name))

    def _checked(self, name: str) -> bytes:
        data = self._bytes(name)
        if hashlib.sha256(data).hexdigest() != self.hashes.get(name):
            raise CheckpointError(
                f"{self.folder / name} is damaged: its hash is not the manifest's"
            )
        return data

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / name} cannot be read: {error.strerror}"
            ) from error

    def _parse(self, name: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / name} is not JSON: {error}") from error


def _manifest(hashes: Any) -> dict[str, Any]:
    """The manifest vouches for itself too, so that its own damage is not blamed on a file."""
    own = hashlib.sha256(_json(hashes)).hexdigest()
    return {"format": FORMAT, "sha256": hashes, "own_sha256": own}


def _plain(content: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def random_states(device: str) -> dict[str, torch.Tensor]:
    """The generators of torch (and of `device`), numpy and Python as tensors."""
    _, keys, *rest = np.random.get_state()
    version, values, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([float(value) for value in rest], dtype=torch.float64),
        "python": torch.tensor([version, *values], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
    }
    if device != "cpu":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def restore_random(states: Mapping[str, torch.Tensor], *, device: str) -> None:
    """Sets every generator that `random_states` read."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, *values = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(values), None if math.isnan(gauss) else gauss))
    if "device" in states and device != "cpu":
        torch.cuda.set_rng_state(states["device"], device)


# ── the optimizer ───────────────────────────────────────────────────────────────────────────────


def moments(
    trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """An optimizer's states under `parameter::state`, by the parameters' names in `trained`."""
    return {
        f"{name}::{key}": value
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    kept: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Puts back what `moments` returned; step counts stay on the CPU, as torch keeps them."""
    optimizer.state.clear()
    for key, value in kept.items():
        name, kind = key.rsplit("::", 1)
        parameter = trained[name]
        place = "cpu" if kind == "step" else parameter.device
        optimizer.state[parameter][kind] = value.to(place)
