"""Utilisation of the peak arithmetic rate in a train step and of the peak memory bandwidth in decoding (a section of
roofline.py)."""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.steps import Shape, config_of, train_step
from benchmarks.timing import median_and_range, milliseconds, print_header, print_row, seconds_of, time_in_turns
from mythos_jax.config import ModelConfig, load_config
from mythos_jax.flops import count_parameters, decode_bytes, training_flops
from mythos_jax.inference.generate import generate
from mythos_jax.model.layers import compute_dtype
from mythos_jax.model.mythos import Mythos

HOUSE = Path(__file__).parents[1] / "configs" / "house_1b.yaml"

# Dense bfloat16 FLOP/s and bytes/s from the data sheets; the keys are contained in jax's `device_kind`.
DATA_SHEETS = {
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H200": (989e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
}
# Large enough that one loop of each (51 MB and 69 MB of weights per token) does not stay in a processor's caches.
SMALL_DENSE = ModelConfig(
    vocab_size=4096, dim=512, n_heads=8, n_kv_heads=8, hidden_dim=1408, loop_layers=4, loops=4, max_seq_len=256
)
SMALL_MOE = dataclasses.replace(
    SMALL_DENSE, feed_forward="moe", n_experts=16, experts_per_token=2, expert_dim=704, n_shared_experts=1
)
# 20 layers of 45 M parameters, of which 12 (1.1 GB in bfloat16) are the loop.
DENSE_1B = ModelConfig(
    vocab_size=32000, dim=2048, n_heads=16, n_kv_heads=4, hidden_dim=5632, prelude_layers=4, loop_layers=12,
    coda_layers=4, loops=4, max_seq_len=4096, remat="full",
)  # fmt: skip


def best_rate(work: float, call: Callable[[], Any], repeats: int = 10) -> float:
    """The highest rate over the repeats, of a call that does `work`; an additional first call compiles."""
    call()
    return work / min(seconds_of(call) for _ in range(repeats))


def measured_flops(dtype: jnp.dtype, n: int) -> float:
    """FLOP/s of a matrix product, n x n x n."""
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    matmul = jax.jit(jnp.matmul)
    return best_rate(2 * n**3, lambda: matmul(a, a).block_until_ready())


def measured_bandwidth(size: int) -> float:
    """Bytes/s of reading or copying an array of `size` bytes, whichever is higher."""
    x = jnp.ones((256, size // 1024), jnp.float32)
    read, copy = jax.jit(lambda x: x.sum(-1)), jax.jit(lambda x: x + 1)
    return max(
        best_rate(x.nbytes, lambda: read(x).block_until_ready()),
        best_rate(2 * x.nbytes, lambda: copy(x).block_until_ready()),
    )


def toy(model: ModelConfig) -> ModelConfig:
    """The same kind of model with few channels."""
    fields: dict[str, Any] = dict(vocab_size=256, dim=64, n_heads=4, n_kv_heads=4, hidden_dim=96, max_seq_len=64)
    if model.attention == "mla":
        fields |= dict(q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    if model.feed_forward == "moe":
        fields |= dict(n_experts=8, expert_dim=32, shared_expert_dim=32)
    return dataclasses.replace(model, prelude_layers=1, loop_layers=1, loops=2, coda_layers=1, **fields)


@dataclass(frozen=True)
class Setting:
    """What is measured: models by name, the batch of a train step, and the tokens of decoding."""

    models: dict[str, ModelConfig]
    shape: Shape
    prompt: int
    new_tokens: int
    matrix: int  # side of the matrices that measure FLOP/s
    array_bytes: int  # size of the array that measures bandwidth


def choose_setting(on_gpu: bool, small: bool) -> Setting:
    """Models of 1 B parameters on a GPU, small ones on a CPU; toys with `small`."""
    if not on_gpu and not small:
        models = {"dense": SMALL_DENSE, "mixture of experts": SMALL_MOE}
        return Setting(models, Shape(8, 128), prompt=64, new_tokens=16, matrix=2048, array_bytes=2**28)
    house = dataclasses.replace(load_config(HOUSE).model, loops=8)
    models = {"dense, 1 B": DENSE_1B, "mixture of experts, 1 B": house}
    models = {name: dataclasses.replace(model, dtype="bfloat16") for name, model in models.items()}
    if small:
        toys = {name: toy(model) for name, model in models.items()}
        return Setting(toys, Shape(2, 32), prompt=16, new_tokens=4, matrix=256, array_bytes=2**20)
    return Setting(models, Shape(8, 1024), prompt=128, new_tokens=64, matrix=8192, array_bytes=2**32)


def utilisation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arithmetic in a train step, and memory bandwidth in decoding one text, as a percentage of the peak."""
    setting = choose_setting(arguments.device == "gpu", arguments.small)
    peak_flops, peak_bandwidth = find_peaks(setting)
    result: dict[str, Any] = {"flops": peak_flops, "bandwidth": peak_bandwidth}
    rows, length = setting.shape
    print_header(f"train step, {rows} x {length} tokens", "parameters", "TFLOP", "ms", "TFLOP/s", "utilisation, %")
    for name, model in setting.models.items():
        config = config_of(model, setting.shape)
        flops = training_flops(config)
        times, first = time_in_turns({"step": train_step(config)}, arguments.repeats)
        rates = [flops / seconds for seconds in times["step"]]
        percent = median_and_range([rate / peak_flops for rate in rates], 100)
        print_row(name, f"{count_parameters(model):,}", f"{flops / 1e12:.3g}", milliseconds(times["step"]),
                  median_and_range(rates, 1e-12, 3), percent)  # fmt: skip
        result[name] = {"flops": flops, "step": times["step"], "first": first["step"]}

    print()
    print_header("one token, batch 1", "MB to read", "ms", "GB/s", "utilisation, %")
    for name, model in setting.models.items():
        token_times = decode_seconds(model, setting.prompt, setting.new_tokens, arguments.repeats)
        size = decode_bytes(model, setting.prompt + setting.new_tokens // 2, model.loops)
        rates = [size / seconds for seconds in token_times]
        percent = median_and_range([rate / peak_bandwidth for rate in rates], 100)
        print_row(name, f"{size / 1e6:.1f}", milliseconds(token_times), median_and_range(rates, 1e-9), percent)
        result[name] |= {"bytes": size, "token": token_times}
    return result


def find_peaks(setting: Setting) -> tuple[float, float]:
    """FLOP/s and bytes/s: from the data sheet of a known device, otherwise as measured. Prints both."""
    dtype = compute_dtype(next(iter(setting.models.values())))
    flops, bandwidth = measured_flops(dtype, setting.matrix), measured_bandwidth(setting.array_bytes)
    device = jax.devices()[0].device_kind
    print(f"{device}: measured {flops / 1e12:.3g} TFLOP/s ({dtype}), {bandwidth / 1e9:.3g} GB/s", end="")
    data_sheet = next((peaks for name, peaks in DATA_SHEETS.items() if name in device), None)
    if data_sheet:
        flops, bandwidth = data_sheet
        print(f"; data sheet, used below: {flops / 1e12:.4g} TFLOP/s, {bandwidth / 1e9:.4g} GB/s", end="")
    print("\n")
    return flops, bandwidth


def decode_seconds(config: ModelConfig, prompt: int, new_tokens: int, repeats: int) -> list[float]:
    """Seconds per token in each repeat: the difference between generating 1 + `new_tokens` tokens and one."""
    call = decode_call(config, prompt)
    times, _ = time_in_turns({"long": lambda: call(1 + new_tokens), "short": lambda: call(1)}, repeats)
    return [(long - short) / new_tokens for long, short in zip(times["long"], times["short"], strict=True)]


def decode_call(config: ModelConfig, prompt: int) -> Callable[[int], None]:
    """Generates so many tokens after a prompt of random ones, and waits for them.

    Weights are stored in the compute dtype, as they would be for decoding.
    """
    model, dtype = Mythos(config), compute_dtype(config)

    @jax.jit
    def initial_variables() -> dict[str, Any]:
        variables = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
        return {**variables, "params": jax.tree.map(lambda x: x.astype(dtype), variables["params"])}

    variables = initial_variables()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, prompt))

    def call(count: int) -> None:
        generate(model, variables, tokens, max_new_tokens=count).tokens.block_until_ready()

    return call
