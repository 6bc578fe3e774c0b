"""The complete train step of mythos_1b, compiled: whether it fits, and which kernels it consists of."""

import dataclasses
import math

import pytest

from mythos_jax.config import MeshConfig, load_config
from mythos_jax.flops import count_parameters
from mythos_jax.preflight.compile import compile_train
from mythos_jax.preflight.cost import matmul_flops
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.report import make_report
from mythos_jax.preflight.topology import parse_topology


@pytest.mark.parametrize(("topology", "mesh"), [("v5e:4x4", (4, 4)), ("v5p:2x2x2", (4, 2))])
def test_the_smallest_size(topology, mesh):
    config = load_config("configs/mythos_1b.yaml")
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=mesh[0], expert=mesh[1]))
    topology = parse_topology(topology)
    program = compile_train(config, topology, quick=True)
    check_fit(config, make_report(config, topology, program), mesh)
    module = parse(program.text)
    check_attention_kernels(config, module)
    check_expert_kernels(config, module)
    check_no_large_arrays(config, module)


def check_fit(config, report, mesh):
    assert report.fits
    # Experts are sharded over both axes, other weights over fsdp; only norms are replicated.
    parameters = 4 * count_parameters(config.model)
    assert parameters / (mesh[0] * mesh[1]) < report.hbm["parameters"] < parameters / mesh[0]
    assert report.hbm["optimizer"] == pytest.approx(2 * report.hbm["parameters"], rel=0.01)
    # Half of the loop's products run forward twice (remat); the ring of experts multiplies whole tiles.
    assert 1.1 < report.flops["compiled"] / report.flops["model"] < 1.3
    assert report.utilisation > 0.6  # of the chip's peak, by the sum over instructions
    assert sum(c.ici for c in report.collectives) > 0
    assert report.seconds["DCN"] == 0


def kernels(module, name):
    """How often each Mosaic kernel with this name runs, and the FLOPs of a run."""
    for i, runs in module.walk():
        if i.opcode == "custom-call" and 'target="tpu_custom_call"' in i.attributes and name in i.op_name:
            yield runs, matmul_flops(module, i)


def rows_per_chip(config):
    """In one of the parts that gradients are accumulated over."""
    chips = config.mesh.fsdp * config.mesh.expert
    return config.training.batch_size // config.training.grad_accumulation_steps // chips


def check_attention_kernels(config, module):
    """One per layer and loop: what the forward pass has made is kept. FLOPs are those of causal attention in blocks of
    512."""
    c, S, parts = config.model, config.data.seq_len, config.training.grad_accumulation_steps
    times = c.prelude_layers + c.coda_layers + c.loop_layers * c.loops
    K, V = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    scores = rows_per_chip(config) * c.n_heads * S * S * (S / 512 + 1) / (2 * S / 512)
    for phase, widths in [("fwd", K + V), ("dq", 2 * K + V), ("dkv", 2 * K + 2 * V)]:
        splash = list(kernels(module, f"splash_mha_{phase}"))
        assert sum(runs for runs, _ in splash) == parts * times
        assert {flops for _, flops in splash} == {2 * scores * widths}


def check_expert_kernels(config, module):
    """All products over experts are Megablox kernels: three forward, and eight backward, two of which compute again
    what the layer's output does not keep. What tiles of two experts and sums over choices add is less than a third.

    The gradients of weights are added up in place: nothing else writes an array as large as those of all experts here.
    """
    c, t = config.model, config.training
    chips = config.mesh.fsdp * config.mesh.expert
    product = 2 * t.batch_size * config.data.seq_len * c.experts_per_token * c.dim * c.expert_dim * c.loops / chips
    total = sum(runs * flops for runs, flops in kernels(module, "gmm"))
    assert 11 * product < total < 1.3 * 11 * product
    assert "ragged-dot" not in {i.opcode for i, _ in module.walk()}
    sums = c.n_experts // config.mesh.expert, c.dim, c.expert_dim
    written = [
        i for i, runs in module.walk() if runs >= c.loops and any((a.dtype, a.shape) == ("f32", sums) for a in i.arrays)
    ]
    assert {i.opcode for i in written} <= {"custom-call", "bitcast", "get-tuple-element", "parameter", "tuple", "while"}


def check_no_large_arrays(config, module):
    """Neither the attention scores of all heads nor the logits of all tokens exist at once."""
    S, vocab_size = config.data.seq_len, config.model.vocab_size
    scores = rows_per_chip(config) * config.model.n_heads * S * S
    in_attention = [a for i, _ in module.walk() if "/attention/" in i.op_name for a in i.arrays]
    assert in_attention
    assert max(math.prod(a.shape) for a in in_attention) < scores / 8
    with_vocab = [a for i, _ in module.walk() for a in i.arrays if vocab_size in a.shape]
    assert with_vocab
    assert max(math.prod(a.shape) for a in with_vocab) <= vocab_size * max(config.model.dim, S)
