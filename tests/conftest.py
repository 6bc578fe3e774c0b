"""Tests run on the CPU, as eight devices, and share what XLA has compiled with each other and with later runs."""

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

SETTINGS = {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": str(Path(__file__).parent.parent / ".cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.5,
    # Compiling is most of the suite's time, and without these it takes a third less; `make test-torch` has them.
    "jax_disable_most_optimizations": True,
}
for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the programs that tests start; those see one device

jax.config.update("jax_num_cpu_devices", 8)

# XLA emits fused loops through MLIR, which takes more time than the rest of a compilation; it has an older way.
# It reads these flags when it first compiles; the programs that tests start inherit them.
XLA_FLAGS = ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS])

# Tracing leaves many objects behind: Python looks through them less often, and never again through those of imports.
gc.set_threshold(50_000, 20, 20)

from mythos_jax.config import Config, TrainingConfig  # noqa: E402
from mythos_jax.training import step  # noqa: E402

# A suite that is started in the background, or under nohup, inherits signals that are ignored, and so would the
# programs that tests start and then interrupt.
DEFAULTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
for number, handler in DEFAULTS.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def one_step_per_config() -> Iterator[None]:
    """Runs of this process whose steps are the same share one program: to trace it takes most of their time.

    A test that patches what a step reads while it is traced needs a config that no other test has.
    """
    made: dict[str, Any] = {}
    make = step.jitted_step

    def jitted_step(config: Config, options: Any = None) -> Any:
        rest = TrainingConfig()  # what only the host looks at
        same = {name: getattr(rest, name) for name in ("checkpoint_every", "keep_checkpoints", "log_every")}
        training = replace(config.training, **same, evaluate_every=0)
        if training.schedule == "constant" and not training.depth.curriculum_fraction:
            training = replace(training, steps=rest.steps)
        key = repr((replace(config, name="", training=training), options))
        if key not in made:
            made[key] = make(config, options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "jitted_step", jitted_step)
        yield


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
