"""SentencePiece's byte-pair encoding, as GGUF files store it, in the terms of a Hugging Face `tokenizer.json`.

SentencePiece has no list of merges: of all neighbours whose texts together are a token, it joins those with the token
of the highest score first. So every way to write a token as two others is a merge, in the order of their scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

NORMAL, UNUSED = 1, 5  # of tokenizer.ggml.token_type; texts are never joined to tokens of other kinds
SPACE = "▁"


def sentence_piece(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float], unknown: str | None, add_space: bool
) -> dict[str, Any]:
    """The normaliser, the decoder and the model. add_space: a text is read as if a space stood before it."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if add_space else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,  # a text is one word
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges({token: i for i, token in enumerate(tokens) if kinds[i] in (NORMAL, UNUSED)}, scores),
        },
    }


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """Every pair of tokens that make a third, the likeliest of these first. Tokens with equal scores come by their
    numbers, which is the order in which they were learnt."""
    pairs = [
        (-scores[number], number, -cut, token[:cut], token[cut:])
        for token, number in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [[left, right] for *_, left, right in sorted(pairs)]
