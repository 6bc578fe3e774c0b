"""`mythos compile` with the real TPU compiler: what fits, what does not, and what the compiled programs contain."""

import dataclasses
import json
import math
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.chips import CHIPS
from mythos_jax.cli import main
from mythos_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, ModelConfig, TrainingConfig
from mythos_jax.flops import cache_bytes, count_parameters
from mythos_jax.ops.chunked import CHUNK_LENGTH
from mythos_jax.ops.grouped_matmul import grouped_matmul, grouped_matmul_transposed, grouped_outer
from mythos_jax.ops.megablox import tile_rows
from mythos_jax.preflight.collectives import read_collectives
from mythos_jax.preflight.compile import compile_decode, compile_train
from mythos_jax.preflight.cost import cost
from mythos_jax.preflight.devices import topology_devices
from mythos_jax.preflight.hlo import parse
from mythos_jax.preflight.report import preflight
from mythos_jax.preflight.topology import parse_topology
from mythos_jax.sharding import device_bytes, make_mesh, use_mesh
from mythos_jax.training.compiler import tuned_options

# All sizes differ, so that the shape of an array identifies it.
MOE = ModelConfig(
    vocab_size=32000, dim=256, max_seq_len=512, loops=2, n_heads=4, n_kv_heads=2, hidden_dim=640, remat="full",
    feed_forward="moe", n_experts=16, experts_per_token=2, expert_dim=384, n_shared_experts=1, dtype="bfloat16",
)  # fmt: skip
SMALL = Config(
    name="small", model=MOE, training=TrainingConfig(batch_size=16), data=DataConfig(seq_len=512),
    mesh=MeshConfig(fsdp=2, tensor=2, expert=4),
)  # fmt: skip


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_the_compiler_knows_the_tuned_options_of_each_generation(topology):
    """Its own options are other ones, and a name that it does not know is refused."""
    devices = topology_devices(parse_topology(topology))
    rows = NamedSharding(jax.sharding.Mesh(devices, "x"), PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=rows)
    lowered = jax.jit(lambda a, b: a @ b).lower(x, x)
    for experts in (False, True):
        options = tuned_options(devices[0].device_kind, experts)
        assert options["xla_enable_async_all_gather"] is True
        lowered.compile(compiler_options=options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_tpu_scoped_vmem_limit": 1})


@cache
def small_program():
    return compile_train(SMALL, parse_topology("v5e:4x4"), quick=True)


def test_expert_weights_do_not_move_along_the_expert_axis():
    program = small_program()
    gathers = [c for c in read_collectives(parse(program.text), program.mesh) if c.kind == "all-gather"]
    # Expert weights are identified by their shape: their number per device, and the hidden width. A shared expert has
    # no axis of experts. The weights are gathered along fsdp only.
    local_experts, hidden = MOE.n_experts // SMALL.mesh.expert, {MOE.expert_dim, MOE.expert_dim // SMALL.mesh.tensor}
    of_weights = [c for c in gathers if any(local_experts == a.shape[0] and hidden & set(a.shape) for a in c.arrays)]
    assert any(c.axes == ("fsdp",) for c in of_weights)
    assert not any("expert" in c.axes for c in of_weights)
    assert any("expert" in c.axes for c in gathers)  # tokens do


def test_all_to_all_sends_tokens_only_to_their_experts():
    config = dataclasses.replace(SMALL, model=dataclasses.replace(MOE, expert_exchange="all_to_all"))
    program = compile_train(config, parse_topology("v5e:4x4"), quick=True)
    collectives = read_collectives(parse(program.text), program.mesh)
    assert any(c.kind == "ragged-all-to-all" and c.axes == ("expert",) for c in collectives)
    # Along the expert axis only counts are gathered. The ring gathers tokens, which are MOE.dim wide.
    ring = read_collectives(parse(small_program().text), small_program().mesh)
    for program_collectives, gathers_tokens in [(collectives, False), (ring, True)]:
        gathers = [c for c in program_collectives if c.kind == "all-gather" and c.axes == ("expert",)]
        assert any(MOE.dim in a.shape for c in gathers for a in c.arrays) == gathers_tokens


def test_no_chip_holds_all_logits():
    """The vocabulary is sharded over tensor and rows over the other axes; likewise the table and its gradient."""
    vocab_size, row_shards = MOE.vocab_size, SMALL.mesh.fsdp * SMALL.mesh.expert
    arrays = {a for i, _ in parse(small_program().text).walk() for a in i.arrays}
    assert not any(vocab_size in a.shape for a in arrays)
    sharded = [a for a in arrays if vocab_size // SMALL.mesh.tensor in a.shape]
    logits_or_table = max(SMALL.training.batch_size // row_shards * CHUNK_LENGTH, MOE.dim)
    assert sharded
    assert max(a.bytes for a in sharded) <= 4 * logits_or_table * vocab_size // SMALL.mesh.tensor


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("shape", [(8192, 64, 512, 1024), (20480, 8, 4096, 2816)])
def test_expert_products_on_each_generation(topology, shape):
    """A product and both gradients take 3 x 2 R D F FLOPs, and the tiles that experts share. Gradients of weights are
    float32 and added in place. The kernels fit into the fast memory."""
    R, E, D, F = shape
    mesh = make_mesh(MeshConfig(), topology_devices(parse_topology(topology)))
    by_rows = PartitionSpec("fsdp")

    def products(x_RD, y_RF, w_EDF, sizes_E, sums_EDF):
        out_RF, dx_RD = grouped_matmul(x_RD, w_EDF, sizes_E), grouped_matmul_transposed(y_RF, w_EDF, sizes_E)
        return out_RF, dx_RD, grouped_outer(x_RD, y_RF, sizes_E, sums_EDF)

    def array(dtype, n, *shape):
        return jax.ShapeDtypeStruct((4 * n, *shape), dtype, sharding=NamedSharding(mesh, by_rows))

    inputs = array(jnp.bfloat16, R, D), array(jnp.bfloat16, R, F), array(jnp.bfloat16, E, D, F), array(jnp.int32, E)
    with use_mesh(mesh):
        run = jax.shard_map(products, in_specs=by_rows, out_specs=by_rows, check_vma=False)
        compiled = jax.jit(run, donate_argnums=4).lower(*inputs, array(jnp.float32, E, D, F)).compile()
    module, m = parse(compiled.as_text()), tile_rows(R, E)
    flops = 3 * 2 * (R + (E - 1) * m) * D * F
    assert 0.97 * flops < cost(module).flops < 1.1 * flops
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * E * D * F
    makes_sums = [
        i.opcode for i, _ in module.walk() if i.arrays and (i.arrays[0].dtype, i.arrays[0].shape) == ("f32", (E, D, F))
    ]
    assert set(makes_sums) <= {"parameter", "bitcast", "custom-call"}


def test_the_report_of_a_program_that_does_not_fit(tmp_path, capsys):
    path = tmp_path / "big.yaml"
    path.write_text(
        "model: {vocab_size: 32000, dim: 512, max_seq_len: 16384, loops: 2, n_heads: 8, n_kv_heads: 8}\n"
        "training: {batch_size: 64}\ndata: {seq_len: 16384}\n"
    )
    assert main(["compile", str(path), "--topology", "v5e:2x2", "--quick"]) == 1
    out, err = capsys.readouterr()
    assert "DOES NOT FIT: it needs" in out
    assert "of 15.75 GiB" in out
    assert "values that the forward pass leaves for the backward pass take" in out
    assert "set model.remat to full" in out
    assert "Traceback" not in out + err
    assert main(["compile", str(path), "--topology", "v5e:2x2", "--quick", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False
    assert report["hbm"]["peak"] > report["hbm"]["capacity"]
    # What XLA writes of a refused program accounts for all that it needs, and its costs are known.
    assert report["biggest"][0]["bytes"] > 2**29
    assert report["sum_seconds"] > report["seconds"]["compute"] > 0


def test_decode_holds_parameters_and_cache():
    """The cache is bfloat16, which is what the dtype "auto" means on a TPU."""
    model = dataclasses.replace(MOE, feed_forward="dense", n_experts=0)
    auto = dataclasses.replace(model, dtype="auto")
    config = Config(model=auto, data=DataConfig(seq_len=512), evaluation=EvaluationConfig(batch_size=64))
    report = preflight(config, parse_topology("v5e:2x2"), decode=True, quick=True)
    assert report.fits
    assert report.hbm["cache"] == 64 * 512 * cache_bytes(model, model.loops) / 4 + 64 * 4 / 4
    assert report.hbm["parameters"] == pytest.approx(4 * count_parameters(model) / 4, rel=0.01)
    assert report.tokens == 64


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_cache_sharded_along_its_positions_is_not_moved(attention):
    """Devices along `sequence` exchange only maxima, sums and outputs of attention; nothing as long as their shards."""
    latents = dict(q_lora_rank=96, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=80)
    fields = {"attention": attention, **(latents if attention == "mla" else {})}
    model = dataclasses.replace(MOE, feed_forward="dense", n_experts=0, **fields)
    length, rows, mesh = 448, 16, MeshConfig(fsdp=2, tensor=2, sequence=4)
    evaluation = EvaluationConfig(batch_size=rows)
    config = Config(model=model, data=DataConfig(seq_len=length), evaluation=evaluation, mesh=mesh)
    program = compile_decode(config, parse_topology("v5e:4x4"), quick=True)
    along_sequence = [c for c in read_collectives(parse(program.text), program.mesh) if "sequence" in c.axes]
    assert any(c.kind == "all-reduce" for c in along_sequence)
    assert not any({length, length // mesh.sequence} & set(a.shape) for c in along_sequence for a in c.arrays)
    cache = rows * length * cache_bytes(model, model.loops) / (16 if attention == "gqa" else 8)  # latents have no heads
    assert device_bytes(program.state["cache"]) == cache + 4 * rows / 2


@pytest.mark.parametrize("chip", [chip.name for chip in CHIPS.values() if not chip.is_gpu])
def test_every_topology_is_known_to_the_compiler(chip):
    for shape in CHIPS[chip].shapes:
        devices = topology_devices(parse_topology(f"{chip}:{shape}"))
        sides = [int(side) for side in shape.split("x")]
        assert len(devices) == math.prod(sides) * CHIPS[chip].devices


def test_slices_are_joined_by_the_data_axis():
    mesh = make_mesh(MeshConfig(data=2, slices=2), topology_devices(parse_topology("v5e:2x2", slices=2)))
    assert dict(mesh.shape)["data"] == 2
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]


def test_each_chip_sends_its_part_of_the_gradients_between_slices():
    """A sixteenth of them, in float32 or bfloat16. A quick compile leaves some sums in the loop, which runs twice."""
    config = dataclasses.replace(
        SMALL, mesh=MeshConfig(data=2, fsdp=4, expert=4), training=TrainingConfig(batch_size=32)
    )
    report = preflight(config, parse_topology("v5e:4x4", slices=2), quick=True)
    between = [c for c in report.collectives if c.dcn]
    assert {c.axes for c in between} == {("data",)}
    gradients = 4 * count_parameters(config.model)
    assert gradients / 16 / 2 < sum(c.dcn for c in between) < 2 * gradients / 16


def test_the_error_for_an_unknown_topology_lists_the_known_ones(capsys):
    assert main(["compile", "configs/quickstart.yaml", "--topology", "v5e:5x5"]) == 2
    error = capsys.readouterr().err
    assert "'v5e:5x5'" in error
    assert "v5e:16x16" in error
