"""One picklable tree of errors. Each is one line: where, what went wrong, and a hint."""

import signal


class QarlError(Exception):
    """Base of every error that qarl raises on purpose.

    Args:
        what: the fact, e.g. "unknown key 'stepz'".
        where: file, key, tensor, worker; empty when `what` says it.
        hint: what the user can do; empty when there is no advice.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        super().__init__(what, where, hint)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}; {self.hint}" if self.hint else line


def first_line(error: object) -> str:
    """The first line of what an error of another library says, and its type where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def behind(error: BaseException) -> BaseException:
    """What a signal's handler raised inside of a C extension: the cause of `error`, a SystemError, or that one's cause.
    Any other error itself."""
    cause: BaseException | None = error if isinstance(error, SystemError) else None
    while cause and not isinstance(cause, (QarlError, KeyboardInterrupt)):
        cause = cause.__cause__
    return cause or error


LACK_OF_MEMORY = "perhaps by the system for lack of memory, see `dmesg`"
"""The likely reason of a SIGKILL that qarl did not send."""


def how_ended(code: int) -> str:
    """The exit code of a process, minus the number of the signal that ended it, in words."""
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}, {LACK_OF_MEMORY}" if name == "SIGKILL" else f"was killed by {name}"


AGAIN = "the same command continues from the last checkpoint, if there is one"
"""The hint of a run that failed through no fault of its input."""

INTERRUPTED = f"interrupted; {AGAIN}"
"""What is said of a run that a signal has ended."""

TRACEBACK = "QARL_TRACEBACK=1 shows the traceback"
"""The hint where the user's own code fails."""

DAMAGED = "delete that checkpoint to use the one before"
"""The hint of a checkpoint that cannot be read."""

OTHER_VERSION = "resume with the qarl that wrote it, or start over with run.resume=false"
"""The hint of a checkpoint that another version wrote."""


class UsageError(QarlError):
    """The input is wrong and nothing was started: the command line exits with 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A config file or override is wrong."""


class DataError(UsageError):
    """A data row or file is wrong."""


class ModelError(UsageError):
    """A model directory cannot be used."""


class ResourceError(UsageError):
    """The cluster or machine lacks what the config requests."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or of another run."""


class KernelError(QarlError):
    """There is no kernel for a shape, device or format, or the engine chose another one than requested."""


class PublicationError(QarlError):
    """Published weights were changed on their way, or the engine does not compute with them."""


class MismatchError(QarlError):
    """Learner and sampler disagree by more than the config allows."""


class RolloutError(QarlError):
    """Rollout workers could not produce the samples."""


class ActorError(QarlError):
    """A worker or a rank raised what no one foresaw."""


class TeacherError(QarlError):
    """The teacher endpoint refuses to answer, or does not speak the protocol."""


class ObjectiveError(QarlError, ValueError):
    """Log-probs, mask or advantages that give no loss."""


class DivergenceError(ObjectiveError):
    """A log-prob or a loss is no longer finite: the command line exits with 3."""

    exit_code = 3
