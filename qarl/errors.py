"""One picklable tree of errors. Each says what went wrong, where, and the hint, in one line."""


class QarlError(Exception):
    """Base of every error that qarl raises on purpose.

    Args:
        what: the fact, e.g. "unknown key 'stepz'".
        where: file, key, tensor, worker; empty when `what` says it.
        hint: what the user does about it; empty when nothing can be done.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        super().__init__(what, where, hint)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}; {self.hint}" if self.hint else line


class UsageError(QarlError):
    """The input is at fault, nothing has been started: the command line exits with 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A config file or override is wrong."""


class DataError(UsageError):
    """A data row or file is wrong."""


class ModelError(UsageError):
    """A model directory cannot be used."""


class ResourceError(UsageError):
    """The cluster or machine lacks what the config asks for."""


class KernelError(QarlError):
    """No kernel for this shape, device or format; or the engine chose another one than asked."""


class PublicationError(QarlError):
    """Published weights did not arrive as they were sent, or did not take."""


class MismatchError(QarlError):
    """Learner and sampler disagree by more than the config allows."""


class RolloutError(QarlError):
    """Rollout workers could not produce the samples."""


class TeacherError(QarlError):
    """The teacher endpoint refuses to answer, or is none."""


class CheckpointError(QarlError):
    """A checkpoint is missing, foreign or incomplete."""


class ObjectiveError(QarlError, ValueError):
    """Log-probs, mask or advantages of which no loss can be made."""


class DivergenceError(ObjectiveError):
    """Training has left the finite numbers: the command line exits with 3."""

    exit_code = 3
