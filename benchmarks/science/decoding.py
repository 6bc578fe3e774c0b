"""A way to decode, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mythos_jax.flops import cache_bytes, count_parameters, forward_flops
from mythos_jax.inference.generate import generate
from mythos_jax.inference.speculative import SpeculativeResult, speculate
from mythos_jax.model.halting import Halting
from mythos_jax.runs.load import LoadedModel


@dataclass(frozen=True)
class Side:
    """A model and a way to decode with it. draft: loops and tokens."""

    loaded: LoadedModel
    halting: Halting | None = None
    loop_cache: str = "all"
    draft: tuple[int, int] | None = None

    @property
    def loops(self) -> int:
        return self.loaded.config.model.loops

    def continued(self, prompt: np.ndarray, new_tokens: int) -> Any:
        decode: Callable[..., Any] = generate
        if self.draft:
            decode = partial(speculate, draft_loops=self.draft[0], draft_tokens=self.draft[1])
        result = decode(
            self.loaded.model,
            self.loaded.variables,
            prompt,
            max_new_tokens=new_tokens,
            halting=self.halting,
            loop_cache=self.loop_cache,
        )
        result.tokens.block_until_ready()
        return result

    def flops(self, mean_loops: float, result: Any) -> float:
        """Per generated token, at half of the context on average, at the depth that was executed."""
        config = self.loaded.config.model
        parts = forward_flops(config, config.max_seq_len // 2)
        read_out, token = parts.coda + parts.head, parts.prelude + mean_loops * parts.loop
        if isinstance(result, SpeculativeResult) and self.draft:
            n = self.draft[1]
            return ((n + 1) * (token + read_out) + n * read_out) * float(result.rounds) / (result.tokens.shape[1] - 1)
        return token + read_out * (mean_loops if self.halting and self.halting.reads_logits else 1)

    @property
    def kilobytes(self) -> float:
        """Weights in float32, and the cache of a full context."""
        c = self.loaded.config.model
        return (4 * count_parameters(c) + c.max_seq_len * cache_bytes(c, self.loops, self.loop_cache)) / 1024
