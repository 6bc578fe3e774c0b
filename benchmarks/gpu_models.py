"""Whole models on a GPU (steps of gpu.py): the same numbers as on a CPU and as the originals, and how fast they are."""

import argparse
import dataclasses
import re
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_kernels import relative_error, verdict
from benchmarks.steps import train_step
from benchmarks.timing import median_and_range, milliseconds, print_header, print_row, time_in_turns
from benchmarks.utilisation import decode_seconds, toy
from mythos_jax.chips import peak_flops
from mythos_jax.config import Config, MeshConfig, ModelConfig, load_config
from mythos_jax.flops import decode_bytes, training_flops
from mythos_jax.model.mythos import Mythos
from mythos_jax.sharding import make_mesh, use_mesh
from tests.porting import golden as golden_data

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "mythos_1b.yaml"
# Float32 without TF32 differs by the order of sums. In bfloat16 a router may choose another expert now and then.
MAX_ERROR = {"float32": 1e-4, "bfloat16": 0.1}

_GQA = ModelConfig(
    vocab_size=512, dim=256, n_heads=4, n_kv_heads=2, hidden_dim=640, loops=3, max_seq_len=256, remat="full"
)
_MLA = dataclasses.replace(
    _GQA, attention="mla", n_kv_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32,
    v_head_dim=64,
)  # fmt: skip
_EXPERTS = dict(feed_forward="moe", n_experts=8, experts_per_token=2, expert_dim=128, n_shared_experts=1)
MODELS = {
    "GQA, dense": _GQA,
    "MLA, dense": _MLA,
    "GQA, experts": dataclasses.replace(_GQA, **_EXPERTS),
    "MLA, experts": dataclasses.replace(_MLA, **_EXPERTS),
}


def check(_: argparse.Namespace) -> dict[str, Any]:
    """The versions of what is installed, and of what the measurements need what is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dependencies, found = project["dependencies"], {}
    print_header("package", "version")
    for requirement in [*dependencies, "jax-cuda13-plugin", "torch", "open-mythos"]:
        name = re.split(r"[<>=;\[ ]", requirement)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
        print_row(name, found[name])
    return found


def golden(arguments: argparse.Namespace) -> dict[str, Any]:
    """Logits of the golden models, which the PyTorch originals wrote, at every depth; float32."""
    print_header("golden model", "depths", "largest difference of a logit")
    results = {}
    names = golden_data.NAMES[:2] if arguments.small else golden_data.NAMES
    for name in names:
        config, variables = golden_data.load(name)
        config = dataclasses.replace(config, dtype="float32")
        data, depths = golden_data.arrays(name), golden_data.loop_counts(name)

        @partial(jax.jit, static_argnames="config")
        def run(config: ModelConfig, variables: Any, tokens: jax.Array, loops: int, state: Any) -> jax.Array:
            return Mythos(config).apply(variables, tokens, loops=loops, initial_state=state).logits

        with jax.default_matmul_precision("highest"):
            difference = max(
                float(np.abs(np.asarray(logits) - golden_data.logits(name, loops)).max())
                for loops in depths
                for logits in [run(config, variables, data["input_ids"], loops, data.get("initial_state"))]
            )
        print_row(name, ", ".join(map(str, depths)), verdict(difference, 1e-3))
        results[name] = difference
    return results


def gradients(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss and gradients of small models of each kind, beside float32 on this machine's CPU."""
    print_header("model", "type", "loss", "gradients", "worst weight")
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    models = dict(list(MODELS.items())[: 1 if arguments.small else None])
    with ThreadPoolExecutor() as pool:  # most of the time goes to compiling
        variables = dict(zip(models, pool.map(_fresh_variables, models.values()), strict=True))
        places = [("float32", cpu), *((dtype, device) for dtype in MAX_ERROR)]
        runs = {
            name: [pool.submit(_loss_and_gradients, config, variables[name], *place) for place in places]
            for name, config in models.items()
        }
    results: dict[str, Any] = {}
    for name, (expected, *actual) in runs.items():
        for (dtype, limit), run in zip(MAX_ERROR.items(), actual, strict=True):
            errors = _errors(run.result(), expected.result())
            print_row(name, dtype, *(verdict(errors[key], limit) for key in ("loss", "all")),
                      f"{errors['worst']:.1e}, {errors['where']}")  # fmt: skip
            results[f"{name}, {dtype}"] = errors
    return results


def _fresh_variables(config: ModelConfig) -> Any:
    model = Mythos(dataclasses.replace(config, dtype="float32"))
    with use_mesh(make_mesh(MeshConfig(), jax.devices("cpu")[:1])):
        return jax.device_get(jax.jit(lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))))())


def _loss_and_gradients(config: ModelConfig, variables: Any, dtype: str, device: jax.Device) -> Any:
    """On one device, as numpy arrays."""
    model = Mythos(dataclasses.replace(config, dtype=dtype))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, config.max_seq_len + 1)).astype(np.int32)

    def loss(params: Any, rest: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({**rest, "params": params}, tokens[:, :-1]).logits.astype(jnp.float32)
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()

    params = variables["params"]
    rest = {name: value for name, value in variables.items() if name != "params"}
    with use_mesh(make_mesh(MeshConfig(), [device])), jax.default_matmul_precision("highest"):
        arrays = jax.device_put((params, rest, tokens), device)
        # Without trying several forms of each product, which takes minutes in float32.
        options = {"xla_gpu_autotune_level": 0} if device.platform == "gpu" else None
        return jax.device_get(jax.jit(jax.value_and_grad(loss), compiler_options=options)(*arrays))


def _errors(actual: Any, expected: Any) -> dict[str, Any]:
    (loss, grads), (expected_loss, expected_grads) = actual, expected
    pairs = [(jax.tree_util.keystr(path), a, b) for (path, a), b in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    )]  # fmt: skip
    flat = [np.concatenate([np.ravel(pair[i]) for pair in pairs]) for i in (1, 2)]
    each = {name: relative_error(jnp.asarray(a), jnp.asarray(b)) for name, a, b in pairs if np.any(b)}
    where = max(each, key=lambda name: each[name])
    return {
        "loss": abs(float(loss) / float(expected_loss) - 1),
        "all": relative_error(jnp.asarray(flat[0]), jnp.asarray(flat[1])),
        "worst": each[where],
        "where": where,
    }


def mythos_config(small: bool) -> Config:
    """mythos_1b for one GPU, with as many rows as one of 16 chips has. small: with toy sizes."""
    config = load_config(CONFIG)
    model, rows, length = config.model, 16, config.data.seq_len
    if small:
        model, rows, length = toy(model), 4, 32
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, dtype="bfloat16"),
        mesh=MeshConfig(),
        training=dataclasses.replace(config.training, batch_size=rows),
        data=dataclasses.replace(config.data, seq_len=length),
    )


def mythos(arguments: argparse.Namespace) -> dict[str, Any]:
    """A train step of mythos_1b on one GPU, and decoding of one text."""
    config = mythos_config(arguments.small)
    rows, length = config.training.batch_size, config.data.seq_len
    device = jax.devices()[0]
    times, first = time_in_turns({"step": train_step(config)}, arguments.repeats)
    flops, peak = training_flops(config), peak_flops([device])
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    print_header(
        f"mythos_1b, {rows} x {length} tokens", "ms", "tokens/s", "utilisation, %", "peak, GiB", "compilation, s"
    )
    print_row(
        "train step",
        milliseconds(times["step"]),
        median_and_range([rows * length / s for s in times["step"]], digits=0),
        median_and_range([flops / s / peak for s in times["step"]], 100) if peak else "-",
        f"{memory / 2**30:.1f}" if memory else "-",
        f"{first['step']:.0f}",
    )
    prompt, new = (16, 4) if arguments.small else (128, 64)
    token = decode_seconds(config.model, prompt, new, arguments.repeats)
    size = decode_bytes(config.model, prompt + new // 2, config.model.loops)
    print()
    print_header("mythos_1b, decoding one text", "MB to read", "ms a token", "GB/s")
    print_row("one token", f"{size / 1e6:.0f}", milliseconds(token), median_and_range([size / s for s in token], 1e-9))
    return {
        "step": times["step"],
        "first": first["step"],
        "flops": flops,
        "memory": memory,
        "token": token,
        "bytes": size,
    }
