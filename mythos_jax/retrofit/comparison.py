"""How far a retrofitted model is from the dense model that it was made of, before any training."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
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
    """tokens: how many; are_random: they are no text. dense_loss: of the dense model on them, in nats per token."""

    tokens: int
    are_random: bool
    dense_loss: float
    distances: tuple[Distance, ...]


@dataclass(frozen=True)
class Sample:
    """tokens: int32 [1, T], T >= 2. are_random: the model has no tokenizer for a text."""

    tokens: np.ndarray
    are_random: bool


def make_sample(source: Source, text: str | None) -> Sample:
    """A text as the model reads it, at most MOST_TOKENS of it; None: TEXT, or random tokens without a tokenizer.

    Raises ConfigError for a text that is too short, or that the model has no tokenizer for.
    """
    most, found = min(MOST_TOKENS, source.config.max_seq_len), text_of(source)
    if found is None:
        if text is not None:
            raise ConfigError(f"--text: {source.path} has no tokenizer to read it with; allowed: without --text")
        numbers = np.random.default_rng(0).integers(0, source.config.vocab_size, most)
        return Sample(numbers[None].astype(np.int32), are_random=True)
    tokenizer, conventions = found
    tokens = conventions.begin(tokenizer.encode(TEXT if text is None else text))[:most]
    if len(tokens) < 2:
        raise ConfigError(f"--text: got {len(tokens)} token, allowed: a text of at least 2")
    return Sample(np.asarray(tokens, np.int32)[None], are_random=False)


def compare(dense: Source, looped: Source, sample: Sample, depths: tuple[int, ...] = DEPTHS) -> Comparison:
    """Runs both in float32, one after the other."""
    tokens = sample.tokens
    reference = _logits(dense, tokens, (1,))[0]
    loss, log_p = _loss(reference, tokens), _log_softmax(reference)
    distances = []
    for loops, logits in zip(depths, _logits(looped, tokens, depths), strict=True):
        kl = (np.exp(log_p) * (log_p - _log_softmax(logits))).sum(-1).mean()
        distances.append(Distance(loops, float(np.abs(logits - reference).max()), float(kl), _loss(logits, tokens)))
    return Comparison(tokens.shape[1], sample.are_random, loss, tuple(distances))


def _logits(source: Source, tokens: np.ndarray, depths: tuple[int, ...]) -> list[np.ndarray]:
    config, variables = load_variables(source)
    config = replace(config, dtype="float32")
    run = jax.jit(_apply, static_argnums=0)
    # Accelerators would otherwise round the factors of float32 products, and so what the adapter passes on.
    with jax.default_matmul_precision("highest"):
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
