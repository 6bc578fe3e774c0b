"""`training.compiler`: which options the compiler gets for which chip."""

import dataclasses

import jax
import pytest

from mythos_jax.config import Config
from mythos_jax.sharding import make_mesh
from mythos_jax.training.compiler import compiler_options, tuned_options
from mythos_jax.training.step import make_train_step

VMEM = "xla_tpu_scoped_vmem_limit_kib"


@pytest.mark.parametrize(
    ("kind", "dense", "experts"),
    [
        ("TPU v5 lite", None, None),
        ("TPU v5e", None, None),
        ("TPU v5", 98304, 81920),
        ("TPU v5p", 98304, 81920),
        ("TPU v6 lite", 98304, 81920),
    ],
)
def test_each_generation_of_tpus_has_the_memory_that_maxtext_gives_it(kind, dense, experts):
    assert tuned_options(kind, experts=False).get(VMEM) == dense
    assert tuned_options(kind, experts=True).get(VMEM) == experts
    assert tuned_options(kind, experts=True)["xla_enable_async_all_gather"] is True


def test_xla_knows_the_options_for_gpus():
    """The compiler for CPUs reads all options of XLA, and refuses a name that it does not know."""
    options = tuned_options("NVIDIA H100 80GB HBM3", experts=True)
    assert options["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert VMEM not in options
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    lowered.compile(compiler_options=options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_gpu_enable_latency_hiding": True})


def test_the_step_says_which_options_it_has(capsys, monkeypatch):
    config = Config(name="a")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    assert compiler_options(config, mesh) == {}
    make_train_step(config, mesh)
    assert "training.compiler" not in capsys.readouterr().err
    tuned = dataclasses.replace(config, training=dataclasses.replace(config.training, compiler="tuned"))
    make_train_step(tuned, mesh)
    assert capsys.readouterr().err == "training.compiler tuned: no options are known for cpu\n"
    monkeypatch.setattr("mythos_jax.training.step.compiler_options", lambda *_: {"a": 1, "b": True})
    make_train_step(tuned, mesh)
    assert capsys.readouterr().err == "training.compiler tuned: a=1 b=true\n"
