"""Rematerialisation: what the forward pass keeps for the backward pass, which computes everything else again.

A layer keeps its input. A loop keeps the state that it starts from and the outputs of its layers, so that the backward
pass computes each layer once again and not twice, and holds the insides of one layer at a time. Inside a layer
`model.remat` names what is kept in addition (docs/training.md).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from mythos_jax.config.model import Remat
from mythos_jax.ops.attention import SAVED

# The names (`checkpoint_name`) of the outputs of a layer and of its feed-forward, and of the two products from which a
# dense feed-forward makes its hidden activations; attention has its own, SAVED.
LAYER, FEED_FORWARD, UP, GATE = "layer", "feed_forward", "up", "gate"

# What is kept inside a layer, by name.
_KEPT: dict[str, tuple[str, ...]] = {
    "attention": (SAVED,),
    "sublayers": (SAVED, FEED_FORWARD),
    "half_hidden": (SAVED, FEED_FORWARD, UP),
    "hidden": (SAVED, FEED_FORWARD, UP, GATE),
}


def remat_layer(call: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer's call, (module, …) -> …, as the backward pass computes it again."""
    # With prevent_cse, the default: if one loop runs, or none around the layer, XLA would else find that the forward
    # pass has computed all this before, and keep it. It also holds a layer back until its gradient is there.
    return call if remat == "none" else nn.remat(call, policy=_policy(remat))


def remat_loop(call: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A loop's call, as `remat_layer`; its layers are rematerialised by themselves."""
    return call if remat == "none" else nn.remat(call, policy=_policy(remat, LAYER), prevent_cse=False)


def _policy(remat: Remat, *names: str) -> Callable[..., Any]:
    """Keeps what has one of these names or is kept inside a layer."""
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=names,
            names_which_can_be_offloaded=[SAVED],
            offload_src="device",
            offload_dst="pinned_host",
        )
    kept = policies.save_only_these_names(*names, *_KEPT.get(remat, ()))
    if remat == "dots":
        return policies.save_from_both_policies(kept, policies.dots_with_no_batch_dims_saveable)
    return kept
