"""Objectives that training can add to the next-token loss (which is in `model/likelihood.py`), and those that train an
exit gate."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mythos_jax.config import ObjectivesConfig
from mythos_jax.model.state import Aux

# A part's share of a mean over the tokens of a batch, weighted by the mask, [B, T] -> []; the shares of all parts add
# up to the mean.
Mean = Callable[[jax.Array], jax.Array]


def token_mean(mask_BT: jax.Array, weight: jax.Array) -> Mean:
    """weight: the sum of the masks of all parts."""
    return lambda x_BT: (x_BT * mask_BT).sum() / weight


def total_weight(mask_BT: jax.Array) -> jax.Array:
    """The sum of the mask of a batch; 1 for padding alone, so that means over it are 0, not NaN."""
    total = mask_BT.sum()
    return jnp.where(total > 0, total, 1)


def extra_objectives(config: ObjectivesConfig, aux: Aux, mean: Mean, use: float | jax.Array) -> dict[str, jax.Array]:
    """Every objective with a non-zero weight, float32 []: a part's share of it, not yet multiplied by its weight.
    use: the part's share of all loops that the batch's rows run, which is its share of the routers' choices."""
    objectives = {}
    if config.ponder_cost:
        objectives["ponder_cost"] = mean(ponder_cost(_computed(aux.act_weight_LBT)))
    if config.ponder_prior:
        prior_BT = ponder_prior(_computed(aux.act_weight_LBT), config.ponder_prior_rate)
        objectives["ponder_prior"] = mean(prior_BT)
    if config.contraction:
        objectives["contraction"] = mean(contraction(_computed(aux.change_LBT)))
    if config.router_z:
        # A dense model has no router.
        router_z = jnp.mean(aux.router_z) if aux.router_z is not None else jnp.float32(0)
        objectives["router_z"] = router_z * use
    return objectives


def ponder_cost(weight_LBT: jax.Array) -> jax.Array:
    """Expected loops under the ACT weights, [B, T]; a differentiable compute cost (after arXiv 1603.08983)."""
    loops_L = jnp.arange(1, weight_LBT.shape[0] + 1, dtype=jnp.float32)
    return jnp.einsum("LBT,L->BT", weight_LBT, loops_L)


def ponder_prior(weight_LBT: jax.Array, rate: float) -> jax.Array:
    """KL(ACT weights || `log_geometric`), [B, T] (PonderNet, arXiv 2107.05407, equation 6)."""
    log_prior_L11 = log_geometric(rate, len(weight_LBT), jnp.int32(len(weight_LBT)))
    terms_LBT = weight_LBT * (jnp.log(jnp.maximum(weight_LBT, 1e-8)) - log_prior_L11)
    return terms_LBT.sum(0)


def log_geometric(rate: float, loops: int, steps_BT: jax.Array) -> jax.Array:
    """Logarithms of the geometric distribution over the first `steps_BT` of these loops that goes on with probability
    1 - rate, truncated and renormalised, [L, B, T]; at rate 0 it is uniform. What comes after these loops is of no
    meaning."""
    ratio_L11 = jnp.arange(loops, dtype=jnp.float32)[:, None, None] * jnp.log1p(-rate)
    exists_LBT = jnp.arange(1, loops + 1)[:, None, None] <= steps_BT
    return ratio_L11 - jnp.log(jnp.where(exists_LBT, jnp.exp(ratio_L11), 0).sum(0))


def contraction(change_LBT: jax.Array) -> jax.Array:
    """By how much each loop changes the state more than the loop before it did, summed over loops, [B, T]."""
    return nn.relu(change_LBT[1:] - change_LBT[:-1]).sum(0)


class TokenLosses(NamedTuple):
    """minimised_BT: what training minimises. nats_BT: the next-token loss that it reports, in nats. metrics: shares of
    means over tokens, to be logged."""

    minimised_BT: jax.Array
    nats_BT: jax.Array
    metrics: dict[str, jax.Array]


def exit_objective(
    config: ObjectivesConfig, loss_LBT: jax.Array, aux: Aux, loops_BT: jax.Array, mean: Mean
) -> TokenLosses:
    """The two stages of Ouro (arXiv 2510.25741, sections 3.3 and 3.4).

    loss_LBT: next-token loss after each traced loop, in nats, 0 where the mask is. loops_BT: int32, loops that the
    token has run; with truncated backpropagation the trace has its last ones only, and the token exits after one of
    them.
    """
    logit_LBT = _computed(aux.halt_logit_LBT)
    steps_BT = jnp.minimum(loops_BT, len(logit_LBT))
    log_p_LBT, exists_LBT = log_exits(logit_LBT, steps_BT)
    p_LBT = jnp.where(exists_LBT, jnp.exp(log_p_LBT), 0)
    first_BT, index_L11 = loops_BT - steps_BT, jnp.arange(1, len(logit_LBT) + 1)[:, None, None]
    metrics = {"mean_exit": mean((p_LBT * (first_BT + index_L11)).sum(0))}
    if config.exit_loss == "gain":
        gate_BT = gain_loss(loss_LBT, logit_LBT, steps_BT, config.exit_gain, config.exit_slope)
        last_BT = jnp.take_along_axis(loss_LBT, steps_BT[None] - 1, axis=0)[0]
        return TokenLosses(gate_BT, last_BT, metrics | {"exit_loss": mean(gate_BT)})
    entropy_BT = -jnp.where(exists_LBT, p_LBT * log_p_LBT, 0).sum(0)
    nats_BT = (p_LBT * loss_LBT).sum(0)
    metrics["exit_entropy"] = mean(entropy_BT)
    closeness_BT = entropy_BT  # minus KL(p || prior), for a uniform one up to a constant
    if config.exit_prior_rate:
        log_prior_LBT = log_geometric(config.exit_prior_rate, len(logit_LBT), steps_BT)
        closeness_BT = entropy_BT + (p_LBT * log_prior_LBT).sum(0)
    return TokenLosses(nats_BT - config.exit_entropy * closeness_BT, nats_BT, metrics)


def log_exits(logit_LBT: jax.Array, steps_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the probabilities p_t to exit after each of the first `steps_BT` loops, and which loops these are.

    p_t = lambda_t prod_(j<t) (1 - lambda_j), where lambda = sigmoid(logit); the last of these loops takes what is left.
    """
    index_L11 = jnp.arange(1, len(logit_LBT) + 1)[:, None, None]
    going_on_LBT = nn.log_sigmoid(-logit_LBT)
    survival_LBT = jnp.cumsum(going_on_LBT, axis=0) - going_on_LBT  # up to the loop before
    stops_LBT = jnp.where(index_L11 == steps_BT, 0, nn.log_sigmoid(logit_LBT))
    return survival_LBT + stops_LBT, index_L11 <= steps_BT


def gain_loss(
    loss_LBT: jax.Array, logit_LBT: jax.Array, steps_BT: jax.Array, threshold: float, slope: float
) -> jax.Array:
    """Binary cross-entropy of the gate, [B, T]: after each loop but the first, it is to go on with probability
    sigmoid(slope (gain - threshold)), where the gain is by how much the loop lowered the loss, at least 0. The sum over
    loops is divided by all of them (equations 5 and 6 of Ouro)."""
    gain_LBT = nn.relu(loss_LBT[:-1] - loss_LBT[1:])
    label_LBT = jax.lax.stop_gradient(nn.sigmoid(slope * (gain_LBT - threshold)))
    logit_LBT = logit_LBT[1:]
    terms_LBT = label_LBT * nn.log_sigmoid(-logit_LBT) + (1 - label_LBT) * nn.log_sigmoid(logit_LBT)
    exists_LBT = jnp.arange(2, len(loss_LBT) + 1)[:, None, None] <= steps_BT
    return -jnp.where(exists_LBT, terms_LBT, 0).sum(0) / steps_BT


def _computed(values: jax.Array | None) -> jax.Array:
    # A config that asks for an objective of a model that does not compute it has been refused (`Config`).
    assert values is not None
    return values
