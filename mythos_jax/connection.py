"""Joining the other processes of a run. If one of them is missing, at the start or later, this process ends with one
line and a documented exit code.

Left to itself, jax waits for the others in C++, where signals are not handled, and aborts the process with a C++ stack
when the wait fails or another process dies. Here it waits in a thread, and its error callback ends the process.
"""

import contextlib
import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from mythos_jax.calls import Call
from mythos_jax.cluster import Cluster
from mythos_jax.errors import RESTART, ConfigError, one_line
from mythos_jax.interrupts import TURN
from mythos_jax.processes import SHUTDOWN_GRACE

# Seconds that jax itself waits longer than we do, so that it never ends the process first.
MARGIN = 60
# Seconds to wait for an answer when we look why the coordinator was not reached.
PROBE = 2


def connect(cluster: Cluster | None, connect_timeout: int = 300, heartbeat_timeout: int = 100) -> None:
    """Joins the other processes; must be called before anything that asks jax for devices. None: does nothing.

    connect_timeout: seconds to wait for all processes to connect.
    heartbeat_timeout: seconds without a heartbeat after which a process counts as dead and the others exit.

    Raises ConfigError if the processes cannot connect. This is then a single process.
    """
    if cluster is None:
        return
    end = time.monotonic() + connect_timeout
    initialize = partial(
        jax.distributed.initialize,
        initialization_timeout=connect_timeout + MARGIN,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )
    if cluster.source != "tpu":
        initialize = partial(
            initialize,
            cluster.coordinator,
            cluster.processes,
            cluster.process_id,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",
        )
    try:
        if cluster.process_id == 0:
            _wait_for_port(cluster, end)
        with _own_client():
            _run_in_thread(initialize, cluster, connect_timeout, end)
        if cluster.source != "tpu":
            _check_count(cluster, end)
    except BaseException:
        _abandon()
        raise


def _who(cluster: Cluster) -> str:
    return "this process" if cluster.process_id is None else f"process {cluster.process_id} of {cluster.processes}"


def _wait_for_port(cluster: Cluster, end: float) -> None:
    """Waits until process 0 can listen on the coordinator's port; jax crashes if it cannot.

    An earlier attempt of the same run may still be ending.
    """
    port = int((cluster.coordinator or "").rpartition(":")[2])
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:  # another address or port
        return
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    while True:
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
                probe.listen()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"{_who(cluster)} ({cluster.source}): cannot listen on port {port} ({error.strerror}); allowed: "
                    "a --coordinator HOST:PORT whose port is free on the host of process 0"
                ) from None
        time.sleep(0.2)


def _run_in_thread(initialize: Callable[[], None], cluster: Cluster, connect_timeout: int, end: float) -> None:
    """Runs jax's `initialize` while this thread waits for it and for signals. Raises ConfigError if it fails."""
    call = Call(initialize, "connect")
    who, address = f"{_who(cluster)} ({cluster.source})", cluster.coordinator
    while not call.ended.wait(TURN):
        if time.monotonic() < end:
            continue
        if cluster.process_id == 0 or address is None:
            reason = "not all processes came"
        else:
            reason = _why_unreachable(address) or "process 0 answers, but not all processes came"
        raise ConfigError(
            f"{who} could not join the others at {address or 'the TPU’s coordinator'} within {connect_timeout} s: "
            f"{reason}"
        )
    if call.error is not None:
        reason = one_line(call.error, limit=200)
        if "bad_cast" in reason:  # what is left of an error that came through the callback in `_own_client`
            reason = "process 0 has ended or refused it; allowed: the same --processes everywhere, and each id once"
        raise ConfigError(f"{who} could not join the others at {address or 'the TPU’s coordinator'}: {reason}")


def _why_unreachable(address: str) -> str:
    """Why nothing answers at HOST:PORT; empty if something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE).close()
    except OSError as error:
        return error.strerror or one_line(error)
    return ""


def _check_count(cluster: Cluster, end: float) -> None:
    """Raises ConfigError if the processes were told different numbers of processes, which jax does not notice."""
    client = _state().client
    client.key_value_set(f"mythos/processes/{cluster.process_id}", str(cluster.processes))
    client.wait_at_barrier("mythos/processes", max(int((end - time.monotonic()) * 1000), 10_000))
    counts = sorted({int(count) for _, count in client.key_value_dir_get("mythos/processes")})
    if len(counts) > 1:
        if cluster.process_id == 0:
            time.sleep(SHUTDOWN_GRACE)  # the others read the counts from this process
        raise ConfigError(
            f"--processes: got {' and '.join(map(str, counts))} in different processes, allowed: one number"
        )


def _state() -> Any:
    from jax._src import distributed  # jax has no public name for its client

    return distributed.global_state


def _abandon() -> None:
    """Makes this a single process, whatever state jax is in.

    What was started keeps running, unseen by jax, until the process ends: it cannot be ended while it waits.
    """
    state = _state()
    for name in ("preemption_sync_manager", "client", "service"):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(getattr(state, name)))  # its destructor would wait, too
        setattr(state, name, None)


@contextlib.contextmanager
def _own_client() -> Iterator[None]:
    """Inside, jax's client bypasses proxies and calls `_end_without_the_others` instead of aborting."""
    from jax._src import distributed

    with contextlib.suppress(AttributeError):
        jax.config.update("jax_check_proxy_envs", False)  # a warning about what is handled here
    library: Any = distributed._jax
    make_client = library.get_distributed_runtime_client

    def make(address: str, *arguments: Any, **options: Any) -> Any:
        _bypass_proxies(address)
        if _end_on_bad_cast():
            options["missed_heartbeat_callback"] = _end_without_the_others
        return make_client(address, *arguments, **options)

    library.get_distributed_runtime_client = make
    try:
        yield
    finally:
        library.get_distributed_runtime_client = make_client


def _bypass_proxies(address: str) -> None:
    """gRPC would connect to the coordinator through $http_proxy, which the processes of a run never need."""
    variable, host = "no_grpc_proxy", address.rpartition(":")[0].strip("[]")
    exempt = os.environ.get(variable) or os.environ.get("no_proxy")
    os.environ[variable] = f"{exempt},{host}" if exempt else host


def _end_without_the_others(*_: Any) -> None:
    """Called from a C++ thread when another process has died or no longer answers."""
    who = f"process {_state().process_id}: "
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"mythos: {who}another process is gone\n".encode())
    os._exit(RESTART)


_terminate_handler: Any = None  # must live as long as the process


def _end_on_bad_cast() -> bool:
    """Makes C++ call `_end_without_the_others` where it would abort because of an uncaught `std::bad_cast`.

    jaxlib (seen in 0.10 and 0.12) cannot convert the argument of its error callback for Python, so that this is what
    the callback ends in. Returns False where the C++ library has no such hook; jax then aborts as usual.
    """
    global _terminate_handler
    if _terminate_handler is not None:
        return True
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, exception_type = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (OSError, AttributeError):
        return False
    handler_type = ctypes.CFUNCTYPE(None)
    set_terminate.restype = exception_type.restype = ctypes.c_void_p
    previous: Any = None

    def handle() -> None:
        # A std::type_info is a pointer to its virtual table, then one to the name.
        kind = exception_type()
        name = ctypes.c_char_p.from_address(kind + ctypes.sizeof(ctypes.c_void_p)).value if kind else None
        if name == b"St8bad_cast":
            _end_without_the_others()
        previous()

    _terminate_handler = handler_type(handle)
    previous = handler_type(set_terminate(_terminate_handler))
    return True
