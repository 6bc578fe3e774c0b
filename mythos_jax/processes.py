"""Being one of the processes of a run: logging from process 0, ordering, agreeing on failures, and shutdown.

A run has one process per host (or per GPU) under `jax.distributed`; everything here also works in a single process that
never connected. Work that touches shared files runs on process 0 first, then on the others.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax

from mythos_jax.errors import ConfigError, StorageError, TrainingError, one_line
from mythos_jax.interrupts import handled
from mythos_jax.streams import log

# Seconds that process 0, which hosts the coordinator, outlives a failure, so that the others can report theirs.
SHUTDOWN_GRACE = 3

Result = TypeVar("Result")


def is_process_zero() -> bool:
    """Whether this is the process that prints, logs and prepares data: the only one, or process 0 of several."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_single_process() -> bool:
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def process_prefix() -> str:
    """What identifies this process at the start of a message, such as `process 3: `; empty in a single process."""
    return "" if is_single_process() else f"process {jax.process_index()}: "


def log0(text: str, level: int = logging.INFO) -> None:
    """Logs one line, on process 0 only: to standard error, unless the logger "mythos_jax" is configured otherwise."""
    if is_process_zero():
        log(text, level)


# All processes call these functions in the same order, so that equal call numbers mean the same call.
_calls = itertools.count()
_keys: list[str] = []  # of the newest `gathered` and the calls since
_alone = False  # whether this is process 0, doing what the others do after it
_WEEK = 7 * 24 * 3600 * 1000  # in ms, longer than any wait: the runtime ends the wait much sooner if a process dies


def _next_key() -> str:
    _keys.append(f"mythos/{next(_calls)}")
    return _keys[-1]


def process_zero_first(
    name: str, work: Callable[[], Result], identity: Callable[[Result], str] = lambda _: ""
) -> Result:
    """Runs `work` on process 0, then on all others, which find the files it made. Waits as long as that takes.

    work: nothing that all processes must do at once (`require_all_processes`): process 0 would wait for the others, and
    they for it.
    name: what error messages call the work.
    identity: text that must agree across processes.

    Raises ConfigError or TrainingError on all processes if process 0 raises it, and ConfigError on a process whose
    identity differs.
    """
    if is_single_process():
        return work()
    key = _next_key()
    if is_process_zero():
        return _tell_others(key, work, identity)
    text, result = _told(key), work()
    if identity(result) != text:
        raise ConfigError(
            f"{name}: process {jax.process_index()} finds something else than process 0; allowed: paths that all "
            "processes share"
        )
    return result


def of_process_zero(work: Callable[[], Result]) -> Result:
    """What `work` returns on process 0, the only one that runs it: whatever JSON can say. The others wait for it, and
    it for none of them. Raises on all processes if it raises."""
    if is_single_process():
        return work()
    key = _next_key()
    if is_process_zero():
        return _tell_others(key, work, json.dumps)
    found: Result = json.loads(_told(key))
    return found


_KINDS = {"wrong": ConfigError, "away": StorageError, "failed": TrainingError}


def _tell_others(key: str, work: Callable[[], Result], text: Callable[[Result], str]) -> Result:
    """On process 0: the result of `work`. The others are told it as `text`, or how it fails."""
    try:
        with _being_alone():
            result = work()
        told = f"done {text(result)}"
    except Exception as error:
        kind = next((kind for kind, of in _KINDS.items() if isinstance(error, of)), "")
        message = str(error) if kind else f"process 0: {one_line(error, limit=200)}"
        client().key_value_set(key, f"{kind or 'failed'} {message}")
        raise
    client().key_value_set(key, told)
    return result


def _told(key: str) -> str:
    """On the others: what process 0 tells. Raises what it raises; errors that are not ours as TrainingError."""
    kind, _, text = client().blocking_key_value_get(key, _WEEK).partition(" ")
    if kind in _KINDS:
        raise _KINDS[kind](text)
    return str(text)


@contextlib.contextmanager
def _being_alone() -> Iterator[None]:
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def require_all_processes(what: str) -> None:
    """Raises RuntimeError where only process 0 gets: it would wait for the others there, and they for it."""
    if _alone:
        raise RuntimeError(f"{what}: all processes must do this at once, and process 0 is alone here")


def raise_together(work: Callable[[], Result]) -> Result:
    """Runs `work` on all processes; if it raises on one of them it raises on all, so that they stay in step."""
    if is_single_process():
        return work()
    require_all_processes("raise_together")
    result: Any = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    message = "" if failure is None else f"process {jax.process_index()}: {one_line(failure, limit=200)}"
    messages = [text for text in gathered(message) if text]
    if failure is not None:
        raise failure
    if messages:
        raise TrainingError(messages[0])
    return result


def gathered(text: str) -> list[str]:
    """The texts of all processes, by index. All of them call it at once."""
    if is_single_process():
        return [text]
    key = _next_key()
    client().key_value_set(f"{key}/{jax.process_index()}", text)
    client().wait_at_barrier(key, _WEEK)
    # Every process is in this call, so that the keys of all calls before it have been read.
    if is_process_zero():
        for old in _keys[:-1]:
            client().key_value_delete(old)
    del _keys[:-1]
    texts = {int(name.rpartition("/")[2]): found for name, found in client().key_value_dir_get(key)}
    return [texts[i] for i in range(jax.process_count())]


def client() -> Any:
    """The key-value store of jax.distributed. Unlike a collective it never waits for a device."""
    # Orbax uses it in the same way; jax has no public name for it.
    from jax._src import distributed

    return distributed.global_state.client


class StopSignal:
    """Whether SIGTERM, SIGHUP (the terminal was closed) or Ctrl-C asked the run to stop, and after which step; the
    answer is the same on all processes.

    A single process reads what its own handler recorded. With several, jax's preemption service forwards a SIGTERM that
    one of them received and picks a step that none has finished yet; asking it only reads a flag. The service installs
    its own SIGTERM handler, so we do not touch that signal, and turn the others into one. A second Ctrl-C acts at once.
    """

    def __init__(self) -> None:
        self._caught: list[int] = []
        self._asked = 0

    def reached(self) -> int | None:
        """The number of the signal to stop for after this step, if any. All processes must call it once per step."""
        if is_single_process():
            return self._caught[0] if self._caught else None
        from jax.experimental import multihost_utils

        # Counted from 1, as the service does: after a SIGTERM before the first step, it waits for the call of number 1.
        self._asked += 1
        if not multihost_utils.reached_preemption_sync_point(self._asked):
            return None
        return self._caught[0] if self._caught else signal.SIGTERM

    @contextlib.contextmanager
    def watching(self) -> Iterator["StopSignal"]:
        """Handles signals inside the context, as `handled` does."""
        numbers = [signal.SIGINT]
        if is_single_process():
            numbers.append(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
            numbers.append(signal.SIGHUP)
        with handled(numbers, self._record):
            yield self

    def _record(self, number: int, _: FrameType | None) -> None:
        if self._caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught.append(number)
        if not is_single_process():
            os.kill(os.getpid(), signal.SIGTERM)


def lost_a_process(error: BaseException) -> bool:
    """Whether jax failed because another process is gone, which a restart mends, and not for a reason that recurs."""
    if is_single_process() or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    gone = r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED|Gloo|NCCL|[Cc]onnection|[Hh]eartbeat"
    return re.search(gone, str(error)) is not None


def exit_now(code: int) -> None:
    """Ends one of several processes after a failure, without the usual wait at exit for the others, which may be
    waiting for this one. Does nothing in a single process."""
    if is_single_process():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_process_zero():
        time.sleep(SHUTDOWN_GRACE)
    os._exit(code)
