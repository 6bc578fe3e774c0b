"""SentencePiece tokenizers of GGUF files against the algorithm of llama.cpp, written here in the plainest way."""

from itertools import pairwise

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mythos_jax.data.conventions import gguf_files, read_conventions
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.errors import ConfigError
from tests.tokenizer_kinds import CORPUS

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DEFINED = "<tool>"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = (
    TokenType[name] for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "BYTE")
)


@pytest.fixture(scope="module")
def vocabulary():
    return make_vocabulary()


def make_vocabulary():
    """Tokens in Llama 2's order: three control tokens, bytes, pieces as they were learnt, then single characters.
    Spaces are learnt too: runs of them are tokens, as in Llama's vocabulary."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    text = [line + "      " + line[:9] for line in CORPUS]
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=420, limit_alphabet=90, show_progress=False))
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda entry: entry[1])]
    learnt = [piece for piece in pieces if len(piece) > 1]
    characters = [piece for piece in pieces if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *learnt, *characters, DEFINED]
    scores = [0.0] * 259 + [-float(i) for i in range(len(learnt) + len(characters))] + [0.0]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 260), USER_DEFINED]
    assert any("▁▁" in piece for piece in learnt)
    return tokens, scores, kinds


def write(path, vocabulary, **settings):
    tokens, scores, kinds = vocabulary
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for name, value in settings.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def greedy(text, vocabulary, add_space=True):
    """Joins, of all neighbours that make a token, those with the highest score, the first of them if several have it;
    what is no token at last is spelled in bytes."""
    tokens, scores, kinds = vocabulary
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] in (NORMAL, BYTE)}
    found = []
    for number, part in enumerate(text.split(DEFINED)):
        found += [tokens.index(DEFINED)] if number else []
        symbols = list((" " + part if add_space and part else part).replace(" ", "▁"))
        while True:
            pairs = [
                (scores[ids[left + right]], -i)
                for i, (left, right) in enumerate(pairwise(symbols))
                if left + right in ids
            ]
            if not pairs:
                break
            i = -max(pairs)[1]
            symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
        for symbol in symbols:
            found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("add_space", [True, False])
def test_ids_of_random_texts(tmp_path, vocabulary, add_space):
    path = write(tmp_path / "model.gguf", vocabulary, add_space_prefix=add_space)
    tokenizer = load_tokenizer(path)
    random = np.random.default_rng(0)
    alphabet = [*"abcdefghijklmnopqrstuvwxyz  ..,;'\"\n\t<>/s0123éżё漢😀\u200d", "  ", "\n\n", DEFINED]
    words = " ".join(CORPUS[:6]).split(" ")
    texts = ["", " ", "a", "</s>", "<s> a", "<unk>", "<0x41>", DEFINED, f"a{DEFINED} b", *CORPUS[:6]]
    for _ in range(150):
        parts = random.choice(words, 4).tolist() + random.choice(alphabet, 12).tolist()
        random.shuffle(parts)
        texts.append("".join(parts) if random.random() < 0.5 else " ".join(parts))
    for text in texts:
        got = tokenizer.encode(text).tolist()
        assert got == greedy(text, vocabulary, add_space), text
        if DEFINED not in text:  # after which a space is added, too
            assert tokenizer.decode(got) == text


def test_special_tokens_and_conventions(tmp_path, vocabulary):
    """llama.cpp's defaults: a beginning of text, 1, and an end, 2."""
    tokenizer = load_tokenizer(write(tmp_path / "model.gguf", vocabulary))
    assert tokenizer.encode("a</s>", special_tokens=True).tolist() == [*tokenizer.encode("a").tolist(), 2]
    assert (tokenizer.end_of_document, tokenizer.first_tokens) == (2, (1,))
    found = read_conventions(tmp_path / "model.gguf", tokenizer, None, len(vocabulary[0]))
    assert (found.first_tokens, found.prefix_token, found.stop_tokens) == ((1,), 1, (2,))
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "out").mkdir()
    for name, content in gguf_files(tmp_path / "model.gguf").items():
        (tmp_path / "out" / name).write_bytes(content)
    again = load_tokenizer(tmp_path / "out")
    assert again.fingerprint == tokenizer.fingerprint
    assert read_conventions(tmp_path / "out", again, tmp_path / "out", len(vocabulary[0])) == found
    without = load_tokenizer(write(tmp_path / "other.gguf", vocabulary, add_bos_token=False))
    assert without.first_tokens == ()


def test_equal_scores_are_in_the_order_of_learning(tmp_path, vocabulary):
    """Some converters write one score for all; the numbers of the tokens still say what was learnt first."""
    tokens, _, kinds = vocabulary
    equal = load_tokenizer(write(tmp_path / "model.gguf", (tokens, [-1000.0] * len(tokens), kinds)))
    for text in CORPUS[:6]:
        assert equal.encode(text).tolist() == greedy(text, vocabulary)


def test_what_is_refused(tmp_path, vocabulary):
    tokens, scores, kinds = vocabulary
    path = write(tmp_path / "scores.gguf", (tokens, scores[:-1], kinds))
    with pytest.raises(ConfigError, match=rf"tokenizer\.ggml\.scores: got {len(tokens) - 1}, allowed: one per token"):
        load_tokenizer(path)
    writer = GGUFWriter(tmp_path / "t5.gguf", "llama")
    writer.add_tokenizer_model("t5")
    writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.model: got 't5', allowed: 'gpt2' .*'llama'"):
        load_tokenizer(tmp_path / "t5.gguf")
