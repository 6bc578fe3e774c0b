"""Ouro (`OuroForCausalLM`, arXiv 2510.25741): all layers are the loop, one norm ends every loop, a gate says when to
stop."""

from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting import hugging_face
from mythos_jax.porting.family import DTYPE_FIELDS, Family
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.layouts import LINEAR
from mythos_jax.porting.tables import Row, rename
from mythos_jax.processes import log0

NORMS = {
    "input_layernorm": "attention_norm",
    "input_layernorm_2": "attention_out_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "post_attention_layernorm_2": "feed_forward_out_norm",
}
SPECIAL = {"norm": "pre_post", "state_norm": True, "final_norm": False, "exit_gate": True}
# Which loop is read out is a property of a call here (`halting`), not of the model.
READ_OUT = ("early_exit_threshold", "early_exit_step", "use_weighted_exit", "chunk_size")


def rows(config: ModelConfig) -> list[Row]:
    return [
        *hugging_face.rows(NORMS, config),
        rename("model.early_exit_gate.weight", "params.recurrence.cell.halt_kernel", LINEAR),
        rename("model.early_exit_gate.bias", "params.recurrence.cell.halt_bias"),
    ]


def to_model(fields: Fields) -> dict[str, Any]:
    _announce_read_out(fields)
    return {**hugging_face.to_model(fields), **SPECIAL, "loops": fields.integer("total_ut_steps", 4)}


def _announce_read_out(fields: Fields) -> None:
    """Says if the original would not read out the last loop, by default, for all tokens."""
    given = fields.given
    step = None if given.get("early_exit_step") is None else fields.integer("early_exit_step")
    threshold = None if given.get("early_exit_threshold") is None else fields.number("early_exit_threshold")
    what = f"{fields.where}: all loops run, though "
    if step is not None:
        log0(f"{what}early_exit_step is {step}; --loops {step + 1} reads out that one")
    elif threshold is not None and threshold < 1:
        log0(f"{what}early_exit_threshold is {threshold}; --halting gate:{threshold} follows it")
    elif given.get("use_weighted_exit") and threshold is None:
        log0(f"{fields.where}: the last loop is read out, though use_weighted_exit is true (see Mythos.expected)")


def from_model(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "ouro",
        "architectures": ["OuroForCausalLM"],
        **hugging_face.from_model(config),
        "total_ut_steps": config.loops,
        "early_exit_threshold": 1.0,
        "use_sliding_window": False,
    }


FAMILY = Family(
    name="ouro",
    rows=rows,
    to_model=to_model,
    from_model=from_model,
    config_fields=(*hugging_face.CONFIG_FIELDS, "total_ut_steps", *READ_OUT),
    signature=("model.early_exit_gate.weight",),
    model_types=("ouro",),
    tied=hugging_face.TIED,
    buffers=hugging_face.BUFFERS,
    dtype_fields=DTYPE_FIELDS,
    auto_map=hugging_face.auto_map("ByteDance/Ouro-1.4B", "ouro", "Ouro"),
)
