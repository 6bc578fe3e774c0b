"""Decoding with a cache, in plain NumPy and float64, one row and one token's keys and values at a time.

An independent truth for bounded caches and for halting by logits: what is remembered is a Python list per layer, slot
and token, and each rule of the design is one line. The layers' formulas are those of `reference`.
"""

import numpy as np

from tests.reference import enter, layer, leave, norm


class Decoder:
    """One row. `margin`: how near any running token came to a decision, relative to the threshold."""

    def __init__(self, config, variables, loops, slots=None, criterion=None, threshold=None, min_loops=1):
        self.config, self.params, self.loops = config, variables["params"], loops
        self.slots = slots or loops
        self.criterion, self.threshold, self.min_loops = criterion, threshold, min_loops
        self.outer = {i: [] for i in range(config.prelude_layers + config.loop_layers + config.coda_layers)}
        self.inner = [[[] for _ in range(self.slots)] for _ in range(config.loop_layers)]
        self.length, self.margin = 0, np.inf

    def feed(self, tokens, several):
        """Takes in the next tokens of the row; returns their logits [T, V] and loops [T]. several: whether the call
        has places for more than one token, as a prompt's has."""
        c, params, T, first = self.config, self.params, len(tokens), self.length
        by_logits = self.criterion in ("kl", "entropy", "argmax")
        halting = self.criterion is not None and not (by_logits and several)
        x = params["embedding"][tokens] * c.embedding_scale
        for i in range(c.prelude_layers):
            x = self.once(f"prelude_{i}", i, x)
        e = norm(x, params["prelude_norm"]["scale"], c.norm_eps) if c.prelude_norm else x
        cell = params["recurrence"]["cell"]
        h = e if c.initial_state == "injected" else np.zeros_like(e)
        for store in self.inner:
            for slot in store:
                slot.extend([None] * T)

        exits = np.full(T, self.loops)  # the loops that each token runs; known once it halts
        last = [[None] * T for _ in range(c.loop_layers)]
        logits, equal = None, np.zeros(T)
        for t in range(self.loops):
            frozen = exits <= t
            if frozen.all():
                break
            y = enter(c, cell, h, e, t)
            for i in range(c.loop_layers):

                def remember(new, i=i, t=t, frozen=frozen):
                    slot = self.inner[i][t % self.slots]
                    for j in range(T):
                        if not frozen[j]:
                            last[i][j] = slot[first + j] = tuple(part[j] for part in new)
                    return tuple(np.stack([entry[part] for entry in slot]) for part in range(len(new)))

                y, _, _ = layer(c, cell[f"layer_{i}"], y, None, old=remember, first=first)
            if c.lora_rank:
                lora = cell["lora"]
                scale = lora["scale"][min(t, len(lora["scale"]) - 1)]
                y = y + ((y @ lora["down"]["kernel"]) * scale) @ lora["up"]["kernel"]
            new = leave(c, cell, h, e, y)
            if c.state_norm:
                new = norm(new, cell["state_norm"]["scale"], c.norm_eps)
            old, h = h, np.where(frozen[:, None], h, new)

            old_logits, logits = logits, self.read_out(h) if by_logits and not several else None
            for j in np.flatnonzero(~frozen):
                halts = t == self.loops - 1
                if halting:
                    measure = None
                    if self.criterion == "latent":
                        measure = np.linalg.norm(h[j] - old[j]) / np.linalg.norm(h[j])
                    elif self.criterion == "cosine":
                        measure = 1 - h[j] @ old[j] / np.linalg.norm(h[j]) / np.linalg.norm(old[j])
                    elif t > 0:
                        before, now = log_softmax(old_logits[j]), log_softmax(logits[j])
                        if self.criterion == "kl":
                            measure = np.exp(before) @ (before - now)
                        elif self.criterion == "entropy":
                            measure = abs(np.exp(before) @ before - np.exp(now) @ now)
                        else:
                            second, best = np.sort(logits[j])[-2:]
                            self.margin = min(self.margin, best - second)
                            equal[j] = equal[j] + 1 if before.argmax() == now.argmax() else 0
                            halts |= t + 1 >= self.min_loops and equal[j] >= self.threshold
                    if measure is not None:
                        self.margin = min(self.margin, abs(measure / self.threshold - 1))
                        halts |= t + 1 >= self.min_loops and measure < self.threshold
                if halts:
                    exits[j] = t + 1
                    for i in range(c.loop_layers):  # slots it has not reached, and only those
                        for slot in range(t + 1, self.slots):
                            self.inner[i][slot][first + j] = last[i][j]
        logits = self.read_out(h, keep=True)
        self.length += T
        return logits, exits

    def read_out(self, x, keep=False):
        """Coda and head. keep: remember the keys and values; the states are the last ones."""
        c, params = self.config, self.params
        for i in range(c.coda_layers):
            x = self.once(f"coda_{i}", c.prelude_layers + c.loop_layers + i, x, keep)
        return norm(x, params["final_norm"]["scale"], c.norm_eps) @ params["embedding"].T

    def once(self, name, index, x, keep=True):
        """A layer outside the loop."""

        def remember(new):
            held = self.outer[index] + [tuple(part[j] for part in new) for j in range(len(x))]
            if keep:
                self.outer[index] = held
            return tuple(np.stack([entry[part] for entry in held]) for part in range(len(new)))

        x, _, _ = layer(self.config, self.params[name], x, None, old=remember, first=self.length)
        return x


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())
