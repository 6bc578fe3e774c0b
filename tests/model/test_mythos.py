"""The whole model: initialisation, precision, sharding constraints, and calls that are refused."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mythos_jax.model.mythos import Mythos
from mythos_jax.model.state import initial_noise
from tests.tiny import HUGINN, MLA, PARCAE, B, T, V, run, some_tokens, variables

LOOPS = 5


def test_standard_deviations_of_initial_weights():
    moe = {"feed_forward": "moe", "n_experts": 2, "experts_per_token": 1, "expert_dim": 16, "n_shared_experts": 1}
    config = replace(MLA, prelude_layers=0, coda_layers=0, output_init=0.5, **moe)
    initial = nn.unbox(jax.jit(Mythos(config).init)(jax.random.key(0), some_tokens()))
    names = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(initial["params"])}
    matrices = {name: leaf for name, leaf in names.items() if leaf.size >= 300}
    assert len(matrices) >= 8
    for name, matrix in matrices.items():
        assert matrix.dtype == jnp.float32
        writes_to_residual = "'down'" in name or "'out'" in name
        scale = config.output_init if writes_to_residual else 1
        assert abs(np.std(matrix) / config.std - scale) < 0.2 * scale, name
    out = run(config, initial, some_tokens(), loops=LOOPS, initial_state=None)
    loss = -jax.nn.log_softmax(out.logits)[0, np.arange(T), some_tokens()[1]].mean()
    assert abs(loss - np.log(V)) < 0.5  # about uniform before any training


@pytest.mark.parametrize("config", [HUGINN, PARCAE], ids=["huginn", "parcae"])
def test_init_needs_no_noise(config):
    shapes = jax.eval_shape(Mythos(config).init, jax.random.key(0), some_tokens())
    assert set(shapes) == {"params"}


def test_noise_is_truncated_at_three_sigma():
    noise = np.asarray(initial_noise(HUGINN, jax.random.key(0), (50_000,)))
    sigma = np.sqrt(2 / (5 * HUGINN.dim)) * HUGINN.embedding_scale
    assert np.abs(noise).max() <= 3 * sigma
    assert abs(noise.std() / (0.9866 * sigma) - 1) < 0.02  # the deviation of a normal truncated at 3 sigma
    assert abs(noise.mean()) < 0.02 * sigma


def test_bfloat16_is_close_to_float32():
    """bfloat16 has 8 significant bits; over five loops and three layers the error may grow to a few percent."""
    exact = run(MLA, variables(MLA), some_tokens(), loops=LOOPS, initial_state=None)
    out = run(replace(MLA, dtype="bfloat16"), variables(MLA), some_tokens(), loops=LOOPS, initial_state=None)
    assert out.logits.dtype == jnp.float32
    assert out.features.dtype == out.state.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((out.logits - exact.logits) ** 2) / np.mean(exact.logits**2))
    assert 1e-4 < error < 0.03  # the lower bound shows that bfloat16 is in use


def test_head_of_features_gives_the_logits():
    def both(variables, tokens):
        model = Mythos(MLA)
        features = model.apply(variables, tokens, loops=LOOPS, method="features")
        return model.apply(variables, features, method="head")

    out = run(MLA, variables(MLA), some_tokens(), loops=LOOPS, initial_state=None)
    np.testing.assert_allclose(jax.jit(both)(variables(MLA), some_tokens()), out.logits, rtol=0, atol=1e-5)


def test_sharding_constraints_on_a_mesh():
    """With `set_mesh` and Auto axes; with other kinds of axes Linen raises, or silently ignores the constraints."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = [("batch", "data"), ("act_vocab", "tensor")]

    def call(variables, tokens):
        return Mythos(MLA).apply(variables, tokens, loops=LOOPS).logits

    expected = run(MLA, variables(MLA), some_tokens(), loops=LOOPS, initial_state=None).logits
    with jax.set_mesh(mesh):
        with nn.logical_axis_rules(rules):
            logits = jax.jit(call)(variables(MLA), some_tokens())
        unnamed = jax.jit(lambda *arguments: call(*arguments))(variables(MLA), some_tokens())
    assert logits.sharding.spec == PartitionSpec("data", None, "tensor")
    assert len({shard.device for shard in logits.addressable_shards}) == 8
    assert logits.addressable_shards[0].data.shape == (B // 2, T, V // 4)
    assert unnamed.sharding.is_fully_replicated
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "tokens", "keywords", "message"),
    [
        (MLA, np.zeros((1, 17), np.int32), {}, r"tokens: got 17 positions, allowed: at most max_seq_len, 16"),
        (MLA, np.zeros((1, 2), np.int32), {"loops": -1}, r"loops: got -1, allowed: an integer >= 1"),
        (HUGINN, np.zeros((1, 2), np.int32), {}, r"initial_state: got none for a model that starts from noise"),
        (HUGINN, np.zeros((1, 2), np.int32), {"initial_state": "ones"}, r"initial_state: got 'ones', allowed: an arr"),
    ],
)
def test_refusals(config, tokens, keywords, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: Mythos(config).apply(v, tokens, **keywords), variables(config))
