"""GGUF files (llama.cpp) through the `gguf` library: opening one, and its tokenizer as a Hugging Face `tokenizer.json`.

A file's metadata have the vocabulary, the merges, and a word, `tokenizer.ggml.pre`, for how text is split before the
merges are applied. The rules behind these words are llama.cpp's, which are those of the models' published tokenizers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mythos_jax.errors import ConfigError, one_line

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

# Contractions, words with one leading character, numbers of so many digits, punctuation, line ends, other white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    """GPT-2's alphabet, after GPT-2's own splitting if `use_regex`."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS_APART = [{"type": "Digits", "individual_digits": True}, _byte_level(True)]
PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "command-r": _DIGITS_APART,
    "llama-bpe": [_split(_WORDS % "{1,3}"), _byte_level(False)],
    "qwen2": [_split(_WORDS % ""), _byte_level(False)],
}


def open_gguf(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """The metadata of a GGUF file by name, and its tensors (`gguf.ReaderTensor`), which stay in the file.

    Raises ConfigError: the library is missing, the file cannot be read, is damaged or cut off.
    """
    try:
        from gguf import GGUFReader  # an extra that not every installation has
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ConfigError(f"{path}: needs the gguf library; pip install 'mythos-jax[gguf]'") from None
    try:
        reader = GGUFReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None
    except Exception as error:  # the library checks little, and NumPy raises errors of many kinds
        message = one_line(error, limit=200)
        if "GGMLQuantizationType" in message:
            raise ConfigError(
                f"{path}: has a tensor of a type that the gguf library here does not know ({message})"
            ) from None
        raise ConfigError(f"{path}: damaged or truncated GGUF file ({message})") from None


def tokenizer_json(path: Path) -> bytes:
    """The tokenizer of a GGUF file as the content of a `tokenizer.json`.

    Raises ConfigError as `open_gguf` does, and for a kind of tokenizer that is not supported.
    """
    metadata, _ = open_gguf(path)
    model, pre = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    if model != "gpt2":
        raise ConfigError(f"{path}: tokenizer.ggml.model: got {model!r}, allowed: 'gpt2' (byte-level BPE)")
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(f"{path}: tokenizer.ggml.pre: got {pre!r}, allowed: {', '.join(PRE_TOKENIZERS)}")
    tokens: Sequence[str] = metadata.get("tokenizer.ggml.tokens", [])
    kinds: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not tokens or len(kinds) != len(tokens):
        raise ConfigError(f"{path}: tokenizer.ggml.tokens: got {len(tokens)} tokens and {len(kinds)} kinds of tokens")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, token, special=kind == CONTROL)
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # a byte without a token vanishes
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",  # a word that is a token is that token
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", [])],
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": number, "content": token, **flags, "special": special}
