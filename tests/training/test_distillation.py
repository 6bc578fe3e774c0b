"""Learning from a teacher: the step against full logits of both, and runs that have a teacher."""

import dataclasses
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config import Config, DataConfig, DepthConfig, DistillationConfig, MeshConfig, TrainingConfig
from mythos_jax.config import backprop_loops as backprop
from mythos_jax.data.placement import batch_sharding, to_global
from mythos_jax.errors import ConfigError
from mythos_jax.flops import forward_flops, training_flops
from mythos_jax.model.apply import apply
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.state import Constants, Teacher
from mythos_jax.sharding import make_mesh, use_mesh
from mythos_jax.training.depth import draw_depths, loops_with_gradient, truncated_forward
from mythos_jax.training.step import _make_gradients, abstract_state, init_state, jitted_step
from mythos_jax.training.teacher import abstract_teacher, load_teacher
from mythos_jax.training.train import train
from tests import tiny
from tests.survival import lines, with_training

B, T = 8, 12
STUDENT = tiny.DENSE
TEACHER = dataclasses.replace(STUDENT, dim=2 * STUDENT.dim, loops=2, prelude_layers=0)


def config_of(mesh=None, **distillation):
    depth = DepthConfig(distribution="poisson", mean_loops=3, max_loops=5, backprop_loops=2)
    learned = DistillationConfig(teacher="teacher", **distillation)
    training = TrainingConfig(batch_size=B, grad_accumulation_steps=2, depth=depth, distillation=learned)
    return Config(model=STUDENT, training=training, data=DataConfig(seq_len=T), mesh=mesh or MeshConfig())


def batch_of(seed):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, tiny.V, (B, T + 1)).astype(np.int32)
    weights = random.choice([0, 0.5, 1], (B, T)).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": weights}


def dense_loss(config, params, teacher, batch):
    """With the logits of all positions; (1 - w) CE + w T^2 KL, a mean over the weights of the tokens."""
    variables, loops = {"params": params}, draw_depths(config, jnp.int32(0), B)
    run = partial(truncated_forward, backprop_loops=backprop(config), limit=loops_with_gradient(config, jnp.int32(0)))
    out = apply(run, Mythos(STUDENT), variables, batch["tokens"], None, loops, None)
    logits = out.features @ params["unembedding" if "unembedding" in params else "embedding"].T
    theirs = Mythos(teacher.model).apply(teacher.variables, batch["tokens"]).logits
    learned = config.training.distillation
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    p, log_q = jax.nn.softmax(theirs / learned.temperature), jax.nn.log_softmax(logits / learned.temperature)
    kl = (p * (jnp.log(p) - log_q)).sum(-1)
    mean = lambda x: (x * batch["mask"]).sum() / batch["mask"].sum()  # noqa: E731
    loss = (1 - learned.weight) * mean(nats) + learned.weight * learned.temperature**2 * mean(kl)
    return loss, (mean(nats), mean(kl))


@pytest.mark.parametrize(
    ("mesh", "weight", "temperature"),
    [
        (MeshConfig(fsdp=2, tensor=2), 0.3, 2.0),
        pytest.param(MeshConfig(), 1.0, 0.5, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_full_logits(mesh, weight, temperature):
    """At random depth with truncated backpropagation, in two parts, with weights of the tokens, on a mesh."""
    config = config_of(mesh, weight=weight, temperature=temperature)
    teacher, batch = Teacher(tiny.variables(TEACHER, seed=1), TEACHER), batch_of(0)
    params = tiny.variables(STUDENT)["params"]
    (_, (nats, kl)), expected = jax.jit(jax.value_and_grad(partial(dense_loss, config), has_aux=True))(
        params, teacher, batch
    )
    device_mesh = make_mesh(mesh, jax.local_devices()[: 4 if mesh.tensor > 1 else 1])
    with use_mesh(device_mesh):
        placed = to_global(batch_sharding(device_mesh), B, np.arange(B), batch)
        state = init_state(config, device_mesh).replace(variables={"params": params, "balance": {}})
        gradients, sums = jax.jit(_make_gradients(config))(state, placed, Constants(teacher=teacher))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, expected)
    np.testing.assert_allclose(sums["nats"] / sums["weight"], nats, rtol=1e-5)
    np.testing.assert_allclose(sums["extra"]["distillation"], kl, rtol=1e-4)
    assert kl > 0.1


def test_a_student_that_is_its_teacher_learns_from_the_text_alone_and_compiles_once():
    training = TrainingConfig(batch_size=B, warmup_steps=0, gradient_clip=0.0)
    alone = dataclasses.replace(config_of(), training=training)
    learned = DistillationConfig(teacher="teacher", weight=0.25, temperature=3.0)
    config = dataclasses.replace(alone, training=dataclasses.replace(training, distillation=learned))
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    with use_mesh(mesh):
        state, step = init_state(config, mesh), jitted_step(config)
        teacher = Teacher(jax.tree.map(jnp.copy, state.variables), STUDENT)
        copy = jax.tree.map(jnp.copy, state)
        state, metrics = step(state, batch_of(0), Constants(teacher=teacher))
        _, plain = jitted_step(alone)(copy, batch_of(0), Constants())
        np.testing.assert_allclose(metrics["distillation"], 0, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["gradient_norm"], 0.75 * plain["gradient_norm"], rtol=1e-4)
        compiled = []
        for seed in (1, 2):  # the teacher is still there: not donated
            state, metrics = step(state, batch_of(seed), Constants(teacher=teacher))
            assert metrics["distillation"] > 1e-6
            compiled.append(step._cache_size())
        assert compiled[0] == compiled[1]


def test_the_teacher_s_forward_pass_is_counted():
    config = config_of()
    more = training_flops(config, teacher=TEACHER) - training_flops(config)
    assert more == B * T * forward_flops(TEACHER, T // 2).at(2)


def distilling(config, teacher, **training):
    return with_training(config, distillation=DistillationConfig(teacher=str(teacher)), **training)


def test_a_run_with_a_teacher(config, uninterrupted, tmp_path, capsys):
    """It goes on with the same teacher, wherever that is, and with no other one."""
    teacher, run = uninterrupted, tmp_path / "run"
    train(distilling(config, teacher, steps=1, schedule="constant"), run, progress=False)
    assert lines(run)[0]["distillation"] > 0.01
    moved = teacher.rename(tmp_path / "moved")
    assert train(distilling(config, moved, steps=2, schedule="constant"), run, progress=False)["step"] == 2
    assert f"training.distillation.teacher was '{teacher}', is now '{moved}'" in capsys.readouterr().err
    refused = f"{run}: cannot resume, training.distillation.teacher: got {{!r}}, allowed: the weights of {moved} as"
    for path, other in {str(run): distilling(config, run, steps=3), "": with_training(config, steps=3)}.items():
        with pytest.raises(ConfigError, match=re.escape(refused.format(path))):
            train(other, run, progress=False)
    narrow = DistillationConfig(teacher=str(moved), teacher_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"\(training\.distillation\.teacher_dtype was 'float32', is 'bfloat16'\)"):
        train(with_training(config, steps=3, distillation=narrow), run, progress=False)
    moved.rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"^training\.distillation\.teacher: .*moved: no such file"):
        train(distilling(config, moved, steps=3), run, progress=False)


def test_a_teacher_that_does_not_fit(config, uninterrupted, tmp_path):
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    with pytest.raises(ConfigError) as caught:
        train(distilling(other, uninterrupted), tmp_path / "run", progress=False)
    assert str(caught.value) == (
        f"training.distillation.teacher: got {uninterrupted} with vocab_size 264, allowed: a model with the run's "
        "vocabulary, 300"
    )
    model, data = dataclasses.replace(config.model, max_seq_len=64), dataclasses.replace(config.data, seq_len=64)
    longer = dataclasses.replace(config, model=model, data=data)
    with pytest.raises(ConfigError, match=r"data\.seq_len: got 64, allowed: at most max_seq_len of the teacher .*, 32"):
        train(distilling(longer, uninterrupted), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    gated = dataclasses.replace(config.model, exit_gate=True)
    training = distilling(config, "teacher").training
    training = dataclasses.replace(training, objectives=dataclasses.replace(training.objectives, exit_loss="expected"))
    with pytest.raises(ConfigError, match=r"objectives\.exit_loss: got 'expected', allowed: none with a teacher"):
        dataclasses.replace(config, model=gated, training=training)


def test_shapes_ahead_of_time_are_those_of_the_teacher(config, uninterrupted):
    learned = DistillationConfig(teacher=str(uninterrupted), teacher_dtype="bfloat16")
    config, mesh = with_training(config, distillation=learned), make_mesh(MeshConfig(), jax.local_devices()[:1])
    ahead, loaded = abstract_teacher(config, mesh), load_teacher(config)[0]
    assert ahead.model == loaded.model
    assert {x.dtype.name for x in jax.tree.leaves(loaded.variables)} == {"bfloat16", "float32"}
    same = lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, ahead.variables, loaded.variables)))
    with use_mesh(mesh):
        shape = jax.ShapeDtypeStruct((8, 16), jnp.int32)
        batch = {"tokens": shape, "targets": shape, "mask": jax.ShapeDtypeStruct((8, 16), bool)}
        lowered = jitted_step(config).lower(abstract_state(config, mesh), batch, Constants(teacher=ahead))
    assert "bf16" in lowered.as_text()
    shutil.rmtree(uninterrupted / "checkpoints")
    assert abstract_teacher(config, mesh).model == loaded.model  # no weights are read
