"""How likely the model finds a text: what training minimises and evaluation reports."""

from typing import Any

import flax.linen as nn
import jax

from mythos_jax.model.mythos import Mythos, Output
from mythos_jax.ops.cross_entropy import cross_entropy


def next_token_nats(
    model: Mythos, variables: Any, batch: dict[str, jax.Array], **keywords: Any
) -> tuple[jax.Array, Output]:
    """Float32 nats [B, T] of each target, 0 where the mask is 0, and what the model returned.

    batch: int32 tokens and targets [B, T], mask [B, T] with 1 where the target counts, and int32 segment_ids [B, T]
    where tokens see only their own segment. Keywords go to the model.
    """
    out = model.apply(variables, batch["tokens"], method="trunk", segment_ids=batch.get("segment_ids"), **keywords)
    table_VD = nn.unbox(variables["params"]["embedding"])
    nats_BT = cross_entropy(out.features, table_VD, batch["targets"])
    return nats_BT * batch["mask"], out
