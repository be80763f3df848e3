import contextlib
import os
import random

import numpy as np
import pytest
import torch

from rlpost.errors import CheckpointError
from rlpost.policy import checkpoint
from rlpost.policy.checkpoint import Checkpoint, is_whole, random_states, restore_random, write

TENSORS = {"weights.safetensors": {"a": torch.arange(6.0), "b": torch.ones(2, 3)}}
DOCUMENTS = {"state.json": {"version": 3}}


def save(folder, **changes):
    return write(folder, **{"tensors": TENSORS, "documents": DOCUMENTS, **changes})


def test_what_is_written_is_read(tmp_path):
    found = Checkpoint(save(tmp_path / "c"))
    assert found.document("state.json") == {"version": 3}
    assert torch.equal(found.tensors("weights.safetensors")["a"], torch.arange(6.0))
    assert is_whole(tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["c"]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_found_and_the_file_named(tmp_path, name, damage):
    path = save(tmp_path / "c") / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    assert not is_whole(tmp_path / "c")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint(tmp_path / "c").verify()


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    (save(tmp_path / "c") / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        Checkpoint(tmp_path / "c")


def test_a_file_beside_the_manifest_is_not_trusted(tmp_path):
    (save(tmp_path / "c") / "extra.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"extra\.json"):
        Checkpoint(tmp_path / "c").document("extra.json")


@pytest.mark.parametrize("call", ["_write_synced", "_sync_folder"])
@pytest.mark.parametrize("when", range(4))
def test_a_crash_at_any_moment_leaves_the_old_checkpoint_or_the_new(
    tmp_path, monkeypatch, call, when
):
    save(tmp_path / "c")
    count, original = iter(range(99)), getattr(checkpoint, call)

    def crash(*arguments):
        if next(count) == when:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(checkpoint, call, crash)
    with contextlib.suppress(OSError):
        save(tmp_path / "c", documents={"state.json": {"version": 4}})
    monkeypatch.undo()
    assert is_whole(tmp_path / "c")
    assert Checkpoint(tmp_path / "c").document("state.json")["version"] in (3, 4)
    save(tmp_path / "c", documents={"state.json": {"version": 5}})  # leftovers are in nobody's way
    assert Checkpoint(tmp_path / "c").document("state.json")["version"] == 5
    assert sorted(os.listdir(tmp_path)) == ["c"]


def test_files_are_synced_before_the_manifest_and_the_manifest_before_the_rename(
    tmp_path, monkeypatch
):
    seen = []
    original = checkpoint._write_synced
    monkeypatch.setattr(
        checkpoint, "_write_synced", lambda path, data: (seen.append(path), original(path, data))
    )
    save(tmp_path / "c")
    assert seen[-1].name == "manifest.json"
    assert all(path.parent.name == "c.partial" for path in seen)


def test_random_states_go_on_where_they_were():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss()

    draw()
    states = random_states("cpu")
    first = draw()
    draw()
    restore_random(states, device="cpu")
    assert draw() == first
