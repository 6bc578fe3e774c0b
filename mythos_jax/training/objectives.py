"""Objectives that training can add to the next-token loss (which is in `model/likelihood.py`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.config import ObjectivesConfig
from mythos_jax.model.state import Aux


def extra_objectives(config: ObjectivesConfig, aux: Aux, mask_BT: jax.Array) -> dict[str, jax.Array]:
    """Every objective with a non-zero weight, float32 []: its mean over the tokens in the mask, not yet weighted."""
    objectives = {}
    if config.ponder_cost:
        objectives["ponder_cost"] = _token_mean(ponder_cost(_computed(aux.act_weight_LBT)), mask_BT)
    if config.ponder_prior:
        prior_BT = ponder_prior(_computed(aux.act_weight_LBT), config.ponder_prior_rate)
        objectives["ponder_prior"] = _token_mean(prior_BT, mask_BT)
    if config.contraction:
        objectives["contraction"] = _token_mean(contraction(_computed(aux.change_LBT)), mask_BT)
    if config.router_z:
        # A dense model has no router.
        objectives["router_z"] = jnp.mean(aux.router_z) if aux.router_z is not None else jnp.float32(0)
    return objectives


def ponder_cost(weight_LBT: jax.Array) -> jax.Array:
    """Expected loops under the ACT weights, [B, T]; a differentiable compute cost (after arXiv 1603.08983)."""
    loops_L = jnp.arange(1, weight_LBT.shape[0] + 1, dtype=jnp.float32)
    return jnp.einsum("LBT,L->BT", weight_LBT, loops_L)


def ponder_prior(weight_LBT: jax.Array, rate: float) -> jax.Array:
    """KL(ACT weights || geometric distribution with this rate, truncated at L loops and renormalised), [B, T]
    (PonderNet, arXiv 2107.05407, equation 6)."""
    prior_L = rate * (1 - rate) ** jnp.arange(weight_LBT.shape[0], dtype=jnp.float32)
    log_prior_L = jnp.log(prior_L / prior_L.sum())
    terms_LBT = weight_LBT * (jnp.log(jnp.maximum(weight_LBT, 1e-8)) - log_prior_L[:, None, None])
    return terms_LBT.sum(0)


def contraction(change_LBT: jax.Array) -> jax.Array:
    """By how much each loop changes the state more than the loop before it did, summed over loops, [B, T]."""
    return nn.relu(change_LBT[1:] - change_LBT[:-1]).sum(0)


def _computed(values: jax.Array | None) -> jax.Array:
    # A config that asks for an objective of a model that does not compute it has been refused (`Config`).
    assert values is not None
    return values


def _token_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return (x_BT * mask_BT).sum() / jnp.maximum(mask_BT.sum(), 1)
