"""The teacher of a run, for distillation.py: loaded, or only its shapes."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from mythos_jax.config import Config, ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.storage import Storage
from mythos_jax.runs.base import ModelRecord, located, model_record, step_of
from mythos_jax.runs.configs import model_of
from mythos_jax.runs.fingerprint import fingerprint
from mythos_jax.runs.load import load_model
from mythos_jax.runs.state import Teacher
from mythos_jax.sharding import placed_shapes, shardings
from mythos_jax.training.tokenizers import check_tokenizers
from mythos_jax.typed import check_field


def load_teacher(config: Config, saved: ModelRecord | None = None, run_dir: Any = "") -> tuple[Teacher, ModelRecord]:
    """The teacher on the run's mesh, and the record of it.

    saved: the record that the run has, if it has begun. Raises ConfigError if there is no such model, or if it predicts
    other tokens.
    """
    settings = config.training.distillation
    path = located(settings.teacher, saved, "training.distillation.teacher")
    step = step_of(path, saved, run_dir)
    storage = Storage(settings.teacher_dtype)
    loaded = load_model(
        path, step, mesh=config.mesh, storage=storage, keep_int8=False, with_predictor=False, merge=True
    )
    _check_model(config, loaded.config.model)
    check_tokenizers(config, loaded, path, "it is the run's teacher")
    record = model_record(path, loaded.step, fingerprint(loaded.variables))
    return Teacher(loaded.variables, loaded.config.model), record


def abstract_teacher(config: Config, mesh: Mesh) -> Teacher | None:
    """The shapes, dtypes and places of the teacher's weights, for compiling ahead of time; they are not read."""
    settings = config.training.distillation
    if not settings.teacher:
        return None
    model = model_of(settings.teacher)
    _check_model(config, model)
    boxed = {"balance": {}, **abstract_variables(model)}
    store = Storage(settings.teacher_dtype).store_all
    stored = jax.eval_shape(lambda variables: store(model, variables), nn.unbox(boxed))
    return Teacher(placed_shapes(stored, shardings(mesh, boxed)), model)


def _check_model(config: Config, theirs: ModelConfig) -> None:
    path, ours = config.training.distillation.teacher, config.model
    if theirs.vocab_size != ours.vocab_size:
        raise ConfigError(
            f"training.distillation.teacher: got {path} with vocab_size {theirs.vocab_size}, allowed: a model with the "
            f"run's vocabulary, {ours.vocab_size}"
        )
    length, longest = config.data.seq_len, theirs.max_seq_len
    check_field(length <= longest, "data.seq_len", length, f"at most max_seq_len of the teacher {path}, {longest}")
