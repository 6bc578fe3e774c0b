"""Devices that are not attached, described by their compilers: libtpu for TPUs, jax's CUDA plugin for GPUs."""

import importlib.util
import os
from typing import Any

from jax.experimental import topologies

from mythos_jax.chips import CHIPS
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.preflight.topology import Topology

# libtpu expects to run on a TPU VM. Without these it asks the VM's metadata server what it runs on, and logs failures.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations may run on this machine, since none uses a chip
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}

# Compiler options for GPUs that are not attached: nothing can be tried out on them.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_shard_autotuning": False}

# XLA's description of a GPU (stream_executor's GpuTargetConfigProto), as its own files in tools/hlo_opt/gpu_specs.
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_per_core}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock} l2_cache_size: {cache}
  device_memory_size: {memory:.0f} memory_bandwidth: {bandwidth:.0f}
  cuda_compute_capability {{ major: {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 2 }}
device_description_str: "{description}"
"""
_HOPPER = dict(shared=232448, shared_per_core=233472, cores=132, units=128, clock=1.98, capability=9)
_GPUS: dict[str, dict[str, Any]] = {
    "a100": dict(
        shared=166912, shared_per_core=167936, cores=108, units=64, clock=1.41, capability=8, cache=40 * 2**20,
        description="NVIDIA A100-SXM4-80GB",
    ),
    "h100": dict(_HOPPER, cache=50 * 2**20, description="NVIDIA H100 80GB HBM3"),
    "h200": dict(_HOPPER, cache=60 * 2**20, description="NVIDIA H200"),
}  # fmt: skip


def topology_devices(topology: Topology) -> list[Any]:
    """Descriptions of a topology's devices. Raises ConfigError if the compiler is missing or does not know them."""
    return _gpus(topology) if topology.chip.is_gpu else _tpus(topology)


def _tpus(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("mythos compile: needs the TPU compiler; install it: pip install '.[tpu]' in the checkout")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)  # the default is four chips per host
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # its two cores are one device, as they are on a TPU VM
    options["topology_name"] = f"{topology.chip.name}:{topology.shape}"
    return _describe(topology.name, "libtpu", "tpu", options)


def _gpus(topology: Topology) -> list[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise ConfigError("mythos compile: needs the CUDA compiler; install it: pip install '.[cuda]' in the checkout")
    chip, (nodes, gpus) = topology.chip, topology.nodes
    target = _GPU_TARGET.format(memory=CHIPS[chip.name].hbm_bytes, bandwidth=chip.hbm_bandwidth, **_GPUS[chip.name])
    options = {"target_config": target, "topology": f"1x{nodes}x{gpus}"}  # slices x nodes x GPUs of each
    return _describe(topology.name, "CUDA plugin", "cuda", options)


def _describe(name: str, compiler: str, platform: str, options: dict[str, Any]) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(platform=platform, **options).devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = one_line(error, limit=200)
        raise ConfigError(f"--topology: {name} is unknown to this {compiler} ({reason})") from None
