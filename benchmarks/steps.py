"""Train steps to be timed: from a model and the shape of a batch to a call that runs one step."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from mythos_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from mythos_jax.data.batch import Batch
from mythos_jax.runs.state import Constants
from mythos_jax.sharding import make_mesh
from mythos_jax.training.step import init_state, make_train_step


class Shape(NamedTuple):
    rows: int
    length: int


def config_of(model: ModelConfig, shape: Shape) -> Config:
    """A run of `model` on batches of this shape."""
    training = TrainingConfig(batch_size=shape.rows, learning_rate=1e-5, warmup_steps=1)
    model = dataclasses.replace(model, max_seq_len=max(model.max_seq_len, shape.length))
    return Config(model=model, training=training, data=DataConfig(seq_len=shape.length))


def batch_of(config: Config) -> Batch:
    """A batch of random tokens, always the same."""
    rows, length = config.training.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((rows, length), bool)}


def train_step(config: Config) -> Callable[[], None]:
    """A call that runs one training step, always on the same batch, and waits for it."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    step, state, batch = make_train_step(config, mesh), init_state(config, mesh), jax.device_put(batch_of(config))

    def call() -> None:
        nonlocal state
        state, metrics = step(state, batch, Constants())
        jax.block_until_ready((state, metrics))

    return call
