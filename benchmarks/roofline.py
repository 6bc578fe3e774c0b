"""How near the hardware's limit: utilisation, scaling, what recurrence costs, compile time, cache.

    .venv/bin/python -m benchmarks.roofline [section ...] [--device cpu|gpu] [--threads 2] [--repeats 5] [--json FILE]

Every section prints a Markdown table: medians, least and most in brackets; what is compared takes turns; compile
time stands apart. On a GPU the utilisation is that of models of 1 B parameters in bfloat16, elsewhere of small ones;
`--small` shrinks those to toys, to try the script.
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.steps import Shape, batch_of, run_of, train_step
from benchmarks.timing import by_turns, head, milliseconds, ratios, row, spread, use_cores, use_device
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
from mythos_jax.sharding import make_mesh, use_mesh
from mythos_jax.training.optimizer import make_optimizer
from mythos_jax.training.step import abstract_state, jitted_step

Features = Callable[[Any, jax.Array], jax.Array]  # parameters and tokens [B, T] to [B, T, D] before the head

CONFIGS = Path(__file__).parents[1] / "configs"

# The shape of the original's README example, otherwise our own defaults.
README = ModelConfig(
    vocab_size=1000, dim=256, n_heads=8, n_kv_heads=2, max_seq_len=1024, loops=4, hidden_dim=341, feed_forward="moe",
    n_experts=8, experts_per_token=2, expert_dim=64, n_shared_experts=1, shared_expert_dim=128,
)  # fmt: skip
PLAIN = ModelConfig(vocab_size=1000, dim=256, n_heads=8, n_kv_heads=2, hidden_dim=688, loop_layers=2, loops=8)


# --- scaling ---


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of the power law seconds = c sizes^p that is nearest, least squares of the logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


def scaling(arguments: argparse.Namespace) -> Any:
    """A train step as one thing grows; each axis by turns over its sizes."""

    def with_loops(n: int) -> Config:
        return run_of(dataclasses.replace(README, loops=n), Shape(8, 128))

    def with_experts(n: int) -> Config:
        return run_of(dataclasses.replace(README, n_experts=n), Shape(32, 128))

    axes: dict[str, tuple[tuple[int, ...], Callable[[int], Config]]] = {
        "loops (8 x 128 tokens)": ((1, 2, 4, 8, 16), with_loops),
        "experts (4,096 tokens)": ((8, 16, 32, 64), with_experts),
        "length (4 rows)": ((128, 256, 512, 1024), lambda n: run_of(README, Shape(4, n))),
        "rows (of 128)": ((4, 8, 16, 32), lambda n: run_of(README, Shape(n, 128))),
    }
    found: dict[str, Any] = {}
    head("train step", "size: ms", "exponent", "ratio")
    for name, (sizes, config) in axes.items():
        times, _ = by_turns({str(n): train_step(config(n)) for n in sizes}, arguments.repeats)
        small, target = {"loops": ("4", ", at most 4.2"), "experts": ("8", ", at most 1.3")}.get(
            name.split()[0], (str(sizes[0]), "")
        )
        ratio = spread(ratios(times[str(sizes[-1])], times[small]), digits=2)
        power = exponent(sizes, [statistics.median(times[str(n)]) for n in sizes])
        cells = "; ".join(f"{n}: {milliseconds(times[str(n)])}" for n in sizes)
        row(name, cells, f"{power:.2f}", f"{sizes[-1]} : {small} = {ratio}{target}")
        found[name] = times
    return found


# --- recurrence ---


def unrolled_features(config: ModelConfig, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Features [B, T, D] of a model without injection, its loops written out: the layers and nothing else."""
    c = config
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    context = AttentionContext(rope_tables(positions_BT, c.rope_dim, c.rope_theta), Mask())
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
    return RMSNorm(c.norm_eps).apply({"params": params["final_norm"]}, x_BTD)


def gradient_call(features: Features, params: Any, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """Forward and backward, the head and its loss included."""

    @jax.jit
    def gradient(params, tokens, targets):
        def loss(params):
            return cross_entropy(features(params, tokens), params["embedding"], targets).mean()

        return jax.value_and_grad(loss)(params)

    return lambda: jax.block_until_ready(gradient(params, batch["tokens"], batch["targets"]))


def update_call(params: Any) -> Callable[[], Any]:
    """Clipping and AdamW alone; the weights stand in for gradients, which have their shape."""
    optimizer = make_optimizer(TrainingConfig())
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    return lambda: jax.block_until_ready(update(params, state, params))


def recurrence(arguments: argparse.Namespace) -> Any:
    """Forward and backward of a looped model beside those of a plain transformer of as many layers, and beside the
    same shared layers written out; AdamW apart, since a plain transformer has more weights."""
    bare = dataclasses.replace(PLAIN, injection="none")
    plain = dataclasses.replace(bare, loop_layers=PLAIN.loop_layers * PLAIN.loops, loops=1)
    batch = batch_of(run_of(PLAIN, Shape(8, 128)))

    def features_of(config: ModelConfig) -> Features:
        return lambda params, tokens: Mythos(config).apply({"params": params}, tokens, method="features")

    sides = {
        "recurrent": (PLAIN, features_of(PLAIN)),
        "recurrent, no injection": (bare, features_of(bare)),
        "plain, own weights": (plain, features_of(plain)),
        "shared weights, written out": (bare, lambda params, tokens: unrolled_features(bare, params, tokens)),
    }
    gradients, updates = {}, {}
    for name, (config, features) in sides.items():
        params = nn.unbox(jax.jit(Mythos(config).init)(jax.random.key(0), batch["tokens"][:1, :1]))["params"]
        gradients[name] = gradient_call(features, params, batch)
        updates[name] = update_call(params)
    times, first = by_turns(gradients, arguments.repeats)
    optimizing, _ = by_turns(updates, arguments.repeats)
    layers = PLAIN.prelude_layers + PLAIN.loops * PLAIN.loop_layers + PLAIN.coda_layers
    head(f"{layers} layers applied, 8 x 128 tokens", "parameters", "forward and backward, ms", "beside plain, %",
         "beside written out, %", "AdamW, ms", "first call, s")  # fmt: skip
    for name, (config, _) in sides.items():
        beside = [
            spread([100 * (r - 1) for r in ratios(times[name], times[other])]) if other != name else ""
            for other in ("plain, own weights", "shared weights, written out")
        ]
        row(name, f"{count_parameters(config):,}", milliseconds(times[name]), *beside, milliseconds(optimizing[name]),
            f"{first[name]:.1f}")  # fmt: skip
    return {"gradients": times, "optimizer": optimizing, "first": first}


# --- compile ---


def compiling(arguments: argparse.Namespace) -> Any:
    """Time to trace and compile a train step, shallow and deep; nothing that an earlier one left behind is used."""
    jax.config.update("jax_enable_compilation_cache", False)

    def compile_at(loops: int) -> None:
        jax.clear_caches()
        config = run_of(dataclasses.replace(README, loops=loops), Shape(8, 128))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(config))
        with use_mesh(mesh):
            jitted_step(config).lower(abstract_state(config, mesh), batch).compile()

    times, _ = by_turns({str(n): lambda n=n: compile_at(n) for n in (4, 64)}, min(arguments.repeats, 5))
    head("compiling a train step", "4 loops, s", "64 loops, s", "ratio, at most 1.2")
    row("README's shape", spread(times["4"], digits=2), spread(times["64"], digits=2),
        spread(ratios(times["64"], times["4"]), digits=2))  # fmt: skip
    return times


# --- cache ---


def cache(arguments: argparse.Namespace) -> Any:
    """Bytes of latent cache that a token of context takes, of the arrays themselves."""
    found = {}
    head("model", "loops", "bytes a token", "values a loop and layer", "of which latent + key", "the original's")
    for name in ("mythos_1b", "mythos_3b", "mythos_10b"):
        c = load_config(CONFIGS / f"{name}.yaml").model
        made = init_cache(c, batch=2, capacity=8)
        size = sum(x.nbytes for x in jax.tree.leaves((made.prelude, made.loop, made.coda))) // (2 * 8)
        slots = c.prelude_layers + c.loops * c.loop_layers + c.coda_layers
        values = size / (slots * compute_dtype(c).itemsize)
        theirs = c.kv_lora_rank + c.n_heads * c.qk_rope_head_dim
        row(name, c.loops, f"{size:,}", f"{values:g}", f"{c.kv_lora_rank} + {c.qk_rope_head_dim}",
            f"{theirs} ({theirs / values:.1f} times)")  # fmt: skip
        found[name] = {"bytes": size, "values": values, "original": theirs}
    return found


SECTIONS = {"utilisation": utilisation, "scaling": scaling, "recurrence": recurrence, "compile": compiling,
            "cache": cache}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="utilisation of toys, in bfloat16, to try the script")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    for name in arguments.sections:
        if name not in SECTIONS:
            parser.error(f"section: got {name!r}, allowed: {', '.join(SECTIONS)}")
    use_cores(arguments.threads)
    use_device(arguments.device)
    found: dict[str, Any] = {}
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {arguments.threads} threads, "
          f"{arguments.repeats} turns")  # fmt: skip
    for name in arguments.sections or SECTIONS:
        print(f"\n## {name}\n", flush=True)
        found[name] = SECTIONS[name](arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
