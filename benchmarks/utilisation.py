"""Utilisation: of the peak of arithmetic in a train step, of the peak of memory in decoding (see `roofline.py`)."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.steps import Shape, run_of, train_step
from benchmarks.timing import by_turns, head, milliseconds, row, seconds_of, spread
from mythos_jax.config import ModelConfig, load_config
from mythos_jax.flops import count_parameters, decode_bytes, training_flops
from mythos_jax.inference.generate import generate
from mythos_jax.model.layers import compute_dtype
from mythos_jax.model.mythos import Mythos

HOUSE = Path(__file__).parents[1] / "configs" / "house_1b.yaml"

# Dense bfloat16 FLOP/s and bytes/s from the data sheets, by a part of jax's `device_kind`.
DATA_SHEETS = {
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H200": (989e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
}
# One loop of each does not stay in a processor's caches: 51 MB and 69 MB of weights that a token uses.
SMALL_DENSE = ModelConfig(
    vocab_size=4096, dim=512, n_heads=8, n_kv_heads=8, hidden_dim=1408, loop_layers=4, loops=4, max_seq_len=256
)
SMALL_MOE = dataclasses.replace(
    SMALL_DENSE, feed_forward="moe", n_experts=16, experts_per_token=2, expert_dim=704, n_shared_experts=1
)
# 20 layers of 45 M parameters; 12 of them, 1.1 GB in bfloat16, are the loop.
DENSE_1B = ModelConfig(
    vocab_size=32000, dim=2048, n_heads=16, n_kv_heads=4, hidden_dim=5632, prelude_layers=4, loop_layers=12,
    coda_layers=4, loops=4, max_seq_len=4096, remat="full",
)  # fmt: skip


def best_rate(work: float, call: Callable[[], Any], repeats: int = 10) -> float:
    """The largest rate reached, of calls that do so much work each; the first compiles."""
    call()
    return work / min(seconds_of(call) for _ in range(repeats))


def measured_flops(dtype: jnp.dtype, n: int) -> float:
    """FLOP/s of a large product of matrices."""
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.matmul)
    return best_rate(2 * n**3, lambda: product(a, a).block_until_ready())


def measured_bandwidth(size: int) -> float:
    """Bytes/s of reading an array of so many bytes, or of copying it, whichever is more."""
    x = jnp.ones((256, size // 1024), jnp.float32)
    read, copy = jax.jit(lambda x: x.sum(-1)), jax.jit(lambda x: x + 1)
    return max(
        best_rate(x.nbytes, lambda: read(x).block_until_ready()),
        best_rate(2 * x.nbytes, lambda: copy(x).block_until_ready()),
    )


def toy(model: ModelConfig) -> ModelConfig:
    """The same kind of model, a few channels wide."""
    small = dict(vocab_size=256, dim=64, n_heads=4, hidden_dim=96, max_seq_len=64, prelude_layers=1, coda_layers=1)
    if model.attention == "mla":
        small |= dict(q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    if model.feed_forward == "moe":
        small |= dict(n_experts=8, expert_dim=32, shared_expert_dim=32)
    return dataclasses.replace(model, n_kv_heads=4, loop_layers=1, loops=2, **small)


def utilisation(arguments: argparse.Namespace) -> Any:
    """Of the peak of arithmetic in a train step, of the peak of memory in decoding a text alone."""
    on_gpu, small = arguments.device == "gpu", arguments.small
    if on_gpu or small:
        house = dataclasses.replace(load_config(HOUSE).model, loops=8)
        models = {"dense, 1 B": DENSE_1B, "mixture of experts, 1 B": house}
        models = {name: dataclasses.replace(m, dtype="bfloat16") for name, m in models.items()}
        shape, prompt, new = Shape(8, 1024), 128, 64
    else:
        models = {"dense": SMALL_DENSE, "mixture of experts": SMALL_MOE}
        shape, prompt, new = Shape(8, 128), 64, 16
    if small:
        models, shape, prompt, new = {name: toy(m) for name, m in models.items()}, Shape(2, 32), 16, 4
    dtype = compute_dtype(next(iter(models.values())))
    flops = measured_flops(dtype, 256 if small else 8192 if on_gpu else 2048)
    bandwidth = measured_bandwidth(2**20 if small else 2**32 if on_gpu else 2**28)
    kind = jax.devices()[0].device_kind
    print(f"{kind}: measured {flops / 1e12:.3g} TFLOP/s ({dtype}), {bandwidth / 1e9:.3g} GB/s", end="")
    sheet = next((peaks for name, peaks in DATA_SHEETS.items() if name in kind), None)
    if sheet:
        flops, bandwidth = sheet
        print(f"; data sheet, used below: {flops / 1e12:.4g} TFLOP/s, {bandwidth / 1e9:.4g} GB/s", end="")
    print("\n")
    found: dict[str, Any] = {"flops": flops, "bandwidth": bandwidth}

    head(f"train step, {shape.rows} x {shape.length} tokens", "parameters", "TFLOP", "ms", "TFLOP/s", "utilisation, %")
    for name, model in models.items():
        config = run_of(model, shape)
        work = training_flops(config)
        times, first = by_turns({"step": train_step(config)}, arguments.repeats)
        rates = [work / s for s in times["step"]]
        share = spread([rate / flops for rate in rates], 100)
        row(name, f"{count_parameters(model):,}", f"{work / 1e12:.3g}", milliseconds(times["step"]),
            spread(rates, 1e-12, 3), share)  # fmt: skip
        found[name] = {"flops": work, "step": times["step"], "first": first["step"]}

    print()
    head("a token decoded alone", "MB to read", "ms", "GB/s", "utilisation, %")
    for name, model in models.items():
        times = decode_seconds(model, prompt, new, arguments.repeats)
        work = decode_bytes(model, prompt + new // 2, model.loops)
        rates = [work / s for s in times]
        share = spread([rate / bandwidth for rate in rates], 100)
        row(name, f"{work / 1e6:.1f}", milliseconds(times), spread(rates, 1e-9), share)
        found[name] |= {"bytes": work, "token": times}
    return found


def decode_seconds(config: ModelConfig, prompt: int, new: int, repeats: int) -> list[float]:
    """Seconds a token: a text with `new` tokens more than the first, less one that ends with the first.

    Weights are stored in the compute dtype, as one would to decode.
    """
    model, dtype = Mythos(config), compute_dtype(config)

    @jax.jit
    def stored():
        variables = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
        return {**variables, "params": jax.tree.map(lambda x: x.astype(dtype), variables["params"])}

    variables = stored()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, prompt))

    def call(count: int) -> None:
        generate(model, variables, tokens, max_new_tokens=count).tokens.block_until_ready()

    times, _ = by_turns({"long": lambda: call(1 + new), "short": lambda: call(1)}, repeats)
    return [(long - short) / new for long, short in zip(times["long"], times["short"], strict=True)]
