"""Chunked cross-entropy and KL to a teacher against softmaxes over all logits at once, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config import MeshConfig
from mythos_jax.ops.cross_entropy import cross_entropy
from mythos_jax.ops.distillation import distillation
from mythos_jax.sharding import make_mesh, use_mesh

B, T, V, D, E = 4, 12, 40, 8, 6
KEYS = jax.random.split(jax.random.key(0), 6)
STUDENT = jax.random.normal(KEYS[0], (B, T, D)), jax.random.normal(KEYS[1], (V, D))
TEACHER = jax.random.normal(KEYS[2], (B, T, E)), jax.random.normal(KEYS[3], (V, E))
TARGETS = jax.random.randint(KEYS[4], (B, T), 0, V)
MASK = jnp.ones((B, T)).at[:, 5:].set(0.5).at[1:3, 2:11].set(0)
WEIGHTS = jax.random.uniform(KEYS[5], (2, B, T))  # of the cross-entropy and the KL of each token, for gradients


def dense(student, teacher, temperature):
    logits, theirs = (features @ table.T for features, table in (student, teacher))
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS[..., None], -1)[..., 0]
    log_p, log_q = jax.nn.log_softmax(theirs / temperature), jax.nn.log_softmax(logits / temperature)
    counts = MASK != 0
    return nats * counts, (jnp.exp(log_p) * (log_p - log_q)).sum(-1) * counts


def weighted(losses):
    return sum((loss * weight).sum() for loss, weight in zip(losses, WEIGHTS, strict=True))


@pytest.mark.parametrize(
    ("mesh", "temperature", "chunk"),
    [
        (None, 1.0, None),
        (MeshConfig(fsdp=2, tensor=2), 2.5, 5),
        (MeshConfig(data=2, fsdp=1, sequence=2), 0.5, 4),
    ],
)
def test_losses_and_gradients_are_those_of_all_logits(mesh, temperature, chunk):
    def ours(student, teacher):
        losses = distillation(student, teacher, TARGETS, MASK, temperature, chunk)
        return weighted(losses), losses

    run = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))
    if mesh is None:
        (_, losses), gradients = run(STUDENT, TEACHER)
    else:
        with use_mesh(make_mesh(mesh, jax.devices()[:4])):
            (_, losses), gradients = run(STUDENT, TEACHER)
    for found, expected in zip(losses, dense(STUDENT, TEACHER, temperature), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    expected = jax.grad(lambda student: weighted(dense(student, TEACHER, temperature)))(STUDENT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients[0], expected)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradients[1]))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    losses = lambda student: distillation(student, STUDENT, TARGETS, MASK, 2.0)  # noqa: E731
    nats, kl = losses(STUDENT)
    np.testing.assert_array_equal(nats, cross_entropy(*STUDENT, TARGETS, mask_BT=MASK))
    np.testing.assert_allclose(kl, 0, atol=1e-6)
    gradients = jax.grad(lambda student: losses(student)[1].sum())(STUDENT)
    assert all(np.abs(x).max() < 1e-5 for x in jax.tree.leaves(gradients))


def test_logits_of_all_positions_never_exist():
    """The largest array of the program, values and gradients together, is one chunk's."""
    big = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, 64, 8), (1000, 8), (1, 64, 4), (1000, 4)]]
    targets = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(features, table, teacher, teacher_table, targets):
        return sum(
            x.sum()
            for x in distillation((features, table), (teacher, teacher_table), targets, jnp.ones((1, 64)), 1.0, 8)
        )

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*big, targets))
    assert "8,1000]" in program
    assert "64,1000]" not in program
