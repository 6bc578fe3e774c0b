"""When checkpoints are due: by steps, and by time, after the same step on all processes."""

import time
from collections.abc import Callable

from mythos_jax.config import TrainingConfig
from mythos_jax.processes import of_process_zero


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
