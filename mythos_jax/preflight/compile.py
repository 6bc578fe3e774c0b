"""Compiles the real train and decode steps for TPUs and GPUs that are not attached."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mythos_jax.config import Config
from mythos_jax.data.placement import batch_sharding, check_batch
from mythos_jax.inference.generate import decode
from mythos_jax.inference.sampling import Sampling
from mythos_jax.inference.state import GenerateResult, Setup, State
from mythos_jax.model.cache import init_cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.preflight.devices import topology_devices
from mythos_jax.preflight.program import Program, compile_lowered
from mythos_jax.preflight.topology import Topology
from mythos_jax.runs.low_rank import abstract_base
from mythos_jax.sharding import RULES, make_mesh, partition_spec, use_mesh
from mythos_jax.training.compiler import compiler_options
from mythos_jax.training.start import abstract_constants, check_on_mesh
from mythos_jax.training.step import abstract_state, jitted_step


def compile_train(config: Config, topology: Topology, quick: bool = False) -> Program:
    """Compiles the train step for the config's global batch. quick: see `compile_lowered`."""
    mesh = _mesh(config, topology)
    rows, length = config.training.batch_size, config.data.seq_len
    check_on_mesh(config, mesh)
    state, constants = abstract_state(config, mesh), abstract_constants(config, mesh)
    teacher = constants.teacher
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))
        for name, dtype in _batch_dtypes(config).items()
    }
    with use_mesh(mesh):
        lowered = jitted_step(config, compiler_options(config, mesh)).lower(state, batch, constants)
    parts = {
        "parameters": state.variables,
        "optimizer": state.optimizer,
        "average": state.average,
        "base": constants.base,
        "teacher": teacher and teacher.variables,
        "batch": batch,
    }
    program = compile_lowered(lowered, mesh, parts, quick)
    return program if teacher is None else dataclasses.replace(program, teacher=teacher.model)


def _batch_dtypes(config: Config) -> dict[str, Any]:
    """Of the arrays of a batch, as in data/batch.py."""
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "mask": jnp.float32 if config.data.chat else jnp.bool_}
    return dtypes | ({"segment_ids": jnp.int32} if config.data.chat or config.data.document_mask else {})


def compile_decode(config: Config, topology: Topology, quick: bool = False) -> Program:
    """Compiles decoding at full depth, for `evaluation.batch_size` rows of up to `data.seq_len` tokens."""
    mesh = _mesh(config, topology)
    rows, length = config.evaluation.batch_size, config.data.seq_len
    check_batch(mesh, rows, "evaluation.batch_size")

    def place(tree: Any, *names: str) -> Any:
        """Abstract arrays, placed by the logical names of their first axes."""

        def place_array(x: Any) -> jax.ShapeDtypeStruct:
            spec = partition_spec(x.shape, (*names, *(None,) * (len(x.shape) - len(names))), mesh.shape, RULES)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(place_array, tree)

    def array(dtype: Any, shape: tuple[int, ...] = (), *names: str) -> Any:
        return place(jax.ShapeDtypeStruct(shape, dtype), *names)

    base = abstract_base(config, mesh) if config.training.lora.rank else {}
    variables = {**base, **abstract_state(config, mesh).variables}
    with use_mesh(mesh):  # the cache's dtype depends on the platform of the mesh
        cache = jax.eval_shape(lambda: init_cache(config.model, rows, length))
    heads = "latent" if config.model.attention == "mla" else "kv_heads"
    cache = place(cache.replace(length_B=None), "slots", "batch", "cache_length", heads).replace(
        length_B=place(cache.length_B, "batch")
    )
    state = State(
        cache=cache,
        done_B=array(jnp.bool_, (rows,), "batch"),
        step=array(jnp.int32),
        result=GenerateResult(
            tokens=array(jnp.int32, (rows, length), "batch"),
            lengths=array(jnp.int32, (rows,), "batch"),
            loops=array(jnp.int32, (rows, length), "batch"),
        ),
    )
    setup = Setup(
        model=Mythos(config.model),
        loops=config.model.loops,
        initial_state=None,
        variables=variables,
        halting=None,
        sampling=Sampling(
            temperature_B=array(jnp.float32, (rows,), "batch"),
            top_k_B=array(jnp.int32, (rows,), "batch"),
            top_p_B=array(jnp.float32, (rows,), "batch"),
            seed_B=array(jnp.uint32, (rows,), "batch"),
        ),
        stop_tokens=array(jnp.int32, (1,)),
    )
    with use_mesh(mesh):
        lowered = decode.lower(setup, state, array(jnp.int32))
    return compile_lowered(lowered, mesh, {"parameters": variables, "cache": cache}, quick)


def _mesh(config: Config, topology: Topology) -> Mesh:
    # Nodes of GPUs are no slices: how the mesh lies over them is the config's to say.
    slices = config.mesh.slices if topology.chip.is_gpu else topology.slices
    return make_mesh(dataclasses.replace(config.mesh, slices=slices), topology_devices(topology))
