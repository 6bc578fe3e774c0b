"""Losses of several runs at equal steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from mythos_jax.watch.reading import WatchedRun

ROWS = 8


@dataclass(frozen=True)
class Comparison:
    """rows: a step, and the mean loss of each run since the row before; None where it has logged none. step_tokens: of
    each run's batch, None if its config cannot be read."""

    rows: list[tuple[int, list[float | None]]]
    step_tokens: list[int | None]

    @property
    def note(self) -> str:
        """What to know when reading it."""
        known = {tokens for tokens in self.step_tokens if tokens is not None}
        words = "mean of the losses logged since the row above"
        if len(known) < 2:
            return words
        each = ", ".join("?" if tokens is None else f"{tokens:,}" for tokens in self.step_tokens)
        return f"{words}; a step has {each} tokens"


def compare_losses(runs: Sequence[WatchedRun], rows: int = ROWS) -> Comparison:
    """At `rows` steps up to the last one that all runs that have begun have reached."""
    curves = [run.history["loss"] for run in runs]
    reached = min((curve.steps[-1] for curve in curves if curve), default=0)
    marks = sorted({round(reached * i / rows) for i in range(1, rows + 1)} - {0})
    table = [
        (step, [curve.mean(before, step) for curve in curves]) for before, step in zip([0, *marks], marks, strict=False)
    ]
    configs = [run.config for run in runs]
    return Comparison(table, [None if c is None else c.training.batch_size * c.data.seq_len for c in configs])
