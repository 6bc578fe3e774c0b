"""Every kind of model on every mesh of eight fake devices: loss and gradients must equal those on one device.

    JAX_PLATFORMS=cpu python -m tests.parallelism [model or mesh …]

The test suite runs a few of these pairs (test_sharding.py).
"""

import dataclasses
import sys
import time
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from mythos_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from mythos_jax.data.placement import batch_sharding, to_global
from mythos_jax.ops import attention
from mythos_jax.runs.state import Constants, TrainState
from mythos_jax.sharding import make_mesh
from mythos_jax.training.step import abstract_state, make_train_step
from tests.tiny import SHARDED_GQA, SHARDED_MLA, moe_fields

B, T = 8, 16

MOE = moe_fields(8, n_shared_experts=1)

MODELS = {
    "gqa dense": SHARDED_GQA,
    "gqa moe": dataclasses.replace(SHARDED_GQA, **MOE),
    "mla dense": SHARDED_MLA,
    "mla moe": dataclasses.replace(SHARDED_MLA, **MOE, readout="act"),
    "gqa moe all-to-all": dataclasses.replace(SHARDED_GQA, **MOE, expert_exchange="all_to_all"),
}
MESHES = {
    "data": MeshConfig(data=8, fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "fsdp per loop": MeshConfig(fsdp=8, gather="per_loop"),
    "tensor": MeshConfig(fsdp=1, tensor=8),
    "expert": MeshConfig(fsdp=1, expert=8),
    "sequence": MeshConfig(fsdp=1, sequence=8),
    "fsdp tensor expert": MeshConfig(fsdp=2, tensor=2, expert=2),
    "data expert sequence": MeshConfig(data=2, fsdp=1, expert=2, sequence=2, slices=2),
    "fsdp tensor sequence per loop": MeshConfig(fsdp=2, tensor=2, sequence=2, gather="per_loop"),
}


def config_of(model: ModelConfig, mesh: MeshConfig) -> Config:
    # Without clipping, the optimizer's first moments after one step are the gradients times (1 - b1).
    training = TrainingConfig(steps=4, batch_size=B, gradient_clip=0.0)
    return Config(model=model, training=training, data=DataConfig(seq_len=T), mesh=mesh)


def random_state(config: Config, mesh: Mesh) -> TrainState:
    """The same weights on every mesh, large enough for every part of the model to affect the loss."""
    random = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_weight = any(getattr(key, "name", getattr(key, "key", "")) == "params" for key in path)
        value = random.normal(0, 0.2, leaf.shape) if is_weight else np.zeros(leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, abstract_state(config, mesh))


def loss_and_gradients(
    model: ModelConfig, mesh_config: MeshConfig, devices: list[jax.Device] | None = None
) -> dict[str, Any]:
    """The loss, the expert load and the gradient of every weight of one training step on this mesh, on the host."""
    config, mesh = config_of(model, mesh_config), make_mesh(mesh_config, devices)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (B, T + 1)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((B, T), bool)}
    placed = to_global(batch_sharding(mesh), B, np.arange(B), batch)
    # For so few tokens attention would be dense. One device keeps that, as the reference; a mesh attends by blocks.
    with mock.patch.object(attention, "MAX_DENSE_QUERIES", T if mesh.size == 1 else 0):
        state, metrics = make_train_step(config, mesh)(random_state(config, mesh), placed, Constants())
    gradients = jax.tree.map(lambda m: np.asarray(m) / (1 - config.training.b1), state.optimizer[1][0].mu)
    return {"loss": metrics["loss"], "expert_load": metrics.get("expert_load"), "gradients": gradients}


def on_one_device(model: ModelConfig) -> dict[str, Any]:
    return loss_and_gradients(model, MeshConfig(), jax.devices()[:1])


def largest_difference(one: Any, other: Any) -> tuple[float, str]:
    """The largest absolute difference between two such results, and the path of the array that has it."""
    differences = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), one, other)
    path, value = max(jax.tree_util.tree_leaves_with_path(differences), key=lambda item: item[1])
    return value, jax.tree_util.keystr(path)


def main(words: list[str]) -> int:
    """Prints a line per pair of model and mesh; returns 1 if any differs from one device by more than 1e-5."""
    jax.config.update("jax_num_cpu_devices", 8)
    failed = 0
    for name, model in MODELS.items():
        if words and name not in words and not set(words) & set(MESHES):
            continue
        one = on_one_device(model)
        largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(one["gradients"]))
        print(f"{name}: loss {float(one['loss']):.4f}, largest gradient {largest:.3f}", flush=True)
        for mesh_name, mesh in MESHES.items():
            if words and name not in words and mesh_name not in words:
                continue
            start = time.perf_counter()
            value, where = largest_difference(one, loss_and_gradients(model, mesh))
            failed += value > 1e-5
            verdict = "ok  " if value <= 1e-5 else "FAIL"
            seconds = time.perf_counter() - start
            print(f"  {verdict} {mesh_name:30} {value:.1e} at {where} ({seconds:.0f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
