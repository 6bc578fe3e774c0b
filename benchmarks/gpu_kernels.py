"""The kernels of NVIDIA's GPUs (steps of gpu.py): are they right, and how fast are they?

Errors are norms of differences relative to float32 references. On a CPU the kernels are interpreted, to try the script.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import median_and_range, milliseconds, print_header, print_row, seconds_of
from mythos_jax.ops import attention, grouped_triton
from mythos_jax.ops.attention import Mask, dense_attention
from mythos_jax.ops.blockwise import blockwise_attention
from mythos_jax.ops.grouped_triton import Blocks

# Relative errors of kernels: bfloat16 has 8 bits.
MAX_ERROR = {"bfloat16": 1e-2, "float32": 1e-4}


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    difference = jnp.linalg.norm((actual.astype(jnp.float32) - expected.astype(jnp.float32)).reshape(-1))
    return float(difference / jnp.linalg.norm(expected.astype(jnp.float32).reshape(-1)))


def verdict(error: float, limit: float) -> str:
    return f"{error:.1e}, {'right' if error <= limit else 'WRONG'}"  # NaN is wrong


def grouped(arguments: argparse.Namespace) -> dict[str, Any]:
    """The products of experts' rows with their matrices: right for uneven and empty experts, and their speed."""
    on_gpu = arguments.device == "gpu"
    print_header("rows x depth x width, experts", "type", "product", "transposed", "outer", "outer, added")
    shapes = [(4096, 512, 1024, 16), (100, 256, 640, 8)] if on_gpu else [(100, 32, 48, 4)]
    results: dict[str, Any] = {"errors": {}}
    for shape, dtype in itertools.product(shapes, MAX_ERROR):
        errors = _grouped_errors(shape, dtype, interpret=not on_gpu)
        name = "{} x {} x {}, {}".format(*shape)
        print_row(name, dtype, *(verdict(error, MAX_ERROR[dtype]) for error in errors))
        results["errors"][f"{name}, {dtype}"] = errors
    print()
    if on_gpu:
        results["speed"] = _grouped_speed((32768, 2048, 2048, 16), arguments.repeats)
    return results


def _inputs(shape: tuple[int, int, int, int], dtype: str) -> tuple[jax.Array, ...]:
    """Rows [R, D] and [R, F], matrices, sizes, and sums. One expert has no rows, and some rows no expert."""
    R, D, F, E = shape
    random = np.random.default_rng(0)
    sizes = random.multinomial(R - R // 10, random.dirichlet(np.ones(E - 1) * 4))
    sizes_E = jnp.asarray(np.insert(sizes, E // 2, 0), jnp.int32)
    x, y, w, sums = (
        jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate([(R, D), (R, F), (E, D, F), (E, D, F)])
    )
    return x, y, w, sizes_E, sums.astype(jnp.float32)


@jax.jit
def _reference(
    x: jax.Array, y: jax.Array, w: jax.Array, sizes_E: jax.Array, sums: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One dense product per expert, in float32."""
    expert_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x)), side="right")
    own_ER = (expert_R == jnp.arange(len(sizes_E))[:, None]).astype(jnp.float32)
    x, y, w = (a.astype(jnp.float32) for a in (x, y, w))
    einsum = partial(jnp.einsum, precision="highest")

    def add(total: tuple[jax.Array, jax.Array], e: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        own_R, w_DF = e
        xw, yw = total
        xw, yw = xw + own_R[:, None] * einsum("RD,DF->RF", x, w_DF), yw + own_R[:, None] * einsum("RF,DF->RD", y, w_DF)
        return (xw, yw), einsum("R,RD,RF->DF", own_R, x, y)

    (xw, yw), outer = jax.lax.scan(add, (jnp.zeros_like(y), jnp.zeros_like(x)), (own_ER, w))
    return xw, yw, outer, outer + sums


def _grouped_errors(shape: tuple[int, int, int, int], dtype: str, interpret: bool) -> list[float]:
    x, y, w, sizes_E, sums = _inputs(shape, dtype)
    expected = _reference(x, y, w, sizes_E, sums)

    @jax.jit
    def kernels(x: jax.Array, y: jax.Array, sums: jax.Array) -> tuple[jax.Array, ...]:
        return (
            grouped_triton.product(x, w, sizes_E, interpret=interpret),
            grouped_triton.product(y, w, sizes_E, transposed=True, interpret=interpret),
            grouped_triton.outer(x, y, sizes_E, interpret=interpret),
            grouped_triton.outer(x, y, sizes_E, sums, interpret=interpret),
        )

    n = int(sizes_E.sum())
    dirty = (a.at[n:].set(jnp.nan) for a in (x, y))  # rows of no expert may hold anything
    actual = kernels(*dirty, sums)
    cut = [n, n, len(sizes_E), len(sizes_E)]
    return [relative_error(a[:rows], b[:rows]) for a, b, rows in zip(actual, expected, cut, strict=True)]


def _grouped_speed(shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    """Of each kernel with different blocks, of XLA's `ragged_dot`, and of one dense product of as many rows."""
    R, D, F, E = shape
    x, y, w, _, sums = _inputs(shape, "bfloat16")
    sizes_E = jnp.asarray(np.random.default_rng(1).multinomial(R, np.full(E, 1 / E)), jnp.int32)
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "dense": (lambda x, w: x @ w, (x, w[0])),
        "ragged_dot": (jax.lax.ragged_dot, (x, w, sizes_E)),
        "product, as chosen": (grouped_triton.product, (x, w, sizes_E)),
        "transposed, as chosen": (partial(grouped_triton.product, transposed=True), (y, w, sizes_E)),
        "outer, as chosen": (grouped_triton.outer, (x, y, sizes_E)),
        "outer, added, as chosen": (grouped_triton.outer, (x, y, sizes_E, sums)),
    }
    print_header("{} x {} x {}, {} experts".format(*shape), "ms", "TFLOP/s")
    seconds = {name: _time(f, a, repeats, name, 2 * R * D * F) for name, (f, a) in calls.items()}
    chosen = grouped_triton.product_blocks, grouped_triton.outer_blocks
    for rows, columns, summed in itertools.product((64, 128), (128, 256), (32, 64, 128)):
        blocks = Blocks(rows, columns, summed)
        try:
            grouped_triton.product_blocks = grouped_triton.outer_blocks = lambda *_, blocks=blocks: blocks
            for name in ("product", "outer"):
                # A function of its own, so that it is traced again.
                call = calls[f"{name}, as chosen"]
                label = f"{name}, {rows} x {columns} x {summed}"
                seconds[label] = _time(lambda *a, f=call[0]: f(*a), call[1], repeats, label, 2 * R * D * F)
        finally:
            grouped_triton.product_blocks, grouped_triton.outer_blocks = chosen
    return seconds


def _time(f: Callable[..., Any], arrays: tuple[Any, ...], repeats: int, name: str, flops: float) -> list[float] | str:
    """Seconds of a run in each of `repeats` rounds of ten; what the compiler says, if it refuses."""
    run = jax.jit(f)

    def ten() -> None:
        jax.block_until_ready([run(*arrays) for _ in range(10)])

    try:
        ten()
    except jax.errors.JaxRuntimeError as error:  # too much shared memory
        print_row(name, str(error).splitlines()[0][:60], "-")
        return str(error)[:300]
    seconds = [seconds_of(ten) / 10 for _ in range(repeats)]
    print_row(name, milliseconds(seconds), median_and_range([flops / s for s in seconds], 1e-12))
    return seconds


def attention_kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    """cuDNN's attention, with widths padded: right in value and gradients, and its speed beside blocks in XLA."""
    on_gpu = arguments.device == "gpu"
    implementation = "cudnn" if on_gpu else "xla"
    dtype = "bfloat16" if on_gpu else "float32"
    widths = {"MLA, 96 and 64": (16, 16, 96, 64), "GQA, 128": (16, 4, 128, 128)}
    if not on_gpu:
        widths = {"MLA, 12 and 8": (4, 4, 12, 8), "GQA, 16": (4, 2, 16, 16)}
    print_header("attention", "value", "dq", "dk", "dv", "cuDNN, ms", "blocks, ms", "cuDNN, TFLOP/s")
    results: dict[str, Any] = {}
    for name, (H, G, K, V) in widths.items():
        cudnn = partial(_causal, partial(attention._cudnn, implementation=implementation), K)
        blocks = partial(_causal, partial(blockwise_attention, checkpoint_name=attention.SAVED, max_block=512), K)
        small = _qkv(2, 512 if on_gpu else 24, H, G, K, V, dtype)
        actual, expected = _value_and_gradients(cudnn)(*small), _value_and_gradients(partial(_dense, K))(*small)
        errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
        large = _qkv(*((8, 4096) if on_gpu else (1, 64)), H, G, K, V, dtype)
        times = [_seconds(_value_and_gradients(f), large, arguments.repeats) for f in (cudnn, blocks)]
        B, T = large[0].shape[:2]
        flops = 7 * 2 * B * H * T * T / 2 * max(K, V)
        cells = [verdict(error, 3 * MAX_ERROR["bfloat16"]) for error in errors]
        rates = median_and_range([flops / s for s in times[0]], 1e-12)
        print_row(name, *cells, *map(milliseconds, times), rates)
        results[name] = {"errors": errors, "cudnn": times[0], "blocks": times[1]}
    return results


def _qkv(B: int, T: int, H: int, G: int, K: int, V: int, dtype: str) -> list[jax.Array]:
    shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, V)]
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def _causal(attend: Callable[..., jax.Array], K: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attend(q, k, v, jnp.arange(q.shape[1], dtype=jnp.int32)[None], None, scale=K**-0.5)


def _dense(K: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return dense_attention(*(x.astype(jnp.float32) for x in (q, k, v)), Mask(), K**-0.5)


def _value_and_gradients(f: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    @jax.jit
    def run(*qkv: jax.Array) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(f, *qkv)
        cotangent = jax.random.normal(jax.random.key(9), out.shape, jnp.float32)
        return out, *vjp(cotangent.astype(out.dtype))

    return run


def _seconds(run: Callable[..., Any], arrays: list[jax.Array], repeats: int) -> list[float]:
    jax.block_until_ready(run(*arrays))
    return [seconds_of(lambda: jax.block_until_ready(run(*arrays))) for _ in range(repeats)]
