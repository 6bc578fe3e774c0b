"""Text that comes in pieces is the text that all its tokens give at once, for every kind of tokenizer.

`make fuzz` tries 600 streams of each kind: random ids, text of many scripts, and both mixed; one to five tokens at a
time; with and without a prompt, which may itself end in the middle of a character.
"""

import random

import pytest

from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.inference.detokenizer import StreamingDetokenizer, continuation_text
from tests import tokenizer_kinds
from tests.fuzz.budget import examples, no_hang

SNIPPETS = [line[i : i + 12] for line in tokenizer_kinds.CORPUS[:6] for i in range(0, len(line), 7)]
STREAMS = range(examples(40, 600))


@pytest.fixture(scope="module", params=tokenizer_kinds.KINDS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(tokenizer_kinds.save(request.param, tmp_path_factory.mktemp("tokenizers")))


def some_tokens(tokenizer, draw):
    """Encoded text, random ids (also special ones, and some beyond the vocabulary), byte tokens; or all in turn."""
    kind = draw.choice(["text", "ids", "bytes", "mixed"])
    if kind == "text":
        return tokenizer.encode("".join(draw.choices(SNIPPETS, k=draw.randint(0, 6)))).tolist()
    if kind == "ids":
        return [draw.randrange(tokenizer.vocab_size + 3) for _ in range(draw.randint(0, 40))]
    if kind == "bytes":  # of characters that are cut, repeated and out of order
        pool = sorted(tokenizer.fallback_bytes) or tokenizer.encode("漢é😀").tolist()
        return draw.choices(pool, k=draw.randint(0, 60))
    return [token for _ in range(3) for token in some_tokens(tokenizer, draw)]


def streamed(tokenizer, prompt, tokens, draw):
    detokenizer, pieces, start = StreamingDetokenizer(tokenizer, prompt), [], 0
    while start < len(tokens):
        size = draw.randint(1, 5)
        pieces.append(detokenizer.add(tokens[start : start + size]))
        start += size
    return "".join([*pieces, detokenizer.add([], last=True)])


def test_a_stream_is_the_text_decoded_at_once(tokenizer):
    for seed in STREAMS:
        draw = random.Random(seed)
        prompt = some_tokens(tokenizer, draw) if draw.random() < 0.7 else []
        tokens = some_tokens(tokenizer, draw)
        # The independent truth: two decodes of the whole, by the library.
        before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + tokens)
        same = 0
        while before[same : same + 1] and before[same : same + 1] == whole[same : same + 1]:
            same += 1
        expected = whole[same:]
        with no_hang():
            assert streamed(tokenizer, prompt, tokens, draw) == expected, (seed, prompt, tokens)
        assert continuation_text(tokenizer, prompt, tokens) == expected, (seed, prompt, tokens)


def test_a_token_costs_the_same_however_long_the_text_is(tokenizer, monkeypatch):
    """Few tokens are decoded for each new one; a run of byte tokens once, when it ends."""
    decode, decoded = tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    draw = random.Random(0)
    tokens = [token for _ in range(60) for token in some_tokens(tokenizer, draw)]
    detokenizer = StreamingDetokenizer(tokenizer)
    for token in tokens:
        detokenizer.add([token])
    assert len(tokens) > 1000
    assert sum(decoded) < 40 * len(tokens)


def test_whole_characters_are_not_held_back(tokenizer):
    """What a stream has not told yet is less than a character, or a run of byte tokens."""
    tokens = tokenizer.encode("".join(SNIPPETS)).tolist()
    detokenizer, told = StreamingDetokenizer(tokenizer), ""
    for n, token in enumerate(tokens):
        told += detokenizer.add([token])
        if token not in tokenizer.fallback_bytes:
            assert len(told) >= len(tokenizer.decode(tokens[: n + 1])) - 1
