import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlpost_rewards.label import f1, label

from rlpost.errors import JobError, RowError
from rlpost.reward import recorded
from rlpost.types import Task

LABELS = [
    "greeting",
    "card lost",
    "a, b",
    "a",
    "b",
    "true",
    "1",
    '"quoted"',
    "C++/C#",
    "étoile",
    "{x}",
]


def scored(answer, reply, labels=LABELS, **arguments):
    task = Task(id="7", messages=(), answer=answer)
    return label(task, recorded(task, reply), labels=labels, **arguments)


@pytest.mark.parametrize("name", LABELS)
def test_a_label_of_any_characters_is_read_in_each_form(name):
    for reply in (name, f" {name}\n", json.dumps(name), json.dumps({"label": name})):
        score = scored(name, reply)
        assert (score.value, score.reason) == (1.0, "ok")
        assert score.parts == {"valid": 1.0, "correct": 1.0}
    assert scored(name, json.dumps({"label": name}, ensure_ascii=False)).value == 1.0


def test_letters_composed_in_two_ways_are_one_label():
    assert scored("étoile", "e\u0301toile").value == 1.0


def test_wrappings_come_off_or_are_punished():
    assert scored("a", '<think>b?</think>```json\n{"label": "a"}\n```').value == 1.0
    assert scored("a", "<think>b?</think>a", thinking="punish").reason == "thinking"
    assert scored("a", "```\na\n```", fence="punish").value == 0.0


@pytest.mark.parametrize(
    ("reply", "valid", "reason"),
    [
        ("b", 1.0, "wrong"),
        ("c", 0.0, "unknown_label"),
        ("A", 0.0, "unknown_label"),
        ("a b", 0.0, "unknown_label"),
        ("a\nb", 0.0, "unknown_label"),
        ('{"label": "a", "why": "x"}', 0.0, "no_label"),
        ('["a"]', 0.0, "no_label"),
        ('{"label": ["a"]}', 0.0, "no_label"),
        ("null", 0.0, "no_label"),
        ("", 0.0, "no_label"),
        (" and ".join(LABELS), 0.0, "unknown_label"),
        (json.dumps(LABELS), 0.0, "no_label"),
    ],
)
def test_anything_else_is_worth_nothing(reply, valid, reason):
    score = scored("a", reply)
    assert (score.value, score.parts["valid"], score.reason) == (0.0, valid, reason)


def test_case_counts_unless_folded():
    assert scored("greeting", "Greeting").value == 0.0
    assert scored("greeting", "Greeting", fold_case=True).value == 1.0


@pytest.mark.parametrize(
    "reply", ['["a", "b"]', '{"labels": ["b", "a"]}', "b\na", "a; b", '["a","b","a"]']
)
def test_a_set_of_labels_is_read_in_each_form(reply):
    assert scored(["a", "b"], reply).value == 1.0


def test_a_label_with_a_comma_is_not_two():
    assert scored(["a, b"], "a, b").value == 1.0
    assert scored(["a", "b"], "a, b").value == 0.0
    assert scored(["a", "greeting"], "a, greeting").value == 1.0


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('["a"]', 2 / 3),
        ('["a", "b", "true"]', 4 / 5),
        ('["true"]', 0),
        ("[]", 0),
        ('["a", "zz"]', 1 / 2),
    ],
)
def test_several_labels_are_worth_their_f1(reply, value):
    score = scored(["a", "b"], reply)
    assert score.value == pytest.approx(value)
    assert score.parts["correct"] == 0.0


def test_an_unknown_label_among_several_is_not_valid():
    assert scored(["a"], '["a", "zz"]').parts["valid"] == 0.0
    assert scored([], "[]").value == 1.0


@pytest.mark.parametrize("answer", [None, [], "none", ["none"]])
def test_out_of_scope_is_a_label_of_its_own(answer):
    assert scored(answer, "none", out_of_scope="none").value == 1.0
    assert scored(answer, '{"label": null}', out_of_scope="none").value == 1.0
    assert scored(answer, "a", out_of_scope="none").value == 0.0
    assert scored("a", "none", out_of_scope="none").parts == {"valid": 1.0, "correct": 0.0}


def test_without_a_list_every_label_is_valid():
    assert scored("a", "q", labels=None).parts == {"valid": 1.0, "correct": 0.0}
    assert scored("a", "a", labels=None).value == 1.0


def test_labels_are_read_from_a_file_beside_the_job(tmp_path):
    (tmp_path / "labels.txt").write_text("a\nb c\n\n", encoding="utf-8")
    assert scored("b c", "b c", labels="labels.txt", base_dir=str(tmp_path)).value == 1.0
    with pytest.raises(JobError, match=r"other\.txt"):
        scored("a", "a", labels="other.txt", base_dir=str(tmp_path))


def test_bad_rows_and_arguments_are_named():
    with pytest.raises(RowError, match=r"row 7.*'zz' is not among the labels"):
        scored("zz", "a")
    with pytest.raises(RowError, match="row 7 has no answer"):
        scored(None, "a")
    with pytest.raises(RowError, match="row 7"):
        scored({"a": 1}, "a")
    with pytest.raises(JobError, match="twice"):
        scored("a", "a", labels=["a", "a"])
    with pytest.raises(JobError, match="twice without case"):
        scored("a", "a", labels=["a", "A"], fold_case=True)
    with pytest.raises(JobError, match="not a list of texts"):
        scored("a", "a", labels=[1])


def test_metrics_tell_scope_apart():
    tasks = [
        Task(id=str(i), messages=(), answer=a) for i, a in enumerate(["a", "b", "none", "none"])
    ]
    rollouts = [
        recorded(t, reply) for t, reply in zip(tasks, ["a", "zz", "none", "b"], strict=True)
    ]
    found = label.metrics(tasks, rollouts, labels=["a", "b"], out_of_scope="none")
    assert found == {
        "accuracy": 0.5,
        "valid": 0.75,
        "f1": 0.5,
        "in_scope_accuracy": 0.5,
        "out_of_scope_recall": 0.5,
    }


@given(st.sets(st.sampled_from("abcd")), st.sets(st.sampled_from("abcd")))
def test_f1_is_one_only_for_equal_sets(chosen, gold):
    value = f1(frozenset(chosen), frozenset(gold))
    assert 0.0 <= value <= 1.0
    assert (value == 1.0) == (chosen == gold)


@given(st.text(), st.sampled_from(["a", ["a", "b"], None]))
def test_any_text_gets_a_score(text, answer):
    score = scored(answer, text, out_of_scope="none")
    assert 0.0 <= score.value <= 1.0 and score.reason.isidentifier()
    assert (score.value == 1.0) == (score.parts["correct"] == 1.0)
