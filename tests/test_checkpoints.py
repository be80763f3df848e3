"""The checkpoints of a run: whole or absent, and plain JSON."""

import json
import os
from dataclasses import replace

import pytest
from fakes import FakeLearner, group, task
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost import checkpoints
from rlpost.errors import CheckpointError


def state(update, groups=()):
    cohort = [(g.id, g.task.id, g.policy_version, g, "") for g in groups]
    return {
        "update": update,
        "buffer": {"cohorts": [[*cohort, (99, "t9", 0, None, "")]], "released": update},
    }


async def save(root, update, *, keep=2, best=None, groups=()):
    return await checkpoints.save(
        root, update, state(update, groups), FakeLearner(), keep=keep, best=best
    )


def names(root):
    return sorted(path.name for path in root.iterdir())


async def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    rich = group(4, [0.5, None], version=3, of=task("t4", answer={"a": [1, None]}, meta={"k": 2}))
    rich = replace(rich, rollouts=(replace(rich.rollouts[0], info={"n": 1}), rich.rollouts[1]))
    folder = await save(tmp_path, 7, groups=[rich])
    read = checkpoints.read(folder)
    assert read["update"] == 7
    ((kept, running),) = read["buffer"]["cohorts"]
    assert kept[:3] == (4, "t4", 3)
    assert running[3] is None
    back = kept[3]
    assert back.policy_version == 3
    assert back.values == [0.5]
    assert back.task.answer == {"a": [1, None]}
    assert list(back.rollouts[0].trajectory.token_ids) == list(
        rich.rollouts[0].trajectory.token_ids
    )
    assert back.rollouts[0].info == {"n": 1}
    assert back.rollouts[1].status == "crashed"


@settings(max_examples=30, deadline=None)
@given(st.floats(allow_nan=False), st.text())
def test_numbers_and_texts_come_back_bit_for_bit(number, text):
    """Log-probabilities are trained on after a resume: nothing may be rounded."""
    import asyncio
    import tempfile
    from pathlib import Path

    one = group(0, [0.5], of=task("t0", answer=text))
    trajectory = replace(one.rollouts[0].trajectory, logprobs=(number,) * 4)
    one = replace(one, rollouts=(replace(one.rollouts[0], trajectory=trajectory),))
    with tempfile.TemporaryDirectory() as folder:
        saved = asyncio.run(save(Path(folder), 1, groups=[one]))
        back = checkpoints.read(saved)["buffer"]["cohorts"][0][0][3]
    assert list(back.rollouts[0].trajectory.logprobs) == [number] * 4
    assert back.task.answer == text


async def test_the_newest_and_the_best_are_kept(tmp_path):
    for update in range(6):
        await save(tmp_path, update, keep=2, best=min(update, 1))
    assert names(tmp_path) == ["best.json", "update-00001", "update-00004", "update-00005"]
    assert checkpoints.best(tmp_path).name == "update-00001"
    assert checkpoints.newest(tmp_path)[0].name == "update-00005"


async def test_without_a_best_the_newest_is_exported(tmp_path):
    await save(tmp_path, 3)
    assert checkpoints.best(tmp_path).name == "update-00003"


async def test_saving_an_update_again_replaces_it(tmp_path):
    await save(tmp_path, 3)
    await save(tmp_path, 3, groups=[group(1, [1.0, 0.0])])
    assert names(tmp_path) == ["update-00003"]
    assert len(checkpoints.newest(tmp_path)[1]["buffer"]["cohorts"][0]) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "controller.json").write_text("{}"),
        lambda folder: (folder / "controller.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "learner" / "manifest.json").write_text('{"sha256": {}} '),
        lambda folder: os.truncate(folder / "controller.json", 10),
    ],
)
async def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    await save(tmp_path, 1)
    damage(await save(tmp_path, 2))
    notes = []
    folder, read = checkpoints.newest(tmp_path, note=lambda kind, **fields: notes.append(fields))
    assert (folder.name, read["update"]) == ("update-00001", 1)
    assert [note["checkpoint"] for note in notes] == ["update-00002"]
    assert str(tmp_path / "update-00002") in notes[0]["reason"]


async def test_a_learner_file_that_is_missing_or_changed_is_noticed(tmp_path):
    class WithWeights(FakeLearner):
        async def save(self, folder):
            await super().save(folder)
            import hashlib
            from pathlib import Path

            (Path(folder) / "weights").write_bytes(b"abc")
            hashes = {"weights": hashlib.sha256(b"abc").hexdigest()}
            (Path(folder) / "manifest.json").write_text(json.dumps({"sha256": hashes}))

    folder = await checkpoints.save(tmp_path, 1, state(1), WithWeights(), keep=1, best=None)
    assert checkpoints.read(folder)["update"] == 1
    (folder / "learner" / "weights").write_bytes(b"abd")
    with pytest.raises(CheckpointError, match="weights is damaged or missing"):
        checkpoints.read(folder)


async def test_a_save_that_is_cut_short_leaves_no_checkpoint_and_the_last_one_whole(tmp_path):
    class Full(FakeLearner):
        async def save(self, folder):
            raise OSError(28, "No space left on device")

    await save(tmp_path, 1)
    with pytest.raises(OSError, match="No space left"):
        await checkpoints.save(tmp_path, 2, state(2), Full(), keep=2, best=None)
    assert checkpoints.newest(tmp_path)[0].name == "update-00001"
    await save(tmp_path, 2)  # what the cut left behind is not in the way
    assert checkpoints.newest(tmp_path)[0].name == "update-00002"


async def test_what_a_kill_left_half_written_is_cleared_away_by_the_next_save(tmp_path):
    (tmp_path / "update-00007.partial" / "learner").mkdir(parents=True)
    await save(tmp_path, 8)
    (tmp_path / "update-00008.old" / "learner").mkdir(parents=True)
    (tmp_path / "update-00006.old").mkdir()
    await save(tmp_path, 8)
    assert names(tmp_path) == ["update-00008"]


def test_no_checkpoint_at_all_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="holds no whole checkpoint; start the job anew"):
        checkpoints.newest(tmp_path)


async def test_nothing_that_is_not_plain_is_written(tmp_path):
    bad = state(1) | {"callback": print}
    with pytest.raises(TypeError, match="does not belong into a checkpoint"):
        await checkpoints.save(tmp_path, 1, bad, FakeLearner(), keep=1, best=None)
