"""Parcae (`parcae_lm.models.parcae.Parcae`, arXiv 2604.12946).

Value embeddings need a gate and a table in the same layer. The original chooses the layers of each by its own rule, so
its files hold gates without a table and tables without a gate. They have no effect, but are kept.
"""

import math
from typing import Any

from mythos_jax.config import ModelConfig
from mythos_jax.porting import recurrent_gpt
from mythos_jax.porting.family import Family
from mythos_jax.porting.fields import Fields
from mythos_jax.porting.layouts import FROM_HEADS, LINEAR, TO_HEADS
from mythos_jax.porting.tables import Row, rename, with_prefix

MODEL = [
    rename("transformer.wte.weight", "params.embedding"),
    rename("transformer.adapter.A_log", "params.recurrence.cell.injection.log_a"),
    rename("transformer.adapter.dt_bias", "params.recurrence.cell.injection.dt_bias"),
    rename("transformer.adapter.B", "params.recurrence.cell.injection.b", LINEAR),
    rename("transformer.C.weight", "params.readout_projection.kernel", LINEAR),
    rename("transformer.ln_f.weight", "params.final_norm.scale"),
]

PRELUDE_NORM = [rename("transformer.ln_prelude.weight", "params.prelude_norm.scale")]

LAYER = [
    rename("norm_1.weight", "attention_norm.scale"),
    rename("norm_2.weight", "feed_forward_norm.scale"),
    rename("attn.c_q.weight", "attention.q.kernel", TO_HEADS),
    rename("attn.c_k.weight", "attention.k.kernel", TO_HEADS),
    rename("attn.c_v.weight", "attention.v.kernel", TO_HEADS),
    rename("attn.c_proj.weight", "attention.out.kernel", FROM_HEADS),
    rename("mlp.fc.weight", "feed_forward.up.kernel", LINEAR),
    rename("mlp.proj.weight", "feed_forward.down.kernel", LINEAR),
]

VALUE_GATE = [rename("attn.ve_gate.weight", "attention.value_gate", LINEAR)]


def rows(config: ModelConfig) -> list[Row]:
    table = [*MODEL, *PRELUDE_NORM] if config.prelude_norm else [*MODEL]
    table += [rename(f"value_embeds.{i}.weight", f"params.value_table_{i}") for i in config.value_table_layers]
    for number, (theirs, ours) in enumerate(recurrent_gpt.layer_prefixes(config)):
        layer = [*LAYER, *VALUE_GATE] if number in config.value_gate_layers else LAYER
        table += with_prefix(layer, theirs, ours)
    return table


def gate_layers(prelude: int, loop: int, coda: int, loops: int, backprop_loops: int) -> tuple[int, ...]:
    """Layers that have a value gate.

    In the original, a layer has one if its number has the parity of the number of the last layer that the loop
    back-propagates through. It numbers the coda's layers after those of the *unrolled* loop.
    """
    numbers = [*range(prelude + loop), *(prelude + loop * loops + i for i in range(coda))]
    return tuple(i for i, number in enumerate(numbers) if number % 2 == (loop * backprop_loops - 1) % 2)


def table_layers(prelude: int, loop: int, coda: int) -> tuple[int, ...]:
    """Layers that have a value table: those of the last layer's parity."""
    layers = prelude + loop + coda
    return tuple(i for i in range(layers) if i % 2 == (layers - 1) % 2)


SUPPORTED = {
    "use_abacus": False,
    "randomize_positions_from": None,
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "ReLU2",
    "bias": False,
    "qk_bias": False,
    "mup_model_scaling_factor": 1,
    "debias_attention": False,
    "center_attention": False,
    "clip_qkv": None,
    "logit_softcap": None,
    "injection_type": "diagonal",
    "tie_embeddings": True,
    "model_class_name": "Parcae",
}
# Those with an embedding scale and a logit scale of 1 and noise of the same size; the first is written.
INIT_STRATEGIES = ("scaled-zero", "scaled", "scaled-geiping", "scaled-stuck", "small")
# Any value is accepted, since none changes what the weights compute; these are written.
UNUSED = {
    "name": "",
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
ROPE = {"use_rope": True, "rope_condense_ratio": 1}
CONFIG_FIELDS = (
    *recurrent_gpt.CONFIG_FIELDS,
    *SUPPORTED,
    *UNUSED,
    "init_strategy",
    "rope_settings",
    "qk_norm",
    "recurrent_embedding_dimension",
    "recurrent_intermediation_embedding_dimension",
    "recurrent_num_attention_heads",
    "prelude_norm",
)


def to_model(fields: Fields) -> dict[str, Any]:
    """Fields of `ModelConfig` from those of `ParcaeConfig`; defaults are the original's."""
    fields.expect(SUPPORTED)
    fields.choice("init_strategy", INIT_STRATEGIES, "scaled")
    common = recurrent_gpt.to_model(fields)
    dim, loops = common["dim"], common["loops"]
    heads = fields.integer("num_attention_heads")
    for name in ("num_key_value_heads", "recurrent_num_attention_heads"):
        if fields.given.get(name) is not None:
            fields.expect({name: heads})
    fields.expect({"recurrent_embedding_dimension": dim})
    rope = fields.section("rope_settings", [*ROPE, "rope_base"])
    rope.expect(ROPE)
    vocab_size, multiple = fields.integer("vocab_size"), fields.integer("padding_multiple", 512, low=1)
    has_hidden_dim = fields.given.get("intermediate_size") is not None
    stages = common["prelude_layers"], common["loop_layers"], common["coda_layers"]
    return {
        **common,
        "vocab_size": fields.integer("padded_vocab_size", math.ceil(vocab_size / multiple) * multiple),
        "n_heads": heads,
        "n_kv_heads": heads,
        "rope_theta": rope.number("rope_base", 50_000),
        "qk_norm": fields.boolean("qk_norm"),
        "activation": "relu2",
        "hidden_dim": fields.integer("intermediate_size") if has_hidden_dim else 4 * dim,
        "loop_hidden_dim": fields.integer("recurrent_intermediation_embedding_dimension"),
        "norm": "pre",
        "norm_eps": fields.number("norm_eps", 1e-5),
        "prelude_norm": fields.boolean("prelude_norm"),
        "readout_projection": True,
        "injection": "parcae",
        "output_init": 0.0,
        "value_gate_layers": gate_layers(*stages, loops, fields.integer("mean_backprop_depth")),
        "value_table_layers": table_layers(*stages),
    }


def from_model(config: ModelConfig) -> dict[str, Any]:
    """Fields of `ParcaeConfig`; correct only if `to_model` restores the config, which the caller checks."""
    return {
        **UNUSED,
        **SUPPORTED,
        **recurrent_gpt.from_model(config),
        "init_strategy": INIT_STRATEGIES[0],
        "padding_multiple": 64,
        "rope_settings": {**ROPE, "rope_base": config.rope_theta},
        "qk_norm": config.qk_norm,
        "recurrent_embedding_dimension": config.dim,
        "recurrent_intermediation_embedding_dimension": config.loop_hidden_dim or config.hidden_dim,
        "recurrent_num_attention_heads": None,
        "prelude_norm": config.prelude_norm,
        "mean_backprop_depth": _backprop_depth(config),
    }


def _backprop_depth(config: ModelConfig) -> int:
    """A mean_backprop_depth whose parity gives the value gates of this model; half of the loops is usual."""
    usual = math.ceil(config.loops / 2)
    for depth in (usual, usual + 1):
        gates = gate_layers(config.prelude_layers, config.loop_layers, config.coda_layers, config.loops, depth)
        if gates == config.value_gate_layers:
            return depth
    return usual


FAMILY = Family(
    name="parcae",
    rows=rows,
    to_model=to_model,
    from_model=from_model,
    config_fields=CONFIG_FIELDS,
    signature=("transformer.adapter.A_log",),
    tied=recurrent_gpt.TIED,
    buffers=recurrent_gpt.BUFFERS,
    stored_buffers=recurrent_gpt.stored_buffers,
    pytorch_bin=True,
)
