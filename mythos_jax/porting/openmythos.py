"""OpenMythos 0.5.0 (`open_mythos.main.OpenMythos`)."""

from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting.family import Family
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.layouts import FROM_HEADS, LINEAR, TO_HEADS
from mythos_jax.porting.tables import Row, concat, rename, stack, with_prefix

MODEL = [
    rename("embed.weight", "params.embedding"),
    rename("norm.weight", "params.final_norm.scale"),
]

NORMS = [
    rename("attn_norm.weight", "attention_norm.scale"),
    rename("ffn_norm.weight", "feed_forward_norm.scale"),
]

GQA = [
    rename("attn.wq.weight", "attention.q.kernel", TO_HEADS),
    rename("attn.wk.weight", "attention.k.kernel", TO_HEADS),
    rename("attn.wv.weight", "attention.v.kernel", TO_HEADS),
    rename("attn.wo.weight", "attention.out.kernel", FROM_HEADS),
]

FEED_FORWARD = [
    rename("gate.weight", "gate.kernel", LINEAR),
    rename("up.weight", "up.kernel", LINEAR),
    rename("down.weight", "down.kernel", LINEAR),
]

RECURRENCE = [
    rename("norm.weight", "injection.norm.scale"),
    rename("injection.log_A", "injection.log_a"),
    rename("injection.log_dt", "injection.log_dt"),
    rename("injection.B", "injection.b"),
    rename("lora.down.weight", "lora.down.kernel", LINEAR),
    rename("lora.scale.weight", "lora.scale"),
    rename("lora.B", "lora.up.kernel"),
    rename("act.halt.weight", "halt_kernel", LINEAR),
    rename("act.halt.bias", "halt_bias"),
]


def rows(config: ModelConfig) -> list[Row]:
    attention = _mla(config) if config.attention == "mla" else GQA
    layer = [*NORMS, *attention]
    dense_layer = [*layer, *with_prefix(FEED_FORWARD, "ffn.", "feed_forward.")]
    table = [*MODEL]
    for i in range(config.prelude_layers):
        table += with_prefix(dense_layer, f"prelude.{i}.", f"params.prelude_{i}.")
    for i in range(config.coda_layers):
        table += with_prefix(dense_layer, f"coda.{i}.", f"params.coda_{i}.")
    table += with_prefix(layer, "recurrent.block.", "params.recurrence.cell.layer_0.")
    table += with_prefix(RECURRENCE, "recurrent.", "params.recurrence.cell.")
    table += with_prefix(_moe(config), "recurrent.block.ffn.", "")
    return table


def _mla(config: ModelConfig) -> list[Row]:
    """Multi-head latent attention. Each head's query is [nope, rope]: two tensors of theirs, one parameter of ours."""
    query_up = ("attn.q_up_nope.weight", "attn.q_up_rope.weight")
    widths = (config.qk_nope_head_dim, config.qk_rope_head_dim)
    return [
        rename("attn.q_down.weight", "attention.q_down.kernel", LINEAR),
        rename("attn.q_norm.weight", "attention.q_norm.scale"),
        concat(query_up, "attention.q_up.kernel", TO_HEADS, axis=2, widths=widths),
        rename("attn.kv_down.weight", "attention.kv_down.kernel", LINEAR),
        rename("attn.kv_norm.weight", "attention.kv_norm.scale"),
        rename("attn.kv_up.weight", "attention.kv_up", TO_HEADS),
        rename("attn.wo.weight", "attention.out.kernel", FROM_HEADS),
    ]


def _moe(config: ModelConfig) -> list[Row]:
    """The mixture of experts of the loop's layer. Our paths are full: the router's bias is not in `params`."""
    moe = "recurrence.cell.layer_0.moe"
    table = [
        rename("router.weight", f"params.{moe}.router.kernel", LINEAR),
        rename("router_bias", f"balance.{moe}.router.bias"),
    ]
    for name in ("gate", "up", "down"):
        experts = [f"routed_experts.{i}.{name}.weight" for i in range(config.n_experts)]
        table.append(stack(experts, f"params.{moe}.{name}", LINEAR))
    for i in range(config.n_shared_experts):
        table += with_prefix(FEED_FORWARD, f"shared_experts.{i}.", f"params.{moe}.shared_{i}.")
    return table


MLA_SIZES = {  # MythosConfig's defaults; a GQA model has these fields too, without using them
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
# Integers that have the same names here and there.
SAME_NAMES = (
    "vocab_size",
    "dim",
    "n_heads",
    "n_kv_heads",
    "max_seq_len",
    "prelude_layers",
    "coda_layers",
    "n_experts",
    "n_shared_experts",
    "expert_dim",
)
# Any value is accepted, since neither changes what the weights compute; these are written.
UNUSED = {"max_output_tokens": 4096, "dropout": 0.0}
CONFIG_FIELDS = (
    *SAME_NAMES,
    *MLA_SIZES,
    *UNUSED,
    "max_loop_iters",
    "attn_type",
    "n_experts_per_tok",
    "act_threshold",
    "rope_theta",
    "lora_rank",
)


def to_model(fields: Fields) -> dict[str, Any]:
    """Fields of `ModelConfig` from those of `MythosConfig`, including what the original hard-codes."""
    sizes = {name: fields.integer(name) for name in SAME_NAMES}
    loops, experts_per_token = fields.integer("max_loop_iters"), fields.integer("n_experts_per_tok")
    return {
        **sizes,
        **{name: fields.integer(name, default) for name, default in MLA_SIZES.items()},
        "loops": loops,
        "attention": fields.choice("attn_type", ("gqa", "mla")),
        "rope_theta": fields.number("rope_theta"),
        "hidden_dim": sizes["dim"] * 4 // 3,
        "feed_forward": "moe",
        "experts_per_token": experts_per_token,
        "shared_expert_dim": sizes["expert_dim"] * experts_per_token,
        "norm_eps": 1e-6,
        "injection": "openmythos",
        "initial_state": "injected",
        "loop_embedding": True,
        "lora_rank": fields.integer("lora_rank"),
        "lora_loops": loops,
        "readout": "act",
        "act_threshold": fields.number("act_threshold"),
        "act_remainder": False,
        "freeze_halted": False,
        "init_std": 0.02,
    }


def from_model(config: ModelConfig) -> dict[str, Any]:
    """Fields of `MythosConfig`; correct only if `to_model` restores the config, which the caller checks."""
    return {
        **{name: getattr(config, name) for name in SAME_NAMES},
        **{name: getattr(config, name) or default for name, default in MLA_SIZES.items()},
        "max_loop_iters": config.lora_loops or config.loops,
        "attn_type": config.attention,
        "n_experts_per_tok": config.experts_per_token,
        "act_threshold": config.act_threshold,
        "rope_theta": config.rope_theta,
        "lora_rank": config.lora_rank,
        **UNUSED,
    }


FAMILY = Family(
    name="openmythos",
    rows=rows,
    to_model=to_model,
    from_model=from_model,
    config_fields=CONFIG_FIELDS,
    signature=("recurrent.injection.log_A",),
    tied={"head.weight": "embed.weight"},
    buffers=("freqs_cis", "freqs_cis_mla"),
    zeros=("recurrent.block.ffn.router_bias",),  # a buffer, so `named_parameters()` does not have it
)
