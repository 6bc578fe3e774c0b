"""With the weights of the PyTorch originals, our model gives the same numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.model.cache import init_cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.pretrained import load_pretrained
from tests.porting import golden

TOLERANCE = 1e-4
all_models = pytest.mark.parametrize("name", golden.NAMES)


@partial(jax.jit, static_argnames=("config", "loops"))
def run_static(config, variables, tokens, loops, **keywords):
    return Mythos(config).apply(variables, tokens, loops=loops, **keywords)


@partial(jax.jit, static_argnames="config")
def run(config, variables, tokens, loops, state):
    """The number of loops is traced, so that one compilation serves every depth."""
    return Mythos(config).apply(variables, tokens, loops=loops, initial_state=state)


@partial(jax.jit, static_argnames=("config", "loops"))
def decode(config, variables, tokens, cache, state, loops):
    return Mythos(config).apply(variables, tokens, cache=cache, loops=loops, initial_state=state)


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert np.abs(np.asarray(got) - expected).max() <= TOLERANCE


@all_models
def test_logits_at_every_loop_count(name):
    config, variables = golden.load(name)
    g = golden.arrays(name)
    counts = golden.loop_counts(name)
    assert name in golden.DENSE or max(counts) > config.loops
    for loops in counts:
        out = run(config, variables, g["input_ids"], loops, g.get("initial_state"))
        assert_close(out.logits, golden.logits(name, loops))
        if "prelude_out" in g:
            assert_close(out.aux.injected_BTD, g["prelude_out"])
        for key in (f"rec_out_r{loops}" if config.readout == "act" else f"coda_in_r{loops}", f"latent_r{loops}"):
            if key in g:
                assert_close(out.state, g[key])
        if config.readout == "act":
            np.testing.assert_array_equal(out.loops, g[f"n_loops_used_r{loops}"])
        if "initial_state" in g:
            zeros = np.zeros_like(g["initial_state"])
            assert_close(run(config, variables, g["input_ids"], loops, zeros).logits, g[f"logits_zero_r{loops}"])


@pytest.mark.parametrize("name", [*golden.OURS, "ouro"])
def test_static_depth_and_its_trace(name):
    config, variables = golden.load(name)
    g = golden.arrays(name)
    loops = int(g["loop_counts"].max())
    out = run_static(config, variables, g["input_ids"], loops, initial_state=g.get("initial_state"))
    assert_close(out.logits, g[f"logits_r{loops}"])
    if config.exit_gate:
        assert_close(out.aux.halt_probability_LBT, 1 / (1 + np.exp(-g["gate_logits"])))
    if config.readout == "act":
        assert_close(out.aux.halt_probability_LBT, g["halt_p"])
        assert_close(out.aux.act_weight_LBT, g["act_weights"])
        np.testing.assert_array_equal(out.loops, g[f"n_loops_used_r{loops}"])


@all_models
def test_cached_decode_and_greedy_tokens(name):
    config, variables = golden.load(name)
    g = golden.arrays(name)
    tokens, start = g["input_ids"], int(g["cached_prefill_len"])
    loops = int(g.get("decode_n_loops", g.get("decode_num_steps", 1)))
    rows, length = tokens.shape

    def state(first, last, zero=False):
        if "initial_state" not in g:
            return None
        initial = g["initial_state"][:, first:last]
        return np.zeros_like(initial) if zero else initial

    def prompt_logits(zero=False):
        """Of the first tokens at once and of the others one by one: the same two programs serve what follows."""
        cache = init_cache(config, rows, length + g["greedy_tokens"].shape[1], loops)
        out = decode(config, variables, tokens[:, :start], cache, state(0, start, zero), loops)
        yield out
        for i in range(start, length):
            out = decode(config, variables, tokens[:, i : i + 1], out.cache, state(i, i + 1, zero), loops)
            yield out

    assert_close(np.stack([out.logits[:, -1] for out in prompt_logits()], 1), g["cached_logits"])

    *_, out = prompt_logits(zero=True)
    logits, greedy_tokens = [], []
    for _ in range(g["greedy_tokens"].shape[1]):
        logits.append(out.logits[:, -1])
        greedy_tokens.append(out.logits[:, -1].argmax(-1).astype(jnp.int32))
        out = decode(config, variables, greedy_tokens[-1][:, None], out.cache, state(0, 1, zero=True), loops)
    np.testing.assert_array_equal(np.stack(greedy_tokens, 1), g["greedy_tokens"])
    assert_close(np.stack(logits, 1), g["greedy_logits"])


def test_value_gates_and_tables_are_in_the_layers_of_the_original():
    config, _ = golden.load("parcae")
    assert config.value_gate_layers == (0, 2, 4, 5)
    assert config.value_table_layers == (0, 2, 4, 6)


def test_checkpoint_of_the_openmythos_trainer():
    config, variables = load_pretrained(golden.FOLDER / "openmythos_trainer" / "checkpoint.pt")
    g = golden.arrays("openmythos_trainer")
    assert (config.dim, config.rope_theta, config.lora_rank, config.loops) == (32, 10000.0, 2, 3)
    for loops in (1, 3, 5):
        assert_close(run(config, variables, g["input_ids"], loops, None).logits, g[f"logits_r{loops}"])
