"""Texts with labels, the whole list of labels in the prompt: rows like {"text": …, "label": …}."""

from collections.abc import Sequence
from dataclasses import replace

from rlpost.env import SingleTurn
from rlpost.errors import JobError
from rlpost.prompt_template import Template
from rlpost.row_files import Complaints, Row, did_you_mean, read_table
from rlpost.types import Task
from rlpost_envs.prompts import read_prompt

PROMPT = """\
Choose the label that fits the text. Answer with the label only.
Labels: {labels}

Text: {text}"""


class Classify(SingleTurn):
    """The environment of a file of labelled texts.

    `text` and `label` name the columns; a label is a string, or a list of strings where several are
    right. `labels` fixes the list and its order; without it, it is every label of the file, sorted.
    `prompt` is a file with {text} and {labels}. `labels` ends up in the attribute of that name, for
    the reward. Raises RowError or UserErrors for rows, JobError for arguments.
    """

    def __init__(
        self,
        *,
        path: str,
        text: str = "text",
        label: str = "label",
        labels: Sequence[str] | None = None,
        prompt: str | None = None,
    ):
        if labels is not None and (isinstance(labels, str) or len(labels) < 2):
            raise JobError(
                f"environment.labels is {labels!r}", cure="write a list of at least two labels"
            )
        template = read_prompt(prompt, PROMPT, columns=("text", "labels"), needed="text")
        table, complaints = read_table(path), Complaints.of(path)
        tasks = [_read(row, text, label, labels, complaints) for row in table]
        complaints.settle()
        found = {name for task in tasks for name in _as_list(task.answer)}
        self.labels = list(labels) if labels is not None else sorted(found)
        super().__init__([_ask(task, template, self.labels) for task in tasks])


def _read(
    row: Row, text: str, label: str, labels: Sequence[str] | None, complaints: Complaints
) -> Task:
    """The task without its prompt; its text waits in meta."""
    said, gold = row.columns.get(text), row.columns.get(label)
    there = list(row.columns)
    if not isinstance(said, str) or not said.strip():
        cure = did_you_mean(text, there) or f'the columns are {", ".join(there)}; set text = "…"'
        complaints.add(f"column {text!r} holds no text", line=row.line, cure=cure)
    names = _as_list(gold)
    if not names or not all(isinstance(name, str) and name for name in names):
        cure = did_you_mean(label, there) or f'the columns are {", ".join(there)}; set label = "…"'
        complaints.add(f"column {label!r} holds no label", line=row.line, cure=cure)
    elif labels is not None:
        for name in names:
            if name not in labels:
                cure = did_you_mean(name, labels) or "add it to labels, or mend the row"
                complaints.add(f"the label {name!r} is not in labels", line=row.line, cure=cure)
    return Task(
        id=str(row.columns.get("id", row.line)),
        messages=[],
        answer=gold,
        meta={name: value for name, value in row.columns.items() if name not in ("id", label)}
        | {"text": said},
    )


def _ask(task: Task, template: Template, labels: Sequence[str]) -> Task:
    columns = {"text": task.meta["text"], "labels": ", ".join(labels)}
    return replace(task, messages=[{"role": "user", "content": template.render(columns)}])


def _as_list(gold: object) -> list[str]:
    if gold is None:
        return []
    return list(gold) if isinstance(gold, list) else [gold]  # type: ignore[list-item]
