"""An independent reference for decoding with a cache, in plain NumPy and float64, one row at a time.

It covers bounded caches and halting by logits. The cache is a Python list per layer, slot and token, so that each rule
is one line. The layers' formulas are those of `reference`.
"""

from typing import Any

import numpy as np

from mythos_jax.config import ModelConfig
from tests.reference import enter, head, layer, leave, lora, norm, sigmoid

BY_LOGITS = ("kl", "entropy", "argmax")


class Decoder:
    """One row. margin: the smallest distance of a running token to a decision, relative to the threshold."""

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, Any],
        loops: int,
        loop_cache: str = "all",
        criterion: str | None = None,
        threshold: float | None = None,
        min_loops: int = 1,
    ):
        self.config, self.params, self.loops = config, variables["params"], loops
        self.cell = self.params["recurrence"]["cell"]
        rules = {"all": lambda t: t, "last": lambda t: 0, "first": lambda t: min(t, 1)}
        self.slot_of = rules.get(loop_cache) or (lambda t: t % int(loop_cache.removeprefix("modulo:")))
        self.slots = len({self.slot_of(t) for t in range(loops)})
        self.criterion, self.threshold, self.min_loops = criterion, threshold, min_loops
        # Keys and values per token: of each layer outside the loop, and of each slot of each layer inside.
        self.outer_kv: dict[int, list[Any]] = {
            i: [] for i in range(config.prelude_layers + config.loop_layers + config.coda_layers)
        }
        self.loop_kv: list[list[list[Any]]] = [[[] for _ in range(self.slots)] for _ in range(config.loop_layers)]
        self.length, self.margin = 0, np.inf
        # Of the current call, per token: keys and values of its last loop, and, for argmax, for how many loops the most
        # likely next token has been the same.
        self._exit_kv: list[list[Any]] = []
        self._unchanged = self._survival = np.zeros(0)

    def feed(self, tokens: np.ndarray, is_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
        """Processes the next tokens of the row; returns their logits [T, V] and loops [T].

        is_prompt: the call has room for more than one token. Criteria that compare logits do not apply then.
        """
        c, T = self.config, len(tokens)
        by_logits = self.criterion in BY_LOGITS and not is_prompt
        halting = self.criterion is not None and (by_logits or self.criterion not in BY_LOGITS)
        x = self.params["embedding"][tokens] * c.embedding_scale
        for i in range(c.prelude_layers):
            x = self._outer_layer(f"prelude_{i}", i, x)
        e = norm(x, self.params["prelude_norm"]["scale"], c.norm_eps) if c.prelude_norm else x
        h = e if c.initial_state == "injected" else np.zeros_like(e)
        for slots in self.loop_kv:
            for slot in slots:
                slot.extend([None] * T)

        exits = np.full(T, self.loops)  # the loops that each token runs, known once it halts
        self._exit_kv = [[None] * T for _ in range(c.loop_layers)]
        self._unchanged, self._survival = np.zeros(T), np.ones(T)
        logits = None
        for t in range(self.loops):
            frozen = exits <= t
            if frozen.all():
                break
            old, h = h, np.where(frozen[:, None], h, self._loop(h, e, t, frozen))
            old_logits, logits = logits, self._read_out(h, keep=False) if by_logits else None
            for j in np.flatnonzero(~frozen):
                last = t == self.loops - 1
                if (halting and self._halts(j, t, h, old, logits, old_logits)) or last:
                    exits[j] = t + 1
                    self._fill_skipped_slots(j, t)
        logits = self._read_out(h, keep=True)
        self.length += T
        return logits, exits

    def _loop(self, h: np.ndarray, e: np.ndarray, t: int, frozen: np.ndarray) -> np.ndarray:
        """The state after loop t. Only tokens that are not frozen write their keys and values."""
        c, cell = self.config, self.cell
        y = enter(c, cell, h, e, t)
        for i in range(c.loop_layers):

            def update_cache(new, i=i):
                slot = self.loop_kv[i][self.slot_of(t)]
                for j in np.flatnonzero(~frozen):
                    self._exit_kv[i][j] = slot[self.length + j] = tuple(part[j] for part in new)
                return tuple(np.stack([entry[part] for entry in slot]) for part in range(len(new)))

            y, _, _ = layer(c, cell[f"layer_{i}"], y, None, old=update_cache, first=self.length)
        new = leave(c, cell, h, e, lora(c, cell, y, t))
        return norm(new, cell["state_norm"]["scale"], c.norm_eps) if c.state_norm else new

    def _halts(self, j, t, h, old, logits, old_logits) -> bool:
        """Whether token j halts after loop t; also updates the margin."""
        if self.criterion == "argmax":
            if t == 0:
                return False
            second, best = np.sort(logits[j])[-2:]
            self.margin = min(self.margin, best - second)
            self._unchanged[j] = self._unchanged[j] + 1 if old_logits[j].argmax() == logits[j].argmax() else 0
            return t + 1 >= self.min_loops and self._unchanged[j] >= self.threshold
        if self.criterion == "gate":
            p = sigmoid(h[j] @ self.cell["halt_kernel"] + self.cell["halt_bias"])[0]
            self._survival[j] *= 1 - p
            self.margin = min(self.margin, abs(self._survival[j] - (1 - self.threshold)))
            return t + 1 >= self.min_loops and 1 - self._survival[j] >= self.threshold
        measure = self._measure(j, t, h, old, logits, old_logits)
        if measure is None:
            return False
        self.margin = min(self.margin, abs(measure / self.threshold - 1))
        return t + 1 >= self.min_loops and measure < self.threshold

    def _measure(self, j, t, h, old, logits, old_logits) -> float | None:
        """What is compared with the threshold; None if there is no earlier loop to compare with."""
        if self.criterion == "latent":
            return np.linalg.norm(h[j] - old[j]) / np.linalg.norm(h[j])
        if self.criterion == "cosine":
            return 1 - h[j] @ old[j] / np.linalg.norm(h[j]) / np.linalg.norm(old[j])
        if t == 0:
            return None
        before, after = log_softmax(old_logits[j]), log_softmax(logits[j])
        if self.criterion == "kl":
            return np.exp(before) @ (before - after)
        return abs(np.exp(before) @ before - np.exp(after) @ after)  # entropy

    def _fill_skipped_slots(self, j: int, t: int) -> None:
        """The slots that a token never reached receive its keys and values of loop t, its last."""
        for i in range(self.config.loop_layers):
            for slot in range(t + 1, self.slots):
                self.loop_kv[i][slot][self.length + j] = self._exit_kv[i][j]

    def _read_out(self, x: np.ndarray, keep: bool) -> np.ndarray:
        """Coda and head. keep: store the coda's keys and values, since these states are final."""
        c, params = self.config, self.params
        for i in range(c.coda_layers):
            x = self._outer_layer(f"coda_{i}", c.prelude_layers + c.loop_layers + i, x, keep)
        return head(c, params, x)

    def _outer_layer(self, name: str, number: int, x: np.ndarray, keep: bool = True) -> np.ndarray:
        """A layer outside the loop."""

        def update_cache(new):
            kv = self.outer_kv[number] + [tuple(part[j] for part in new) for j in range(len(x))]
            if keep:
                self.outer_kv[number] = kv
            return tuple(np.stack([entry[part] for entry in kv]) for part in range(len(new)))

        x, _, _ = layer(self.config, self.params[name], x, None, old=update_cache, first=self.length)
        return x


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())
