"""The progress of long work on standard error: a bar on a terminal, elsewhere a plain line now and then."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from mythos_jax.streams import discard, log

LINE_EVERY = 30  # seconds


class Progress:
    """Counts the parts of some work, and shows how many are done. A context manager.

    If standard error is closed or its reader is gone, the work goes on and nothing is shown.
    """

    def __init__(self, total: int | None, title: str, unit: str, *, start: int = 0, show: bool = True) -> None:
        """total: None if it is not known. unit: what is counted, in the singular; "B" for bytes. start: parts that were
        done before. show: False shows nothing."""
        self._total, self._title, self._unit, self._done = total, title, unit, start
        self._show, self._shown_at = show, time.monotonic()
        self._note = ""
        self._bar: tqdm | None = None
        if show and _is_terminal():
            self._bar = tqdm(total=total, initial=start, desc=title, unit=unit, unit_scale=unit == "B")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._on_terminal(self._bar.close)

    def update(self, count: int = 1, note: str = "") -> None:
        """Counts parts that are done. note: more to show, until the next note."""
        self._done, self._note = self._done + count, note or self._note
        if self._bar is not None:
            bar = self._bar
            bar.set_postfix_str(self._note, refresh=False)
            self._on_terminal(lambda: bar.update(count))
        elif self._show and time.monotonic() - self._shown_at >= LINE_EVERY:
            self._shown_at = time.monotonic()
            log(f"{self._title}: {self._progress()}" + (f", {self._note}" if self._note else ""))

    def _progress(self) -> str:
        if self._unit == "B":
            total = "" if self._total is None else f" of {self._total / 1e6:.1f}"
            return f"{self._done / 1e6:.1f}{total} MB"
        total = "" if self._total is None else f" of {self._total}"
        return f"{self._done}{total} {self._unit}s"

    def _on_terminal(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except (OSError, ValueError):  # the terminal is gone
            discard(sys.stderr)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # None, or closed
        return False
