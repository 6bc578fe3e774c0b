"""Huginn-0125 (`RavenForCausalLM`, arXiv 2502.05171): its fields and its tensors, and ours."""

import math
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.tables import FROM_HEADS, LINEAR, TO_HEADS, Row, cut, one

NAME = "huginn"
TIED = {"lm_head.weight": "transformer.wte.weight"}
BUFFERS = ("freqs_cis",)
MARKS = ("transformer.adapter.weight", "transformer.core_block.0.attn.Wqkv.weight")

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
NOT_OF_THE_WEIGHTS = {
    "architecture_class_name": "RecurrentGPT",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "sampling_scheme": "poisson-lognormal-filling",
    "activation_checkpoint_impl": "per-iteration",
    "test_time_noise_type": "fixed",
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "torch_dtype": "float32",
}
STATES = {"like-init": "noise", "zero": "zeros"}
FIELDS = (
    *SUPPORTED,
    *NOT_OF_THE_WEIGHTS,
    "n_embd",
    "n_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_layers",
    "block_size",
    "vocab_size",
    "padded_vocab_size",
    "padding_multiple",
    "intermediate_size",
    "norm_eps",
    "state_init",
    "n_layers_in_prelude",
    "n_layers_in_recurrent_block",
    "n_layers_in_coda",
    "mean_recurrence",
    "mean_backprop_depth",
    "qk_bias",
    "rope_base",
    "effective_expected_depth",
    "init_values",
)


def to_model(fields: Fields) -> dict[str, Any]:
    """Fields of `ModelConfig` for fields of `RavenConfig`."""
    fields.fixed(SUPPORTED)
    dim, heads = fields.integer("n_embd"), fields.integer("n_heads")
    fields.fixed({"num_attention_heads": heads, "num_key_value_heads": heads})
    scale = Fields(fields.given.get("init_values") or {}, f"{fields.where}: init_values", ["embed_scale"])
    prelude, coda = fields.integer("n_layers_in_prelude"), fields.integer("n_layers_in_coda")
    layers, loops = fields.integer("n_layers_in_recurrent_block"), fields.integer("mean_recurrence")
    return {
        # The model class builds padded_vocab_size rows, and its config sets both alike.
        "vocab_size": fields.integer("padded_vocab_size", fields.integer("vocab_size")),
        "dim": dim,
        "max_seq_len": fields.integer("block_size"),
        "prelude_layers": prelude,
        "loop_layers": layers,
        "coda_layers": coda,
        "loops": loops,
        "attention": "gqa",
        "n_heads": heads,
        "n_kv_heads": heads,
        "rope_theta": fields.number("rope_base"),
        "qk_bias": fields.flag("qk_bias"),
        "feed_forward": "dense",
        "activation": "swiglu",
        "hidden_dim": fields.integer("intermediate_size"),
        "norm": "sandwich",
        "norm_eps": fields.number("norm_eps"),
        "embedding_scale": scale.number("embed_scale", math.sqrt(dim)),
        "readout_norm": True,
        "injection": "concat",
        "initial_state": STATES[fields.word("state_init", STATES, "like-init")],
        "readout": "last",
        "output_init": 1 / math.sqrt(2 * (prelude + layers * loops + coda)),
    }


def from_model(config: ModelConfig) -> dict[str, Any]:
    """Fields of `RavenConfig`; right only where `to_model` leads back (the caller checks)."""
    depth = config.prelude_layers + config.coda_layers + config.loop_layers * config.loops
    std = math.sqrt(2 / (5 * config.dim))
    return {
        **NOT_OF_THE_WEIGHTS,
        **SUPPORTED,
        "n_embd": config.dim,
        "n_heads": config.n_heads,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "head_dim": config.gqa_head_dim,
        "n_layers": config.prelude_layers + config.loop_layers + config.coda_layers,
        "block_size": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "padding_multiple": math.gcd(config.vocab_size, 4096),
        "intermediate_size": config.hidden_dim,
        "norm_eps": config.norm_eps,
        "state_init": {ours: theirs for theirs, ours in STATES.items()}.get(config.initial_state, "like-init"),
        "n_layers_in_prelude": config.prelude_layers,
        "n_layers_in_recurrent_block": config.loop_layers,
        "n_layers_in_coda": config.coda_layers,
        "mean_recurrence": config.loops,
        "mean_backprop_depth": min(8, config.loops),
        "qk_bias": config.qk_bias,
        "rope_base": config.rope_theta,
        "effective_expected_depth": depth,
        "init_values": {
            "std": std,
            "out_proj": std / math.sqrt(2 * depth),
            "embedding": std,
            "embed_scale": config.embedding_scale,
        },
    }


def rows(config: ModelConfig) -> list[Row]:
    """The table."""
    layer = [*LAYER, *(QK_BIAS if config.qk_bias else [])]
    parts = (
        ("prelude", "prelude_", config.prelude_layers),
        ("core_block", "recurrence.cell.layer_", config.loop_layers),
        ("coda", "coda_", config.coda_layers),
    )
    return [
        *MODEL,
        *(
            row.under(f"transformer.{theirs}.{i}.", f"params.{ours}{i}.")
            for theirs, ours, count in parts
            for i in range(count)
            for row in layer
        ),
    ]


MODEL = [
    one("transformer.wte.weight", "params.embedding"),
    one("transformer.adapter.weight", "params.recurrence.cell.injection.adapter.kernel", LINEAR),
    one("transformer.ln_f.weight", "params.final_norm.scale"),
]

LAYER = [
    one("norm_1.weight", "attention_norm.scale"),
    one("norm_2.weight", "attention_out_norm.scale"),
    one("norm_3.weight", "feed_forward_norm.scale"),
    one("norm_4.weight", "feed_forward_out_norm.scale"),
    cut("attn.Wqkv.weight", ["attention.q.kernel", "attention.k.kernel", "attention.v.kernel"], TO_HEADS),
    one("attn.proj.weight", "attention.out.kernel", FROM_HEADS),
    cut("mlp.fc.weight", ["feed_forward.gate.kernel", "feed_forward.up.kernel"], LINEAR),
    one("mlp.proj.weight", "feed_forward.down.kernel", LINEAR),
]

QK_BIAS = [cut("attn.qk_bias", ["attention.q_bias", "attention.k_bias"], "1 1 h k -> h k")]
