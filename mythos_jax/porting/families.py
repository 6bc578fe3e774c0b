"""The formats that models are read from and written to, and what each can express."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.porting import huginn, openmythos, parcae
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.tables import Row, Shape, Table, one
from mythos_jax.typed import differences, from_dict, to_dict

NATIVE = "mythos_jax"
# Fields of a config that say nothing about what the weights compute.
NOT_OF_THE_WEIGHTS = ("init_std", "output_init", "dtype", "remat", "expert_exchange")


@dataclass(frozen=True)
class Family:
    """A format. tied: their alias of a tensor and the name it is stored under. buffers: tensors of theirs that are
    recomputed here. marks: tensors that a file of this family has. fields: names their `config.json` may hold.
    """

    name: str
    rows: Callable[[ModelConfig], list[Row]]
    to_model: Callable[[Fields], dict[str, Any]]
    from_model: Callable[[ModelConfig], dict[str, Any]]
    fields: tuple[str, ...]
    tied: Mapping[str, str]
    buffers: tuple[str, ...]
    marks: tuple[str, ...]

    def table(self, config: ModelConfig) -> Table:
        return Table(self.rows(config), parameter_shapes(config))

    def model_config(self, fields: Mapping[str, Any], where: str) -> ModelConfig:
        """The config that a `config.json` describes. Raises ConfigError, naming `where` and the field."""
        fields = {name: value for name, value in fields.items() if name not in ("family", "tied")}
        try:
            if self.name == NATIVE:
                return from_dict(ModelConfig, fields, "model")
            return ModelConfig(**self.to_model(Fields(fields, where, self.fields)))
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from None

    def config_json(self, config: ModelConfig) -> dict[str, Any]:
        """What `config.json` holds for this model. Raises ConfigError with all that the family cannot express."""
        if self.name == NATIVE:
            return {"family": NATIVE, **to_dict(config)}
        lacks = inexpressible(self, config)
        if lacks:
            raise ConfigError(f"{self.name} cannot express {'; '.join(lacks)}")
        return {"family": self.name, **self.from_model(config), "tied": dict(self.tied)}


def _of(module: Any) -> Family:
    return Family(
        module.NAME,
        module.rows,
        module.to_model,
        module.from_model,
        module.FIELDS,
        module.TIED,
        module.BUFFERS,
        module.MARKS,
    )


def _native_rows(config: ModelConfig) -> list[Row]:
    return [one(path, path) for path in parameter_shapes(config)]


FAMILIES = {
    NATIVE: Family(NATIVE, _native_rows, lambda fields: {}, to_dict, (), {}, (), ("params.embedding",)),
    **{module.NAME: _of(module) for module in (openmythos, huginn, parcae)},
}


def family(name: str) -> Family:
    """Raises ConfigError for a name that is none."""
    if name not in FAMILIES:
        raise ConfigError(f"format: got {name!r}, allowed: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def recognise(fields: Mapping[str, Any] | None, names: Iterable[str], where: str) -> Family:
    """The family of a model, told by the "family" field, else by its tensors' names."""
    if fields and "family" in fields:
        if fields["family"] not in FAMILIES:
            raise ConfigError(f"{where}: family: got {fields['family']!r}, allowed: {', '.join(FAMILIES)}")
        return FAMILIES[fields["family"]]
    names = set(names)
    for candidate in FAMILIES.values():
        if names.issuperset(candidate.marks):
            return candidate
    for candidate in FAMILIES.values():  # tensors renamed or missing: what the fields look like still tells
        known = set(candidate.fields)
        if fields and known and len(known & set(fields)) > 0.7 * len(known):
            return candidate
    raise ConfigError(f"{where}: neither its fields nor its tensors are those of {', '.join(FAMILIES)}")


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of all variables by dotted path, `params.…` and `balance.…`."""
    return {path: leaf.shape for path, leaf in flatten_dict(nn.unbox(abstract_variables(config)), sep=".").items()}


def inexpressible(target: Family, config: ModelConfig) -> list[str]:
    """What of this config the family's own config cannot say: the fields that do not survive going there and back."""
    ours = to_dict(config)
    fields = Fields(target.from_model(config), target.name, target.fields)
    theirs = {**to_dict(ModelConfig()), **target.to_model(fields)}
    theirs = {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()}
    found = differences(_canonical(ours), _canonical(theirs))
    return [f"model.{name}: {json.dumps(got)} (it means {json.dumps(has)})" for name, (got, has) in found.items()]


def _canonical(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with derived values written out, and those that act nowhere left out."""
    fields = {name: value for name, value in fields.items() if name not in NOT_OF_THE_WEIGHTS}
    fields["head_dim"] = fields["head_dim"] or fields["dim"] // fields["n_heads"]
    fields["loop_hidden_dim"] = fields["loop_hidden_dim"] or fields["hidden_dim"]
    fields["shared_expert_dim"] = fields["shared_expert_dim"] or fields["expert_dim"]
    fields["lora_loops"] = fields["lora_loops"] or fields["loops"]
    unused: list[str] = []
    if fields["attention"] == "gqa":
        unused += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    else:
        unused += ["n_kv_heads", "head_dim", "qk_norm", "qk_bias"]
    if fields["feed_forward"] == "dense":
        unused += ["n_experts", "experts_per_token", "expert_dim", "n_shared_experts", "shared_expert_dim"]
    else:
        unused += ["loop_hidden_dim"]
        unused += [] if fields["n_shared_experts"] else ["shared_expert_dim"]
    if not fields["loop_embedding"]:
        unused += ["loop_embedding_scale"]
    if not fields["lora_rank"]:
        unused += ["lora_loops"]
    if fields["readout"] != "act":
        unused += ["act_threshold", "act_remainder"]
    if fields["readout"] != "act":
        unused += ["freeze_halted"]
    if not fields["prelude_layers"] + fields["coda_layers"]:
        unused += ["hidden_dim"]
    return {name: value for name, value in fields.items() if name not in unused}
