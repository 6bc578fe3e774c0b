"""How many loops a token will need, predicted from the prelude's output before the first loop.

A small head predicts, for every depth t below the L it was trained on, how far the next-token distribution after t
loops will still be from the final one (KL, in nats). A token then runs the t that minimises

    predicted KL after t loops + price * t,

which for true expectations is the best use of a given mean number of loops (`price` is its Lagrange multiplier). The
price that keeps the mean within a budget is measured on separate rows (training/predictor.py). A predictor is a pytree
of arrays, the collection "predictor" of a model's variables.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.errors import ConfigError
from mythos_jax.model.halting import Halting

PREDICTOR = "predictor"
MISSING = "halting criterion: got 'predicted' for weights without a predictor; `mythos train-predictor RUN` trains one"
MAX_LOG_KL = 10.0  # bound on the logarithm of a predicted KL, so that no exponential overflows

# From a price that buys every loop to one that buys only the first.
PRICES = np.concatenate([[0.0], np.logspace(-7, 1.5, 256)]).astype(np.float32)


def init_head(key: jax.Array, dim: int, hidden: int, loops: int) -> dict[str, jax.Array]:
    """A head for models of width `dim` and up to `loops` loops; it predicts 1 nat for everything."""
    return {
        "in": jax.random.normal(key, (dim, hidden)) * dim**-0.5,
        "in_bias": jnp.zeros(hidden),
        "out": jnp.zeros((hidden, loops - 1)),
        "out_bias": jnp.zeros(loops - 1),
    }


def log_excess(head: Mapping[str, jax.Array], injected_BTD: jax.Array) -> jax.Array:
    """Logarithm of the predicted KL, in nats, after 1 … L - 1 loops; float32 [..., L - 1]."""
    # Normalised here, since not every model norms its prelude's output.
    x = injected_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    # One hidden layer: it must cost little next to the loops that it saves.
    hidden = jax.nn.gelu(x @ head["in"] + head["in_bias"])
    return jnp.minimum(hidden @ head["out"] + head["out_bias"], MAX_LOG_KL)


def loops_at(excess: jax.Array, price: jax.Array | float) -> jax.Array:
    """The loops that minimise excess + price * loops, the smaller of equals; int32 [...] from [..., L - 1]."""
    total = jnp.pad(excess, [(0, 0)] * (excess.ndim - 1) + [(0, 1)])  # after L loops the KL is 0
    total += price * jnp.arange(1, total.shape[-1] + 1)
    return jnp.argmin(total, axis=-1).astype(jnp.int32) + 1


def check_predictor(halting: Halting | None, variables: Mapping[str, Any]) -> None:
    """Raises ConfigError for a policy that needs a predictor, where the model's variables have none."""
    if halting is not None and halting.criterion == "predicted" and PREDICTOR not in variables:
        raise ConfigError(MISSING)


def predicted_loops(
    predictor: Mapping[str, Any] | None, injected_BTD: jax.Array, budget: float | jax.Array | None
) -> jax.Array:
    """Loops that each token is to run, int32 [B, T]; on average at most `budget` (None: the predictor's own).

    Raises ConfigError where the model's variables have no predictor.
    """
    if predictor is None:
        raise ConfigError(MISSING)
    budget = predictor["budget"] if budget is None else budget
    # The mean falls as the price rises; a budget that no price meets gets the highest.
    first = jnp.argmax(jnp.append(predictor["mean_loops"] <= budget, True))
    price = predictor["prices"][jnp.minimum(first, len(predictor["prices"]) - 1)]
    return loops_at(jnp.exp(log_excess(predictor, injected_BTD)), price)
