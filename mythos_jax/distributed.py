"""Many processes, one run: who connects them, who speaks, who goes first, and how they part.

A run is one process a host (or a GPU) under `jax.distributed`. `find_cluster` reads from flags and the environment
who they are; one process is left as it is. The order of things that touch files is: process 0 first, then the rest.
"""

import contextlib
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from typing import Any, TypeVar

import jax

from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote

COORDINATOR, PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LAST_WORDS = 3  # seconds that process 0, which serves the others, stays after a failure, so that they can report theirs

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cluster:
    """How this process finds the others. source: flags, slurm or tpu; of a TPU jax itself finds the rest.

    local_devices: numbers of the GPUs that are this process's; None: all that it sees.
    """

    source: str
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_cluster(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """The cluster that flags, else environment variables, else Slurm, else a TPU's host speak of; None: one process.

    Raises ConfigError where flags or variables contradict each other or something is left out.
    """
    coordinator = coordinator or environment.get(COORDINATOR)
    processes = _integer("--processes", processes, PROCESSES, environment)
    process_id = _integer("--process-id", process_id, PROCESS_ID, environment)
    if processes is not None:
        _check(coordinator, processes, process_id)
        return None if processes == 1 else Cluster("flags", coordinator, processes, process_id)
    if process_id is not None:
        raise ConfigError(f"--process-id: got {process_id} without --processes; allowed: both, and --coordinator")
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _slurm(environment, coordinator)
    if coordinator is not None:
        raise ConfigError(f"--coordinator: got {coordinator} without --processes; allowed: both, and --process-id")
    return Cluster("tpu") if _on_tpu_host(environment) else None


def _integer(flag: str, value: int | None, variable: str, environment: Mapping[str, str]) -> int | None:
    if value is not None or not environment.get(variable):
        return value
    try:
        return int(environment[variable])
    except ValueError:
        raise ConfigError(f"{variable}: got {environment[variable]!r}, allowed: an integer, as {flag}") from None


def _check(coordinator: str | None, processes: int, process_id: int | None) -> None:
    if processes < 1:
        raise ConfigError(f"--processes: got {processes}, allowed: an integer >= 1")
    if processes == 1:
        return
    if process_id is None or not 0 <= process_id < processes:
        raise ConfigError(f"--process-id: got {process_id}, allowed: 0 to {processes - 1}, another for each process")
    if not re.fullmatch(r".+:\d+", coordinator or ""):
        raise ConfigError(f"--coordinator: got {coordinator}, allowed: HOST:PORT of process 0, the same for all")


def _slurm(environment: Mapping[str, str], coordinator: str | None) -> Cluster:
    """The step that `srun` started us in. (Left to itself, jax gives each process one GPU, alone on a node or not.)"""
    tasks, node_tasks = int(environment["SLURM_STEP_NUM_TASKS"]), environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    if coordinator is None:
        # node7 · node7,other1 · node[07-09],other1; a port of the job's own, where other jobs share the node.
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
        port = int(environment["SLURM_JOB_ID"]) % 4096 + 61440
        coordinator = f"{first[1]}{first[2] or ''}:{port}"
    seen = environment.get("CUDA_VISIBLE_DEVICES", "")
    shares_a_node = max(map(int, re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", node_tasks)), default=tasks) > 1
    local = int(environment["SLURM_LOCALID"])
    # A task that sees several GPUs of a node which it shares takes the one of its number.
    mine = (local,) if shares_a_node and seen.count(",") else None
    return Cluster("slurm", coordinator, tasks, int(environment["SLURM_PROCID"]), mine)


def _on_tpu_host(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    wanted = not platforms or "tpu" in platforms.split(",")
    return wanted and find_spec("libtpu") is not None and bool(glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"))


def connect(cluster: Cluster | None, connect_timeout: int = 300, heartbeat_timeout: int = 100) -> None:
    """Joins the other processes; must come before anything that asks for devices. None: does nothing.

    connect_timeout: seconds to wait for all to come. heartbeat_timeout: seconds after which a process that is not
    heard of counts as dead and the others end. Raises ConfigError where they do not find each other.
    """
    if cluster is None:
        return
    timeouts = {
        "initialization_timeout": connect_timeout,
        "heartbeat_timeout_seconds": heartbeat_timeout,
        "shutdown_timeout_seconds": heartbeat_timeout,
    }
    try:
        if cluster.source == "tpu":
            jax.distributed.initialize(**timeouts)
        else:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.processes,
                cluster.process_id,
                local_device_ids=cluster.local_devices,
                cluster_detection_method="deactivate",
                **timeouts,
            )
    except (RuntimeError, ValueError, OSError) as error:
        where = cluster.coordinator or "the TPU's own coordinator"
        raise ConfigError(
            f"process {cluster.process_id} of {cluster.processes} ({cluster.source}) could not join the others at "
            f"{where} within {connect_timeout} s: {_first_line(error)}"
        ) from error


def cache_compilations(folder: str | None) -> None:
    """Keeps compiled programs in a folder, which may be remote; None: where JAX_COMPILATION_CACHE_DIR says, if it does.

    Process 0 writes what all read.
    """
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
    if is_remote(folder or jax.config.jax_compilation_cache_dir or ""):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own caches want a disk


def is_first() -> bool:
    """Whether this is the process that prints, logs and prepares: the only one, or process 0."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_alone() -> bool:
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def name_of_process() -> str:
    """To put before a message: which of several processes this is."""
    return "" if is_alone() else f"process {jax.process_index()}: "


def say(text: str) -> None:
    """One line on standard error, from the first process."""
    if is_first():
        print(text, file=sys.stderr)


# Every process makes the same calls of the next two functions in the same order, so the numbers of calls agree.
_calls = itertools.count()
_WEEK = 7 * 24 * 3600 * 1000  # in ms; a process that is gone ends the waiting long before


def first_then_rest(name: str, work: Callable[[], Result], identity: Callable[[Result], str] = lambda _: "") -> Result:
    """`work()` on process 0, then on all others, which find the files that it made; however long that takes.

    identity: text that must be the same everywhere. Where process 0 raises ConfigError, all do. Raises ConfigError
    where an identity differs; `name` is what the message calls the work.
    """
    if is_alone():
        return work()
    key = f"mythos/{next(_calls)}"
    if is_first():
        try:
            result = work()
        except ConfigError as error:
            _client().key_value_set(key, f"error {error}")
            raise
        _client().key_value_set(key, f"done {identity(result)}")
        return result
    kind, _, text = _client().blocking_key_value_get(key, _WEEK).partition(" ")
    if kind == "error":
        raise ConfigError(text)
    result = work()
    if identity(result) != text:
        raise ConfigError(
            f"{name}: process {jax.process_index()} sees another one than process 0; allowed: paths that all share"
        )
    return result


def all_or_none(work: Callable[[], Result]) -> Result:
    """`work()` on all processes; where it raises on one, it raises on all, so that they go on the same way."""
    if is_alone():
        return work()
    key = f"mythos/{next(_calls)}"
    try:
        result, why = work(), ""
    except Exception as error:
        failure, why = error, f"process {jax.process_index()}: {_first_line(error)}"
    _client().key_value_set(f"{key}/{jax.process_index()}", why)
    _client().wait_at_barrier(key, _WEEK)
    reasons = [reason for _, reason in _client().key_value_dir_get(key) if reason]
    if why:
        raise failure
    if reasons:
        raise RuntimeError(reasons[0])
    return result


def _client() -> Any:
    # The key-value store that jax.distributed keeps for its own use: no collective, so nothing waits on a device. Orbax
    # uses it the same way; jax has no public name for it.
    from jax._src import distributed

    return distributed.global_state.client


class StopSignal:
    """Whether to stop after a step, by SIGTERM or Ctrl-C, and after which: the same one in all processes.

    One process looks at what its handler noted. With more, jax's preemption service passes on the SIGTERM that one of
    them got and chooses a step that none has finished; asking it reads a flag and waits for nothing. It has a SIGTERM
    handler of its own, so we leave that alone and hand it a Ctrl-C. A second Ctrl-C acts at once.
    """

    def __init__(self) -> None:
        self._caught: list[int] = []

    def reached(self, step: int) -> int | None:
        """The number of the signal to stop for after this step. To be asked once at every step, by all."""
        if is_alone():
            return self._caught[0] if self._caught else None
        from jax.experimental import multihost_utils

        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        return self._caught[0] if self._caught else signal.SIGTERM

    @contextlib.contextmanager
    def watching(self) -> Iterator["StopSignal"]:
        """Handles signals inside; outside the main thread they are the caller's."""
        numbers = (signal.SIGINT, signal.SIGTERM) if is_alone() else (signal.SIGINT,)
        try:
            before = {number: signal.signal(number, self._note) for number in numbers}
        except ValueError:
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self._caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught.append(number)
        if not is_alone():
            os.kill(os.getpid(), signal.SIGTERM)


def lost_a_process(error: BaseException) -> bool:
    """Whether jax failed because another process is gone, and not for a reason that comes again."""
    if is_alone() or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    gone = r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED|Gloo|NCCL|[Cc]onnection|[Hh]eartbeat"
    return re.search(gone, str(error)) is not None


def leave(code: int) -> None:
    """Ends a process that failed alone: at once, not waiting at exit for others that may be waiting for us."""
    if is_alone():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(LAST_WORDS)
    os._exit(code)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
