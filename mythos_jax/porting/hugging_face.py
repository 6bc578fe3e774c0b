"""What the `config.json` and the tensors of Hugging Face's Llama-like models have in common.

Families differ in the norms, biases and loops around it (llama.py, ouro.py). Fields that are not known here, and known
ones that ask for something else than is computed here, are refused by name.
"""

from collections.abc import Mapping
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.layouts import (
    BIAS_OF_HEADS,
    FROM_HEADS,
    HALVES,
    HALVES_OF_HEADS,
    HALVES_TO_HEADS,
    LINEAR,
    TO_HEADS,
)
from mythos_jax.porting.tables import Row, rename, with_prefix

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
BUFFERS = ("*rotary_emb.inv_freq", "*rotary_emb.cos_cached", "*rotary_emb.sin_cached")  # in files of old versions

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
)
# Of these fields no other value is implemented.
EXPECTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
}
# Any value is accepted, since none changes what the weights compute.
UNUSED = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "is_llama_config",
    "kv_channels",
    "max_window_layers",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
# The window in which a layer attends: checked by `_check_window`.
WINDOW = ("sliding_window", "use_sliding_window", "layer_types")
CONFIG_FIELDS = (*SIZES, *EXPECTED, *UNUSED, *WINDOW)

LLAMA3 = {  # theirs: ours
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_seq_len",
}


def to_model(fields: Fields) -> dict[str, Any]:
    """The fields of `ModelConfig` that all families determine alike. All layers are the loop's."""
    fields.refuse_unknown()
    fields.expect(EXPECTED)
    _check_window(fields)
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", low=1)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "dim": dim,
        "max_seq_len": fields.integer("max_position_embeddings"),
        "prelude_layers": 0,
        "loop_layers": fields.integer("num_hidden_layers"),
        "coda_layers": 0,
        "loops": 1,
        "attention": "gqa",
        "n_heads": heads,
        "n_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", dim // heads),
        "feed_forward": "dense",
        "activation": "swiglu",
        "hidden_dim": fields.integer("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps"),
        "injection": "none",
        "tied_embedding": fields.boolean("tie_word_embeddings", False),
        **rope(fields),
    }


def from_model(config: ModelConfig) -> dict[str, Any]:
    """The fields that all families write alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.loop_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.gqa_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        **rope_from_model(config),
        "tie_word_embeddings": config.tied_embedding,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def auto_map(repository: str, module: str, prefix: str) -> dict[str, str]:
    """Where transformers finds the classes of a model that it does not have itself."""
    return {
        "AutoConfig": f"{repository}--configuration_{module}.{prefix}Config",
        "AutoModel": f"{repository}--modeling_{module}.{prefix}Model",
        "AutoModelForCausalLM": f"{repository}--modeling_{module}.{prefix}ForCausalLM",
    }


def rope_from_model(config: ModelConfig) -> dict[str, Any]:
    """The fields of RoPE in both spellings: transformers 4 reads the first two, transformers 5 the last."""
    scaling = None
    if config.rope_scaling == "llama3":
        scaling = {theirs: getattr(config, ours) for theirs, ours in LLAMA3.items()} | {"rope_type": "llama3"}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
    }


def rope(fields: Fields) -> dict[str, Any]:
    """Base and scaling, from the spelling of transformers 4 (`rope_theta`, `rope_scaling`), from that of 5
    (`rope_parameters`), or from both if they agree.

    A reader that knows one spelling only would take the default base for files in the other, without an error.
    """
    theta, new = fields.given.get("rope_theta"), fields.given.get("rope_parameters")
    old = None if theta is None else _rope(fields, fields.given.get("rope_scaling"), theta, "rope_scaling")
    if new is None:
        if old is None:
            raise ConfigError(f"{fields.where}: rope_theta: missing, and so is rope_parameters")
        return old
    if not isinstance(new, Mapping) or "rope_theta" not in new:
        raise ConfigError(f"{fields.where}: rope_parameters: got {new!r}, allowed: an object with rope_theta")
    found = _rope(fields, new, new["rope_theta"], "rope_parameters")
    if old is not None and found != old:
        raise ConfigError(
            f"{fields.where}: rope_parameters: differs from rope_theta and rope_scaling, allowed: the same"
        )
    return found


def _rope(fields: Fields, scaling: Any, theta: Any, name: str) -> dict[str, Any]:
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{fields.where}: {name}: got {scaling!r}, allowed: null, or an object with rope_type")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"{fields.where}: {name}: rope_type: got {kind!r}, allowed: default, llama3")
    known = ("rope_type", "type", "rope_theta", *LLAMA3)
    inner = Fields({"rope_theta": theta, **scaling}, f"{fields.where}: {name}", known)
    inner.refuse_unknown()
    numbers: dict[str, Any] = {"rope_theta": inner.number("rope_theta")}
    if kind == "default":
        return {**numbers, "rope_scaling": "none"}
    for theirs, ours in LLAMA3.items():
        numbers[ours] = inner.integer(theirs) if theirs.startswith("original") else inner.number(theirs)
    return {**numbers, "rope_scaling": "llama3"}


def _check_window(fields: Fields) -> None:
    """A window counts unless `use_sliding_window` is false, as in Qwen's files."""
    if fields.boolean("use_sliding_window", True):
        fields.expect({"sliding_window": None})
    others = [kind for kind in fields.sequence("layer_types") if kind != "full_attention"]
    if others:
        raise ConfigError(f"{fields.where}: layer_types: got {others[0]!r}, allowed: full_attention only")


def rows(norms: Mapping[str, str], config: ModelConfig) -> list[Row]:
    """The table of a model all of whose layers are the loop's. norms: for each norm of a layer, theirs and ours."""
    table = [rename("model.embed_tokens.weight", "params.embedding")]
    layer = _layer(config, norms)
    for i in range(config.loop_layers):
        table += with_prefix(layer, f"model.layers.{i}.", f"params.recurrence.cell.layer_{i}.")
    table.append(
        rename(
            "model.norm.weight",
            "params.recurrence.cell.state_norm.scale" if config.state_norm else "params.final_norm.scale",
        )
    )
    if not config.tied_embedding:
        table.append(rename("lm_head.weight", "params.unembedding"))
    return table


def _layer(config: ModelConfig, norms: Mapping[str, str]) -> list[Row]:
    table = [rename(f"{theirs}.weight", f"{ours}.scale") for theirs, ours in norms.items()]
    for name, layout in [("q", HALVES_TO_HEADS), ("k", HALVES_TO_HEADS), ("v", TO_HEADS)]:
        table.append(rename(f"self_attn.{name}_proj.weight", f"attention.{name}.kernel", layout))
    table.append(rename("self_attn.o_proj.weight", "attention.out.kernel", FROM_HEADS))
    if config.qk_bias:
        table += [rename(f"self_attn.{x}_proj.bias", f"attention.{x}_bias", HALVES_OF_HEADS) for x in "qk"]
    if config.value_bias:
        table.append(rename("self_attn.v_proj.bias", "attention.v_bias", BIAS_OF_HEADS))
    if config.qk_gain_norm != "none":
        layout = HALVES if config.qk_gain_norm == "head" else HALVES_OF_HEADS
        table += [rename(f"self_attn.{x}_norm.weight", f"attention.{x}_norm.scale", layout) for x in "qk"]
    for name in ("gate", "up", "down"):
        table.append(rename(f"mlp.{name}_proj.weight", f"feed_forward.{name}.kernel", LINEAR))
    return table
