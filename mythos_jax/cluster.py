"""Process discovery: which cluster this process belongs to.

`find_cluster` reads flags, environment variables, Slurm and TPU hosts; a single process is left as it is. connection.py
joins the cluster; what the processes do once they are connected is in processes.py.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec

import jax

from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote

COORDINATOR, PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@dataclass(frozen=True)
class Cluster:
    """How this process finds the others.

    source: "flags", "slurm" or "tpu"; on a TPU jax detects everything else itself.
    local_devices: indices of the GPUs this process uses; None: all visible ones.
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
    """The cluster described by flags, else environment variables, else Slurm, else the TPU host; None: one process.

    Raises ConfigError if flags or variables contradict each other or one is missing.
    """
    coordinator = coordinator or environment.get(COORDINATOR) or None
    processes = _integer("--processes", processes, PROCESSES, environment)
    process_id = _integer("--process-id", process_id, PROCESS_ID, environment)
    if processes is not None:
        _check(coordinator, processes, process_id)
        return None if processes == 1 else Cluster("flags", coordinator, processes, process_id)
    if process_id is not None:
        raise ConfigError(f"--process-id: got {process_id} without --processes; allowed: both, and --coordinator")
    if environment.get("SLURM_STEP_NUM_TASKS") and _slurm_integer(environment, "SLURM_STEP_NUM_TASKS") > 1:
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
        raise ConfigError(f"--process-id: got {process_id}, allowed: 0 to {processes - 1}, unique to each process")
    _check_address(coordinator)


def _check_address(coordinator: str | None) -> None:
    port = re.fullmatch(r"[^/\s]+:(\d{1,5})", coordinator or "")
    if port is None or not 1 <= int(port[1]) <= 65535:
        raise ConfigError(f"--coordinator: got {coordinator}, allowed: HOST:PORT of process 0, the same everywhere")


def _slurm(environment: Mapping[str, str], coordinator: str | None) -> Cluster:
    """The step in which `srun` started this process.

    jax's own Slurm detection assigns one GPU to each process, even to one that has a whole node.
    """
    tasks, rank, local = (
        _slurm_integer(environment, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    )
    node_tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    if coordinator is None:
        # Node lists look like node7 · node7,other1 · node[07-09],other1. The port derives from the job id, so that jobs
        # sharing a node do not collide.
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
        if first is None:
            raise ConfigError(f"SLURM_STEP_NODELIST: got {nodes!r}, allowed: a list of nodes, as srun sets it")
        port = _slurm_integer(environment, "SLURM_JOB_ID") % 4096 + 61440
        coordinator = f"{first[1]}{first[2] or ''}:{port}"
    _check_address(coordinator)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    shares_a_node = max(map(int, re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", node_tasks)), default=tasks) > 1
    # A task that shares its node but sees several GPUs takes the one with its own local index.
    devices = (local,) if shares_a_node and visible.count(",") else None
    return Cluster("slurm", coordinator, tasks, rank, devices)


def _slurm_integer(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not re.fullmatch(r"\d+", value):
        raise ConfigError(f"{name}: got {value!r}, allowed: an integer >= 0, as srun sets it")
    return int(value)


def _on_tpu_host(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    may_use_tpu = not platforms or "tpu" in platforms.split(",")
    return may_use_tpu and find_spec("libtpu") is not None and bool(glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"))


def cache_compilations(folder: str | None) -> None:
    """Caches compiled programs in a folder, which may be remote; None: in $JAX_COMPILATION_CACHE_DIR, if set.

    Process 0 writes the cache, all processes read it.
    """
    option = "jax_compilation_cache_dir"
    if folder:
        if not is_remote(folder) and os.path.exists(folder) and not os.path.isdir(folder):
            raise ConfigError(f"--compilation-cache: got {folder}, which is a file; allowed: a folder")
        jax.config.update(option, folder)
    if is_remote(getattr(jax.config, option) or ""):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own caches need a disk
