"""The state of the engine on the device: what the request of each place asks for, and where its token is.

A place holds one token in the middle of its loops. P is the number of places, N the pages of a row, S the stop tokens.
A plain request has one place; one that shows drafts has a ring of several, each with the token after that of the place
before it. Every array but the cache's pools begins with P.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import struct

from mythos_jax.inference import generate
from mythos_jax.inference.sampling import Sampling
from mythos_jax.model.apply import apply
from mythos_jax.model.cache import Cache, empty_kv
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import TokenState
from mythos_jax.serving.policy import Policy, predictions

State = TypeVar("State")

# Phases of a place: nothing in it; its token loops; its token's loops have ended, and it waits for the one before it.
EMPTY, LOOPING, WAITING = 0, 1, 2


class Setup(struct.PyTreeNode):
    """What serves all requests: the model and its weights."""

    model: Mythos = struct.field(pytree_node=False)
    variables: Any


class Terms(struct.PyTreeNode):
    """What the request of each place asks for; written once, when it is admitted.

    stops_PS: int32 tokens that end the text, -1 is none. last_P: int32, the position of the last token that it wants.
    draft_loops_P: int32, loops of a draft; 0 is none. ring_P: int32, the first place of the request. next_P: int32, the
    place of the token after this one; without drafts the place itself. pages_PN: int32, the cache pages of the request.
    logprobs_P: bool, it asks for log-probabilities.
    """

    policy: Policy
    sampling: Sampling
    stops_PS: jax.Array
    last_P: jax.Array
    draft_loops_P: jax.Array
    ring_P: jax.Array
    next_P: jax.Array
    pages_PN: jax.Array
    logprobs_P: jax.Array


class Work(struct.PyTreeNode):
    """Where the token of each place is.

    position_P: int32, its place in its text. loop_P: int32, loops that it has run. phase_P: int32. head_P: bool, all
    tokens before it are final. drafted_P: bool, it was read out for a draft. predicted_P: int32, loops that a predictor
    asks for. features_PD, measure_P: what criteria that look at the logits remember of the loop before.
    """

    tokens: TokenState
    position_P: jax.Array
    loop_P: jax.Array
    phase_P: jax.Array
    head_P: jax.Array
    drafted_P: jax.Array
    predicted_P: jax.Array
    features_PD: jax.Array
    measure_P: jax.Array


class Places(struct.PyTreeNode):
    """All places, and the pools of pages that their requests keep keys and values in."""

    terms: Terms
    work: Work
    pool: Cache


def begin(
    setup: Setup, sampling: Sampling, tokens_BT: jax.Array, active_BT: jax.Array, cache: Cache
) -> tuple[TokenState, Cache]:
    """As `inference.generate.begin`, with all fields that a token has in its loops."""

    def forward(model: Mythos) -> tuple[TokenState, Cache | None]:
        return generate.begin(model, cache, tokens_BT, active_BT, sampling.seed_B)

    c = setup.model.config
    tokens, filled = apply(forward, setup.model, setup.variables)
    # Kept from the start, so that a token has the same fields in all its loops.
    exit_kv = (empty_kv(c, *tokens_BT.shape),) * c.loop_layers
    return tokens.replace(exit_kv=exit_kv), cast(Cache, filled)


def new_work(setup: Setup, policy: Policy, tokens: TokenState, position_B: jax.Array, head_B: jax.Array) -> Work:
    """Tokens [B, 1] before their first loop, in their places."""
    zeros_B, shape_BD = jnp.zeros_like(position_B), tokens.state_BTD[:, 0].shape
    return Work(
        tokens=tokens,
        position_P=position_B,
        loop_P=zeros_B,
        phase_P=jnp.full_like(zeros_B, LOOPING),
        head_P=head_B,
        drafted_P=jnp.zeros_like(head_B),
        predicted_P=predictions(setup.model, setup.variables, policy, tokens.inputs.injected_BTD)[:, 0],
        features_PD=jnp.zeros(shape_BD, tokens.state_BTD.dtype),
        measure_P=jnp.zeros(position_B.shape),
    )


def rows(tree: Any, index: jax.Array) -> Any:
    """The rows of every array at `index`."""
    return jax.tree.map(lambda x: x[index], tree)


def put(tree: Any, index: jax.Array, new: Any) -> Any:
    """The tree with the rows at `index` replaced; an index past the end writes nothing."""
    return jax.tree.map(lambda x, n: x.at[index].set(n.astype(x.dtype), mode="drop"), tree, new)


def run_if(condition: jax.Array, change: Callable[[State], State], state: State) -> State:
    """The state, changed if the condition is true: a loop that runs once or not at all. XLA writes the caches of a
    loop's carry in place, where a conditional copies them."""
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), lambda _, state: change(state), state)


def seen_pages(pool: Cache, pages_BN: jax.Array, active_B: jax.Array) -> jax.Array:
    """The page table with which rows that are not active read and write nothing."""
    return jnp.where(active_B[:, None], pages_BN, n_pages(pool))


def n_pages(pool: Cache) -> int:
    """Pages in a pool, which as an entry of a table means no page."""
    return jax.tree.leaves((pool.prelude, pool.loop, pool.coda))[0].shape[1]
