"""Train and decode steps compiled for NVIDIA GPUs: which kernels they consist of, and what these cost."""

import dataclasses
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.chips import CHIPS
from mythos_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig, load_config
from mythos_jax.flops import cache_bytes
from mythos_jax.ops import grouped_triton
from mythos_jax.preflight.collectives import read_collectives
from mythos_jax.preflight.compile import compile_train
from mythos_jax.preflight.cost import matmul_flops
from mythos_jax.preflight.devices import GPU_OPTIONS, topology_devices
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.kernels import target
from mythos_jax.preflight.report import make_report, preflight
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import make_mesh, use_mesh

# A small mythos_1b. All sizes differ, so that the shape of an array identifies it.
MODEL = ModelConfig(
    vocab_size=1000, dim=256, max_seq_len=512, loops=2, n_heads=4, n_kv_heads=4, hidden_dim=640, remat="full",
    attention="mla", q_lora_rank=96, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    feed_forward="moe", n_experts=16, experts_per_token=2, expert_dim=384, n_shared_experts=1, dtype="bfloat16",
)  # fmt: skip
SMALL = Config(
    name="small", model=MODEL, training=TrainingConfig(batch_size=64), data=DataConfig(seq_len=512),
    mesh=MeshConfig(fsdp=2, expert=4),
)  # fmt: skip


@cache
def small_program():
    return compile_train(SMALL, parse_topology("h100:8"))


def check_kernels(config, module):
    """All attention is cuDNN's, and all products of experts are grouped, within 1.3 times the FLOPs of their rows."""
    gpus = config.mesh.fsdp * config.mesh.expert
    parts = config.training.grad_accumulation_steps
    choices = config.training.batch_size // parts * config.data.seq_len * config.model.experts_per_token
    runs, flops = Counter(), {}
    for i, times in module.walk():
        assert i.opcode != "ragged-dot"
        if i.opcode == "custom-call":
            kernels = grouped_triton.PRODUCT, grouped_triton.OUTER
            name = next((name for name in kernels if name in i.op_name), target(i))
            runs[name] += times
            if times:
                flops.setdefault(name, set()).add(matmul_flops(module, i))
    assert set(runs) == {*kernels, "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    loops = parts * config.model.loops
    layers = parts * (config.model.prelude_layers + config.model.coda_layers)
    # Each weight has one gradient; tokens may pass in chunks. Rows pass forward and backward, and again where the
    # backward pass needs what was not kept.
    chunks = runs[grouped_triton.OUTER] / (3 * loops)
    ideal = 2 * choices / gpus / chunks * config.model.dim * config.model.expert_dim
    assert all(ideal <= n < 1.3 * ideal for name in kernels for n in flops[name])
    assert 8 * chunks * loops <= runs[grouped_triton.PRODUCT] <= 11 * chunks * loops
    assert runs["__cudnn$fmhaSoftmaxBackward"] == loops + layers
    assert loops + layers <= runs["__cudnn$fmhaSoftmax"] <= 2 * (loops + layers)


def check_no_dense_products_over_experts(config, module):
    """No product but a kernel's has the weights of several experts, side by side or one behind the other."""
    n, width = config.model.n_experts // config.mesh.expert, config.model.expert_dim
    for i, _ in module.walk():
        if i.opcode == "dot":
            shapes = [a.shape for operand in range(2) for a in module.operand(i, operand).arrays]
            assert not any(n * width in shape or (shape[0] == n and width in shape[1:]) for shape in shapes), str(i)


def test_the_train_step_consists_of_kernels():
    module = parse(small_program().text)
    check_kernels(SMALL, module)
    check_no_dense_products_over_experts(SMALL, module)


def test_the_report_counts_all_kernels():
    report = make_report(SMALL, parse_topology("h100:8"), small_program())
    assert report.fits
    assert report.uncounted == ()
    assert 1 < report.flops["compiled"] / report.flops["model"] < 2
    assert {"all-gather", "all-reduce"} <= {c.kind for c in report.collectives}
    assert sum(c.dcn for c in report.collectives) == 0


def test_the_step_of_the_smallest_size():
    """mythos_1b as it is, but for its mesh."""
    config = load_config("configs/mythos_1b.yaml")
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=2, expert=4))
    program = compile_train(config, parse_topology("h100:8"))
    report = make_report(config, parse_topology("h100:8"), program)
    assert report.fits
    assert report.flops["compiled"] < 1.3 * report.flops["model"]
    check_kernels(config, parse(program.text))


def test_on_one_gpu_weights_are_cast_once_and_gradients_added_in_place():
    """Per part of the batch, not per loop."""
    parts = 2
    training = dataclasses.replace(SMALL.training, batch_size=16, grad_accumulation_steps=parts)
    model = dataclasses.replace(MODEL, loops=5)
    config = dataclasses.replace(SMALL, model=model, training=training, mesh=MeshConfig())
    module = parse(compile_train(config, parse_topology("h100:1")).text)
    E, D, F = MODEL.n_experts, MODEL.dim, MODEL.expert_dim
    shapes = (E, D, F), (E, F, D)
    runs = Counter()
    for i, times in module.walk():
        whole = [a for a in i.arrays if a.shape in shapes]
        if i.opcode == "fusion" and whole and "dot_general" not in i.op_name:
            runs[whole[0].dtype] += times
    assert runs["bf16"] == 3 * parts
    assert runs["f32"] <= 3 * parts + 6  # added to those of the other parts; begun, and read by the optimizer


def test_decode_holds_parameters_and_cache():
    """The cache is bfloat16, and the experts' products are grouped: a row reads its own experts."""
    config = dataclasses.replace(SMALL, evaluation=EvaluationConfig(batch_size=8), mesh=MeshConfig())
    report = preflight(config, parse_topology("h100:1"), decode=True)
    assert report.fits
    assert report.hbm["cache"] == 8 * 512 * cache_bytes(MODEL, MODEL.loops) + 8 * 4
    assert report.flops["compiled"] < 4 * report.flops["model"]


@pytest.mark.parametrize("chip", [chip.name for chip in CHIPS.values() if chip.is_gpu])
def test_every_gpu_is_known_to_the_compiler(chip):
    for shape, n in [("1", 1), ("8", 8), ("3x8", 24)]:
        devices = topology_devices(parse_topology(f"{chip}:{shape}"))
        assert len(devices) == n
        assert devices[0].platform == "gpu"
        assert chip.upper() in devices[0].device_kind


def test_what_leaves_a_node_is_counted_apart():
    """A sum over two nodes: each GPU sends the others in its node two eighths, less its own, and the other node one."""
    mesh = make_mesh(MeshConfig(), topology_devices(parse_topology("h100:2x8")))
    x = jax.ShapeDtypeStruct((16, 1 << 20), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    with use_mesh(mesh):
        total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        compiled = total.lower(x).compile(compiler_options=GPU_OPTIONS)
    (collective,) = read_collectives(parse(compiled.as_text()), mesh)
    size = 4 * 2**20
    assert (collective.kind, collective.axes, collective.group) == ("all-reduce", ("fsdp",), 16)
    assert (collective.ici, collective.dcn) == (2 * size * 7 / 8, size / 8)
