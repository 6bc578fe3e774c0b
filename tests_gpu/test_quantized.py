"""Products in 8 bits on NVIDIA's GPUs: of the three of a step, two multiply 8-bit numbers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.ops.quantized import quantized_matmul
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.devices import GPU_OPTIONS, topology_devices
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import make_mesh, use_mesh

ROWS, D, F = 8192, 2048, 5632


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_two_of_three_products_are_in_8_bits(kind):
    mesh = make_mesh(MeshConfig(), topology_devices(parse_topology("h100:1")))

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(x, w):
        return (quantized_matmul(x, w, 1, kind).astype(jnp.float32) ** 2).sum()

    with use_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(array(ROWS, D), array(D, F))
    found = cost(parse(lowered.compile(compiler_options=GPU_OPTIONS).as_text()))
    product = 2 * ROWS * D * F
    assert (found.flops, found.narrow_flops) == (3 * product, 2 * product)
