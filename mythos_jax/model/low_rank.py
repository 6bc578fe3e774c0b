"""Low-rank weights beside the frozen matrices of a model: LoRA fine-tuning (arXiv 2106.09685).

A matrix W, [*inputs, *outputs], is used as W + a b with a [*inputs, R] and b [R, *outputs]; the sum is never built
(`ops/products.py`). In the collection `low_rank`, {"a", "b"} is at the path that the matrix has under `params`. The b
that a model is given is already scaled by alpha / rank. This has nothing to do with the loop's own `LoopLoRA`.
"""

import math
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mythos_jax.config import LoraConfig, ModelConfig
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.gather import LOW_RANK, SCALES, Weight, low_rank_axes
from mythos_jax.model.names import select
from mythos_jax.ops.narrow import Narrow, wide
from mythos_jax.typed import check_field

# Names of the low-rank weights.
PARTS = ("a", "b")
# All matrices of attention and feed-forward; of a mixture of experts, those of the shared experts.
_BY_DEFAULT = re.compile(r"(^|\.)(attention|feed_forward|shared_\d+)\.")


def adaptable(config: ModelConfig) -> dict[str, Weight]:
    """The matrices that low-rank weights can be added to, as boxed shapes by dotted path below `params`: not the
    embedding and the head, whose products sum over their last axis, and not the routed experts."""
    boxes = flatten_dict(abstract_variables(config)["params"], sep=".")
    return {
        path: box
        for path, box in boxes.items()
        if isinstance(box, Weight) and box.inputs == tuple(range(len(box.inputs)))
    }


def target_paths(config: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """The matrices that get low-rank weights, by dotted path below `params`.

    Raises ConfigError, with the nearest names, for a target that stands for nothing, or for no matrix that can get any.
    """
    matrices = adaptable(config)
    if not lora.targets:
        return tuple(path for path in matrices if _BY_DEFAULT.search(path))
    found: set[str] = set()
    for name in lora.targets:
        paths = select(config, [name], "training.lora.targets") & matrices.keys()
        known = ", ".join(dict.fromkeys(".".join(path.split(".")[-3:-1]) for path in matrices))
        allowed = f"names of matrices, such as {known}; not embedding, head, norms or routed experts, which have none"
        check_field(bool(paths), "training.lora.targets", name, allowed)
        found |= paths
    return tuple(path for path in matrices if path in found)


def fresh_low_rank(config: ModelConfig, lora: LoraConfig, seed_key: jax.Array) -> dict[str, Any]:
    """`init_low_rank` as a run begins."""
    # A stream of its own, apart from the keys of weights and depths.
    return init_low_rank(config, target_paths(config, lora), lora.rank, jax.random.fold_in(seed_key, 0x6C72))


def init_low_rank(config: ModelConfig, paths: Iterable[str], rank: int, key: jax.Array) -> dict[str, Any]:
    """Boxed low-rank weights for the matrices at these paths, under which the model is what it is without them: b is 0,
    and a uniform within 1 / sqrt(inputs), as in PEFT. What is drawn for a matrix does not depend on the others."""
    boxes, flat = adaptable(config), {}
    for path in paths:
        box = boxes[path]
        n = len(box.inputs)
        shape, axes = box.value.shape, low_rank_axes(box.names, n)
        bound = 1 / math.sqrt(math.prod(shape[:n]))
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own_key, (*shape[:n], rank), jnp.float32, -bound, bound)
        flat[f"{path}.a"] = nn.LogicallyPartitioned(a, axes["a"])
        flat[f"{path}.b"] = nn.LogicallyPartitioned(jnp.zeros((rank, *shape[n:])), axes["b"])
    return unflatten_dict(flat, sep=".")


def scaled(low_rank: Any, scale: float) -> Any:
    """As a model uses them: b times alpha / rank."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x * scale if path[-1].key == "b" else x, low_rank)


def merged(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables without low-rank weights: float32 W + a b in place of each matrix W that has them, computed in float32.
    Other matrices are float32, too, where they are stored as int8. Each stays where it is on the mesh."""
    low_rank = flatten_dict(dict(variables[LOW_RANK]), sep=".")
    params = flatten_dict(dict(variables["params"]), sep=".")
    scales = flatten_dict(dict(variables.get(SCALES, {})), sep=".")
    # Not a set: all processes of a run must start the same computations in the same order.
    for path in dict.fromkeys([*(name.rpartition(".")[0] for name in low_rank), *scales]):
        w = params[path]
        parts = [low_rank.get(f"{path}.{part}") for part in PARTS]
        place = w.sharding if isinstance(w, jax.Array) else None
        params[path] = jax.jit(_sum, out_shardings=place)(Narrow(w, scales.get(path)), *parts)
    rest = {name: tree for name, tree in variables.items() if name not in (LOW_RANK, SCALES)}
    return {**rest, "params": unflatten_dict(params, sep=".")}


def _sum(base: Narrow, a: jax.Array | None, b: jax.Array | None) -> jax.Array:
    w = wide(base, jnp.dtype(jnp.float32))
    return w if a is None or b is None else w + jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
