"""How far a retrofitted model is from the dense model that it was made of, before any training."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.pretrained import load_variables
from mythos_jax.porting.reading import Source, text_of

TOLERANCE = 1e-4  # of a float32 logit
DEPTHS = (1, 2, 4, 8)
MOST_TOKENS = 256
TEXT = (
    "A train leaves the station at nine in the morning and travels sixty miles in the first hour. In the second hour "
    "it travels half as far, because the track climbs into the hills, and at eleven it stops for twenty minutes. "
    "How far has it come by then? It has come sixty miles and then thirty miles, which makes ninety miles."
)


@dataclass(frozen=True)
class Distance:
    """At a number of loops: the largest difference of a logit; the KL divergence from the dense model's next token to
    the looped model's, and the loss of the text, both in nats per token."""

    loops: int
    max_abs: float
    kl: float
    loss: float


@dataclass(frozen=True)
class Comparison:
    """dense_loss: of the dense model on the same tokens, in nats per token."""

    tokens: int
    dense_loss: float
    distances: tuple[Distance, ...]


def text_tokens(source: Source, text: str) -> np.ndarray:
    """Int32 [1, T]: the text as the model reads it, at most MOST_TOKENS of it; random tokens if it has no tokenizer."""
    most = min(MOST_TOKENS, source.config.max_seq_len)
    found = text_of(source)
    if found is None:
        numbers = np.random.default_rng(0).integers(0, source.config.vocab_size, most)
        return numbers[None].astype(np.int32)
    tokenizer, conventions = found
    return np.asarray(conventions.begin(tokenizer.encode(text))[:most], np.int32)[None]


def compare(dense: Source, looped: Source, tokens: np.ndarray, depths: tuple[int, ...] = DEPTHS) -> Comparison:
    """Runs both in float32, one after the other. tokens: int32 [1, T], T >= 2."""
    reference = _logits(dense, tokens, (1,))[0]
    losses, log_p = _loss(reference, tokens), _log_softmax(reference)
    distances = []
    for loops, logits in zip(depths, _logits(looped, tokens, depths), strict=True):
        kl = (np.exp(log_p) * (log_p - _log_softmax(logits))).sum(-1).mean()
        distances.append(Distance(loops, float(np.abs(logits - reference).max()), float(kl), _loss(logits, tokens)))
    return Comparison(tokens.shape[1], losses, tuple(distances))


def _logits(source: Source, tokens: np.ndarray, depths: tuple[int, ...]) -> list[np.ndarray]:
    config, variables = load_variables(source)
    config = replace(config, dtype="float32")
    run = jax.jit(_apply, static_argnums=0)
    return [np.asarray(run(config, variables, tokens, jnp.int32(loops)))[0] for loops in depths]


def _apply(config: ModelConfig, variables: Any, tokens: jax.Array, loops: jax.Array) -> jax.Array:
    output: Any = Mythos(config).apply(variables, tokens, loops=loops, rngs={"state": jax.random.key(0)})
    return output.logits


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    logits_TV = logits_TV.astype(np.float64)
    shifted_TV = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True))


def _loss(logits_TV: np.ndarray, tokens: np.ndarray) -> float:
    log_p_TV = _log_softmax(logits_TV[:-1])
    return float(-log_p_TV[np.arange(len(log_p_TV)), tokens[0, 1:]].mean())
