"""How likely the model finds a text: what training minimises and evaluation reports."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mythos_jax.model.apply import apply
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos, output_table
from mythos_jax.model.state import Output, TokenState, make_inputs
from mythos_jax.ops.cross_entropy import cross_entropy


class Forward(Protocol):
    """A way to run the model on a batch without its head."""

    def __call__(
        self,
        model: Mythos,
        tokens_BT: jax.Array,
        segment_ids: jax.Array | None,
        loops: int | jax.Array | None,
        halting: Halting | None,
    ) -> Output: ...


def forward(
    model: Mythos,
    tokens_BT: jax.Array,
    segment_ids: jax.Array | None,
    loops: int | jax.Array | None,
    halting: Halting | None,
    *,
    trace_states: bool = False,
) -> Output:
    """The plain forward pass; the trace has the state after each loop if requested."""
    tokens, _ = model.begin(tokens_BT, segment_ids=segment_ids)
    tokens, _, trace = model.loop(tokens, loops=loops, halting=halting, trace_states=trace_states)
    return model.finish(tokens, trace=trace, logits=False)


def expected_forward(
    model: Mythos,
    tokens_BT: jax.Array,
    segment_ids: jax.Array | None,
    loops: int | jax.Array | None,
    halting: Halting | None,
) -> Output:
    """All loops, read out as the exit gate's expected logits; there is no halting."""
    assert halting is None
    return model.expected(tokens_BT, segment_ids=segment_ids, loops=loops, logits=False)


def token_loss(
    model: Mythos,
    variables: Any,
    batch: dict[str, jax.Array],
    *,
    loops: int | jax.Array | None = None,
    halting: Halting | None = None,
    rngs: dict[str, jax.Array] | None = None,
    run: Forward = forward,
) -> tuple[jax.Array, Output]:
    """Cross-entropy of each target in nats, float32 [B, T], 0 where the mask is 0; and what the model returned.

    batch: int32 tokens and targets [B, T], mask [B, T], and int32 segment_ids [B, T] where tokens attend to their own
    segment only. The mask is the weight of each target, as a bool or float32; the loss is not multiplied by it, which
    is for those to do who take means. rngs: {"state": key} for models that start from noise.
    """
    arguments = batch["tokens"], batch.get("segment_ids"), loops, halting
    out = apply(run, model, variables, *arguments, rngs=rngs)
    # The loss contains the head: for a large vocabulary, logits exist for a few positions at a time.
    table_VD = output_table(variables)
    return cross_entropy(out.features, table_VD, batch["targets"], mask_BT=batch["mask"]), out


def exit_losses(
    model: Mythos,
    variables: Any,
    batch: dict[str, jax.Array],
    *,
    loops: int | jax.Array,
    rngs: dict[str, jax.Array] | None = None,
    run: Forward,
) -> tuple[jax.Array, Output]:
    """As `token_loss`, but for the state after each loop that `run` traces: float32 [L, B, T]. run: traces states.

    Each state goes through the coda and the head, one state after the other, and again in the backward pass.
    """
    out = apply(run, model, variables, batch["tokens"], batch.get("segment_ids"), loops, None, rngs=rngs)
    inputs = make_inputs(model.config, batch["tokens"], None, batch.get("segment_ids"), None)
    inputs, table_VD = inputs.replace(injected_BTD=out.aux.injected_BTD), output_table(variables)

    def loss_of(state_BTD: jax.Array) -> jax.Array:
        tokens = TokenState(inputs, state_BTD, jnp.zeros(state_BTD.shape[:2], bool), out.loops)
        read_out: Any = model.apply(variables, tokens, logits=False, method="finish")
        return cross_entropy(read_out.features, table_VD, batch["targets"], mask_BT=batch["mask"])

    return jax.lax.map(jax.checkpoint(loss_of), out.aux.state_LBTD), out
