"""`mythos retrofit`: a dense model cut into prelude, loop and coda (arXiv 2511.07384).

The prelude's output e and the state h enter the loop through one matrix, the adapter, which is Huginn's and that of the
published retrofitted models: x = [h; e] W. As it is made here by default, W passes e through and ignores h. Every loop
then computes the same, and if no layer is dropped, the looped model gives the dense model's logits at every depth. What
the state adds is learned from zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.config.model import InitialState
from mythos_jax.errors import ConfigError
from mythos_jax.porting import llama, native, raven
from mythos_jax.porting.coverage import require_tensors
from mythos_jax.porting.families import get_family
from mythos_jax.porting.family import Family, parameter_shapes
from mythos_jax.porting.reading import DerivedSource, Source, text_of
from mythos_jax.porting.saving import Written, write_directory
from mythos_jax.porting.tensor_info import TensorInfo
from mythos_jax.porting.writing import SHARD_BYTES, refuse_existing
from mythos_jax.retrofit.cut import LOOP, Cut, dense_layers
from mythos_jax.retrofit.training import TRAINING_FILE, training_tree, training_yaml

ADAPTER = f"params.{LOOP}injection.adapter.kernel"

# What makes a model dense: the fields in which a looped one differs from a plain pass over its layers.
DENSE: dict[str, Any] = {
    "loops": 1,
    "injection": "none",
    "initial_state": "injected",
    "prelude_norm": False,
    "state_norm": False,
    "readout_norm": False,
    "readout_projection": False,
    "readout": "last",
    "lora_rank": 0,
    "exit_gate": False,
    "value_gate_layers": (),
    "value_table_layers": (),
}
# Formats of a retrofitted model, in the order in which they are tried.
FORMATS = (raven.FAMILY, raven.OLMO_FAMILY, llama.NANBEIGE, native.FAMILY)


def _input(dim: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.zeros((dim, dim)), np.eye(dim)])


def _add(dim: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.eye(dim), np.eye(dim)])


def _random(dim: int, rng: np.random.Generator) -> np.ndarray:
    bound = 1 / np.sqrt(2 * dim)  # the default of torch's Linear, as in the published models
    return rng.uniform(-bound, bound, (2 * dim, dim))


# How the state h and the prelude's output e enter the loop: the adapter [2 D, D], the state's rows first.
ADAPTERS: dict[str, Callable[[int, np.random.Generator], np.ndarray] | None] = {
    "input": _input,  # e alone; what h adds is learned
    "add": _add,  # h + e
    "random": _random,
    "none": None,  # no adapter: h alone, which starts as e (Ouro, Nanbeige)
}


@dataclass(frozen=True)
class Plan:
    """How a dense model becomes a looped one. loops: the depth of its config. initial_state: before the first loop, one
    of `ModelConfig`; without an adapter it is always the prelude's output. seed: of a random adapter. format: of the
    files (default: Raven's if it can express the model, else Nanbeige's, else ours)."""

    cut: Cut
    loops: int = 4
    adapter: str = "input"
    initial_state: InitialState = "zeros"
    seed: int = 0
    format: str | None = None

    def is_exact(self, dense: ModelConfig, loops: int) -> bool:
        """Whether the looped model gives the dense model's logits at this many loops before it is trained."""
        if self.cut.dropped(len(dense_layers(dense))) or self.adapter == "random":
            return False
        one_pass = self.adapter == "none" or (self.adapter == "add" and self.initial_state == "zeros")
        return self.adapter == "input" or (one_pass and loops == 1)


@dataclass(frozen=True)
class Retrofit:
    """A retrofitted model that was written. source: it, as a source of tensors; family: the format; written: the files.
    training: the config that trains it, which is the file `training_file`."""

    source: "RetrofitSource"
    family: Family
    written: Written
    training: dict[str, Any]
    training_file: Path


def retrofit(
    dense: Source, out: str | Path, plan: Plan, *, shard_bytes: int = SHARD_BYTES, progress: bool = True
) -> Retrofit:
    """Writes the looped model as the new directory `out`; stored dtypes are kept.

    Raises ConfigError: `out` exists, the source is not dense, its tensors do not fit, a part of the model cannot be
    where the plan puts it, the format cannot express the result.
    """
    refuse_existing(out)
    require_dense(dense)
    require_tensors(dense)
    source = RetrofitSource(dense, plan)
    family = _family(source.config, plan)
    training = training_tree(Path(out), source.config, dense.tokenizer is not None)
    file = Path(out) / TRAINING_FILE
    more = {TRAINING_FILE: training_yaml(file, training)}
    written = write_directory(out, source, family, more=more, shard_bytes=shard_bytes, progress=progress)
    return Retrofit(source, family, written, training, file)


def require_dense(source: Source) -> None:
    """Raises ConfigError if the source is not one pass over its layers."""
    for name, value in DENSE.items():
        got = getattr(source.config, name)
        if got != value:
            got, value = (list(x) if isinstance(x, tuple) else x for x in (got, value))
            raise ConfigError(f"{source.path}: got model.{name} {got}, allowed: a dense model, with {value}")


class RetrofitSource(DerivedSource):
    """The looped model: the dense model's tensors under the names of their new places, and an adapter."""

    def __init__(self, dense: Source, plan: Plan):
        self._plan = plan
        config = _looped_config(dense.config, plan)
        shapes, dense_shapes = parameter_shapes(config), parameter_shapes(dense.config)
        self._taken_from: dict[str, str] = {}  # the dense model's path of each of ours that it has
        for path, shape in shapes.items():
            if path == ADAPTER:
                continue
            place = _place(path, plan.cut)
            taken = path if place is None else _moved(path, place, plan.cut, dense.config)
            if path == "params.unembedding" and path not in dense_shapes:
                taken = "params.embedding"  # a head of its own starts as the tied one
            if dense_shapes.get(taken) != shape:
                raise _misplaced(config, place, plan.cut)
            self._taken_from[path] = taken
        dtypes = {path: dense.parameter_dtype(self._taken_from.get(path, "params.embedding")) for path in shapes}
        tensors = {path: TensorInfo(shape, dtypes[path]) for path, shape in shapes.items()}
        super().__init__(dense.path, native.FAMILY, config, tensors, dense)
        if dense.directory is not None:  # its files are copied; config.json names tokens, too
            self.text = text_of(dense)

    def _read(self, stored_name: str) -> np.ndarray:
        if stored_name != ADAPTER:
            return self.base.parameter(self._taken_from[stored_name])
        make = ADAPTERS[self._plan.adapter]
        assert make is not None, "only models with an adapter have its matrix"
        return make(self.config.dim, np.random.default_rng(self._plan.seed)).astype(self.tensors[stored_name].dtype)


def _looped_config(config: ModelConfig, plan: Plan) -> ModelConfig:
    has_adapter = ADAPTERS[plan.adapter] is not None
    if config.feed_forward == "dense" and not config.prelude_layers + config.coda_layers:
        # All layers have one width, wherever they go.
        config = replace(config, hidden_dim=config.loop_hidden_dim or config.hidden_dim, loop_hidden_dim=None)
    own_head = plan.format in (raven.FAMILY.name, raven.OLMO_FAMILY.name)  # which cannot be tied
    return replace(
        config,
        prelude_layers=len(plan.cut.prelude),
        loop_layers=len(plan.cut.loop),
        coda_layers=len(plan.cut.coda),
        loops=plan.loops,
        injection="concat" if has_adapter else "none",
        initial_state=plan.initial_state if has_adapter else "injected",
        tied_embedding=config.tied_embedding and not own_head,
    )


def _family(config: ModelConfig, plan: Plan) -> Family:
    if plan.format is not None:
        family = get_family(plan.format)
        if family is native.INT8_FAMILY:
            allowed = "a format that rounds nothing, since the model is to be trained"
            raise ConfigError(f"format: got {family.name}, allowed: {allowed}")
        return family
    return next(family for family in FORMATS if not family.inexpressible(config))


def _place(path: str, cut: Cut) -> str | None:
    """The layer of the looped model that a parameter belongs to, such as `recurrence.cell.layer_0`."""
    _, _, name = path.partition(".")
    return next((place for place in cut.sources() if name.startswith(f"{place}.")), None)


def _moved(path: str, place: str, cut: Cut, dense: ModelConfig) -> str:
    """The dense model's path of a parameter of a layer."""
    return path.replace(place, dense_layers(dense)[cut.sources()[place]], 1)


def _misplaced(config: ModelConfig, place: str | None, cut: Cut) -> ConfigError:
    """The dense model's layers are not all alike, and this one is not like those of its new place."""
    assert place is not None, "models that are alike but for their layers have the same other parameters"
    part, layer = cut.part_of(place), cut.sources()[place]
    kinds = "those in the loop are mixtures of experts, those outside are not"
    if config.feed_forward == "dense":
        kinds = f"those in the loop are {config.loop_hidden_dim} wide inside, those outside {config.hidden_dim}"
    return ConfigError(
        f"--{part}: got layer {layer}, allowed: layers that stay on their side of the loop, because the model has two "
        f"kinds ({kinds})"
    )
