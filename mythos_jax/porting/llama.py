"""Dense models of Hugging Face's transformers, as one pass of a loop over all of their layers: Llama, Mistral, SmolLM,
Qwen2 and Qwen2.5, Qwen3, OLMo-2; and Nanbeige4.2 (arXiv 2607.22083), which is Llama with more passes than one."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting import hugging_face
from mythos_jax.porting.family import DTYPE_FIELDS, Family
from mythos_jax.porting.fields import Fields

PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
POST_NORMS = {"post_attention_layernorm": "attention_out_norm", "post_feedforward_layernorm": "feed_forward_out_norm"}


def _to_model(special: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    return {**hugging_face.to_model(fields), **special}


def _from_model(model_type: str, architecture: str, config: ModelConfig) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **hugging_face.from_model(config)}


def _dense(
    name: str,
    architecture: str,
    special: Mapping[str, Any],
    signature: tuple[str, ...],
    norms: Mapping[str, str] = PRE_NORMS,
    also: tuple[str, ...] = (),
    to_model: Callable[[Mapping[str, Any], Fields], dict[str, Any]] = _to_model,
) -> Family:
    """A dense family. special: the fields of `ModelConfig` in which it differs from Llama, which none of its own fields
    gives. also: other `model_type`s of the same models."""
    return Family(
        name=name,
        rows=partial(hugging_face.rows, norms),
        to_model=partial(to_model, special),
        from_model=partial(_from_model, name, architecture),
        config_fields=hugging_face.CONFIG_FIELDS,
        signature=signature,
        model_types=(name, *also),
        tied=hugging_face.TIED,
        buffers=hugging_face.BUFFERS,
        dtype_fields=DTYPE_FIELDS,
    )


def _to_qwen3(special: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Qwen3's files may leave out the width of a head, which is then 128, whatever the other sizes are."""
    return {**_to_model(special, fields), "head_dim": fields.integer("head_dim", 128)}


ATTENTION = "model.layers.0.self_attn."
LLAMA = _dense(
    "llama",
    "LlamaForCausalLM",
    {},
    (f"{ATTENTION}q_proj.weight", "model.layers.0.input_layernorm.weight"),
    also=("mistral",),
)
QWEN2 = _dense("qwen2", "Qwen2ForCausalLM", {"qk_bias": True, "value_bias": True}, (f"{ATTENTION}q_proj.bias",))
QWEN3 = _dense(
    "qwen3",
    "Qwen3ForCausalLM",
    {"qk_gain_norm": "head"},
    (f"{ATTENTION}q_norm.weight", "model.layers.0.input_layernorm.weight"),
    to_model=_to_qwen3,
)
OLMO2 = _dense(
    "olmo2",
    "Olmo2ForCausalLM",
    {"qk_gain_norm": "width", "norm": "post"},
    (f"{ATTENTION}q_norm.weight", "model.layers.0.post_feedforward_layernorm.weight"),
    POST_NORMS,
)

# Extensions that Nanbeige's code has and that no release uses; `null`, `false`, 0 and empty mean off.
NANBEIGE_OFF = (
    "qk_layernorm",
    "enable_hyper_connection",
    "enable_mhc",
    "enable_h_res_identity",
    "enable_depth_attention",
    "enable_double_loop_split",
    "loop_share_kv",
    "loop_middle_layers",
    "mhc_diff_for_loop",
    "mhc_double_stream_position_for_loop",
    "mhc_identity_nohresparam",
    "emb_neighbor_num",
    "emb_split_num",
    "ngram_vocab_size_ratio",
    "insert_ngram_layer_idx",
    "ngram_insert_all_layers",
)
# Settings of those extensions, which do nothing on their own.
NANBEIGE_UNUSED = (
    "num_residual_streams",
    "mhc_sinkhorn_iterations",
    "mhc_init_gating_factor",
    "depth_attention_stride",
    "depth_attention_recent_window",
    "depth_attention_static_anchor_once",
    "ngram_fused_mode",
    "ngram_mod_force_prime",
    "ngram_embedding_hidden_size",
    "ngram_compressed_tokenizer",
    "ngram_layer_downproject_size",
    "emb_tp_num",
    "skip_ngram_for_input",
)
NANBEIGE_LOOPS = ("num_loops", "loop_loss_weights", "skip_loop_final_norm")


def _to_nanbeige(fields: Fields) -> dict[str, Any]:
    """Passes as its code counts them: one more than `loop_loss_weights` has entries, else `num_loops`, whose default
    is 1. The norm is part of each pass, or comes after the last."""
    fields.expect_off(NANBEIGE_OFF)
    weights = fields.sequence("loop_loss_weights")
    once = fields.boolean("skip_loop_final_norm", False)
    return {
        **hugging_face.to_model(fields),
        "loops": len(weights) + 1 if weights else fields.integer("num_loops", 1),
        "state_norm": not once,
        "final_norm": once,
    }


def _from_nanbeige(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "nanbeige",
        "architectures": ["NanbeigeForCausalLM"],
        **hugging_face.from_model(config),
        "num_loops": config.loops,
        "loop_loss_weights": [],
        "skip_loop_final_norm": config.final_norm,
    }


NANBEIGE = Family(
    name="nanbeige",
    rows=partial(hugging_face.rows, PRE_NORMS),
    to_model=_to_nanbeige,
    from_model=_from_nanbeige,
    config_fields=(*hugging_face.CONFIG_FIELDS, *NANBEIGE_LOOPS, *NANBEIGE_OFF, *NANBEIGE_UNUSED),
    signature=(),  # its tensors are Llama's
    model_types=("nanbeige",),
    tied=hugging_face.TIED,
    buffers=hugging_face.BUFFERS,
    dtype_fields=DTYPE_FIELDS,
    auto_map=hugging_face.auto_map("Nanbeige/Nanbeige4.2-3B", "nanbeige", "Nanbeige"),
)
