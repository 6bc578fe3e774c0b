"""Compiling the real train step and decode step for TPUs that are not there, with the compiler in libtpu."""

import dataclasses
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from mythos_jax.chips import GIB
from mythos_jax.config import Config
from mythos_jax.data.placement import batch_sharding, check_batch
from mythos_jax.errors import ConfigError
from mythos_jax.inference import generate
from mythos_jax.inference.sampling import Sampling
from mythos_jax.model.cache import init_cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.preflight.topology import Topology
from mythos_jax.sharding import RULES, make_mesh, placement, use_mesh
from mythos_jax.training.step import abstract_state, jitted_step

# libtpu asks the metadata server of a TPU VM what it runs on, and logs that there is none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another compile on this machine holds no chip
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


# For `quick`: the compiler searches less for fast code. Memory and FLOPs stay within a few percent (docs/pods.md).
_QUICK = {"exec_time_optimization_effort": -1.0}


@dataclass(frozen=True)
class Buffer:
    """A large array of a program that does not fit: its bytes on a chip, its type, where in the model it is made."""

    bytes: float
    type: str
    source: str


@dataclass(frozen=True)
class OutOfMemory:
    """The compiler's refusal. needed: bytes on a chip, as far as it says."""

    needed: float
    biggest: tuple[Buffer, ...]


@dataclass(frozen=True)
class Program:
    """What was compiled. state: abstract arrays by part of the state (parameters, optimizer, …). text: the optimised
    HLO. temporaries: bytes on a chip beside the state, at the worst moment. code: bytes on a chip. refusal: why it does
    not fit, and then the others are empty."""

    mesh: Mesh
    state: dict[str, Any]
    text: str = ""
    temporaries: int = 0
    code: int = 0
    refusal: OutOfMemory | None = None


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a slice, as descriptions. Raises ConfigError where libtpu is missing or older than the chip."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("mythos compile: needs the TPU compiler; install it: pip install 'mythos-jax[tpu]'")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)  # else a host has four
    name = f"{topology.chip.name}:{topology.shape}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(f"--topology: {topology.name} is unknown to this libtpu ({_one_line(error)})") from None
    return list(described.devices)


def for_tpu(config: Config) -> Config:
    """The config with the dtype that it means on a TPU: the process that compiles sees only a CPU."""
    dtype = config.model.compute_dtype("tpu")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def compile_train(config: Config, topology: Topology, quick: bool = False) -> Program:
    """The train step for the config's global batch."""
    config = for_tpu(config)
    mesh = _mesh(config, topology)
    rows, length = config.training.batch_size, config.data.seq_len
    check_batch(mesh, rows, "training.batch_size")
    parts = rows // config.training.grad_accumulation_steps
    check_batch(mesh, parts, "training.batch_size / training.grad_accumulation_steps")
    state = abstract_state(config, mesh)
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))
        for name, dtype in {"tokens": jnp.int32, "targets": jnp.int32, "mask": jnp.bool_}.items()
    }
    kept = {"parameters": state.variables, "optimizer": state.optimizer, "average": state.average, "batch": batch}
    with use_mesh(mesh):
        lowered = jitted_step(config).lower(state, batch)
    return _compile(lowered, mesh, kept, quick)


def compile_decode(config: Config, topology: Topology, quick: bool = False) -> Program:
    """Decoding token by token at full depth: `evaluation.batch_size` rows that may grow to `data.seq_len` tokens."""
    config = for_tpu(config)
    mesh = _mesh(config, topology)
    rows, length = config.evaluation.batch_size, config.data.seq_len
    check_batch(mesh, rows, "evaluation.batch_size")

    def place(tree: Any, *names: str) -> Any:
        """Abstract arrays, placed by the logical names of their first axes."""

        def one(x: Any) -> jax.ShapeDtypeStruct:
            spec = placement(x.shape, (*names, *(None,) * (len(x.shape) - len(names))), mesh.shape, RULES)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(one, tree)

    variables = abstract_state(config, mesh).variables
    cache = jax.eval_shape(lambda: init_cache(config.model, rows, length))
    heads = "latent" if config.model.attention == "mla" else "kv_heads"
    cache = place(cache.replace(length_B=None), "slots", "batch", "cache_length", heads).replace(
        length_B=place(cache.length_B, "batch")
    )
    by_row, grid = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(rows,), (rows, length)])
    state = generate.State(
        cache=cache,
        done_B=place(jax.ShapeDtypeStruct((rows,), jnp.bool_), "batch"),
        step=place(jax.ShapeDtypeStruct((), jnp.int32)),
        result=place(generate.GenerateResult(tokens=grid, lengths=by_row, loops=grid), "batch"),
    )
    scalars = (np.float32(0), np.int32(0), np.float32(1))
    setup = generate.Setup(
        model=Mythos(config.model),
        loops=config.model.loops,
        initial_state=None,
        variables=variables,
        halting=None,
        sampling=Sampling(*place(scalars), place(jax.ShapeDtypeStruct((rows,), jnp.uint32), "batch")),
        stop_tokens=place(jax.ShapeDtypeStruct((1,), jnp.int32)),
    )
    with use_mesh(mesh):
        lowered = generate.decode.lower(setup, state, place(jax.ShapeDtypeStruct((), jnp.int32)))
    return _compile(lowered, mesh, {"parameters": variables, "cache": cache}, quick)


def _mesh(config: Config, topology: Topology) -> Mesh:
    return make_mesh(dataclasses.replace(config.mesh, slices=topology.slices), topology_devices(topology))


def chip_bytes(tree: Any) -> int:
    """Bytes of a tree of placed abstract arrays on one chip."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _compile(lowered: Any, mesh: Mesh, state: dict[str, Any], quick: bool) -> Program:
    try:
        compiled = lowered.compile(compiler_options=_QUICK if quick else None)
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error))
        if refusal is None:
            raise
        return Program(mesh, state, refusal=refusal)
    memory = compiled.memory_analysis()
    return Program(
        mesh,
        state,
        text=compiled.as_text(),
        # At the worst moment, as the compiler counts to accept a program; `temp_size` is the sum of all it ever holds.
        temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)B?"


def read_refusal(message: str) -> OutOfMemory | None:
    """The sizes in the compiler's message that a program does not fit, None for another error."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    used = re.search(rf"Used {_SIZE} of", message) or re.search(rf"\({_SIZE}\) exceeds available", message)
    buffers = re.findall(
        rf"Size: {_SIZE}\s*(?:Operator: op_name=\"([^\"]*)\".*?)?\s*Shape: (\S+)", message, flags=re.DOTALL
    )
    return OutOfMemory(
        needed=_bytes(*used.groups()) if used else float("nan"),
        biggest=tuple(Buffer(_bytes(size, unit), type_, source) for size, unit, source, type_ in buffers),
    )


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
