"""Names become objects, and a wrong name becomes one line with its cure."""

import importlib.metadata
import sys
from importlib.metadata import EntryPoint

import pytest

from rlpost import plugins
from rlpost.errors import PluginError


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def message_of(name, base_dir, group="rlpost.rewards"):
    with pytest.raises(PluginError) as caught:
        plugins.resolve(group, name, base_dir=base_dir)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_built_in_rewards_come_through_the_entry_point():
    assert {"label", "math", "extraction"} <= set(plugins.names("rlpost.rewards"))
    assert plugins.origin("rlpost.rewards", "label").endswith("rlpost_rewards.label:label")


def test_a_mistyped_name_is_told_the_nearest_one(tmp_path):
    assert "did you mean 'extraction'?" in message_of("extracton", tmp_path)
    assert "no environment named" in message_of("recepts", tmp_path, "rlpost.envs")


def test_two_distributions_with_one_name_are_both_named(monkeypatch, tmp_path):
    def point(owner, value):
        each = EntryPoint(name="label", value=value, group="rlpost.rewards")
        return each._for(type("Dist", (), {"name": owner, "version": "1"})())

    both = [point("ours", "a:label"), point("theirs", "b:label"), point("ours", "a:label")]
    monkeypatch.setattr(plugins, "entry_points", lambda **_: both)
    text = message_of("label", tmp_path)
    assert "ours 1 (a:label) and theirs 1 (b:label)" in text


def test_an_editable_install_listed_twice_is_no_clash(monkeypatch):
    point = next(iter(importlib.metadata.entry_points(group="rlpost.rewards", name="label")))
    monkeypatch.setattr(plugins, "entry_points", lambda **_: [point, point])
    assert "rlpost_rewards.label:label" in plugins.origin("rlpost.rewards", "label")


def test_the_file_beside_the_job_comes_before_an_importable_module(tmp_path):
    write(tmp_path, "colorsys.py", "def mine(task, rollout): return 1.0\n")
    assert plugins.resolve("rlpost.rewards", "colorsys:mine", base_dir=tmp_path)(None, None) == 1.0
    import colorsys

    assert hasattr(colorsys, "rgb_to_hsv")  # and the library keeps its own name


def test_an_importable_module_needs_no_file(tmp_path):
    assert plugins.resolve("rlpost.rewards", "textwrap:dedent", base_dir=tmp_path)(" a") == "a"
    assert plugins.origin("rlpost.rewards", "textwrap:dedent", base_dir=tmp_path).endswith(".py")


def test_two_jobs_with_files_of_one_name_stay_apart(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        write(tmp_path, f"{folder}/judge_of_two.py", f"def f(task, rollout): return {value}\n")
    found = [
        plugins.resolve("rlpost.rewards", "judge_of_two:f", base_dir=tmp_path / folder)
        for folder in "aba"
    ]
    assert [f(None, None) for f in found] == [1, 2, 1]


def test_a_changed_file_is_loaded_again_and_an_unchanged_one_is_not(tmp_path):
    write(tmp_path, "judge_changed.py", "value = object()\n")
    first = plugins.resolve("rlpost.rewards", "judge_changed:value", base_dir=tmp_path)
    assert plugins.resolve("rlpost.rewards", "judge_changed:value", base_dir=tmp_path) is first
    write(tmp_path, "judge_changed.py", "value = 12345\n")
    import os

    os.utime(tmp_path / "judge_changed.py", ns=(1, 1))
    assert plugins.resolve("rlpost.rewards", "judge_changed:value", base_dir=tmp_path) == 12345


def test_siblings_of_the_file_are_importable(tmp_path):
    write(tmp_path, "sibling_of_judge.py", "ONE = 1.0\n")
    write(
        tmp_path,
        "judge_with_sibling.py",
        "from sibling_of_judge import ONE\ndef f(task, rollout): return ONE\n",
    )
    try:
        assert (
            plugins.resolve("rlpost.rewards", "judge_with_sibling:f", base_dir=tmp_path)(0, 0) == 1
        )
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("def fields(task, rollout): return 1\n", "judge_bad:feilds", "did you mean 'fields'?"),
        ("x = 1\ndef f(:\n", "judge_bad:f", "line 2"),
        ("x = 1\nimport no_such_library\n", "judge_bad:f", "line 2); install no_such_library"),
        ("\n\nraise SystemExit('out')\n", "judge_bad:f", "SystemExit: out"),
        ("x = 1\n", "jugde_bad:f", "did you mean 'judge_bad'?"),
        ("x = 1\n", "judge_bad.py:f", "did you mean"),
        ("x = 1\n", "judge bad:f", "without .py"),
        ("x = 1\n", "judge_bad:", "after the colon"),
    ],
)
def test_each_mistake_is_one_line_with_its_cure(tmp_path, source, name, expected):
    write(tmp_path, "judge_bad.py", source)
    assert expected in message_of(name, tmp_path)
