"""Tokens, drafts and stop texts of a reply, as text that arrives in pieces."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from mythos_jax.inference.detokenizer import continuation_text
from mythos_jax.serving.request import Finished, NewToken, TakenBack
from mythos_jax.serving.text import Draft, ReplyText, StopTexts
from tests import tokenizer_kinds

LENGTH = Finished("length")


def new(index, token, final=True, loops=2):
    return NewToken(index, token, loops, final, None, (), 0.0)


def reply_in_pieces(reply, tokens, cuts, end=LENGTH):
    """The pieces of a reply whose events come in batches that end at `cuts`."""
    events = [*(new(i, token) for i, token in enumerate(tokens)), end]
    ends = [*sorted(cut for cut in set(cuts) if 0 < cut < len(events)), len(events)]
    starts = [0, *ends[:-1]]
    return [reply.add(events[start:stop]) for start, stop in zip(starts, ends, strict=True)]


def naive_stop(text, stops):
    """The text before the stop text that is complete first; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.text("abé漢", max_size=24),
    st.lists(st.text("abé漢", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 80), max_size=8),
)
def test_stop_texts_are_those_of_the_whole_text(text, stops, cuts):
    """Whatever comes together, bytes by bytes."""
    tokens = ByteTokenizer().encode(text).tolist()
    reply = ReplyText(ByteTokenizer(), [65], stop_texts=stops)
    pieces = reply_in_pieces(reply, tokens, cuts)
    kept, stopped = naive_stop(text, stops)
    assert "".join(piece.text for piece in pieces) == kept
    finished = [piece for piece in pieces if piece.finished]
    assert len(finished) == 1
    assert finished[0].finished.reason == ("stop" if stopped else "length")
    assert not any(pieces[pieces.index(finished[0]) + 1 :])


def test_only_a_possible_stop_text_is_held_back():
    reply = ReplyText(ByteTokenizer(), [65], stop_texts=["END", "bye"])
    told = [reply.add([new(i, token)]).text for i, token in enumerate(b"aEbENbyEND")]
    # "E" may begin END; with "b" it does not, and "b" may begin bye.
    assert told == ["a", "", "E", "b", "", "EN", "", "by", "", ""]


def test_find_and_held():
    stops = StopTexts(["abc", "b", "aab"])
    assert stops.find("xabc", 0) == 2  # "b" is complete before "abc"
    assert stops.find("aab", 0) == 0  # both end at the same character
    assert stops.find("xyz", 0) is None
    assert StopTexts(["aab", "abab"]).held("xaba") == 3
    assert StopTexts([]).held("xaba") == 0


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
def test_the_texts_of_tokens_add_up(kind, tmp_path):
    """To the text that plain generation gives, also for tokens at random, whose bytes are no characters."""
    tokenizer = load_tokenizer(tokenizer_kinds.save(kind, tmp_path))
    rng = random.Random(0)
    prompt = tokenizer.encode("The lazy").tolist()
    for trial in range(20):
        tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(30)]
        if trial == 0:
            tokens = tokenizer.encode(" dog — naïve 今日は 😀").tolist()
        reply = ReplyText(tokenizer, prompt)
        pieces = reply_in_pieces(reply, tokens, rng.sample(range(31), 10))
        assert "".join(piece.text for piece in pieces) == continuation_text(tokenizer, prompt, tokens)
        told = [token.event for piece in pieces for token in piece.tokens]
        assert [event.token for event in told] == tokens
        assert reply.new_tokens == len(tokens)


def test_a_stop_token_is_no_text():
    reply = ReplyText(ByteTokenizer(), [65], stop_tokens=[98])
    piece = reply.add([new(0, 97), new(1, 98), Finished("stop")])
    assert (piece.text, piece.finished.reason, piece.stopped) == ("a", "stop", False)
    assert (reply.new_tokens, reply.loops) == (2, 4)
    reply = ReplyText(ByteTokenizer(), [65], stop_tokens=[98])
    assert reply.add([new(0, 98)]).stopped  # the engine looks for fewer of them
    assert not reply.add([new(1, 99)])


def test_without_a_tokenizer_there_are_tokens_only():
    reply = ReplyText(None, [1])
    piece = reply.add([new(0, 7), new(1, 8, final=False), LENGTH])
    assert ([token.event.token for token in piece.tokens], piece.text) == ([7], "")


def test_drafts_are_shown_confirmed_and_taken_back():
    reply = ReplyText(ByteTokenizer(), [65])
    piece = reply.add([new(0, 97), new(1, 98, final=False), new(2, 99, final=False)])
    assert (piece.text, piece.drafts) == ("a", [Draft(1, "b"), Draft(2, "c")])
    piece = reply.add([new(1, 98), new(3, 100, final=False)])
    assert (piece.text, piece.taken_back, piece.drafts) == ("b", None, [Draft(3, "d")])
    piece = reply.add([TakenBack(2), new(2, 120), new(3, 121, final=False)])
    assert (piece.taken_back, piece.text, piece.drafts) == (2, "x", [Draft(3, "y")])
    # An engine need not say what a final token shows.
    piece = reply.add([new(3, 122)])
    assert (piece.taken_back, piece.text, piece.drafts) == (3, "z", [])
    assert (reply.drafted, reply.accepted) == (4, 1)


def test_drafts_that_nobody_saw_need_not_be_taken_back():
    reply = ReplyText(ByteTokenizer(), [65])
    piece = reply.add([new(0, 97), new(1, 98, final=False), TakenBack(1), new(1, 99, final=False)])
    assert (piece.taken_back, piece.drafts) == (None, [Draft(1, "c")])


def test_a_draft_that_finishes_a_character_is_that_character():
    first, second = "é".encode()
    reply = ReplyText(ByteTokenizer(), [65])
    piece = reply.add([new(0, first), new(1, second, final=False)])
    assert (piece.text, piece.drafts) == ("", [Draft(1, "é")])
    assert reply.add([new(1, second)]).text == "é"


@pytest.mark.parametrize("kind", [*tokenizer_kinds.LOSSLESS, "unigram", "word_piece"])
def test_the_bytes_of_tokens_add_up(kind, tmp_path):
    """Those of every token of a text that follows another one are the text's."""
    tokenizer = load_tokenizer(tokenizer_kinds.save(kind, tmp_path))
    text = " dog stops; she is done" if kind not in tokenizer_kinds.LOSSLESS else " dog — naïve 今日は 😀"
    before = tokenizer.encode("The lazy").tolist()
    tokens = tokenizer.encode("The lazy" + text).tolist()[len(before) :]
    expected = continuation_text(tokenizer, before, tokens)
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode() == expected
    assert tokenizer.token_bytes(tokenizer.end_of_document) == tokenizer.spell([tokenizer.end_of_document]).encode()
    assert tokenizer.token_bytes(10**6) == b""
