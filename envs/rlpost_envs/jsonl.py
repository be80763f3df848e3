"""Any rows, answered in one reply: the environment of a job that names none."""

from collections.abc import Iterable

from rlpost.env import SingleTurn
from rlpost.errors import JobError
from rlpost.rows import read_rows
from rlpost.types import Task


class Rows(SingleTurn):
    """The rows that [data] has read, or a file of ready rows (`messages` or `prompt`, `answer`)
    named by `path`. Mistakes in the file are raised as RowError or UserErrors with their
    lines."""

    def __init__(self, tasks: Iterable[Task] | None = None, *, path: str | None = None):
        if (tasks is None) == (path is None):
            raise JobError(
                "the rows are named twice" if path else "no rows are named",
                cure="name them once: train under [data], or path under [environment]",
            )
        super().__init__(read_rows(path) if path is not None else tasks or ())
