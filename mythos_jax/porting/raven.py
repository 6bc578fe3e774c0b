"""Retrofitted models (arXiv 2511.07384): Huginn's shape, cut out of a dense Llama or OLMo-2.

The model type is Huginn's, and so is most of the config, but the layers are those of the dense model: two norms, not
four. Three fields are leftovers of Huginn and mean nothing here: `rope_base`, `block_class_name`, and the token ids.
"""

import math
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting import hugging_face, huginn, recurrent_gpt
from mythos_jax.porting.family import DTYPE_FIELDS, Family
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.layouts import FROM_HEADS, HALVES_OF_HEADS, HALVES_TO_HEADS, LINEAR, TO_HEADS
from mythos_jax.porting.tables import Row, rename, split, with_prefix

SUPPORTED = {**huginn.SUPPORTED, "tie_embeddings": False, "tie_word_embeddings": False, "qk_bias": False}
STATES = {"random": "noise", "embed-init": "injected"}  # theirs: ours
LEFT_OVER = ("rope_base", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
QKV = ("attention.q.kernel", "attention.k.kernel", "attention.v.kernel")
# Told from Llama's blocks by the tensors, not by the config.
OLMO = {"norm": "post", "qk_gain_norm": "width"}


def rows(config: ModelConfig) -> list[Row]:
    post = config.norm == "post"
    layer = [
        rename("norm_1.weight", "attention_out_norm.scale" if post else "attention_norm.scale"),
        rename("norm_2.weight", "feed_forward_out_norm.scale" if post else "feed_forward_norm.scale"),
        split("attn.Wqkv.weight", QKV, (HALVES_TO_HEADS, HALVES_TO_HEADS, TO_HEADS)),
        rename("attn.proj.weight", "attention.out.kernel", FROM_HEADS),
        split("mlp.fc.weight", ["feed_forward.gate.kernel", "feed_forward.up.kernel"], LINEAR),
        rename("mlp.proj.weight", "feed_forward.down.kernel", LINEAR),
    ]
    if config.qk_gain_norm == "width":
        layer += [rename(f"attn.{x}_norm.weight", f"attention.{x}_norm.scale", HALVES_OF_HEADS) for x in "qk"]
    table = [*huginn.MODEL, rename("lm_head.weight", "params.unembedding")]
    for theirs, ours in recurrent_gpt.layer_prefixes(config):
        table += with_prefix(layer, theirs, ours)
    return table


def to_model(fields: Fields) -> dict[str, Any]:
    """Fields of `ModelConfig`, for blocks of Llama."""
    fields.refuse_unknown()
    fields.expect(SUPPORTED)
    init = fields.section("init_values", ["embed_scale", "std"])
    common = recurrent_gpt.to_model(fields)
    if common["initial_state"] == "noise":
        common["initial_state"] = STATES[fields.choice("initial_state_mode", STATES, "random")]
    if common["initial_state"] == "noise":
        init.number("std")  # must be there
        common |= huginn.initial_state(fields, common)
    dim, heads = common["dim"], fields.integer("n_heads", low=1)
    return {
        **common,
        "max_seq_len": fields.integer("max_position_embeddings", common["max_seq_len"]),
        "vocab_size": fields.integer("padded_vocab_size", fields.integer("vocab_size")),
        "n_heads": heads,
        "n_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", dim // heads),
        **hugging_face.rope(fields),
        "activation": "swiglu",
        "hidden_dim": fields.integer("intermediate_size"),
        "norm_eps": fields.number("norm_eps"),
        "embedding_scale": init.number("embed_scale", 1.0),
        "injection": "concat",
        "tied_embedding": False,
    }


def olmo_to_model(fields: Fields) -> dict[str, Any]:
    return {**to_model(fields), **OLMO}


def from_model(config: ModelConfig) -> dict[str, Any]:
    state = {ours: theirs for theirs, ours in STATES.items()}.get(config.initial_state)
    return {
        **huginn.UNUSED,
        **SUPPORTED,
        **recurrent_gpt.from_model(config),
        **hugging_face.rope_from_model(config),
        **({"initial_state_mode": state} if state else {}),
        "n_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.gqa_head_dim,
        "max_position_embeddings": config.max_seq_len,
        "n_layers": config.prelude_layers + config.loop_layers + config.coda_layers,
        "padding_multiple": math.gcd(config.vocab_size, 4096),
        "mean_backprop_depth": min(8, config.loops),
        "effective_expected_depth": recurrent_gpt.effective_depth(config),
        "init_values": huginn.init_values(config, config.embedding_scale),
    }


CONFIG_FIELDS = (
    *huginn.CONFIG_FIELDS,
    *SUPPORTED,
    *LEFT_OVER,
    "initial_state_mode",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "auto_map",
    "use_cache",
)
CORE = "transformer.core_block.0."
SIGNATURE = ("transformer.adapter.weight", f"{CORE}attn.Wqkv.weight", "lm_head.weight")

FAMILY = Family(
    name="raven",
    rows=rows,
    to_model=to_model,
    from_model=from_model,
    config_fields=CONFIG_FIELDS,
    signature=SIGNATURE,
    buffers=hugging_face.BUFFERS,
    dtype_fields=DTYPE_FIELDS,
    auto_map=huginn.auto_map("smcleish/Recurrent-Llama-3.2-train-recurrence-4"),
)
OLMO_FAMILY = Family(
    name="raven_olmo",
    rows=rows,
    to_model=olmo_to_model,
    from_model=from_model,
    config_fields=CONFIG_FIELDS,
    signature=(*SIGNATURE, f"{CORE}attn.q_norm.weight"),
    buffers=hugging_face.BUFFERS,
    dtype_fields=DTYPE_FIELDS,
    auto_map=huginn.auto_map("smcleish/Recurrent-OLMo-2-0425-train-recurrence-4"),
)
