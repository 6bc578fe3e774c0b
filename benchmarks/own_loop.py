"""The train step that a user writes who has a loop of their own: `model.apply` and optax, nothing of `training/`."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks.steps import batch_of
from mythos_jax.config import Config
from mythos_jax.model.mythos import Mythos

Step = Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, Any, jax.Array]]


def make_step(config: Config, variables: Any) -> tuple[Step, Any, Any]:
    """The jitted step, (params, optimizer state, tokens, targets) -> (params, optimizer state, loss), whose first two
    arguments are donated; and those two at the start."""
    t, model = config.training, Mythos(config.model)
    params, rest = variables["params"], {name: part for name, part in variables.items() if name != "params"}
    optimizer = optax.chain(
        optax.clip_by_global_norm(t.gradient_clip), optax.adamw(t.learning_rate, weight_decay=t.weight_decay)
    )

    def loss_of(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        out: Any = model.apply({"params": params, **rest}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(out.logits, targets).mean()

    def step(params: Any, state: Any, tokens: jax.Array, targets: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens, targets)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1)), params, optimizer.init(params)


def train_step(config: Config, variables: Any) -> Callable[[], None]:
    """A call that runs one step, always on the same batch, and waits for it. The variables are donated."""
    step, params, state = make_step(config, variables)
    batch = jax.device_put(batch_of(config))

    def call() -> None:
        nonlocal params, state
        params, state, loss = step(params, state, batch["tokens"], batch["targets"])
        jax.block_until_ready((params, state, loss))

    return call
