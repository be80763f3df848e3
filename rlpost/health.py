"""Watches a run and acts: what is critical pauses it, with a checkpoint and a sentence that says
why."""

from collections import Counter, deque
from collections.abc import Iterable

from rlpost.errors import NonFiniteError, RunError, ScoringError
from rlpost.types import Group, StepReport

WINDOW = 256  # rollouts over which the share of failed judgements is taken
FEWEST = 64  # below that many a share says little


class Health:
    """Raises the error that pauses the run; the controller decides what a pause is."""

    def __init__(self, *, unscored_limit: float, non_finite_limit: int):
        self._unscored_limit, self._non_finite_limit = unscored_limit, non_finite_limit
        self._statuses: deque[tuple[str, str]] = deque(maxlen=WINDOW)
        self._skipped = 0

    def after_group(self, group: Group) -> None:
        """Above the limit of rollouts without a score, or of replies that break their judge:
        ScoringError."""
        for rollout in group.rollouts:
            self._statuses.append((rollout.status, _why(rollout)))
        if len(self._statuses) < FEWEST:
            return
        for kind, statuses in (
            ("got no score", lambda status: status not in ("ok", "reply_error")),
            ("broke their judge", lambda status: status == "reply_error"),
        ):
            reasons = Counter(why for status, why in self._statuses if statuses(status))
            share = reasons.total() / len(self._statuses)
            if share > self._unscored_limit:
                top, _ = reasons.most_common(1)[0]
                seen = len(self._statuses)
                self._statuses.clear()  # where the run goes on, the next window starts afresh
                raise ScoringError(
                    f"{share:.0%} of the last {seen} rollouts {kind}"
                    f" (limit {self._unscored_limit:.0%}); most often: {top}"
                )

    def after_update(self, report: StepReport) -> None:
        """Too many updates in a row whose loss or gradient was not finite: NonFiniteError."""
        self._skipped = self._skipped + 1 if "finite" in report.skipped else 0
        if self._skipped >= self._non_finite_limit:
            skipped, self._skipped = self._skipped, 0
            raise NonFiniteError(
                f"{skipped} updates in a row were skipped ({report.skipped}); lower"
                " learner.learning_rate, or look at the rewards of these updates in rollouts/"
            )


def _why(rollout: object) -> str:
    info = getattr(rollout, "info", {})
    score = getattr(rollout, "score", None)
    status = getattr(rollout, "status", "")
    return str(info.get("error") or (score.reason if score and score.reason else status))


def critical(errors: Iterable[BaseException]) -> RunError | None:
    """The first error that pauses a run, if there is one."""
    return next((error for error in errors if isinstance(error, RunError)), None)
