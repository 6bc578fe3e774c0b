"""What the formats of Huginn (`RavenForCausalLM`) and Parcae have in common: names of layers and of config fields."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.porting.fields import Fields

TIED = {"lm_head.weight": "transformer.wte.weight"}
BUFFERS = ("freqs_cis",)
MOST_LAYERS = 1000  # as in `ModelConfig`

INITIAL_STATES = {"like-init": "noise", "zero": "zeros"}  # theirs: ours
CONFIG_FIELDS = (
    "block_size",
    "n_embd",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "padded_vocab_size",
    "padding_multiple",
    "norm_eps",
    "state_init",
    "n_layers_in_prelude",
    "n_layers_in_recurrent_block",
    "n_layers_in_coda",
    "mean_recurrence",
    "mean_backprop_depth",
)


def to_model(fields: Fields) -> dict[str, Any]:
    """The fields of `ModelConfig` that both formats determine alike."""
    initial_state = fields.choice("state_init", INITIAL_STATES, "like-init")
    return {
        "dim": fields.integer("n_embd", low=1),
        "max_seq_len": fields.integer("block_size"),
        "prelude_layers": fields.integer("n_layers_in_prelude", high=MOST_LAYERS),
        "loop_layers": fields.integer("n_layers_in_recurrent_block", high=MOST_LAYERS),
        "coda_layers": fields.integer("n_layers_in_coda", high=MOST_LAYERS),
        "loops": fields.integer("mean_recurrence"),
        "initial_state": INITIAL_STATES[initial_state],
        "attention": "gqa",
        "feed_forward": "dense",
        "readout": "last",
    }


def from_model(config: ModelConfig) -> dict[str, Any]:
    """The fields of both formats that are written alike."""
    their_state = {ours: theirs for theirs, ours in INITIAL_STATES.items()}
    return {
        "n_embd": config.dim,
        "block_size": config.max_seq_len,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "state_init": their_state.get(config.initial_state, "like-init"),
        "n_layers_in_prelude": config.prelude_layers,
        "n_layers_in_recurrent_block": config.loop_layers,
        "n_layers_in_coda": config.coda_layers,
        "mean_recurrence": config.loops,
    }


def effective_depth(config: ModelConfig) -> int:
    """Layers that a token passes through at the config's loops, by which the originals scale initial weights."""
    return config.prelude_layers + config.loop_layers * config.loops + config.coda_layers


def stored_buffers(config: ModelConfig) -> dict[str, np.ndarray]:
    """Cosines and sines of RoPE's angles, float32 [1, T, 1, k / 2, 2], as the originals compute and store them.

    Each step is computed in float64 and rounded, which gives the originals' numbers, up to the last bit of some.
    """
    exponents = np.arange(0, config.gqa_head_dim, 2, dtype=np.float32) / np.float32(config.gqa_head_dim)
    powers = np.float64(config.rope_theta) ** exponents.astype(np.float64)
    frequencies = np.float32(1) / powers.astype(np.float32)
    angles = np.outer(np.arange(config.max_seq_len, dtype=np.float32), frequencies).astype(np.float64)
    table = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    return {"freqs_cis": table[None, :, None]}


def layer_prefixes(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """The prefix of each layer's names, theirs and ours, from the first prelude layer to the last coda layer."""
    for i in range(config.prelude_layers):
        yield f"transformer.prelude.{i}.", f"params.prelude_{i}."
    for i in range(config.loop_layers):
        yield f"transformer.core_block.{i}.", f"params.recurrence.cell.layer_{i}."
    for i in range(config.coda_layers):
        yield f"transformer.coda.{i}.", f"params.coda_{i}."
