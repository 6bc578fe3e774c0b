"""The train step of mythos_1b, compiled whole: what it takes, and which kernels it is made of."""

import dataclasses
import math

import pytest

from mythos_jax.config import MeshConfig, load_config
from mythos_jax.flops import count_parameters
from mythos_jax.preflight.compile import compile_train
from mythos_jax.preflight.cost import matmul_flops
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.report import read
from mythos_jax.preflight.topology import parse_topology


@pytest.mark.parametrize(("topology", "mesh"), [("v5e:4x4", (4, 4)), ("v5p:2x2x2", (4, 2))])
def test_the_smallest_size(topology, mesh):
    config = load_config("configs/mythos_1b.yaml")
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=mesh[0], expert=mesh[1]))
    topology = parse_topology(topology)
    program = compile_train(config, topology, quick=True)
    it_fits(config, read(config, topology, program), mesh)
    module = parse(program.text)
    attention_is_a_kernel(config, module)
    expert_products_are_kernels(config, module)
    large_arrays_are_nowhere(config, module)


def it_fits(config, report, mesh):
    assert report.fits
    # Experts are cut by both axes, the rest by fsdp; nothing is whole but norms.
    parameters = 4 * count_parameters(config.model)
    assert parameters / (mesh[0] * mesh[1]) < report.hbm["parameters"] < parameters / mesh[0]
    assert report.hbm["optimizer"] == pytest.approx(2 * report.hbm["parameters"], rel=0.01)
    # The loop forward twice (remat), backward once; room in the ring of experts.
    assert 1.2 < report.flops["compiled"] / report.flops["model"] < 1.7
    assert sum(c.ici for c in report.collectives) > 0
    assert report.seconds["DCN"] == 0


def kernels(module, word):
    """(instruction, how often it runs, FLOPs of a run) of the Mosaic kernels so named."""
    for i, runs in module.walk():
        if i.opcode == "custom-call" and 'target="tpu_custom_call"' in i.attributes and word in i.op_name:
            yield i, runs, matmul_flops(module, i)


def rows(config):
    """Of a chip, in one of the parts that gradients are accumulated over."""
    return (
        config.training.batch_size // config.training.grad_accumulation_steps // (config.mesh.fsdp * config.mesh.expert)
    )


def attention_is_a_kernel(config, module):
    """Each layer's, in each loop; the loop forward twice. Its FLOPs are those of causal attention in blocks of 512."""
    c, S, parts = config.model, config.data.seq_len, config.training.grad_accumulation_steps
    outside, loops = c.prelude_layers + c.coda_layers, c.loop_layers * c.loops
    K, V = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    scores = rows(config) * c.n_heads * S * S * (S / 512 + 1) / (2 * S / 512)
    for phase, times, widths in [
        ("fwd", outside + 2 * loops, K + V),
        ("dq", outside + loops, 2 * K + V),
        ("dkv", outside + loops, 2 * K + 2 * V),
    ]:
        found = list(kernels(module, f"splash_mha_{phase}"))
        assert sum(runs for _, runs, _ in found) == parts * times
        assert {flops for _, _, flops in found} == {2 * scores * widths}


def expert_products_are_kernels(config, module):
    """Three products forward, three again (remat), of them two once more in the ring, six backward; and no others over
    experts. The ring has room for a quarter more tokens than an even load (ops/expert_parallel.py)."""
    c, t = config.model, config.training
    chips = config.mesh.fsdp * config.mesh.expert
    one = 2 * t.batch_size * config.data.seq_len * c.experts_per_token * c.dim * c.expert_dim * c.loops / chips
    found = sum(runs * flops for _, runs, flops in kernels(module, "gmm"))
    assert 0.9 * 12 * one < found < 1.3 * 14 * one
    assert "ragged-dot" not in {i.opcode for i, _ in module.walk()}


def large_arrays_are_nowhere(config, module):
    """Scores of all heads, and logits of all tokens."""
    S, vocabulary = config.data.seq_len, config.model.vocab_size
    scores = rows(config) * config.model.n_heads * S * S
    made = [a for i, _ in module.walk() if "/attention/" in i.op_name for a in i.arrays]
    assert made
    assert max(math.prod(a.shape) for a in made) < scores / 8
    of_vocabulary = [a for i, _ in module.walk() for a in i.arrays if vocabulary in a.shape]
    assert of_vocabulary
    assert max(math.prod(a.shape) for a in of_vocabulary) <= vocabulary * max(config.model.dim, S)
