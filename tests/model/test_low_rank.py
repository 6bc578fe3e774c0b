"""Low-rank weights beside frozen matrices compute what the merged weights compute, forward and backward."""

import re
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mythos_jax.config import MeshConfig
from mythos_jax.inference.generate import generate
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.gather import LOW_RANK, gather_loop_weights
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.low_rank import adaptable, init_low_rank, merged, scaled
from mythos_jax.model.mythos import Mythos
from mythos_jax.model.storage import Storage
from mythos_jax.runs.load import placer
from mythos_jax.sharding import make_mesh, shardings, use_mesh
from tests.tiny import DENSE, GQA, HUGINN, MLA, run, run_traced, some_state, some_tokens, variables

RANK = 3
MODELS = {"openmythos": GQA, "mla": MLA, "huginn": HUGINN}


def low_rank_of(config, seed=0):
    """Low-rank weights of every matrix that can have them, none of them 0, as large as the matrices themselves."""
    shapes = nn.unbox(jax.eval_shape(lambda: init_low_rank(config, adaptable(config), RANK, jax.random.key(0))))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (random.standard_normal(x.shape) * 0.3).astype(np.float32), shapes)


def with_low_rank(config):
    return {**variables(config), LOW_RANK: low_rank_of(config)}


def merged_by_hand(config):
    """W + a b in float64, rounded once; every product by its own spelling."""
    params = flatten_dict(variables(config)["params"], sep=".")
    flat = flatten_dict(low_rank_of(config), sep=".")
    for path in {name.rpartition(".")[0] for name in flat}:
        a, b = (flat[f"{path}.{part}"].astype(np.float64) for part in "ab")
        product = a.reshape(-1, RANK) @ b.reshape(RANK, -1)
        params[path] = (params[path] + product.reshape(params[path].shape)).astype(np.float32)
    return {**variables(config), "params": unflatten_dict(params, sep=".")}


def state_of(config):
    return {} if config.initial_state != "noise" else {"initial_state": some_state(config)}


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", ["openmythos", "mla"])
def test_logits_are_those_of_the_merged_weights(name):
    config = MODELS[name]
    expected = run(config, merged_by_hand(config), some_tokens(), loops=3, **state_of(config)).logits
    assert (
        np.abs(expected - run(config, variables(config), some_tokens(), loops=3, **state_of(config)).logits).max() > 1
    )
    close(run(config, with_low_rank(config), some_tokens(), loops=3, **state_of(config)).logits, expected)
    # The while loop, which runs where depth is traced.
    close(run_traced(config, with_low_rank(config), some_tokens(), jnp.int32(3), **state_of(config)).logits, expected)


def test_every_matrix_of_attention_feed_forward_and_injection_can_have_them():
    assert {path.rpartition(".kernel")[0].split(".", 1)[1] for path in adaptable(HUGINN) if "prelude" in path} == {
        f"attention.{name}" for name in ("q", "k", "v", "out")
    } | {f"feed_forward.{name}" for name in ("gate", "up", "down")}
    assert "recurrence.cell.injection.adapter.kernel" in adaptable(HUGINN)
    assert "prelude_0.attention.kv_up" in adaptable(MLA)
    assert not [path for path in adaptable(GQA) if "embedding" in path or path.endswith(("moe.up", "router.kernel"))]
    assert "recurrence.cell.layer_0.moe.shared_0.up.kernel" in adaptable(GQA)


def test_merging():
    for config in (GQA, MLA):
        jax.tree.map(partial(close, tolerance=1e-6), merged(with_low_rank(config)), merged_by_hand(config))


def test_fresh_weights_change_nothing_and_are_drawn_as_in_peft():
    paths = ["prelude_0.attention.out.kernel", "prelude_0.feed_forward.up.kernel"]
    fresh = nn.unbox(init_low_rank(DENSE, paths, 2, jax.random.key(1)))
    out = fresh["prelude_0"]["attention"]["out"]["kernel"]
    assert (out["a"].shape, out["b"].shape) == ((2, 16, 2), (2, 32))
    assert not np.any(out["b"])
    bound = 1 / np.sqrt(32)
    assert 0.9 * bound < np.abs(out["a"]).max() <= bound
    assert np.abs(np.mean(out["a"])) < 0.3 * bound
    alone = nn.unbox(init_low_rank(DENSE, paths[:1], 2, jax.random.key(1)))
    np.testing.assert_array_equal(alone["prelude_0"]["attention"]["out"]["kernel"]["a"], out["a"])
    with_fresh = {**variables(DENSE), LOW_RANK: fresh}
    expected = run(DENSE, variables(DENSE), some_tokens(), loops=2).logits
    np.testing.assert_array_equal(run(DENSE, with_fresh, some_tokens(), loops=2).logits, expected)
    assert scaled(fresh, 2.0)["prelude_0"]["attention"]["out"]["kernel"]["a"] is out["a"]


BATCH = {"tokens": some_tokens(), "targets": some_tokens(1), "mask": np.ones(some_tokens().shape, bool)}
LEARNED = {name: replace(config, remat="full") for name, config in MODELS.items()}


@partial(jax.jit, static_argnames=("config", "gather", "mesh"))  # mesh: that is in use
@partial(jax.value_and_grad, argnums=1)
def loss_and_gradients(config, low_rank, base, scale=1.0, gather=None, mesh=None):
    arguments = {**base, LOW_RANK: scaled(low_rank, scale)}
    if gather == "once":
        arguments = gather_loop_weights(arguments, abstract_variables(config), jnp.dtype("float32"))
    model, rngs = Mythos(config, gather_per_loop=gather == "per_loop"), {"state": jax.random.key(0)}
    return token_loss(model, arguments, BATCH, loops=3, rngs=rngs)[0].mean()


def dense_gradients(config, low_rank, base, scale=1.0):
    """Of a and b, in float64 from the gradients of the merged weights."""

    @jax.jit
    @jax.grad
    def loss(params):
        rngs = {"state": jax.random.key(0)}
        return token_loss(Mythos(config), {**base, "params": params}, BATCH, loops=3, rngs=rngs)[0].mean()

    dense = flatten_dict(loss(merged({**base, LOW_RANK: scaled(low_rank, scale)})["params"]), sep=".")
    flat, gradients = flatten_dict(low_rank, sep="."), {}
    for path in {name.rpartition(".")[0] for name in flat}:
        a, b = (np.asarray(flat[f"{path}.{part}"], np.float64) for part in "ab")
        dw = np.asarray(dense[path], np.float64).reshape(a.size // RANK, -1)
        gradients[f"{path}.a"] = scale * (dw @ b.reshape(RANK, -1).T).reshape(a.shape)
        gradients[f"{path}.b"] = scale * (a.reshape(-1, RANK).T @ dw).reshape(b.shape)
    return unflatten_dict(gradients, sep=".")


@pytest.mark.parametrize("name", ["mla", "huginn"])
def test_gradients_are_those_through_the_merged_weights(name):
    config, low_rank = LEARNED[name], low_rank_of(LEARNED[name])
    _, got = loss_and_gradients(config, low_rank, variables(config), 0.5)
    jax.tree.map(partial(close, tolerance=1e-4), got, dense_gradients(config, low_rank, variables(config), 0.5))


@pytest.mark.parametrize("storage", [Storage("bfloat16"), Storage(int8=True)], ids=str)
def test_gradients_through_a_narrow_base(storage):
    config, low_rank = LEARNED["mla"], low_rank_of(MLA)
    base = storage.store_all(config, variables(config))
    loss, got = loss_and_gradients(config, low_rank, base)
    wide = merged({**base, LOW_RANK: jax.tree.map(np.zeros_like, low_rank)})
    expected_loss, expected = loss_and_gradients(config, low_rank, wide)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-4)
    jax.tree.map(partial(close, tolerance=2e-3), got, expected)


def test_nothing_of_the_size_of_a_matrix_is_made():
    """Neither W + a b nor a gradient of W: all that has a matrix's shape in the program is the matrix itself."""
    config = replace(DENSE, hidden_dim=56, n_heads=4, n_kv_heads=4, remat="full", loops=2)
    low_rank, base = init_low_rank(config, adaptable(config), RANK, jax.random.key(0)), variables(config)

    def loss(trained, base):
        return token_loss(Mythos(config), {**base, **trained}, BATCH, loops=2)[0].mean()

    def products(trained, base):
        """How many products give something with as many elements as a feed-forward matrix."""
        text = jax.jit(jax.grad(loss)).lower(trained, base).compile().as_text()
        return len(re.findall(r"= f32\[(?:32,56|56,32)\]\S* dot\(", text))

    assert products({"params": base["params"]}, {"balance": {}}) >= 9  # as a full gradient does: 3 layers
    assert products({LOW_RANK: nn.unbox(low_rank)}, base) == 0


def test_decoding_gives_the_tokens_of_the_merged_weights():
    low, whole = (
        generate(Mythos(MLA), x, some_tokens(), loops=2, max_new_tokens=4).tokens
        for x in (with_low_rank(MLA), merged_by_hand(MLA))
    )
    np.testing.assert_array_equal(low, whole)


@pytest.mark.parametrize("gather", ["once", "per_loop"])
def test_on_a_mesh(gather):
    """Cut as their matrices are, with the weights of the loop gathered once or in every loop."""
    config, low_rank = LEARNED["mla"], low_rank_of(MLA)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    stored = Storage("bfloat16" if gather == "once" else "float32").store_all(config, variables(config))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), stored)
    expected = jax.device_get(loss_and_gradients(config, low_rank, wide))
    boxed = jax.eval_shape(lambda: init_low_rank(config, adaptable(config), RANK, jax.random.key(0)))
    cut = jax.device_put(low_rank, shardings(mesh, boxed))
    up = cut["prelude_0"]["feed_forward"]["up"]["kernel"]
    assert up["a"].addressable_shards[0].data.shape == (16, RANK)  # [embed, rank]
    assert up["b"].addressable_shards[0].data.shape == (RANK, 20)  # [rank, mlp]
    put = placer(config, mesh)
    base = unflatten_dict({path: put(path, x) for path, x in flatten_dict(stored, sep=".").items()}, sep=".")
    with use_mesh(mesh):
        got = loss_and_gradients(config, cut, base, gather=gather, mesh=mesh)
    assert float(got[0]) == pytest.approx(float(expected[0]), abs=1e-5)
    jax.tree.map(partial(close, tolerance=1e-4), got[1], expected[1])
