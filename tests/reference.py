"""An independent reference: the whole model in plain NumPy and float64, straight from the published formulas.

One sequence at a time, without a cache, batching, masks, or sorting tokens by expert; every loop is a Python loop. It
shares with the package only the names of the parameters.
"""

from typing import Any, NamedTuple

import numpy as np

from mythos_jax.config import ModelConfig


class Truth(NamedTuple):
    """logits [T, V]; loops [T] that contributed; state [T, D] read out; the rest per loop, [L, T] or [L, T, D]."""

    logits: np.ndarray
    loops: np.ndarray
    state: np.ndarray
    states: np.ndarray
    changes: np.ndarray
    probabilities: np.ndarray  # ACT: p
    weights: np.ndarray  # ACT: the weights applied
    halted: np.ndarray  # before the loop
    measures: np.ndarray  # cosine and kl: what is compared with the threshold; kl has none for the first loop
    load: np.ndarray  # tokens per expert, [loop_layers, E]


def forward(
    config: ModelConfig,
    variables: dict[str, Any],
    tokens: np.ndarray,
    loops: int,
    *,
    criterion: str | None = None,
    threshold: float | None = None,
    min_loops: int = 1,
    initial_state: np.ndarray | None = None,
) -> Truth:
    """One sequence of tokens [T]. With a criterion, tokens halt and are then frozen, unless `freeze_halted` is off."""
    model = _Model(config, variables, tokens)
    e = model.prelude()
    h = e if config.initial_state == "injected" else np.zeros_like(e) if initial_state is None else initial_state
    exits = _Exits(model, loops, criterion, threshold, min_loops)
    readout = np.zeros_like(e)
    history: dict[str, list[np.ndarray]] = {name: [] for name in ("states", "changes", "halted")}
    for t in range(loops):
        frozen = exits.halted if criterion and config.freeze_halted else np.zeros(len(tokens), bool)
        new = model.loop(h, e, t, frozen)
        change = np.linalg.norm(new - h, axis=-1) / np.linalg.norm(new, axis=-1)
        old, h = h, np.where(frozen[:, None], h, new)
        for name, value in (("states", h), ("changes", change), ("halted", exits.halted)):
            history[name].append(value)
        weight = exits.update(t, h, old, change)
        readout = readout + weight[:, None] * h
    state, logits = model.finish(readout if config.readout == "act" else h)
    return Truth(
        logits,
        exits.loops,
        state,
        **{name: np.array(values) for name, values in history.items()},
        probabilities=np.array(exits.probabilities),
        weights=np.array(exits.weights),
        measures=np.array(exits.measures),
        load=model.load,
    )


class _Model:
    """The layers, applied to one sequence of tokens. load: how often each expert of the loop's layers was chosen."""

    def __init__(self, config: ModelConfig, variables: dict[str, Any], tokens: np.ndarray):
        self.config, self.variables, self.tokens = config, variables, tokens
        self.params = variables["params"]
        self.cell = self.params["recurrence"]["cell"]
        self.kv: list[Any] = [None] * config.loop_layers  # each layer's keys and values of the last loop
        self.load = np.zeros((config.loop_layers, config.n_experts))

    def prelude(self) -> np.ndarray:
        """What is injected into every loop, [T, D]."""
        c = self.config
        x = self.params["embedding"][self.tokens] * c.embedding_scale
        for i in range(c.prelude_layers):
            x, _, _ = layer(c, self.params[f"prelude_{i}"], x, self._value_embedding(i))
        return norm(x, self.params["prelude_norm"]["scale"], c.norm_eps) if c.prelude_norm else x

    def loop(self, h: np.ndarray, e: np.ndarray, t: int, frozen: np.ndarray) -> np.ndarray:
        """The state [T, D] after loop t; frozen tokens, or with `loop_kv: first` all, keep their keys and values."""
        c, cell = self.config, self.cell
        y = enter(c, cell, h, e, t)
        for i in range(c.loop_layers):
            old = None if self.kv[i] is None else (frozen | (c.loop_kv == "first"), self.kv[i])
            value = self._value_embedding(c.prelude_layers + i)
            y, self.kv[i], experts = layer(c, cell[f"layer_{i}"], y, value, old=old, bias=self._router_bias(i))
            for token in np.flatnonzero(~frozen):
                for expert in experts[token]:
                    self.load[i, expert] += 1
        new = leave(c, cell, h, e, lora(c, cell, y, t))
        return norm(new, cell["state_norm"]["scale"], c.norm_eps) if c.state_norm else new

    def finish(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the coda receives, [T, D], and the logits, [T, V]."""
        c, params = self.config, self.params
        if c.readout_norm:
            x = norm(x, params["final_norm"]["scale"], c.norm_eps)
        if c.readout_projection:
            x = x @ params["readout_projection"]["kernel"]
        state = x
        for i in range(c.coda_layers):
            value = self._value_embedding(c.prelude_layers + c.loop_layers + i)
            x, _, _ = layer(c, params[f"coda_{i}"], x, value)
        return state, head(c, params, x)

    def _value_embedding(self, number: int) -> np.ndarray | None:
        """The value embedding of a layer, [T, G, K]; None unless the layer has both a gate and a table."""
        c = self.config
        if number in c.value_gate_layers and number in c.value_table_layers:
            return self.params[f"value_table_{number}"][self.tokens].reshape(len(self.tokens), c.n_kv_heads, -1)
        return None

    def _router_bias(self, i: int) -> np.ndarray | None:
        if self.config.feed_forward != "moe":
            return None
        return self.variables["balance"]["recurrence"]["cell"][f"layer_{i}"]["moe"]["router"]["bias"]


class _Exits:
    """Which tokens have halted, and the loops that contribute to each."""

    def __init__(self, model: _Model, loops: int, criterion: str | None, threshold: float | None, min_loops: int):
        T = len(model.tokens)
        self.model, self.total, self.criterion, self.min_loops = model, loops, criterion, min_loops
        self.threshold = model.config.act_threshold if threshold is None else threshold
        self.halted, self.loops, self.cumulative = np.zeros(T, bool), np.zeros(T, int), np.zeros(T)
        self.logits: np.ndarray | None = None  # kl: of the loop before
        self.probabilities: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.measures: list[np.ndarray] = []

    def update(self, t: int, h: np.ndarray, old: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Decides after loop t which tokens halt; returns the weight of this loop's state in ACT's read-out, [T]."""
        T = len(h)
        self.loops = self.loops + ~self.halted
        p, weight, halts = np.zeros(T), np.zeros(T), np.zeros(T, bool)
        if self.model.config.readout == "act":
            p, weight, halts = self._act(t, h)
        elif self.model.config.exit_gate:
            p, halts = self._gate(t, h)
        elif self.criterion:
            measure = self._measure(h, old, change)
            if measure is not None:
                halts = (measure < self.threshold) & (t + 1 >= self.min_loops)
        self.halted = self.halted | halts
        self.probabilities.append(p)
        self.weights.append(weight)
        return weight

    def _act(self, t: int, h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Halting probabilities, weights, and which tokens halt, [T] each."""
        c, cell = self.model.config, self.model.cell
        p = sigmoid(h @ cell["halt_kernel"] + cell["halt_bias"])[:, 0]
        weight, halts = np.zeros(len(h)), np.zeros(len(h), bool)
        for i in np.flatnonzero(~self.halted):
            halts[i] = self.cumulative[i] + p[i] >= self.threshold and t + 1 >= self.min_loops
            remainder = max(1 - self.cumulative[i], 0)
            takes_remainder = halts[i] or (c.act_remainder and t == self.total - 1)
            weight[i] = remainder if takes_remainder else min(p[i], remainder)
            self.cumulative[i] += p[i]
        return p, weight, halts

    def _gate(self, t: int, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities to exit here, and which tokens have exited with a probability of at least the threshold."""
        p = sigmoid(h @ self.model.cell["halt_kernel"] + self.model.cell["halt_bias"])[:, 0]
        self.cumulative = np.where(self.halted, self.cumulative, self.cumulative + (1 - self.cumulative) * p)
        if self.criterion is None:
            return p, np.zeros(len(h), bool)
        return p, (self.cumulative >= self.threshold) & (t + 1 >= self.min_loops)

    def _measure(self, h: np.ndarray, old: np.ndarray, change: np.ndarray) -> np.ndarray | None:
        """What the criterion compares with the threshold, [T]; None if there is no earlier loop to compare with."""
        if self.criterion == "latent":
            return change
        if self.criterion == "cosine":
            measure = 1 - (h * old).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(old, axis=-1)
        else:  # kl; the coda sees the state of every token after this loop
            logits, before = self.model.finish(h)[1], self.logits
            self.logits = logits
            if before is None:
                return None
            old_p, new_p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (before, logits))
            measure = (old_p * np.log(old_p / new_p)).sum(-1)
        self.measures.append(measure)
        return measure


def lora(c, cell, y, t):
    """y plus the low-rank update of loop t; loops past the trained depth use the last one's scale."""
    if not c.lora_rank:
        return y
    p = cell["lora"]
    scale = p["scale"][min(t, len(p["scale"]) - 1)]
    return y + ((y @ p["down"]["kernel"]) * scale) @ p["up"]["kernel"]


def enter(c, cell, h, e, t):
    """What the loop's layers receive."""
    if c.loop_embedding:
        width = c.dim // 8
        frequencies = [1e4 ** (-2 * k / width) for k in range((width + 1) // 2)]
        wave = [np.sin(t * f) for f in frequencies] + [np.cos(t * f) for f in frequencies]
        e = e.copy()
        e[:, :width] += c.loop_embedding_scale * np.array(wave[:width])
    p = cell.get("injection")
    if c.injection == "openmythos":
        return norm(h + e, p["norm"]["scale"], c.norm_eps)
    if c.injection == "parcae":
        dt = np.log1p(np.exp(p["dt_bias"]))
        return np.exp(-dt * np.exp(p["log_a"])) * h + dt * (e @ p["b"])
    if c.injection == "concat":
        return np.concatenate([h, e], axis=-1) @ p["adapter"]["kernel"]
    return h


def leave(c, cell, h, e, y):
    """The next state."""
    if c.injection != "openmythos":
        return y
    p = cell["injection"]
    return np.exp(-np.exp(np.clip(p["log_dt"] + p["log_a"], -20, 20))) * h + p["b"] * e + y


def layer(c, p, x, value, old=None, bias=None, first=0):
    """One transformer layer; returns the residual stream, the keys and values, and the experts of each token.

    first: the position of x[0] in the text. old: see `merge_kv`.
    """
    attention, results = mla if c.attention == "mla" else gqa, {}

    def attend_(y):
        y, results["kv"] = attention(c, p["attention"], y, value, old, first)
        return y

    def forward_(y):
        if "moe" not in p:
            return feed_forward(c, p["feed_forward"], y)
        y, results["experts"] = moe(c, p["moe"], y, bias)
        return y

    x = sublayer(c, p, "attention", attend_, x)
    x = sublayer(c, p, "feed_forward", forward_, x)
    return x, results["kv"], results.get("experts", [[]] * len(x))


def sublayer(c, p, name, f, x):
    """x and f, with norms where the config places them."""

    def n(x, which):
        return norm(x, p[name + which]["scale"], c.norm_eps)

    if c.norm == "pre":
        return x + f(n(x, "_norm"))
    if c.norm == "sandwich":
        return n(x + f(n(x, "_norm")), "_out_norm")
    if c.norm == "pre_post":
        return x + n(f(n(x, "_norm")), "_out_norm")
    return x + n(f(x), "_out_norm")


def head(c, params, x):
    """Logits of the coda's output."""
    if c.final_norm:
        x = norm(x, params["final_norm"]["scale"], c.norm_eps)
    return x @ params["embedding" if c.tied_embedding else "unembedding"].T


def gqa(c, p, x, value, old, first):
    q, k, v = (np.einsum("td,dhk->thk", x, p[name]["kernel"]) for name in "qkv")
    if c.qk_bias:
        q, k = q + p["q_bias"], k + p["k_bias"]
    if c.value_bias:
        v = v + p["v_bias"]
    if c.qk_gain_norm == "head":
        q, k = norm(q, p["q_norm"]["scale"], c.norm_eps), norm(k, p["k_norm"]["scale"], c.norm_eps)
    if c.qk_gain_norm == "width":
        q, k = (
            norm(x.reshape(len(x), -1), p[name]["scale"].reshape(-1), c.norm_eps).reshape(x.shape)
            for x, name in ((q, "q_norm"), (k, "k_norm"))
        )
    q, k = rope(c, q, first), rope(c, k, first)
    if c.qk_norm:
        eps = np.finfo(np.float32).eps
        q, k = norm(q, 1, eps), norm(k, 1, eps)
    if "value_gate" in p and value is not None:
        v = v + 2 * sigmoid(x[:, :32] @ p["value_gate"])[..., None] * value
    k, v = merge_kv((k, v), old)
    group = c.n_heads // c.n_kv_heads
    heads = [attend(q[:, j], k[:, j // group], v[:, j // group]) for j in range(c.n_heads)]
    return np.einsum("thk,hkd->td", np.stack(heads, axis=1), p["out"]["kernel"]), (k, v)


def mla(c, p, x, value, old, first):
    R, nope = c.kv_lora_rank, c.qk_nope_head_dim
    q = norm(x @ p["q_down"]["kernel"], p["q_norm"]["scale"], c.norm_eps)
    q = np.einsum("tr,rhk->thk", q, p["q_up"]["kernel"])
    q = np.concatenate([q[..., :nope], rope(c, q[..., nope:], first)], axis=-1)
    down = x @ p["kv_down"]["kernel"]
    latent = norm(down[:, :R], p["kv_norm"]["scale"], c.norm_eps)
    latent, shared = merge_kv((latent, rope(c, down[:, None, R:], first)[:, 0]), old)
    up = np.einsum("tr,rhk->thk", latent, p["kv_up"])
    heads = [
        attend(q[:, j], np.concatenate([up[:, j, :nope], shared], axis=-1), up[:, j, nope:]) for j in range(c.n_heads)
    ]
    return np.einsum("thk,hkd->td", np.stack(heads, axis=1), p["out"]["kernel"]), (latent, shared)


def merge_kv(new, old):
    """The keys and values to attend to. With `old` = (frozen, kv), frozen tokens keep those of the previous loop. `old`
    may also be a function, from these tokens' keys and values to all they may attend to, with themselves last."""
    if old is None:
        return new
    if callable(old):
        return old(new)
    frozen, before = old
    return tuple(np.where(frozen.reshape(-1, *[1] * (n.ndim - 1)), b, n) for n, b in zip(new, before, strict=True))


def attend(q, k, v):
    """Causal attention of one head; the queries belong to the last keys."""
    out = []
    for t in range(len(q)):
        end = len(k) - len(q) + t + 1
        scores = k[:end] @ q[t] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ v[:end])
    return np.stack(out)


def rope(c, x, first=0):
    """x [T, H, K]: rotates pair (2i, 2i + 1) of the token at t by t times its frequency, as complex numbers."""
    T, _, K = x.shape
    rotation = np.exp(1j * (first + np.arange(T))[:, None] * np.array([frequency(c, i, K) for i in range(K // 2)]))
    rotated = (x[..., 0::2] + 1j * x[..., 1::2]) * rotation[:, None]
    return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)


def frequency(c, i, K):
    """Of pair i: 1 / theta^(2i / K), and what Llama 3.1's code makes of it, by its wavelength."""
    f = c.rope_theta ** (-2 * i / K)
    wavelength, old = 2 * np.pi / f, c.rope_original_max_seq_len
    low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
    if c.rope_scaling == "none" or wavelength < old / high:
        return f
    if wavelength > old / low:
        return f / c.rope_scaling_factor
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * f / c.rope_scaling_factor + smooth * f


def moe(c, p, x, bias):
    """The output [T, D] and the experts of each token. The bias affects which are chosen, not their weights."""
    out, chosen = [], []
    for token in x:
        logits = token @ p["router"]["kernel"]
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        experts = np.argsort(-(logits + bias), kind="stable")[: c.experts_per_token]
        total = probabilities[experts].sum()
        y = np.zeros_like(token)
        for j in experts:
            hidden = silu(token @ p["gate"][j]) * (token @ p["up"][j])
            y = y + probabilities[j] / total * (hidden @ p["down"][j])
        out.append(y)
        chosen.append(list(experts))
    y = np.stack(out)
    for i in range(c.n_shared_experts):
        y = y + feed_forward(c, p[f"shared_{i}"], x)
    return y, chosen


def feed_forward(c, p, x):
    up = x @ p["up"]["kernel"]
    hidden = silu(x @ p["gate"]["kernel"]) * up if c.activation == "swiglu" else 0.5 * np.maximum(up, 0) ** 2
    return hidden @ p["down"]["kernel"]


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
