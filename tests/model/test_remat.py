"""Rematerialisation: the same results in less memory, each layer computed once more and no more often."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config.model import Remat
from mythos_jax.model.mythos import Mythos
from tests.tiny import DENSE, MLA, T, V, some_tokens, variables

LOOPS = 5
ROWS = 8
WEIGHT_BTV = np.random.default_rng(1).standard_normal((ROWS, T, V)).astype(np.float32)
DEEP = replace(DENSE, prelude_layers=1, loop_layers=2, coda_layers=1)
# A layer's products in the forward pass, but for the last one (`down`), whose result no gradient needs: q, k, v, two in
# attention, out, gate, up.
AGAIN = 8


class Gradient(NamedTuple):
    """What a forward and backward pass gives, and what it takes: matmuls as JAX writes them, those that the compiler
    leaves, and bytes of temporary memory."""

    logits: jax.Array
    gradients: Any
    written: int
    compiled: int
    temporaries: int


@cache
def gradient(config, loops):
    def loss(params):
        tokens = some_tokens(shape=(ROWS, T))
        out = Mythos(config).apply({**variables(config), "params": params}, tokens, loops=loops)
        return (out.logits * WEIGHT_BTV).sum(), out.logits

    traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(variables(config)["params"])
    compiled = traced.lower().compile()
    (_, logits), gradients = compiled(variables(config)["params"])
    matmuls = count_matmuls(traced.jaxpr.jaxpr), compiled.as_text().count(" dot(")
    return Gradient(logits, gradients, *matmuls, compiled.memory_analysis().temp_size_in_bytes)


def count_matmuls(jaxpr):
    """Also in the bodies of loops and calls, each as often as it is called. (Printed, equal bodies appear once.)"""
    inner = [x for e in jaxpr.eqns for p in e.params.values() for x in jax.tree.leaves(p, is_leaf=is_jaxpr)]
    here = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return here + sum(count_matmuls(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def assert_same_results(config, other, loops):
    """Forward to the bit, gradients within the rounding of sums in another order."""
    one, two = gradient(config, loops), gradient(other, loops)
    np.testing.assert_array_equal(two.logits, one.logits)
    for a, b in zip(jax.tree.leaves(one.gradients), jax.tree.leaves(two.gradients), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def test_what_each_setting_keeps():
    # With a norm after the feed-forward, its output is needed again: `sublayers` then saves a product.
    config = replace(MLA, prelude_layers=0, coda_layers=0, norm="pre_post")
    settings = {remat: replace(config, remat=remat) for remat in get_args(Remat)}
    for remat in settings:  # `variables` draws the same weights for all of them
        assert_same_results(config, settings[remat], LOOPS)
    counts = {remat: gradient(c, LOOPS).written for remat, c in settings.items()}
    sizes = {remat: gradient(c, LOOPS).temporaries for remat, c in settings.items()}
    # What is saved is not computed again. (The CPU has one memory, so there `offload` equals `attention`.)
    assert counts["full"] > counts["attention"] == counts["offload"] > counts["sublayers"] >= counts["dots"]
    assert counts["sublayers"] > counts["half_hidden"] > counts["hidden"] >= counts["none"]
    assert counts["dots"] >= counts["none"]
    assert sizes["full"] < sizes["attention"] < sizes["sublayers"] < sizes["dots"] < sizes["none"]
    assert sizes["sublayers"] < sizes["half_hidden"] < sizes["hidden"] < sizes["none"]


@pytest.mark.parametrize("loops", [1, LOOPS])
def test_every_layer_is_computed_once_more(loops):
    full = replace(DEEP, remat="full")
    assert_same_results(DEEP, full, loops)
    plain, again = gradient(DEEP, loops), gradient(full, loops)
    products = AGAIN * (DEEP.prelude_layers + DEEP.loop_layers + DEEP.coda_layers)
    assert again.written - plain.written == products
    # The compiler does not undo it, which it can where the loop runs once.
    assert again.compiled - plain.compiled == products
    # The CPU's compiler orders what is computed without regard to memory, so that only loops show.
    assert loops == 1 or again.temporaries < 0.5 * plain.temporaries


def test_initial_weights_are_the_same():
    tokens = jnp.zeros((1, 1), jnp.int32)
    plain, full = (jax.jit(Mythos(c).init)(jax.random.key(0), tokens) for c in (DEEP, replace(DEEP, remat="full")))
    jax.tree.map(np.testing.assert_array_equal, plain, full)
