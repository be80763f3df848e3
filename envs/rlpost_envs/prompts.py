"""The prompt of an environment: its own, or the user's file with the same columns."""

from collections.abc import Sequence
from pathlib import Path

from rlpost.errors import JobError
from rlpost.prompt_template import Template


def read_prompt(path: str | None, default: str, *, columns: Sequence[str], needed: str) -> Template:
    """The template in the file `path`, or `default` without one. It may use `columns` and must
    use `needed`.

    Raises JobError for a file that is missing or that uses other columns, RowError for a stray
    brace.
    """
    if path is None:
        return Template.parse(default)
    file = Path(path)
    if not file.is_file():
        raise JobError(
            f"environment.prompt: there is no file {path}",
            cure="the path is relative to the job file",
        )
    template = Template.parse(file.read_text(encoding="utf-8"), place=file.name)
    known = ", ".join(f"{{{column}}}" for column in columns)
    for column in template.columns:
        if column not in columns:
            raise JobError(
                f"the prompt uses {{{column}}}, which this environment does not have",
                place=file.name,
                cure=f"it has {known}; a literal brace is written twice",
            )
    if needed not in template.columns:
        raise JobError(
            f"the prompt lacks {{{needed}}}",
            place=file.name,
            cure=f"write {{{needed}}} where it belongs",
        )
    return template
