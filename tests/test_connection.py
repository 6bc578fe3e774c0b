"""Processes that do not find each other, or lose each other: one line and the documented exit code, from real ones."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from mythos_jax.cluster import find_cluster
from mythos_jax.errors import ConfigError
from tests.ports import free_port
from tests.test_multihost import STEP

JOIN = """
import sys, time
from mythos_jax import cli, connection
from mythos_jax.cluster import Cluster
from mythos_jax.commands import info

def run(arguments, overrides):
    process, processes, timeout, address, then = sys.argv[1:]
    connection.connect(Cluster("flags", address, int(processes), int(process)), int(timeout))
    exec(then)
    return 0

info.run = run
sys.exit(cli.main(["info", "x"]))
"""


def start(process, address, processes=2, timeout=2, then=""):
    arguments = [process, processes, timeout, address, then]
    # A proxy that nobody serves: gRPC must not use it for the coordinator.
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9"}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment
    )


def end(process):
    errors = process.communicate(timeout=120)[1]
    return process.returncode, errors.splitlines()


def free_addresses(count):
    return [f"127.0.0.1:{free_port()}" for _ in range(count)]


def test_processes_that_do_not_meet_say_why_in_one_line():
    one, two, three = free_addresses(3)
    disagreeing = [start(0, three, 2, 60), start(1, three, 3, 60)]  # about the number of processes
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        taken = f"localhost:{server.getsockname()[1]}"
        attempts = {
            "not all processes came": start(0, one),
            "Connection refused": start(1, two),
            "cannot listen on port": start(0, taken),
            "process 0 answers, but not all processes came": start(1, taken),
            "Name or service not known|[Nn]ame resolution": start(1, "no-such-host.invalid:1"),
        }
        ended = {reason: end(process) for reason, process in attempts.items()}
    for reason, (code, lines) in ended.items():
        assert code == 2, lines
        (line,) = lines
        assert line.startswith("mythos: process ")
        assert any(words in line for words in reason.split("|")), line
    message = "mythos: --processes: got 2 and 3 in different processes, allowed: one number"
    assert [end(process) for process in disagreeing] == [(2, [message])] * 2


def test_a_process_that_loses_another_ends_with_42_and_one_line_of_ours():
    (address,) = free_addresses(1)
    # The first ends when the second has joined it, too, and may not live to answer that.
    joined = "connection._state().client.wait_at_barrier('joined', 60_000)"
    ends = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    waits = f"try:\n    {joined}\nexcept Exception:\n    pass\ntime.sleep(100)"
    first = start(0, address, timeout=60, then=f"{joined}; {ends}")
    second = start(1, address, timeout=60, then=waits)
    assert end(first)[0] == -signal.SIGKILL
    code, lines = end(second)
    assert code == 42
    assert [line for line in lines if line.startswith("mythos: ")] == ["mythos: process 1: another process is gone"]
    assert not any("stack trace" in line or "Traceback" in line for line in lines)


def test_a_signal_ends_the_wait():
    """Also one that comes while the wait begins."""
    (address,) = free_addresses(1)
    waiting = start(0, address, timeout=300, then="")
    while True:  # until it waits
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0:
                break
    waiting.send_signal(signal.SIGINT)
    assert end(waiting) == (130, ["mythos: interrupted"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "four"}, "SLURM_STEP_NUM_TASKS: got 'four', allowed: an integer"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID: got '', allowed: an integer"),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID: got '-1', allowed: an integer"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID: got 'x', allowed: an integer"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST: got '', allowed: a list of nodes"),
        ({"JAX_COORDINATOR_ADDRESS": "node7"}, "--coordinator: got node7, allowed: HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "node7:70000"}, "--coordinator: got node7:70000, allowed: HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "http://a:1"}, "--coordinator: got http://a:1, allowed: HOST:PORT"),
    ],
)
def test_a_strange_variable_of_slurm_or_jax_is_named(variables, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster(STEP | variables)


def test_an_empty_variable_is_as_good_as_none():
    assert find_cluster({"SLURM_STEP_NUM_TASKS": "", "JAX_NUM_PROCESSES": "", "JAX_COORDINATOR_ADDRESS": ""}) is None
