"""When checkpoints are due, after the same step on all processes, and the saving of them."""

import time
from collections.abc import Callable
from typing import Any

from mythos_jax.config import TrainingConfig
from mythos_jax.processes import of_process_zero, raise_together
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.runs.local_checkpoints import LocalCheckpoints
from mythos_jax.runs.lock import RunLock
from mythos_jax.runs.state import TrainState
from mythos_jax.training.watchdog import Watchdog


class SaveTimes:
    """Says after which steps a checkpoint is due. All processes ask after every step.

    Process 0 alone looks at its clock, and the others learn what it saw. That is rare: each time, process 0 says in how
    many steps it looks again, which is half of those that are left until the next save at the present pace. So a save
    that is due by time comes a step or two late, and most steps ask nobody.
    """

    def __init__(self, training: TrainingConfig, start: int, clock: Callable[[], float] = time.monotonic) -> None:
        """start: finished steps."""
        self._every, self._seconds, self._clock = training.checkpoint_every, 60 * training.checkpoint_minutes, clock
        self._look = start + 1
        self._saved = self._looked = clock()
        self._looked_at = start

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        by_time = False
        if self._seconds and step >= self._look:
            steps = of_process_zero(lambda: self._steps_left(step))
            self._look, by_time = step + max(steps, 1), not steps
        return by_time or step % self._every == 0

    def saved(self) -> None:
        """A checkpoint was made."""
        self._saved = self._clock()

    def _steps_left(self, step: int) -> int:
        """Steps until process 0 looks at its clock again; 0: a checkpoint is due."""
        now = self._clock()
        pace = (now - self._looked) / (step - self._looked_at)
        self._looked, self._looked_at = now, step
        left = self._saved + self._seconds - now
        return max(int(left / max(pace, 1e-9) / 2), 1) if left > 0 else 0


class Saver:
    """Saves the state of a run: in its directory, and between that, if they are on, in local checkpoints."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        local: LocalCheckpoints | None,
        metadata: dict[str, Any],
        lock: RunLock | None,
        watchdog: Watchdog,
    ) -> None:
        """metadata: of the run, which its checkpoints have. lock: on process 0, that of the run directory."""
        self.checkpoints, self._local = checkpoints, local
        self._metadata, self._lock, self._watchdog = metadata, lock, watchdog
        self._due = self._is_last = False
        self._newest: int | None = None

    def begin(self, training: TrainingConfig, start: int) -> None:
        """Before the first step. start: finished steps."""
        self._times, self._steps = SaveTimes(training, start), training.steps
        self._every = training.local_checkpoints.every if self._local is not None else 0
        self._watchdog.watch_saves(self.writing)

    def due(self, step: int, stopped: bool) -> bool:
        """Whether anything is to be saved after this step. stopped: it is the last one that runs."""
        self._due = self._times.due(step) or self._due
        self._is_last = stopped or step == self._steps
        return self._due or self._is_last or self._locally(step)

    def save(self, state: TrainState, step: int, flush: Callable[[], None], good: bool) -> bool:
        """Starts to save what is due. Returns False if the state is NaN or infinite.

        flush: writes the log, before the checkpoint exists: a run that resumes from it does not log these steps again.
        good: not so after bad steps. Weights may be at fault that are finite, and the good checkpoints are kept until
        a good step.
        Raises LockError, on all processes, if another start has taken the run over; SaveError.
        """
        in_run = self._is_last or (self._due and good)
        locally = self._locally(step) and good and not self._is_last
        if not in_run and not locally:
            return True
        self._watchdog.beat(f"the save after step {step}")
        flush()
        finite = True
        if in_run:
            raise_together(self._lock.check if self._lock else lambda: None)
            finite = self.checkpoints.save(state, self._metadata)
            self._due, self._newest = False, step
            self._times.saved()
        if locally and finite and self._local is not None:
            finite = self._local.save(state, self._metadata, self.checkpoints.steps())
        return finite

    def writing(self) -> int | None:
        """The step of the checkpoint of the run directory that is being written in the background, if one is."""
        return self._newest if self.checkpoints.is_saving() else None

    def wait(self) -> None:
        """Until all is on disk."""
        self._watchdog.beat("the end of the last save")
        self.checkpoints.wait()
        if self._local is not None and self._is_last:
            self._local.finish()

    def _locally(self, step: int) -> bool:
        return bool(self._every) and step % self._every == 0
