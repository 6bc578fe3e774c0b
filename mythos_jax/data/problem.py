"""What a reasoning problem is, and the random numbers that it is made of."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mythos_jax.config import TaskConfig

PADDING = 0  # the token id of padding in every problem
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of SplitMix64


class RowRandom:
    """Random numbers for n rows. Those of row i depend only on `keys[i]` and on how many were drawn before.

    keys: uint64 [n]. Counter-based (the finaliser of SplitMix64, Steele et al. 2014), so that rows can be generated in
    any order and any number at a time, without a generator per row.
    """

    def __init__(self, keys: np.ndarray):
        self.keys, self._drawn = keys, 0

    def integers(self, below: int, count: int) -> np.ndarray:
        """Uniform integers in [0, below), int64 [n, count]. `below` is at most 2^16."""
        counters = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64)
        self._drawn += count
        bits = mix_bits(self.keys[:, None] + counters * _GOLDEN)
        return ((bits >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)).astype(np.int64)


def mix_bits(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit of the output depends on all bits of the input."""
    with np.errstate(over="ignore"):  # NumPy warns of overflow for scalars only
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def fold_in(key: np.ndarray | int, value: np.ndarray | int) -> np.ndarray:
    """A new key, uint64, from a key and a number."""
    with np.errstate(over="ignore"):
        return mix_bits(np.asarray(key, np.uint64) ^ mix_bits(np.asarray(value, np.uint64) + _GOLDEN))


def content_hash(tokens: np.ndarray) -> np.ndarray:
    """A hash of each row of tokens [n, W], uint64 [n], that does not depend on trailing padding."""
    weights = mix_bits(np.arange(1, tokens.shape[1] + 1, dtype=np.uint64) * _GOLDEN) | np.uint64(1)
    return mix_bits((tokens.astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64))


def unit_interval(hashes: np.ndarray) -> np.ndarray:
    """Maps uint64 hashes uniformly to float64 in [0, 1)."""
    return (hashes >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class ProblemRows:
    """n problems of one difficulty, each W tokens long."""

    tokens: np.ndarray  # int [n, W]
    targets: np.ndarray  # int [n, W]: the answers, where `answer_mask` is True
    answer_mask: np.ndarray  # bool [n, W]: the positions of answers to train on
    final_mask: np.ndarray  # bool [n, W]: the answers that must be correct for an exact match
    valid: np.ndarray  # bool [n]: False where the random numbers give no valid problem


class Problem(Protocol):
    """A kind of problem, configured."""

    symbols: tuple[str, ...]  # what each token id means; padding first

    def width(self, difficulty: int) -> int:
        """Tokens per row. Raises ConfigError if there are no problems of this difficulty, as far as that is plain."""
        ...

    def make(self, random: RowRandom, difficulty: int) -> ProblemRows:
        """One problem per key of `random`."""
        ...


def select_answers(
    config: TaskConfig, tokens: np.ndarray, targets: np.ndarray, every: np.ndarray, valid: np.ndarray
) -> ProblemRows:
    """Trains on every answer or the last alone, as configured; an exact match needs the last."""
    last = np.zeros_like(every)
    last[:, -1] = True
    return ProblemRows(tokens, targets, every if config.answers == "every" else last, last, valid)
