"""Parcae (`parcae_lm.models.parcae.Parcae`, arXiv 2604.12946): its fields and its tensors, and ours."""

import math
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.tables import FROM_HEADS, LINEAR, TO_HEADS, Row, one

NAME = "parcae"
TIED = {"lm_head.weight": "transformer.wte.weight"}
BUFFERS = ("freqs_cis",)
MARKS = ("transformer.adapter.A_log",)

SUPPORTED = {
    "use_abacus": False,
    "randomize_positions_from": None,
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "ReLU2",
    "bias": False,
    "qk_bias": False,
    "init_strategy": "scaled-zero",  # it sets the embedding scale to 1
    "mup_model_scaling_factor": 1,
    "debias_attention": False,
    "center_attention": False,
    "clip_qkv": None,
    "logit_softcap": None,
    "injection_type": "diagonal",
    "tie_embeddings": True,
    "model_class_name": "Parcae",
}
NOT_OF_THE_WEIGHTS = {
    "name": "",
    "padding_multiple": 64,
    "attn_impl": "flash",
    "init_orthogonal": True,
    "skip_initialization": False,
    "use_fused_head": "pytorch",
    "activation_checkpoint_impl": "per-iteration",
    "simple_ops": False,
    "strategy": "single",
    "sampling_scheme": "poisson-truncated-full",
    "lockstep_n": False,
    "lockstep_k": False,
    "curriculum_target": "forward",
    "recurrent_iteration_method": "per-sequence",
    "_class_name": "ParcaeConfig",
}
STATES = {"like-init": "noise", "zero": "zeros"}
ROPE = {"use_rope": True, "rope_condense_ratio": 1}
FIELDS = (
    *SUPPORTED,
    *NOT_OF_THE_WEIGHTS,
    "block_size",
    "n_embd",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "padded_vocab_size",
    "rope_settings",
    "norm_eps",
    "qk_norm",
    "n_layers_in_prelude",
    "n_layers_in_recurrent_block",
    "n_layers_in_coda",
    "state_init",
    "recurrent_embedding_dimension",
    "recurrent_intermediation_embedding_dimension",
    "recurrent_num_attention_heads",
    "prelude_norm",
    "mean_recurrence",
    "mean_backprop_depth",
)


def to_model(fields: Fields) -> dict[str, Any]:
    """Fields of `ModelConfig` for fields of `ParcaeConfig`; defaults are the original's."""
    fields.fixed(SUPPORTED)
    dim, heads = fields.integer("n_embd"), fields.integer("num_attention_heads")
    if fields.given.get("num_key_value_heads") is not None:
        fields.fixed({"num_key_value_heads": heads})
    fields.fixed({"recurrent_embedding_dimension": dim})
    if fields.given.get("recurrent_num_attention_heads") is not None:
        fields.fixed({"recurrent_num_attention_heads": heads})
    rope = Fields(fields.given.get("rope_settings") or {}, f"{fields.where}: rope_settings", [*ROPE, "rope_base"])
    rope.fixed(ROPE)
    parts = [fields.integer(f"n_layers_in_{part}") for part in ("prelude", "recurrent_block", "coda")]
    loops, backward = fields.integer("mean_recurrence"), fields.integer("mean_backprop_depth")
    vocabulary, multiple = fields.integer("vocab_size"), fields.integer("padding_multiple", 512)
    hidden = fields.given.get("intermediate_size")
    return {
        "vocab_size": fields.integer("padded_vocab_size", math.ceil(vocabulary / multiple) * multiple),
        "dim": dim,
        "max_seq_len": fields.integer("block_size"),
        "prelude_layers": parts[0],
        "loop_layers": parts[1],
        "coda_layers": parts[2],
        "loops": loops,
        "attention": "gqa",
        "n_heads": heads,
        "n_kv_heads": heads,
        "rope_theta": rope.number("rope_base", 50_000),
        "qk_norm": fields.flag("qk_norm"),
        "feed_forward": "dense",
        "activation": "relu2",
        "hidden_dim": 4 * dim if hidden is None else fields.integer("intermediate_size"),
        "loop_hidden_dim": fields.integer("recurrent_intermediation_embedding_dimension"),
        "norm": "pre",
        "norm_eps": fields.number("norm_eps", 1e-5),
        "prelude_norm": fields.flag("prelude_norm"),
        "readout_projection": True,
        "injection": "parcae",
        "initial_state": STATES[fields.word("state_init", STATES, "like-init")],
        "readout": "last",
        "output_init": 0.0,
        "value_gate_layers": gate_layers(*parts, loops, backward),
        "value_table_layers": table_layers(*parts),
    }


def from_model(config: ModelConfig) -> dict[str, Any]:
    """Fields of `ParcaeConfig`; right only where `to_model` leads back (the caller checks)."""
    parts = (config.prelude_layers, config.loop_layers, config.coda_layers)
    # Which layers hold a gate depends on the parity of mean_backprop_depth: take the depth that gives this file's.
    usual = math.ceil(config.loops / 2)
    depths = (usual, usual + 1)
    fits = [depth for depth in depths if gate_layers(*parts, config.loops, depth) == config.value_gate_layers]
    return {
        **NOT_OF_THE_WEIGHTS,
        **SUPPORTED,
        "block_size": config.max_seq_len,
        "n_embd": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "rope_settings": {**ROPE, "rope_base": config.rope_theta},
        "norm_eps": config.norm_eps,
        "qk_norm": config.qk_norm,
        "n_layers_in_prelude": parts[0],
        "n_layers_in_recurrent_block": parts[1],
        "n_layers_in_coda": parts[2],
        "state_init": {ours: theirs for theirs, ours in STATES.items()}.get(config.initial_state, "like-init"),
        "recurrent_embedding_dimension": config.dim,
        "recurrent_intermediation_embedding_dimension": config.loop_hidden_dim or config.hidden_dim,
        "recurrent_num_attention_heads": None,
        "prelude_norm": config.prelude_norm,
        "mean_recurrence": config.loops,
        "mean_backprop_depth": (fits or depths)[0],
    }


def gate_layers(prelude: int, loop: int, coda: int, loops: int, backward: int) -> tuple[int, ...]:
    """Layers that hold a value gate. The original compares the parity of a layer's number with that of the layers it
    back-propagates through, and numbers the coda after the *unrolled* loop."""
    numbers = [*range(prelude + loop), *(prelude + loop * loops + i for i in range(coda))]
    return tuple(i for i, number in enumerate(numbers) if number % 2 == (loop * backward - 1) % 2)


def table_layers(prelude: int, loop: int, coda: int) -> tuple[int, ...]:
    """Layers that hold a value table; a table without a gate, or a gate without a table, acts nowhere."""
    layers = prelude + loop + coda
    return tuple(i for i in range(layers) if i % 2 == (layers - 1) % 2)


def rows(config: ModelConfig) -> list[Row]:
    """The table."""
    prelude, loop = config.prelude_layers, config.loop_layers
    parts = (
        ("prelude", "prelude_", range(prelude)),
        ("core_block", "recurrence.cell.layer_", range(prelude, prelude + loop)),
        ("coda", "coda_", range(prelude + loop, prelude + loop + config.coda_layers)),
    )
    table = [*MODEL, *(PRELUDE_NORM if config.prelude_norm else [])]
    table += [one(f"value_embeds.{i}.weight", f"params.value_table_{i}") for i in config.value_table_layers]
    for theirs, ours, layers in parts:
        for i, layer in enumerate(layers):
            gate = GATE if layer in config.value_gate_layers else []
            table += [row.under(f"transformer.{theirs}.{i}.", f"params.{ours}{i}.") for row in (*LAYER, *gate)]
    return table


MODEL = [
    one("transformer.wte.weight", "params.embedding"),
    one("transformer.adapter.A_log", "params.recurrence.cell.injection.log_a"),
    one("transformer.adapter.dt_bias", "params.recurrence.cell.injection.dt_bias"),
    one("transformer.adapter.B", "params.recurrence.cell.injection.b", LINEAR),
    one("transformer.C.weight", "params.readout_projection.kernel", LINEAR),
    one("transformer.ln_f.weight", "params.final_norm.scale"),
]

PRELUDE_NORM = [one("transformer.ln_prelude.weight", "params.prelude_norm.scale")]

LAYER = [
    one("norm_1.weight", "attention_norm.scale"),
    one("norm_2.weight", "feed_forward_norm.scale"),
    one("attn.c_q.weight", "attention.q.kernel", TO_HEADS),
    one("attn.c_k.weight", "attention.k.kernel", TO_HEADS),
    one("attn.c_v.weight", "attention.v.kernel", TO_HEADS),
    one("attn.c_proj.weight", "attention.out.kernel", FROM_HEADS),
    one("mlp.fc.weight", "feed_forward.up.kernel", LINEAR),
    one("mlp.proj.weight", "feed_forward.down.kernel", LINEAR),
]

GATE = [one("attn.ve_gate.weight", "attention.value_gate", LINEAR)]
