"""What a weight format consists of: a table of tensors, a `config.json`, and the tensors it is detected by."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from mythos_jax.config import ModelConfig
from mythos_jax.config.model import EXECUTION_FIELDS, INITIALIZATION_FIELDS
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.layouts import Shape
from mythos_jax.porting.tables import Row, Table
from mythos_jax.typed import differences, to_dict

# Fields that versions before 0.2.0 added to the format's own.
ADDED_FIELDS = ("family", "tied")
# Where the configs of transformers have the dtype of the tensors: versions 4 and 5.
DTYPE_FIELDS = ("torch_dtype", "dtype")


def no_buffers(config: ModelConfig) -> dict[str, np.ndarray]:
    return {}


@dataclass(frozen=True)
class Family:
    """A weight format.

    rows: the rows of a model's table. to_model: fields of `ModelConfig` from the format's own; from_model: the
    reverse, correct only for models that the format can express. config_fields: the names of the format's own fields.
    signature: tensors that together occur in files of this format only (with those that are detected before it out of
    the way). model_types: values of "model_type" that tell it. tied: aliases of stored tensors, as alias to stored
    name, in models with a tied embedding. buffers: tensors that are recomputed here and not read, `*` for any part of
    a name; stored_buffers: those of them that the original needs in its files. zeros: tensors that some files lack,
    which are zeros then. dtype_fields: where `config.json` has the dtype of the tensors. auto_map: where transformers
    finds the classes of a model that it does not have itself. pytorch_bin: the original reads `pytorch_model.bin`,
    whole, and not safetensors.
    """

    name: str
    rows: Callable[[ModelConfig], list[Row]]
    to_model: Callable[[Fields], dict[str, Any]]
    from_model: Callable[[ModelConfig], dict[str, Any]]
    config_fields: tuple[str, ...]
    signature: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    stored_buffers: Callable[[ModelConfig], dict[str, np.ndarray]] = no_buffers
    dtype_fields: tuple[str, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)
    pytorch_bin: bool = False

    def ties(self, config: ModelConfig) -> Mapping[str, str]:
        """Aliases in the files of this model."""
        return self.tied if config.tied_embedding else {}

    def is_buffer(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.buffers)

    def table(self, config: ModelConfig) -> Table:
        return Table(self.rows(config), parameter_shapes(config))

    def model_config(self, fields: Mapping[str, Any], where: str) -> ModelConfig:
        """The config that a `config.json` describes. Raises ConfigError, naming `where` and the field."""
        try:
            return self.parse_config(own_fields(fields), where)
        except ConfigError as error:
            message = str(error)
            raise ConfigError(message if message.startswith(where) else f"{where}: {message}") from None

    def parse_config(self, fields: Mapping[str, Any], where: str) -> ModelConfig:
        return ModelConfig(**self.to_model(Fields(fields, where, self.config_fields)))

    def config_json(
        self, config: ModelConfig, dtype: str = "float32", source_fields: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The contents of `config.json`. Raises ConfigError that lists everything the format cannot express.

        dtype: of the tensors. source_fields: a `config.json` of this format that says the same (`changed_by`); what it
        has comes back unchanged.
        """
        self.require_expressible(config)
        given = source_fields or {}
        dtype = given.get("dtype") or given.get("torch_dtype") or dtype
        auto_map = {"auto_map": dict(self.auto_map)} if self.auto_map else {}
        return {**self.from_model(config), **auto_map, **given, **dict.fromkeys(self.dtype_fields, dtype)}

    def require_expressible(self, config: ModelConfig) -> None:
        """Raises ConfigError that lists everything the format cannot express."""
        problems = self.inexpressible(config)
        if problems:
            raise ConfigError(f"{self.name} cannot express {'; '.join(problems)}")

    def inexpressible(self, config: ModelConfig) -> list[str]:
        """The fields that the format cannot express: those that do not survive a round trip through its config."""
        return [
            f"model.{name}: {json.dumps(ours)} (the format implies {json.dumps(theirs)})"
            for name, (ours, theirs) in self._differences(config, self.from_model(config)).items()
        ]

    def changed_by(self, fields: Mapping[str, Any], config: ModelConfig) -> list[str]:
        """The fields of our config for which a `config.json` says something else."""
        return list(self._differences(config, fields))

    def _differences(self, config: ModelConfig, fields: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        theirs = {**to_dict(ModelConfig()), **self.to_model(Fields(fields, self.name, self.config_fields))}
        theirs = {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()}
        return differences(_effective_fields(to_dict(config)), _effective_fields(theirs))


def own_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` that are its format's own."""
    return {name: value for name, value in fields.items() if name not in ADDED_FIELDS}


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of all variables by dotted path, `params.…` and `balance.…`."""
    variables = nn.unbox(abstract_variables(config))
    return {path: leaf.shape for path, leaf in flatten_dict(variables, sep=".").items()}


def _effective_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that affect what the weights compute, with derived defaults filled in."""
    fields = dict(fields)
    fields["head_dim"] = fields["head_dim"] or fields["dim"] // fields["n_heads"]
    fields["loop_hidden_dim"] = fields["loop_hidden_dim"] or fields["hidden_dim"]
    fields["shared_expert_dim"] = fields["shared_expert_dim"] or fields["expert_dim"]
    fields["initial_noise_std"] = fields["initial_noise_std"] or math.sqrt(2 / (5 * fields["dim"]))
    fields["lora_loops"] = fields["lora_loops"] or fields["loops"]
    excluded = {*EXECUTION_FIELDS, *INITIALIZATION_FIELDS, *_unused_fields(fields)}
    return {name: value for name, value in fields.items() if name not in excluded}


def _unused_fields(fields: Mapping[str, Any]) -> list[str]:
    """The fields that have no effect because the feature they belong to is off."""
    unused: list[str] = []
    if fields["attention"] == "gqa":
        unused += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    else:
        unused += ["n_kv_heads", "head_dim", "qk_norm", "qk_gain_norm", "qk_bias", "value_bias"]
    if fields["feed_forward"] == "dense":
        unused += ["n_experts", "experts_per_token", "expert_dim", "n_shared_experts", "shared_expert_dim"]
    else:
        unused += ["loop_hidden_dim"]
        unused += [] if fields["n_shared_experts"] else ["shared_expert_dim"]
    if not fields["loop_embedding"]:
        unused += ["loop_embedding_scale"]
    if fields["rope_scaling"] == "none":
        unused += [name for name in fields if name.startswith("rope_") and name not in ("rope_theta", "rope_scaling")]
    if fields["initial_state"] != "noise":
        unused += ["initial_noise_std"]
    if not fields["lora_rank"]:
        unused += ["lora_loops"]
    if fields["readout"] != "act":
        unused += ["act_threshold", "act_remainder", "freeze_halted"]
    if not fields["prelude_layers"] + fields["coda_layers"]:
        unused += ["hidden_dim"]
    return unused
