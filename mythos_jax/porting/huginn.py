"""Huginn-0125 (`RavenForCausalLM`, arXiv 2502.05171)."""

import math
from collections.abc import Mapping
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.porting import recurrent_gpt
from mythos_jax.porting.family import DTYPE_FIELDS, Family
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.layouts import FROM_HEADS, LINEAR, TO_HEADS
from mythos_jax.porting.tables import Row, rename, split, with_prefix

MODEL = [
    rename("transformer.wte.weight", "params.embedding"),
    rename("transformer.adapter.weight", "params.recurrence.cell.injection.adapter.kernel", LINEAR),
    rename("transformer.ln_f.weight", "params.final_norm.scale"),
]

LAYER = [
    rename("norm_1.weight", "attention_norm.scale"),
    rename("norm_2.weight", "attention_out_norm.scale"),
    rename("norm_3.weight", "feed_forward_norm.scale"),
    rename("norm_4.weight", "feed_forward_out_norm.scale"),
    split("attn.Wqkv.weight", ["attention.q.kernel", "attention.k.kernel", "attention.v.kernel"], TO_HEADS),
    rename("attn.proj.weight", "attention.out.kernel", FROM_HEADS),
    split("mlp.fc.weight", ["feed_forward.gate.kernel", "feed_forward.up.kernel"], LINEAR),
    rename("mlp.proj.weight", "feed_forward.down.kernel", LINEAR),
]

QK_BIAS = [split("attn.qk_bias", ["attention.q_bias", "attention.k_bias"], "1 1 h k -> h k")]


def rows(config: ModelConfig) -> list[Row]:
    layer = [*LAYER, *QK_BIAS] if config.qk_bias else LAYER
    table = [*MODEL]
    for theirs, ours in recurrent_gpt.layer_prefixes(config):
        table += with_prefix(layer, theirs, ours)
    return table


SUPPORTED = {
    "bias": False,
    "tie_embeddings": True,
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "test_time_noise": 0,
}
# Any value is accepted, since none changes what the weights compute; these are written.
UNUSED = {
    "architecture_class_name": "RecurrentGPT",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "sampling_scheme": "poisson-lognormal-filling",
    "activation_checkpoint_impl": "per-iteration",
    "test_time_noise_type": "fixed",
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
}
CONFIG_FIELDS = (
    *recurrent_gpt.CONFIG_FIELDS,
    *SUPPORTED,
    *UNUSED,
    *DTYPE_FIELDS,
    "n_heads",
    "head_dim",
    "n_layers",
    "qk_bias",
    "rope_base",
    "effective_expected_depth",
    "init_values",
)


def auto_map(repository: str) -> dict[str, str]:
    """Where transformers finds the classes of a model with these authors' code."""
    return {
        "AutoConfig": f"{repository}--raven_config_minimal.RavenConfig",
        "AutoModelForCausalLM": f"{repository}--raven_modeling_minimal.RavenForCausalLM",
    }


def to_model(fields: Fields) -> dict[str, Any]:
    """Fields of `ModelConfig` from those of `RavenConfig`."""
    fields.expect(SUPPORTED)
    common = recurrent_gpt.to_model(fields)
    heads = fields.integer("n_heads")
    fields.expect({"num_attention_heads": heads, "num_key_value_heads": heads})
    _check_embed_scale(fields, common["dim"])
    depth = common["prelude_layers"] + common["loop_layers"] * common["loops"] + common["coda_layers"]
    return {
        **common,
        **initial_state(fields, common),
        # The model class builds padded_vocab_size rows, and its config sets both to the same value.
        "vocab_size": fields.integer("padded_vocab_size", fields.integer("vocab_size")),
        "n_heads": heads,
        "n_kv_heads": heads,
        "rope_theta": fields.number("rope_base"),
        "qk_bias": fields.boolean("qk_bias"),
        "activation": "swiglu",
        "hidden_dim": fields.integer("intermediate_size"),
        "norm": "sandwich",
        "norm_eps": fields.number("norm_eps"),
        "embedding_scale": math.sqrt(common["dim"]),
        "readout_norm": True,
        "injection": "concat",
        "output_init": 1 / math.sqrt(2 * depth),
    }


def from_model(config: ModelConfig) -> dict[str, Any]:
    """Fields of `RavenConfig`; correct only if `to_model` restores the config, which the caller checks."""
    return {
        **UNUSED,
        **SUPPORTED,
        **recurrent_gpt.from_model(config),
        "n_heads": config.n_heads,
        "head_dim": config.gqa_head_dim,
        "n_layers": config.prelude_layers + config.loop_layers + config.coda_layers,
        "padding_multiple": math.gcd(config.vocab_size, 4096),
        "mean_backprop_depth": min(8, config.loops),
        "qk_bias": config.qk_bias,
        "rope_base": config.rope_theta,
        "effective_expected_depth": recurrent_gpt.effective_depth(config),
        "init_values": init_values(config, math.sqrt(config.dim)),
    }


def initial_state(fields: Fields, common: Mapping[str, Any]) -> dict[str, Any]:
    """How the state starts. The released classes look only at the noise's deviation, which is 0 for zeros, and not at
    `state_init`."""
    usual = _usual_std(common["dim"])
    std = _init_values(fields).number("std", usual)
    if std <= 0:
        return {"initial_state": "zeros"}
    is_noise = common["initial_state"] == "noise" and not math.isclose(std, usual)
    return {"initial_noise_std": std} if is_noise else {}


def init_values(config: ModelConfig, embed_scale: float) -> dict[str, float]:
    """The field of this name. `std` is also how far the initial state is from zeros."""
    std = _usual_std(config.dim)
    noise = config.initial_noise_std or std
    return {
        "std": 0.0 if config.initial_state == "zeros" else noise,
        "out_proj": std / math.sqrt(2 * recurrent_gpt.effective_depth(config)),
        "embedding": std,
        "embed_scale": embed_scale,
    }


def _usual_std(dim: int) -> float:
    return math.sqrt(2 / (5 * dim))


def _init_values(fields: Fields) -> Fields:
    return fields.section("init_values", ["embed_scale", "std"])


def _check_embed_scale(fields: Fields, dim: int) -> None:
    """The released class computes it, whatever the file says."""
    scale = _init_values(fields).number("embed_scale", math.sqrt(dim))
    if not math.isclose(scale, math.sqrt(dim), rel_tol=1e-4):
        raise ConfigError(
            f"{fields.where}: init_values: embed_scale: got {scale!r}, allowed: {math.sqrt(dim):.6g}, the square root "
            "of n_embd, which the original computes"
        )


FAMILY = Family(
    name="huginn",
    rows=rows,
    to_model=to_model,
    from_model=from_model,
    config_fields=CONFIG_FIELDS,
    signature=("transformer.adapter.weight", "transformer.core_block.0.norm_3.weight"),
    tied=recurrent_gpt.TIED,
    buffers=recurrent_gpt.BUFFERS,
    stored_buffers=recurrent_gpt.stored_buffers,
    dtype_fields=DTYPE_FIELDS,
    auto_map=auto_map("tomg-group-umd/huginn-0125"),
)
