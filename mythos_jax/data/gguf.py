"""GGUF files (llama.cpp) through the `gguf` library: opening one, and its tokenizer as a Hugging Face `tokenizer.json`.

Of byte-level BPE, a file's metadata have the vocabulary, the merges, and a word, `tokenizer.ggml.pre`, for how text is
split before the merges are applied. The rules behind these words are llama.cpp's, which are those of the models'
published tokenizers. Of SentencePiece, they have the vocabulary with scores.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mythos_jax.data.sentence_piece import sentence_piece
from mythos_jax.errors import ConfigError, one_line

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type

# Contractions, words with one leading character, numbers of this many digits, punctuation, line ends, white space.
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
        raise ConfigError(f"{path}: needs the gguf library; pip install '.[gguf]' in the checkout") from None
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
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        allowed = "'gpt2' (byte-level BPE), 'llama' (SentencePiece's BPE)"
        raise ConfigError(f"{path}: tokenizer.ggml.model: got {model!r}, allowed: {allowed}")
    tokens: Sequence[str] = metadata.get("tokenizer.ggml.tokens", [])
    kinds: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not tokens or len(kinds) != len(tokens):
        raise ConfigError(f"{path}: tokenizer.ggml.tokens: got {len(tokens)} tokens and {len(kinds)} kinds of tokens")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, token, special=kind != USER_DEFINED)
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        **(_byte_pairs if model == "gpt2" else _sentence_pieces)(metadata, tokens, kinds, path),
        "post_processor": _beginning(metadata, tokens, path),
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _byte_pairs(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], path: Path) -> dict[str, Any]:
    pre = str(metadata.get("tokenizer.ggml.pre"))
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(f"{path}: tokenizer.ggml.pre: got {pre!r}, allowed: {', '.join(PRE_TOKENIZERS)}")
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
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


def _sentence_pieces(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], path: Path
) -> dict[str, Any]:
    scores: Sequence[float] = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    if len(scores) != len(tokens):
        raise ConfigError(f"{path}: tokenizer.ggml.scores: got {len(scores)}, allowed: one per token, {len(tokens)}")
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    add_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return sentence_piece(tokens, kinds, scores, unknown, bool(add_space))


def _beginning(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> dict[str, Any] | None:
    """The post-processor that puts a beginning of text, where there is one to put; the defaults are llama.cpp's."""
    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    adds = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")
    if not isinstance(adds, bool):
        raise ConfigError(f"{path}: tokenizer.ggml.add_bos_token: got {adds!r}, allowed: true or false")
    number = metadata.get("tokenizer.ggml.bos_token_id", 1 if kind == "llama" else None)
    if not adds or number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        allowed = f"below {len(tokens)}, the number of tokens"
        raise ConfigError(f"{path}: tokenizer.ggml.bos_token_id: got {number}, allowed: {allowed}")
    text = tokens[number]
    parts: list[dict[str, Any]] = [
        {kind: {"id": name, "type_id": i}}
        for i, sequence in enumerate("AB")
        for kind, name in [("SpecialToken", text), ("Sequence", sequence)]
    ]
    special = {text: {"id": text, "ids": [number], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": parts[:2], "pair": parts, "special_tokens": special}


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": number, "content": token, **flags, "special": special}
