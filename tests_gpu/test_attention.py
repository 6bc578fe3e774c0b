"""That attention on NVIDIA's GPUs is cuDNN's kernel, forward and backward, and what it costs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.ops.attention import Mask, attend
from mythos_jax.ops.slower import say_slower
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.devices import GPU_OPTIONS, topology_devices
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.kernels import target
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import BATCH_AXES, make_mesh, use_mesh

B, T = 16, 1024


def lower_gradient(topology, H, G, K, V, mask=()):
    """mask: the fields of Mask that are set."""
    mesh = make_mesh(MeshConfig(), topology_devices(parse_topology(topology)))

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES)))

    def loss(q, k, v, masks):
        return attend(q, k, v, Mask(**masks), K**-0.5).astype(jnp.float32).sum()

    masks = {name: array(B, T, dtype=jnp.int32) for name in mask}
    with use_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
            array(B, T, H, K), array(B, T, G, K), array(B, T, G, V), masks
        )


@pytest.mark.parametrize("topology", ["h100:8", "a100:8"])
@pytest.mark.parametrize(("H", "G", "K", "V"), [(16, 16, 96, 64), (16, 4, 128, 128)])  # MLA of mythos_1b; GQA
def test_mla_and_gqa_are_cudnns(topology, H, G, K, V):
    lowered = lower_gradient(topology, H, G, K, V)
    module = parse(lowered.compile(compiler_options=GPU_OPTIONS).as_text())
    targets = [target(i) for i, _ in module.walk() if i.opcode == "custom-call"]
    assert targets == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    # Blocks of 128 on and below the diagonal; two products forward, five backward.
    blocks = T // 128
    causal = (blocks + 1) / (2 * blocks)
    assert cost(module).flops == pytest.approx(7 * 2 * (B // 8) * H * T * T * K * causal)


@pytest.mark.parametrize(("K", "mask"), [(192, []), (96, ["segments_BT"]), (96, ["index_BT"])])
def test_other_attention_is_not(K, mask):
    assert "cudnn" not in lower_gradient("h100:8", 16, 16, K, 64, mask).as_text()


def test_that_lowered_text_names_cudnn():
    assert "__cudnn$fmhaSoftmax" in lower_gradient("h100:8", 16, 16, 96, 64).as_text()


@pytest.mark.parametrize(
    ("K", "mask", "reason"),
    [(192, [], "at most 128 channels per head, and these have 192"), (96, ["segments_BT"], "a mask of documents")],
)
def test_that_another_is_slower_is_said_once(K, mask, reason, capsys):
    say_slower.cache_clear()
    for _ in range(2):
        lower_gradient("h100:8", 16, 16, K, 64, mask)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attention in blocks, not cuDNN's kernel: it ")
    assert f"{reason}; this is slower" in line
