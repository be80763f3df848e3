"""`rlpost export` without a run of its own: the real thing is in tests/cluster."""

import json

import pytest
from fakes import FakeLearner

from rlpost import assembly, checkpoints
from rlpost.cli import main
from rlpost.errors import RunError

JOB = '[run]\nname = "r"\ngpus = "cpu"\n[model]\npath = "m"\n[environment]\nuse = "receipts"\n'
JOB += '[[reward]]\nuse = "extraction"\n'


@pytest.fixture
async def run(tmp_path):
    """A run with checkpoints at 2, 4 and 6, of which 2 was the best."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    source = {"text": JOB, "path": str(tmp_path / "job.toml"), "overrides": ["run.seed=3"]}
    (folder / "source.json").write_text(json.dumps(source))
    for update in (2, 4, 6):
        state = {"update": update, "buffer": {"cohorts": []}}
        root = folder / "checkpoints"
        await checkpoints.save(root, update, state, FakeLearner(), keep=9, best=2)
    return folder


@pytest.fixture
def exported(monkeypatch):
    """What `export_job` was asked for."""
    calls = []

    def fake(job, checkpoint, out):
        calls.append((job, checkpoint, out))
        return {"serve": f"vllm serve {out}/merged"}

    monkeypatch.setattr(assembly, "export_job", fake)
    return calls


@pytest.mark.parametrize(
    ("arguments", "update"),
    [([], 2), (["--checkpoint", "best"], 2), (["--checkpoint", "last"], 6),
     (["--checkpoint", "4"], 4)],
)  # fmt: skip
def test_the_checkpoint_is_the_best_unless_another_is_named(run, exported, arguments, update):
    assert main(["export", str(run), *arguments]) == 0
    ((job, checkpoint, out),) = exported
    assert checkpoint == run / "checkpoints" / f"update-{update:05d}" / "learner"
    assert out == run / "export"
    assert job.run.seed == 3


def test_json_gives_one_object(run, exported, capsys, tmp_path):
    assert main(["export", str(run), "--json", "--out", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checkpoint"] == "update-00002"
    assert told["out"] == str(tmp_path / "out")
    assert told["serve"].startswith("vllm serve")


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(run, exported, capsys):
    for name in ("5", "newest"):
        assert main(["export", str(run), "--checkpoint", name]) == 2
        told = capsys.readouterr().err
        assert f"there is no checkpoint {name}; best, last, or one of: 2, 4, 6" in told
    assert exported == []


def test_a_damaged_checkpoint_is_not_exported(run, exported, capsys):
    (run / "checkpoints" / "update-00004" / "controller.json").write_text("{}")
    assert main(["export", str(run), "--checkpoint", "4"]) == 1
    assert "controller.json is damaged" in capsys.readouterr().err
    assert exported == []


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "is no run directory; name one that `rlpost run` wrote" in capsys.readouterr().err


def test_a_merged_model_that_disagrees_fails_the_export(run, monkeypatch, capsys):
    def disagree(job, checkpoint, out):
        raise RunError("the merged model is not the trained one")

    monkeypatch.setattr(assembly, "export_job", disagree)
    assert main(["export", str(run)]) == 1
    assert capsys.readouterr().err == "error: the merged model is not the trained one\n"


@pytest.mark.parametrize(
    ("name", "text", "licence"),
    [
        ("LICENSE", "Apache License", "Apache License"),
        ("README.md", "---\nlicense: mit\n---\n# A model", "mit"),
        ("README.md", "# A model under no licence", ""),
    ],
)
def test_the_licence_comes_from_the_models_file_or_its_card(tmp_path, name, text, licence):
    (tmp_path / name).write_text(text)
    assert assembly.licence(tmp_path) == licence
