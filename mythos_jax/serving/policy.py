"""Depth per row: how many loops a token may run and when it may stop earlier, all of it traced, and one loop by it.

In `Halting` the criterion is static: a call has one. Here every row has its own, so that requests with any policies
share a program. The measures are those of model/halting.py and model/exit_probe.py.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mythos_jax.config import ModelConfig
from mythos_jax.model.apply import apply
from mythos_jax.model.cache import Cache
from mythos_jax.model.exit_probe import LOGIT_CRITERIA
from mythos_jax.model.halting import CRITERIA, MANUAL, STATE_CHANGE, Halting, state_criterion_met
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.predictor import PREDICTOR, predicted_loops
from mythos_jax.model.state import TokenState

NEVER = -1  # the criterion of a row whose tokens run all their loops
OWN_BUDGET = np.float32(np.nan)  # the threshold that stands for the predictor's own
NO_PREDICTION = np.int32(np.iinfo(np.int32).max)


class Policy(struct.PyTreeNode):
    """limit_B: int32, the most loops of a token. criterion_B: int32, an index into CRITERIA, or NEVER. threshold_B:
    float32. min_loops_B: int32."""

    limit_B: jax.Array
    criterion_B: jax.Array
    threshold_B: jax.Array
    min_loops_B: jax.Array

    def is_(self, criterion: str) -> jax.Array:
        return self.criterion_B == CRITERIA.index(criterion)

    @property
    def reads_logits_B(self) -> jax.Array:
        return jnp.stack([self.is_(name) for name in LOGIT_CRITERIA]).any(0)

    def for_prompt(self) -> "Policy":
        """As `Halting.for_prompt`: criteria that look at the logits apply to new tokens only."""
        return self.replace(criterion_B=jnp.where(self.reads_logits_B, NEVER, self.criterion_B))


def policy_numbers(config: ModelConfig, loops: int, halting: Halting | None) -> tuple[int, int, float, int]:
    """The fields of a row of `Policy`, for `loops` and `halting` as in `inference.generate.generate`."""
    limit = loops
    if halting is None:  # ACT's weights depend on its threshold also where no token stops by it
        return limit, NEVER, config.act_threshold, 1
    limit = limit if halting.max_loops is None else min(limit, int(halting.max_loops))
    threshold = halting.resolved_threshold
    if threshold is None:
        threshold = config.act_threshold if halting.criterion == "act" else OWN_BUDGET
    return limit, CRITERIA.index(halting.criterion), float(threshold), int(halting.min_loops)


def predictions(model: Mythos, variables: Any, policy: Policy, injected_BTD: jax.Array) -> jax.Array:
    """The loops that a predictor asks for, int32 [B, T], where the policy asks one; elsewhere more than any."""
    if (predictor := variables.get(PREDICTOR)) is None:
        return jnp.full(injected_BTD.shape[:2], NO_PREDICTION)
    budget_B = jnp.where(jnp.isnan(policy.threshold_B), predictor["budget"], policy.threshold_B)
    loops_BT = jax.vmap(predicted_loops, in_axes=(None, 0, 0))(predictor, injected_BTD, budget_B)
    return jnp.where(policy.is_("predicted")[:, None], loops_BT, NO_PREDICTION)


def run_loop(
    model: Mythos, variables: Any, tokens: TokenState, cache: Cache, policy: Policy, loop: jax.Array, predicted_BT: Any
) -> tuple[TokenState, Cache]:
    """Runs loop t = `loop` (int32 [] or one per row [B]) of each row, and ends the loops of tokens whose policy is met.
    A row whose limit is not above t stays as it is.

    Criteria that look at the logits are not looked at here.
    """
    old, c = tokens, model.config

    def forward(model: Mythos) -> tuple[TokenState, Cache | None]:
        tokens, filled, _ = model.loop(
            old, cache, loops=policy.limit_B, halting=loop_halting(c, policy), start=loop, count=1
        )
        if c.readout == "act":
            tokens = _go_on(old, tokens, policy, loop)
        elif c.freeze_halted:
            halts_BT = state_halts(policy, old, tokens, jnp.reshape(loop, (-1, 1)), predicted_BT) & ~tokens.halted_BT
            tokens, filled = model.halt(tokens, filled, halts_BT, loop + 1)
        return tokens, filled

    tokens, filled = apply(forward, model, variables)
    return tokens, cast(Cache, filled)


def loop_halting(config: ModelConfig, policy: Policy) -> Halting | None:
    """What the model's own loop does about halting: ACT's sums are inside it, all else is decided between loops."""
    if not config.freeze_halted:
        return None  # such a model follows no policy on a cache
    if config.readout == "act":
        return Halting("act", policy.threshold_B[:, None], policy.min_loops_B[:, None])
    return Halting(MANUAL)


def state_halts(
    policy: Policy, old: TokenState, new: TokenState, loop_B1: jax.Array, predicted_BT: jax.Array
) -> jax.Array:
    """Whether loop t, from `old` to `new`, meets each token's criterion, for those that look at the state; bool
    [B, T]."""
    met_BT = jnp.zeros_like(new.halted_BT)
    gate = () if new.survival_BT is None else ("gate",)
    for name in (*STATE_CHANGE, "predicted", *gate):
        halting = Halting(name, policy.threshold_B[:, None], policy.min_loops_B[:, None])
        states = new.state_BTD, old.state_BTD, new.survival_BT
        met_BT |= policy.is_(name)[:, None] & state_criterion_met(halting, loop_B1, *states, predicted_BT)
    return met_BT


def _go_on(old: TokenState, new: TokenState, policy: Policy, loop: jax.Array) -> TokenState:
    """A model with ACT read-out spends its weights whatever the policy is; without one, a token evolves to its last
    loop, for those that come after it to see. The loops that are reported are those that had a weight."""
    assert old.act is not None
    goes_on_BT = (policy.criterion_B == NEVER)[:, None] & ~at_limit(policy, loop)
    spent_BT = old.act.probability_BT >= 1
    return new.replace(halted_BT=new.halted_BT & ~goes_on_BT, loops_BT=jnp.where(spent_BT, old.loops_BT, new.loops_BT))


def at_limit(policy: Policy, loop: jax.Array) -> jax.Array:
    """Whether loop t is the last one of a row's tokens; bool [B or 1, 1]."""
    return jnp.reshape(loop + 1, (-1, 1)) >= policy.limit_B[:, None]


def is_done(config: ModelConfig, policy: Policy, tokens: TokenState, loop: jax.Array) -> jax.Array:
    """Whether tokens have run their loops, after loop t; bool [B, T]."""
    if config.freeze_halted:
        return tokens.halted_BT
    return jnp.broadcast_to(at_limit(policy, loop), tokens.halted_BT.shape)  # halted ones keep evolving
