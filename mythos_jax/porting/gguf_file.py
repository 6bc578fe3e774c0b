"""GGUF files (llama.cpp), read through the `gguf` library, as if they were Hugging Face's.

Tensors get the names and the row order of Hugging Face's files and the metadata become fields of a `config.json`, so
that the tables of `llama.py` read them. Quantised tensors are dequantised to float32.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from einops import rearrange

from mythos_jax.config import ModelConfig
from mythos_jax.data.gguf import open_gguf
from mythos_jax.errors import ConfigError
from mythos_jax.model.layers import rope_frequencies
from mythos_jax.porting.hugging_face import rope_from_model
from mythos_jax.porting.tensor_info import TensorInfo

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
# Architectures whose queries and keys llama.cpp's converter permutes: pairs of RoPE are adjacent, as in our model.
ADJACENT = ("llama", "nanbeige")
ARCHITECTURES = (*ADJACENT, "qwen2", "qwen3", "olmo2")

# Metadata under the architecture's name that have a field of their own: theirs, and Hugging Face's.
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "num_loops": "num_loops",
    "skip_loop_final_norm": "skip_loop_final_norm",
}
CHECKED = ("attention.value_length", "rope.dimension_count", "rope.scaling.type")


class GgufFile:
    """The tensors of one `.gguf` file, and the config fields in its metadata.

    fields: of a Hugging Face `config.json`. metadata: all of the file's, by name. notes: as in `TorchFile`.
    Raises ConfigError: the library is missing, the file is damaged or cut off, or what it asks for is not supported.
    """

    notes: Sequence[str] = ()

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata, tensors = open_gguf(self.path)
        stored = {tensor.name: tensor for tensor in tensors}
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            allowed = ", ".join(ARCHITECTURES)
            raise ConfigError(f"{self.path}: general.architecture: got {self.architecture!r}, allowed: {allowed}")
        if self.metadata.get("split.count", 1) > 1:
            raise ConfigError(f"{self.path}: is one of several parts; allowed: a whole file (llama-gguf-split --merge)")
        divisors = stored.pop("rope_freqs.weight", None)
        self.fields = self._fields(tied="output.weight" not in stored)
        if divisors is not None:
            self.fields["rope_scaling"] = self._scaling(np.asarray(divisors.data))
        self._stored = {self._their_name(name): tensor for name, tensor in stored.items()}
        self.tensors = {name: self._info(tensor) for name, tensor in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype; float32 if that is quantised."""
        from gguf.quants import dequantize

        tensor, info = self._stored[name], self.tensors[name]
        kind = tensor.tensor_type.name
        if kind in _PLAIN:
            array = np.array(tensor.data).view(_PLAIN[kind]).reshape(info.shape)
        else:
            try:
                array = dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
            except NotImplementedError:
                raise ConfigError(f"{self.path}: {tensor.name}: type {kind} cannot be dequantised") from None
        return self._half_split(name, array)

    def _half_split(self, name: str, array: np.ndarray) -> np.ndarray:
        """Rows of queries and keys with Hugging Face's pairs of RoPE, channels i and i + k/2 of a head."""
        if self.architecture not in ADJACENT or not re.search(r"self_attn\.[qk]_proj", name):
            return array
        heads = self.fields["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return rearrange(array, "(h half two) ... -> (h two half) ...", h=heads, two=2)

    def _info(self, tensor: Any) -> TensorInfo:
        # GGUF counts dimensions from the innermost.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return TensorInfo(shape, np.dtype(_PLAIN.get(tensor.tensor_type.name, np.float32)))

    def _their_name(self, name: str) -> str:
        """Hugging Face's name of a tensor; the file's own if there is none, which no table then asks for."""
        norms = POST_NORMS if self.architecture == "olmo2" else PRE_NORMS
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            theirs = {**LAYER_NAMES, **norms}.get(part)
            return name if theirs is None else f"model.layers.{layer}.{theirs}.{kind}"
        part, _, kind = name.rpartition(".")
        return f"{GLOBAL_NAMES[part]}.{kind}" if part in GLOBAL_NAMES else name

    def _fields(self, tied: bool) -> dict[str, Any]:
        """Fields of a `config.json`. Metadata of the architecture that are not known here are refused."""
        prefix = f"{self.architecture}."
        own = {name.removeprefix(prefix): value for name, value in self.metadata.items() if name.startswith(prefix)}
        for name, value in own.items():
            if name not in (*FIELDS, *CHECKED) and value:
                raise ConfigError(f"{self.path}: {prefix}{name}: unknown, got {value!r}; it may change the model")
        fields = {theirs: _plain(own[name]) for name, theirs in FIELDS.items() if name in own}
        fields.setdefault("vocab_size", len(self.metadata.get("tokenizer.ggml.tokens", [])))
        fields.setdefault("rope_theta", 10_000.0)  # llama.cpp's default
        fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
        head_dim = fields.setdefault("head_dim", own.get("rope.dimension_count", _width_of_heads(fields)))
        for name in ("attention.value_length", "rope.dimension_count"):
            if own.get(name, head_dim) != head_dim:
                raise ConfigError(
                    f"{self.path}: {prefix}{name}: got {own[name]!r}, allowed: {head_dim}, the key's width"
                )
        if own.get("rope.scaling.type", "none") != "none":
            raise ConfigError(
                f"{self.path}: {prefix}rope.scaling.type: got {own['rope.scaling.type']!r}, allowed: none"
            )
        if self.architecture == "nanbeige" and "num_loops" not in fields:
            raise ConfigError(f"{self.path}: {prefix}num_loops: missing")
        return {"model_type": self.architecture, "tie_word_embeddings": tied, **fields}

    def _scaling(self, divisors: np.ndarray) -> dict[str, Any]:
        """The scaling in whose place the file has what it divides each frequency by.

        Of its numbers, only the factor differs among the published models; the others are our defaults. Raises
        ConfigError if the divisors are not Llama 3's.
        """
        scaled = ModelConfig(
            head_dim=self.fields["head_dim"],
            rope_theta=self.fields["rope_theta"],
            rope_scaling="llama3",
            rope_scaling_factor=float(divisors.max()),
        )
        expected = rope_frequencies(replace(scaled, rope_scaling="none")) / rope_frequencies(scaled)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise ConfigError(f"{self.path}: rope_freqs.weight: not the divisors of Llama 3's scaling of RoPE")
        scaling: dict[str, Any] = rope_from_model(scaled)["rope_scaling"]
        return scaling


_PLAIN: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def _plain(value: Any) -> Any:
    """A number as a person would write it: GGUF has float32, in which 1e-05 is 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _width_of_heads(fields: Mapping[str, Any]) -> Any:
    heads, dim = fields.get("num_attention_heads"), fields.get("hidden_size")
    return dim // heads if isinstance(heads, int) and isinstance(dim, int) and heads else None
