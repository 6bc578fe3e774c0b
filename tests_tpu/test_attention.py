"""When attention compiles to the TPU's splash kernel, and what the kernel costs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.ops.attention import MAX_DENSE_QUERIES, Mask, attend
from mythos_jax.preflight.collectives import read_collectives
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.devices import topology_devices
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import BATCH_AXES, make_mesh, use_mesh


def compile_gradient(topology, mesh_config, B, T, S, H, G, K, V, mask=()):
    """The parsed program, its number of splash kernels, and the mesh. mask: the fields of Mask that are set."""
    mesh = make_mesh(mesh_config, topology_devices(parse_topology(topology)))

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES)))

    masks = {name: array(B, T, dtype=jnp.int32) for name in mask}

    def loss(q, k, v, masks):
        return attend(q, k, v, Mask(**masks), K**-0.5).astype(jnp.float32).sum()

    with use_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
            array(B, T, H, K), array(B, S, G, K), array(B, S, G, V), masks
        )
    module = parse(lowered.compile().as_text())
    kernels = sum(i.opcode == "custom-call" and "splash" in i.op_name for i, _ in module.walk())
    return module, kernels, mesh


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_the_kernel_supports_segments_grouped_heads_odd_lengths_and_any_width(topology):
    """MLA's widths, not multiples of 128; 300 tokens, padded to a block of 384; more shards of heads than kv heads."""
    _, kernels, _ = compile_gradient(topology, MeshConfig(fsdp=1, tensor=4), 2, 300, 300, 8, 2, 96, 64, ["segments_BT"])
    assert kernels == 3


def test_queries_sharded_along_the_sequence_see_all_keys():
    module, kernels, mesh = compile_gradient("v5e:2x2", MeshConfig(fsdp=2, sequence=2), 2, 1024, 1024, 4, 2, 64, 64)
    assert kernels == 3
    collectives = read_collectives(module, mesh)
    assert not any("fsdp" in c.axes for c in collectives)  # rows stay on their devices
    assert any(c.axes == ("sequence",) for c in collectives)


def test_cost_is_that_of_the_blocks_on_and_below_the_diagonal():
    """Nine products per block of scores: two forward, seven backward."""
    module, kernels, _ = compile_gradient("v5e:2x2", MeshConfig(), 8, 2048, 2048, 4, 1, 128, 128)
    assert kernels == 3
    assert cost(module).flops == pytest.approx(9 * 2 * 128 * 2 * 4 * 2048**2 * 5 / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("T", "S", "mask"), [(100, 100, []), (256, 512, ["index_BT"]), (MAX_DENSE_QUERIES, MAX_DENSE_QUERIES, [])]
)
def test_other_shapes_do_not_use_the_kernel(T, S, mask):
    _, kernels, _ = compile_gradient("v5e:2x2", MeshConfig(), 8, T, S, 4, 2, 64, 64, mask)
    assert kernels == 0
