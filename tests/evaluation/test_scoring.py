"""Likelihoods and continuations of ragged sequences, against one call per sequence."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig
from mythos_jax.evaluation import scoring
from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.scoring import batches_by_length, generate_until, padded_width, score
from mythos_jax.inference.generate import generate
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import make_mesh
from tests.tiny import DENSE, variables


@pytest.fixture(scope="module")
def loaded():
    config = Config(model=DENSE, data=DataConfig(seq_len=8), evaluation=EvaluationConfig(batch_size=8))
    weights = jax.tree.map(jnp.asarray, variables(DENSE))
    return LoadedModel(Path("x"), config, Mythos(DENSE), weights, None, make_mesh(MeshConfig()), None)


def test_batches_have_few_widths():
    lengths = [3, 100, 40, 31, 33, 64, 1, 70, 99]
    batches = list(batches_by_length(lengths, 3, 90))
    assert sorted(i for indices, _ in batches for i in indices) == list(range(9))
    for indices, width in batches:
        assert len(indices) <= 3
        assert all(padded_width(lengths[i], 90) == width for i in indices)
    assert {width for _, width in batches} == {32, 64, 90}


@pytest.mark.parametrize("halting", [None, Halting("latent", 0.2)])
def test_likelihoods_equal_those_of_single_calls(loaded, halting, monkeypatch):
    monkeypatch.setattr(scoring, "MIN_WIDTH", 4)
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(0, 40, n).tolist(), k) for n, k in [(17, 16), (5, 2), (9, 1), (2, 1), (12, 5)] * 2]
    run = jax.jit(lambda tokens: loaded.model.apply(loaded.variables, tokens, loops=jnp.int32(5), halting=halting))
    for i, k in (1, 2), (2, 1):  # make the first scored token the most likely one: of two tokens, and of one
        tokens = sequences[i][0]
        best = run(np.array([tokens[:-1]])).logits[0, -k].argmax()
        sequences[i] = [*tokens[:-k], int(best), *tokens[len(tokens) - k + 1 :]], k
    likelihoods = score(loaded, sequences, Setting(5, halting), progress=False)
    assert len({s.loops / s.tokens for s in likelihoods}) > (1 if halting else 0)
    assert len({s.greedy for s in likelihoods}) == 2
    for (tokens, k), got in zip(sequences[:5], likelihoods, strict=False):
        out = run(np.array([tokens[:-1]]))
        logits = np.asarray(out.logits[0, -k:], np.float64)
        targets = np.array(tokens[-k:])
        nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(k), targets]
        assert got.log_likelihood == pytest.approx(-nats.sum(), abs=1e-4)
        assert got.greedy == bool((logits.argmax(-1) == targets).all())
        assert (got.tokens, got.loops) == (k, int(out.loops[0, -k:].sum()))
    for tokens in ([1], list(range(18))):
        with pytest.raises(ValueError, match=r"allowed: 1 <= n < tokens <= 17"):
            score(loaded, [(tokens, 1)], Setting(3), progress=False)


def test_continuations_equal_those_of_single_prompts(loaded):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 40, n).tolist() for n in (3, 5, 12, 2)]  # the third is truncated by four tokens
    alone = []
    for prompt in prompts:
        tokens_1T, lengths = np.zeros((1, 8), np.int32), [len(prompt[-8:])]  # of one shape, so that all share programs
        tokens_1T[0, : lengths[0]] = prompt[-8:]
        result = generate(loaded.model, loaded.variables, tokens_1T, lengths, max_new_tokens=8, loops=3)
        alone.append((result.tokens[0].tolist(), int(result.loops.sum())))
    stop = alone[1][0][3]
    continuations = generate_until(loaded, prompts, Setting(3), max_new_tokens=8, stop_tokens=(stop,), progress=False)
    for (tokens, loops), got in zip(alone, continuations, strict=True):
        length = tokens.index(stop) if stop in tokens else 8
        assert got.tokens == tokens[:length]
        assert got.generated == min(length + 1, 8)
        assert got.loops == loops * got.generated / 8
    assert len(continuations[1].tokens) <= 3
