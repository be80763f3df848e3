"""Every error rlpost raises on purpose.

RlpostError
├── UserError            exit 2: the user's mistake; one line naming file, place and cure
│   ├── JobError         job.toml or --set
│   ├── RowError         a row of a data file
│   ├── PluginError      a reward or environment that cannot be found, imported or called
│   └── ModelError       a model that is missing or lacks what the job needs
├── RunError             exit 1: the job failed or was paused
│   ├── EngineError      the engine broke or does not follow the contract
│   ├── ProofError       the engine does not serve the version it claims
│   ├── ScoringError     too many rollouts without a score
│   ├── CheckpointError  a checkpoint is damaged or does not belong to this job
│   └── NonFiniteError   too many skipped updates in a row
├── ClusterError         exit 3: the cluster cannot be reached
└── Interrupted          exit 130: Ctrl-C, after a clean stop
"""


class RlpostError(Exception):
    """Base. `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(RlpostError):
    """The user's mistake. `str()` is one line: what is wrong (file, line N); what cures it."""

    exit_code = 2

    def __init__(self, problem: str, *, place: str = "", line: int | None = None, cure: str = ""):
        where = ", ".join(part for part in (place, f"line {line}" if line else "") if part)
        text = f"{problem} ({where})" if where else problem
        super().__init__(f"{text}; {cure}" if cure else text)
        self.problem, self.place, self.line, self.cure = problem, place, line, cure


class JobError(UserError):
    """A mistake in job.toml, in --set, or between the job and the machine."""


class RowError(UserError):
    """A mistake in a row of a data file."""


class PluginError(UserError):
    """A reward or environment that cannot be found, imported or called."""


class ModelError(UserError):
    """A model that is not there or lacks what the job needs."""


class UserErrors(UserError):
    """Several mistakes found at once; `str()` has one line each."""

    def __init__(self, errors: list[UserError]):
        Exception.__init__(self, "\n".join(str(error) for error in errors))
        self.errors = errors


class RunError(RlpostError):
    """The job failed or was paused; what was done is kept in the run directory."""


class EngineError(RunError):
    """The engine broke or does not follow the contract."""


class ProofError(RunError):
    """The engine does not serve the policy version it claims."""


class ScoringError(RunError):
    """More than the bearable share of rollouts got no score; names the reward and why."""


class CheckpointError(RunError):
    """A checkpoint is damaged or belongs to another job."""


class NonFiniteError(RunError):
    """Too many updates in a row were skipped because loss or gradients were not finite."""


class ClusterError(RlpostError):
    """The cluster cannot be reached."""

    exit_code = 3


class Interrupted(RlpostError):
    """Ctrl-C, after a clean stop with a checkpoint."""

    exit_code = 130
