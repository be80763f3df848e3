"""The environment seam: an environment gives tasks and answers replies.

Write a class with `tasks()` and `episode(task)`, name it in the job as `module:Class` or register
it under the entry-point group `rlpost.envs`; keyword arguments come from the job's [environment].
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from rlpost.types import Message, Step, Task


class Episode(Protocol):
    """One attempt at one task, used once."""

    def start(self) -> Sequence[Message]:
        """The first messages, system prompt included."""
        ...

    def step(self, reply: str) -> Step:
        """Takes the policy's reply; returns the messages that follow it, or `done`."""
        ...


@runtime_checkable
class Env(Protocol):
    """Gives tasks and answers replies. `tasks()` yields the same tasks in the same order each
    time."""

    def tasks(self) -> Iterable[Task]: ...

    def episode(self, task: Task) -> Episode: ...


class SingleTurnEpisode:
    """Asks `task.messages` and ends after one reply."""

    def __init__(self, task: Task):
        self._task = task

    def start(self) -> Sequence[Message]:
        return self._task.messages

    def step(self, reply: str) -> Step:
        return Step(done=True)


class SingleTurn:
    """The environment of a list of tasks that are answered in one reply each."""

    def __init__(self, tasks: Iterable[Task]):
        self._tasks = list(tasks)

    def tasks(self) -> list[Task]:
        return self._tasks

    def episode(self, task: Task) -> Episode:
        return SingleTurnEpisode(task)
