"""The whole model once more, in plain NumPy and float64, one sequence at a time, straight from the published formulas.

An independent truth for the tests: no cache, no batch, no masks, no sorting of tokens by expert; every loop is a
Python loop. It shares with the package only the names of the parameters.
"""

from typing import NamedTuple

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
    weights: np.ndarray  # ACT: applied weights
    halted: np.ndarray  # before the loop
    measures: np.ndarray  # cosine and kl: what is compared with the threshold; kl has none of the first loop
    load: np.ndarray  # [loop_layers, E]


def forward(
    config: ModelConfig,
    variables: dict,
    tokens: np.ndarray,
    loops: int,
    *,
    criterion: str | None = None,
    threshold: float | None = None,
    min_loops: int = 1,
    initial_state: np.ndarray | None = None,
) -> Truth:
    """One sequence of tokens [T]. With a criterion, tokens halt and are frozen as the design says."""
    c, params = config, variables["params"]
    table = params["embedding"]

    def values(layer):
        if layer in c.value_gate_layers and layer in c.value_table_layers:
            return params[f"value_table_{layer}"][tokens].reshape(len(tokens), c.n_kv_heads, -1)
        return None

    x = table[tokens] * c.embedding_scale
    for i in range(c.prelude_layers):
        x, _, _ = layer(c, params[f"prelude_{i}"], x, values(i))
    if c.prelude_norm:
        x = norm(x, params["prelude_norm"]["scale"], c.norm_eps)
    e, cell = x, params["recurrence"]["cell"]
    h = e if c.initial_state == "injected" else np.zeros_like(e) if initial_state is None else initial_state

    T = len(tokens)
    biases = [
        variables["balance"]["recurrence"]["cell"][f"layer_{i}"]["moe"]["router"]["bias"]
        if c.feed_forward == "moe"
        else None
        for i in range(c.loop_layers)
    ]

    def finish(x):
        """What the coda receives, and the logits."""
        if c.readout_norm:
            x = norm(x, params["final_norm"]["scale"], c.norm_eps)
        if c.readout_projection:
            x = x @ params["readout_projection"]["kernel"]
        state = x
        for i in range(c.coda_layers):
            x, _, _ = layer(c, params[f"coda_{i}"], x, values(c.prelude_layers + c.loop_layers + i))
        return state, norm(x, params["final_norm"]["scale"], c.norm_eps) @ table.T

    halted, ran, cumulative, readout = np.zeros(T, bool), np.zeros(T, int), np.zeros(T), np.zeros_like(e)
    memory, logits = [None] * c.loop_layers, None
    load = np.zeros((c.loop_layers, c.n_experts))
    if c.readout == "act" and threshold is None:
        threshold = c.act_threshold
    history = {name: [] for name in ["states", "changes", "probabilities", "weights", "halted", "measures"]}
    for t in range(loops):
        frozen = halted if criterion and c.freeze_halted else np.zeros(T, bool)
        history["halted"].append(halted)
        y = enter(c, cell, h, e, t)
        for i in range(c.loop_layers):
            old = None if memory[i] is None else (frozen, memory[i])
            place = c.prelude_layers + i
            y, memory[i], chosen = layer(c, cell[f"layer_{i}"], y, values(place), old=old, bias=biases[i])
            for token in np.flatnonzero(~frozen):
                for expert in chosen[token]:
                    load[i, expert] += 1
        if c.lora_rank:
            lora = cell["lora"]
            scale = lora["scale"][min(t, len(lora["scale"]) - 1)]
            y = y + ((y @ lora["down"]["kernel"]) * scale) @ lora["up"]["kernel"]
        new = leave(c, cell, h, e, y)
        if c.state_norm:
            new = norm(new, cell["state_norm"]["scale"], c.norm_eps)
        change = np.linalg.norm(new - h, axis=-1) / np.linalg.norm(new, axis=-1)
        old, h = h, np.where(frozen[:, None], h, new)
        ran = ran + ~halted

        p, weight, halts = np.zeros(T), np.zeros(T), np.zeros(T, bool)
        if c.readout == "act":
            p = sigmoid(h @ cell["halt_kernel"] + cell["halt_bias"])[:, 0]
            for i in np.flatnonzero(~halted):
                halts[i] = cumulative[i] + p[i] >= threshold and t + 1 >= min_loops
                left = max(1 - cumulative[i], 0)
                weight[i] = left if halts[i] or (c.act_remainder and t == loops - 1) else min(p[i], left)
                cumulative[i] += p[i]
            readout = readout + weight[:, None] * h
        elif criterion == "latent":
            halts = (change < threshold) & (t + 1 >= min_loops)
        elif criterion == "cosine":
            cosine = (h * old).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(old, axis=-1)
            halts = (1 - cosine < threshold) & (t + 1 >= min_loops)
            history["measures"].append(1 - cosine)
        elif criterion == "kl":  # the coda sees every token's state of this loop
            logits, before = finish(h)[1], logits
            if t > 0:
                old_p, new_p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (before, logits))
                measure = (old_p * np.log(old_p / new_p)).sum(-1)
                halts = (measure < threshold) & (t + 1 >= min_loops)
                history["measures"].append(measure)
        halted = halted | halts
        for name, value in zip(["states", "changes", "probabilities", "weights"], [h, change, p, weight], strict=True):
            history[name].append(value)

    state, logits = finish(readout if c.readout == "act" else h)
    return Truth(logits, ran, state, **{name: np.array(values) for name, values in history.items()}, load=load)


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
    """One transformer layer; returns the stream, its keys and values, and the experts each token chose.

    first: where x[0] stands in the text. old: see `keep`.
    """
    attention = mla if c.attention == "mla" else gqa
    y, memory = attention(c, p["attention"], norm(x, p["attention_norm"]["scale"], c.norm_eps), value, old, first)
    x = x + y
    if c.norm == "sandwich":
        x = norm(x, p["attention_out_norm"]["scale"], c.norm_eps)
    y = norm(x, p["feed_forward_norm"]["scale"], c.norm_eps)
    chosen = [[]] * len(x)
    if "moe" in p:
        y, chosen = moe(c, p["moe"], y, bias)
    else:
        y = feed_forward(c, p["feed_forward"], y)
    x = x + y
    if c.norm == "sandwich":
        x = norm(x, p["feed_forward_out_norm"]["scale"], c.norm_eps)
    return x, memory, chosen


def gqa(c, p, x, value, old, first):
    q, k, v = (np.einsum("td,dhk->thk", x, p[name]["kernel"]) for name in "qkv")
    if c.qk_bias:
        q, k = q + p["q_bias"], k + p["k_bias"]
    q, k = rope(q, c.rope_theta, first), rope(k, c.rope_theta, first)
    if c.qk_norm:
        eps = np.finfo(np.float32).eps
        q, k = norm(q, 1, eps), norm(k, 1, eps)
    if "value_gate" in p and value is not None:
        v = v + 2 * sigmoid(x[:, :32] @ p["value_gate"])[..., None] * value
    k, v = keep((k, v), old)
    group = c.n_heads // c.n_kv_heads
    heads = [attend(q[:, j], k[:, j // group], v[:, j // group]) for j in range(c.n_heads)]
    return np.einsum("thk,hkd->td", np.stack(heads, axis=1), p["out"]["kernel"]), (k, v)


def mla(c, p, x, value, old, first):
    R, nope = c.kv_lora_rank, c.qk_nope_head_dim
    q = norm(x @ p["q_down"]["kernel"], p["q_norm"]["scale"], c.norm_eps)
    q = np.einsum("tr,rhk->thk", q, p["q_up"]["kernel"])
    q = np.concatenate([q[..., :nope], rope(q[..., nope:], c.rope_theta, first)], axis=-1)
    down = x @ p["kv_down"]["kernel"]
    latent = norm(down[:, :R], p["kv_norm"]["scale"], c.norm_eps)
    latent, shared = keep((latent, rope(down[:, None, R:], c.rope_theta, first)[:, 0]), old)
    up = np.einsum("tr,rhk->thk", latent, p["kv_up"])
    heads = [
        attend(q[:, j], np.concatenate([up[:, j, :nope], shared], axis=-1), up[:, j, nope:]) for j in range(c.n_heads)
    ]
    return np.einsum("thk,hkd->td", np.stack(heads, axis=1), p["out"]["kernel"]), (latent, shared)


def keep(new, old):
    """Frozen tokens keep the keys and values of the loop before. Or `old` is a function, from the keys and values of
    these tokens to those of all that they may look at, themselves last."""
    if old is None:
        return new
    if callable(old):
        return old(new)
    frozen, before = old
    return tuple(np.where(frozen.reshape(-1, *[1] * (n.ndim - 1)), b, n) for n, b in zip(new, before, strict=True))


def attend(q, k, v):
    """Causal attention of one head; the queries stand at the last keys."""
    out = []
    for t in range(len(q)):
        end = len(k) - len(q) + t + 1
        scores = k[:end] @ q[t] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ v[:end])
    return np.stack(out)


def rope(x, theta, first=0):
    """x [T, H, K]: pair (2i, 2i + 1) of the token at t turned by t / theta^(2i / K), as complex numbers."""
    T, _, K = x.shape
    turn = np.exp(1j * (first + np.arange(T))[:, None] / theta ** (np.arange(0, K, 2) / K))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def moe(c, p, x, bias):
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
