"""The mesh, and how arrays are placed on it."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from mythos_jax.data.placement import batch_sharding, check_batch, local_rows, to_global
from mythos_jax.errors import ConfigError
from mythos_jax.inference.generate import generate
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.cache import init_cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.ops.cross_entropy import cross_entropy
from mythos_jax.runs.state import Constants
from mythos_jax.sharding import check_sharded, make_mesh, shardings, split_into_slices, use_mesh
from mythos_jax.training.step import abstract_state, init_state, jitted_step
from tests import parallelism
from tests.tiny import SHARDED_GQA, SHARDED_MLA

MODEL = ModelConfig(vocab_size=64, dim=32, max_seq_len=128, loops=2, n_heads=4, n_kv_heads=2, hidden_dim=64)


def test_the_free_axis_takes_the_remaining_devices():
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
        "expert": 1,
        "sequence": 1,
    }
    assert make_mesh(MeshConfig(data=-1, fsdp=1)).shape["data"] == 8


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ConfigError, match=r"tensor 3 .* allowed: sizes whose product is the number of devices, 8"):
        make_mesh(MeshConfig(tensor=3))
    with pytest.raises(ConfigError, match="allowed: a multiple of 8"):
        check_batch(make_mesh(MeshConfig()), 12, "training.batch_size")


def test_weights_and_optimizer_state_are_created_in_their_shards():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    state = init_state(Config(model=MODEL, training=TrainingConfig(ema_decay=0.9)), mesh)
    expected = {"q": PartitionSpec("fsdp", "tensor"), "out": PartitionSpec("tensor", None, "fsdp")}
    for tree in [state.variables["params"], state.optimizer[1][0].mu, state.optimizer[1][0].nu, state.average]:
        for name, spec in expected.items():
            kernel = tree["prelude_0"]["attention"][name]["kernel"]
            assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), kernel.ndim)
            assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_initial_weights_do_not_depend_on_the_mesh():
    one = init_state(Config(model=MODEL), make_mesh(MeshConfig(), jax.devices()[:1]))
    eight = init_state(Config(model=MODEL), make_mesh(MeshConfig(fsdp=4, tensor=2)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(eight))


BARE = dataclasses.replace(
    SHARDED_GQA, prelude_layers=0, lora_rank=0, injection="none", activation="relu2", n_kv_heads=2
)

BARE_MLA = dataclasses.replace(SHARDED_MLA, prelude_layers=0, lora_rank=0, injection="none", activation="relu2")

reference = functools.cache(parallelism.on_one_device)


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("mla moe", "fsdp tensor expert"),
        ("mla moe", "data expert sequence"),
        ("gqa dense", "fsdp tensor sequence per loop"),
    ],
)
def test_a_step_on_eight_devices_equals_the_step_on_one(model, mesh):
    """Loss, expert load and every gradient. `python -m tests.parallelism` compares all pairs."""
    model = dataclasses.replace(parallelism.MODELS[model], prelude_layers=0)
    one = reference(model)
    assert max(np.abs(g).max() for g in jax.tree.leaves(one["gradients"])) > 0.1
    difference, where = parallelism.largest_difference(
        one, parallelism.loss_and_gradients(model, parallelism.MESHES[mesh])
    )
    assert difference < 1e-5, where


def test_the_loss_on_a_mesh_equals_that_on_one_device():
    """In chunks: vocabulary, width, rows and positions all sharded, then with rows that the mesh does not divide."""
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[1], (40, 8))

    def both(features, table, targets, mask):
        def loss(features, table):
            return jnp.sin(cross_entropy(features, table, targets, chunk_length=4, mask_BT=mask)).sum()

        return jax.value_and_grad(loss, (0, 1))(features, table)

    # The mask leaves each device with another number of chunks to compute.
    for rows, mesh, masked in [
        (4, MeshConfig(fsdp=2, tensor=2, sequence=2), False),
        (3, MeshConfig(data=2, fsdp=2, tensor=2), False),
        (4, MeshConfig(fsdp=2, tensor=2, sequence=2), True),
    ]:
        features = jax.random.normal(keys[0], (rows, 14, 8))
        targets = jax.random.randint(keys[2], (rows, 14), 0, 40)
        mask = np.arange(14) < 5 * np.arange(rows)[:, None] if masked else None
        expected = both(features, table, targets, mask)
        with use_mesh(make_mesh(mesh)):
            sharded = jax.jit(both)(features, table, targets, mask)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), sharded, expected)


def in_loops(hlo):
    """The number of all-gathers in loop bodies, and elsewhere."""
    bodies, counts, name = set(re.findall(r"body=%?([\w.-]+)", hlo)), [0, 0], None
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = header[1]
        if re.search(r" all-gather(-start)?\(", line):
            counts[name not in bodies] += 1
    return counts


def test_loop_weights_are_gathered_once_or_in_every_loop():
    """Unprevented, XLA would move the gathering out of the loop, or JAX would keep its result for the backward pass."""
    counts = {}
    for gather in ["once", "per_loop"]:
        config = parallelism.config_of(BARE, MeshConfig(fsdp=8, gather=gather))
        mesh = make_mesh(config.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((parallelism.B, parallelism.T), dtype, sharding=batch_sharding(mesh))
            for name, dtype in [("tokens", np.int32), ("targets", np.int32), ("mask", bool)]
        }
        with use_mesh(mesh):
            hlo = jitted_step(config).lower(abstract_state(config, mesh), batch, Constants()).compile().as_text()
        counts[gather] = in_loops(hlo)
    matrices = 6  # q, k, v, out, up, down
    assert counts["once"][0] == 0
    assert counts["per_loop"][0] == 2 * matrices  # once more in the backward pass
    assert counts["once"][1] == counts["per_loop"][1] + matrices


def test_only_the_data_axis_spans_slices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2, slices=2))
    assert {d.id for d in mesh.devices[:2].flat} == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match=r"mesh\.data: got 1, allowed: a multiple of mesh\.slices, 2"):
        make_mesh(MeshConfig(slices=2))
    with pytest.raises(ConfigError, match=r"mesh\.slices: got 3, allowed: a divisor of the number of devices, 8"):
        make_mesh(MeshConfig(slices=3))


def test_devices_are_grouped_by_the_slice_they_report():
    @dataclasses.dataclass(frozen=True)
    class Chip:
        id: int
        slice_index: int
        device_kind: str = "none"
        platform: str = "none"
        process_index: int = 0

    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    assert [[chip.slice_index for chip in part] for part in split_into_slices(2, chips)] == [[0] * 4, [1] * 4]
    with pytest.raises(ConfigError, match=r"mesh\.slices: got 1, allowed: 2, the number of slices of the devices"):
        split_into_slices(1, chips)
    gpus = [dataclasses.replace(chip, platform="gpu") for chip in chips]
    assert split_into_slices(1, gpus) == [gpus]
    assert split_into_slices(2, gpus) == [gpus[:4], gpus[4:]]


def test_a_mesh_that_would_replicate_weights_is_refused():
    good, mesh = abstract_variables(MODEL), make_mesh(MeshConfig(fsdp=4, tensor=2))
    check_sharded(mesh, good)
    odd = abstract_variables(dataclasses.replace(MODEL, hidden_dim=61, dim=36, n_heads=3, n_kv_heads=3))
    check_sharded(mesh, odd)  # fsdp divides the width, so no weight is replicated
    none = abstract_variables(dataclasses.replace(MODEL, hidden_dim=61, dim=30, n_heads=3, n_kv_heads=3, vocab_size=67))
    expected = (
        r"mesh: 99.0% of .* allowed: 2%; the largest is params\.embedding \[67, 30\], which fsdp 4, tensor 2 does"
    )
    with pytest.raises(ConfigError, match=expected):
        check_sharded(mesh, none)
    check_sharded(make_mesh(MeshConfig(data=8, fsdp=1)), none)  # a mesh without axes that shard weights
    unnamed = {"params": {**good["params"], "extra": jax.ShapeDtypeStruct((64, 64), np.float32)}}
    with pytest.raises(ConfigError, match=r"the largest is params\.extra \[64, 64\]"):
        check_sharded(mesh, unnamed)


@pytest.mark.parametrize("model", [BARE, BARE_MLA], ids=["gqa", "mla"])
def test_generation_on_a_mesh_gives_the_same_tokens(model):
    """Sampled rather than greedy, so that the tokens depend on every logit. The cache is sharded by rows, positions and
    heads."""
    shapes = jax.eval_shape(lambda: nn.unbox(Mythos(model).init(jax.random.key(0), np.zeros((1, 1), np.int32))))
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: random.normal(1, 0.2, x.shape).astype(np.float32), shapes)
    prompts = random.integers(0, model.vocab_size, (2, 4))

    def run(variables):
        return generate(
            Mythos(model), variables, prompts, [4, 2], max_new_tokens=6, temperature=1.0, seed=[0, 1]
        ).tokens

    expected = run(variables)
    with use_mesh(mesh := make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2))):
        keys = init_cache(model, 2, 10).loop[0].kv.keys
        last = (model.n_kv_heads // 2, model.gqa_head_dim) if model is BARE else keys.shape[3:]
        assert keys.sharding.shard_shape(keys.shape) == (model.loops, 1, 5, *last)
        tokens = run(jax.device_put(variables, shardings(mesh, abstract_variables(model))))
    np.testing.assert_array_equal(tokens, expected)
    assert len(np.unique(expected)) > 4


def test_a_process_reads_the_rows_that_its_devices_hold():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    sharding = batch_sharding(mesh)
    np.testing.assert_array_equal(local_rows(sharding, 8), np.arange(8))
    values = np.arange(24).reshape(8, 3)
    placed = to_global(sharding, 8, np.arange(8), {"x": values})["x"]
    np.testing.assert_array_equal(placed, values)
    assert placed.addressable_shards[0].data.shape == (2, 3)
