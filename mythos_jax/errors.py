"""What can go wrong, and the exit code of each: the ground floor, which imports nothing of the package."""

import signal

# Exit codes of every command. RESTART: run the same command again.
DONE, FAILED, WRONG_INPUT, RESTART, INTERRUPTED = 0, 1, 2, 42, 130


class ConfigError(ValueError):
    """Something the user can correct; the message is one line, fit to be shown as it is."""


class TrainingError(RuntimeError):
    """Training failed; the last good checkpoint stands."""


class BadStepError(TrainingError):
    """The loss or the gradient is no longer a number, or the loss has jumped."""


class SaveError(TrainingError):
    """A checkpoint that could not be written; the ones before it are untouched."""


class DamagedError(TrainingError):
    """A checkpoint whose files do not hold what was saved."""


class Interrupted(Exception):
    """A signal asked the run to stop; it saved first. `signal` says which."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}; checkpoint saved, run the same command to resume")
        self.signal = number


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The error's message on one line, with all white space folded, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]
