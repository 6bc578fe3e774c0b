"""Errors of the package and the exit codes of its commands. Imports nothing of the package."""

import signal

# RESTART: run the same command again.
DONE, FAILED, WRONG_INPUT, RESTART, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 42, 130, 141


class ConfigError(ValueError):
    """Something the user can correct. The message is one line that can be shown as it is."""


class TrainingError(RuntimeError):
    """Training failed; the last good checkpoint is still there."""


class BadStepError(TrainingError):
    """The loss or the gradient is NaN or infinite, or the loss has spiked."""


class SaveError(TrainingError):
    """A checkpoint could not be written; earlier ones are untouched."""


class LockError(TrainingError):
    """Another process trains in the run directory."""


class StorageError(TrainingError):
    """The storage that rows are read from stays away. It may be back later, so the run may be started again."""


class UnreadableError(TrainingError):
    """A checkpoint cannot be read now, but may be whole: no permission, no memory, storage that does not answer."""


class DamagedError(TrainingError):
    """The files of a checkpoint do not hold what was saved."""


class Interrupted(Exception):
    """The run stopped on a signal, after saving a checkpoint. signal: its number."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}; checkpoint saved, run the same command to resume")
        self.signal = number


def one_line(error: object, limit: int | None = None) -> str:
    """A message on one line, with all white space folded, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]
