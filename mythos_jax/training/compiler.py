"""Options of XLA's compilers that others found to make training faster: `training.compiler: tuned`.

They are those of MaxText's recipes at e591f30 (August 2026), per kind of chip: benchmarks/maxtext_v5e_model_configs.py
and its neighbours for v5p and trillium (v6e), with the values of benchmarks/xla_flags_library.py (scoped memory of a
kernel: 96 MiB for dense models, 80 MiB with experts), and src/maxtext/configs/gpu/a3 for the H100. We have not measured
them, because no accelerator was at hand. `mythos compile` shows what they change in a program.
"""

from collections.abc import Mapping

from jax.sharding import Mesh

from mythos_jax.config import Config

Options = dict[str, bool | int | str]

# Gathers of weights run beside computation.
_OVERLAPPED_GATHERS: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# So do sums of gradients between slices.
_OVERLAPPED_SUMS: Options = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
_HOPPER: Options = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**30,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**27,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**27,
}
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_DENSE_KIB, _EXPERTS_KIB = 96 * 1024, 80 * 1024

# By prefix of jax's `device_kind`; the first that matches counts.
_BY_KIND: tuple[tuple[str, Options], ...] = (
    ("TPU v5 lite", _OVERLAPPED_SUMS | _OVERLAPPED_GATHERS),
    ("TPU v5e", _OVERLAPPED_SUMS | _OVERLAPPED_GATHERS),
    ("TPU v5", {_VMEM: _DENSE_KIB} | _OVERLAPPED_SUMS | _OVERLAPPED_GATHERS),
    ("TPU v6", {_VMEM: _DENSE_KIB} | _OVERLAPPED_SUMS | _OVERLAPPED_GATHERS),
    ("NVIDIA H100", _HOPPER),
    ("NVIDIA H200", _HOPPER),
)


def tuned_options(device_kind: str, experts: bool) -> Options:
    """The options for a kind of device, by jax's name for it; none for a kind that is not in the table."""
    found = next((options for kind, options in _BY_KIND if device_kind.startswith(kind)), {})
    return {**found, _VMEM: _EXPERTS_KIB} if experts and _VMEM in found else dict(found)


def compiler_options(config: Config, mesh: Mesh) -> Options:
    """Those that `training.compiler` asks for on the devices of a mesh, which need not be attached."""
    if config.training.compiler == "default":
        return {}
    return tuned_options(mesh.devices.flat[0].device_kind, config.model.n_experts > 0)


def described(options: Mapping[str, bool | int | str]) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in options.items())
