"""Products with int8 weights on a TPU: they are widened on the way into the product, not in memory. Products of
training in int8: their operands are int8."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.ops.narrow import Narrow
from mythos_jax.ops.products import linear, logits
from mythos_jax.ops.quantized import quantized_matmul
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.devices import topology_devices
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import make_mesh, use_mesh

D, F, ROWS = 1024, 4096, 8


@pytest.mark.parametrize(("product", "shape", "scale"), [(linear, (D, F), (1, F)), (logits, (F, D), (F, 1))])
def test_decoding_on_one_chip_keeps_no_widened_weight(product, shape, scale):
    mesh = make_mesh(MeshConfig(), topology_devices(parse_topology("v5e:2x2"))[:1])

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    weights = [Narrow(array(jnp.int8, *shape), array(jnp.float32, *scale)) for _ in range(4)]
    with use_mesh(mesh):
        program = jax.jit(lambda x, ws: [product(x, w) for w in ws]).lower(array(jnp.bfloat16, 1, ROWS, D), weights)
    memory = program.compile().memory_analysis()
    assert memory.argument_size_in_bytes >= 4 * D * F  # int8
    assert memory.temp_size_in_bytes < D * F  # a weight in bfloat16 would be twice that


@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_two_of_three_products_of_training_multiply_int8(chip):
    mesh = make_mesh(MeshConfig(), topology_devices(parse_topology(chip))[:1])

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(x, w):
        return (quantized_matmul(x, w, 1, "int8").astype(jnp.float32) ** 2).sum()

    with use_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(array(512, 512), array(512, 512))
    found = cost(parse(lowered.compile().as_text()))
    product = 2 * 512**3
    assert (found.flops, found.narrow_flops) == (3 * product, 2 * product)
