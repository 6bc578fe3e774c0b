"""Distance from the hardware's limits: utilisation, scaling, cost of recurrence, compile time, size of the cache.

    .venv/bin/python -m benchmarks.roofline [section ...] [--device cpu|gpu] [--threads 2] [--repeats 5] [--json FILE]

Every section prints a Markdown table: medians, with minimum and maximum in brackets. Alternatives are measured in turn,
and compilation is not included. Utilisation is measured with models of 1 B parameters in bfloat16 on a GPU, with small
ones otherwise; `--small` shrinks them to toys, to try the script.
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.steps import Shape, batch_of, config_of, train_step
from benchmarks.timing import (
    median_and_range,
    milliseconds,
    print_header,
    print_row,
    ratios,
    time_in_turns,
    use_cores,
    use_device,
)
from benchmarks.utilisation import utilisation
from mythos_jax.config import Config, ModelConfig, TrainingConfig, load_config
from mythos_jax.flops import count_parameters
from mythos_jax.model.attention import AttentionContext
from mythos_jax.model.block import TransformerBlock
from mythos_jax.model.cache import LayerCache, init_cache
from mythos_jax.model.layers import RMSNorm, compute_dtype, rope_tables
from mythos_jax.model.mythos import Mythos
from mythos_jax.ops.attention import Mask
from mythos_jax.ops.cross_entropy import cross_entropy
from mythos_jax.runs.state import Constants
from mythos_jax.sharding import make_mesh, use_mesh
from mythos_jax.training.optimizer import make_optimizer
from mythos_jax.training.step import abstract_state, jitted_step

Features = Callable[[Any, jax.Array], Any]  # parameters and tokens [B, T] -> features [B, T, D] before the head

CONFIGS = Path(__file__).parents[1] / "configs"

# The shape of the original's README example, otherwise our own defaults.
README = ModelConfig(
    vocab_size=1000, dim=256, n_heads=8, n_kv_heads=2, max_seq_len=1024, loops=4, hidden_dim=341, feed_forward="moe",
    n_experts=8, experts_per_token=2, expert_dim=64, n_shared_experts=1, shared_expert_dim=128,
)  # fmt: skip
PLAIN = ModelConfig(vocab_size=1000, dim=256, n_heads=8, n_kv_heads=2, hidden_dim=688, loop_layers=2, loops=8)


# --- scaling ---


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of the power law seconds = c sizes^p, fitted to the logarithms by least squares."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One quantity to increase. base: the size that the largest is compared with; target: what the ratio should be."""

    name: str
    sizes: tuple[int, ...]
    config: Callable[[int], Config]
    base: int
    target: str = ""


AXES = (
    Axis(
        "loops (8 x 128 tokens)",
        (1, 2, 4, 8, 16),
        lambda n: config_of(dataclasses.replace(README, loops=n), Shape(8, 128)),
        base=4,
        target=", at most 4.2",
    ),
    Axis(
        "experts (4,096 tokens)",
        (8, 16, 32, 64),
        lambda n: config_of(dataclasses.replace(README, n_experts=n), Shape(32, 128)),
        base=8,
        target=", at most 1.3",
    ),
    Axis("length (4 rows)", (128, 256, 512, 1024), lambda n: config_of(README, Shape(4, n)), base=128),
    Axis("rows (of 128)", (4, 8, 16, 32), lambda n: config_of(README, Shape(n, 128)), base=4),
)


def scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    """A train step as one quantity increases; the sizes of each axis are measured in turn."""
    result: dict[str, Any] = {}
    print_header("train step", "size: ms", "exponent", "ratio")
    for axis in AXES:
        times, _ = time_in_turns({str(n): train_step(axis.config(n)) for n in axis.sizes}, arguments.repeats)
        largest = axis.sizes[-1]
        ratio = median_and_range(ratios(times[str(largest)], times[str(axis.base)]), digits=2)
        power = exponent(axis.sizes, [statistics.median(times[str(n)]) for n in axis.sizes])
        cells = "; ".join(f"{n}: {milliseconds(times[str(n)])}" for n in axis.sizes)
        print_row(axis.name, cells, f"{power:.2f}", f"{largest} : {axis.base} = {ratio}{axis.target}")
        result[axis.name] = times
    return result


# --- recurrence ---


def unrolled_features(config: ModelConfig, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Features [B, T, D] of a model without injection, with its loops unrolled: layers and nothing else."""
    c = config
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    context = AttentionContext(rope_tables(positions_BT, c), Mask())
    active_BT = jnp.ones_like(tokens_BT, bool)

    def layer(x_BTD: jax.Array, index: int, weights: Any) -> jax.Array:
        return TransformerBlock(c, index).apply({"params": weights}, x_BTD, context, LayerCache(), active_BT)[0]

    x_BTD = params["embedding"].astype(compute_dtype(c))[tokens_BT] * c.embedding_scale
    for i in range(c.prelude_layers):
        x_BTD = layer(x_BTD, i, params[f"prelude_{i}"])
    for _ in range(c.loops):
        for i in range(c.loop_layers):
            x_BTD = layer(x_BTD, c.prelude_layers + i, params["recurrence"]["cell"][f"layer_{i}"])
    for i in range(c.coda_layers):
        x_BTD = layer(x_BTD, c.prelude_layers + c.loop_layers + i, params[f"coda_{i}"])
    features_BTD: Any = RMSNorm(c.norm_eps).apply({"params": params["final_norm"]}, x_BTD)
    return features_BTD


def gradient_call(features: Features, params: Any, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A call that runs forward and backward, including the head and the loss."""

    @jax.jit
    def gradient(params: Any, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> jax.Array:
            return cross_entropy(features(params, tokens), params["embedding"], targets).mean()

        return jax.value_and_grad(loss)(params)

    return lambda: jax.block_until_ready(gradient(params, batch["tokens"], batch["targets"]))


def update_call(params: Any) -> Callable[[], Any]:
    """A call that runs clipping and AdamW alone. The weights serve as gradients, which have the same shapes."""
    optimizer = make_optimizer(TrainingConfig())
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    return lambda: jax.block_until_ready(update(params, state, params))


def recurrence(arguments: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of a looped model, compared with a plain transformer with the same number of layers, and
    with the same shared layers unrolled. AdamW is measured separately, because a plain transformer has more weights."""
    bare = dataclasses.replace(PLAIN, injection="none")
    plain = dataclasses.replace(bare, loop_layers=PLAIN.loop_layers * PLAIN.loops, loops=1)
    batch = batch_of(config_of(PLAIN, Shape(8, 128)))

    def features_of(config: ModelConfig) -> Features:
        return lambda params, tokens: Mythos(config).apply({"params": params}, tokens, method="features")

    sides = {
        "recurrent": (PLAIN, features_of(PLAIN)),
        "recurrent, no injection": (bare, features_of(bare)),
        "plain, own weights": (plain, features_of(plain)),
        "shared weights, unrolled": (bare, lambda params, tokens: unrolled_features(bare, params, tokens)),
    }
    gradients, updates = {}, {}
    for name, (config, features) in sides.items():
        params = nn.unbox(jax.jit(Mythos(config).init)(jax.random.key(0), batch["tokens"][:1, :1]))["params"]
        gradients[name] = gradient_call(features, params, batch)
        updates[name] = update_call(params)
    times, first = time_in_turns(gradients, arguments.repeats)
    optimizer_times, _ = time_in_turns(updates, arguments.repeats)
    layers = PLAIN.prelude_layers + PLAIN.loops * PLAIN.loop_layers + PLAIN.coda_layers
    print_header(f"{layers} layers applied, 8 x 128 tokens", "parameters", "forward and backward, ms",
                 "against plain, %", "against unrolled, %", "AdamW, ms", "first call, s")  # fmt: skip
    for name, (config, _) in sides.items():
        differences = [
            median_and_range([100 * (r - 1) for r in ratios(times[name], times[other])]) if other != name else ""
            for other in ("plain, own weights", "shared weights, unrolled")
        ]
        print_row(name, f"{count_parameters(config):,}", milliseconds(times[name]), *differences,
                  milliseconds(optimizer_times[name]), f"{first[name]:.1f}")  # fmt: skip
    return {"gradients": times, "optimizer": optimizer_times, "first": first}


# --- compile ---


def compile_time(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time to trace and compile a train step of few and of many loops, without any cache."""
    jax.config.update("jax_enable_compilation_cache", False)

    def compile_at(loops: int) -> None:
        jax.clear_caches()
        config = config_of(dataclasses.replace(README, loops=loops), Shape(8, 128))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(config))
        with use_mesh(mesh):
            jitted_step(config).lower(abstract_state(config, mesh), batch, Constants()).compile()

    times, _ = time_in_turns({str(n): partial(compile_at, n) for n in (4, 64)}, min(arguments.repeats, 5))
    print_header("compiling a train step", "4 loops, s", "64 loops, s", "ratio, at most 1.2")
    print_row("README's shape", median_and_range(times["4"], digits=2), median_and_range(times["64"], digits=2),
              median_and_range(ratios(times["64"], times["4"]), digits=2))  # fmt: skip
    return times


# --- cache ---


def cache(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes of latent cache per token of context, from the arrays themselves."""
    result = {}
    print_header("model", "loops", "bytes per token", "values per loop and layer", "latent + key", "the original's")
    for name in ("mythos_1b", "mythos_3b", "mythos_10b"):
        c = load_config(CONFIGS / f"{name}.yaml").model
        made = init_cache(c, batch=2, capacity=8)
        size = sum(x.nbytes for x in jax.tree.leaves((made.prelude, made.loop, made.coda))) // (2 * 8)
        slots = c.prelude_layers + c.loops * c.loop_layers + c.coda_layers
        values = size / (slots * compute_dtype(c).itemsize)
        theirs = c.kv_lora_rank + c.n_heads * c.qk_rope_head_dim
        print_row(name, c.loops, f"{size:,}", f"{values:g}", f"{c.kv_lora_rank} + {c.qk_rope_head_dim}",
                  f"{theirs} ({theirs / values:.1f} times)")  # fmt: skip
        result[name] = {"bytes": size, "values": values, "original": theirs}
    return result


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "utilisation": utilisation,
    "scaling": scaling,
    "recurrence": recurrence,
    "compile": compile_time,
    "cache": cache,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--small", action="store_true", help="measure utilisation with toy models in bfloat16, to try the script"
    )
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    for name in arguments.sections:
        if name not in SECTIONS:
            parser.error(f"section: got {name!r}, allowed: {', '.join(SECTIONS)}")
    use_cores(arguments.threads)
    use_device(arguments.device)
    results: dict[str, Any] = {}
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {arguments.threads} threads, "
          f"{arguments.repeats} repeats")  # fmt: skip
    for name in arguments.sections or SECTIONS:
        print(f"\n## {name}\n", flush=True)
        results[name] = SECTIONS[name](arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
