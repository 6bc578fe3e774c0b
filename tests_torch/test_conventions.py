"""What a text starts with, and how special tokens in it are read, against transformers on the same files."""

import itertools
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from mythos_jax.data.conventions import read_conventions
from mythos_jax.data.tokenizer import load_tokenizer
from tests.tokenizer_kinds import write_words

TEXTS = ("a b", "b", "<|im_start|> a <|im_end|>", "a </s> b <unk>")


@pytest.mark.parametrize("with_template", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("model_type", ["llama", None])
def test_first_tokens_and_special_tokens(tmp_path, with_template, listed, model_type):
    """Whether or not it has a template, a list of its tokens, a class, and add_bos_token (the template decides)."""
    for add, bos, eos in itertools.product([None, False, True], ["<s>", "<|im_start|>", None], ["</s>", "<|im_end|>"]):
        if (add and not with_template) or (with_template and bos is None):
            continue  # see test_add_bos_token
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "unk_token": "<unk>"}
        settings |= {"bos_token": bos} if bos else {}
        settings |= {} if add is None else {"add_bos_token": add}
        if listed:
            special = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
            settings["added_tokens_decoder"] = {"1": {**special, "single_word": False}}
        files = {"tokenizer_config": settings} | ({"config": {"model_type": model_type}} if model_type else {})
        folder = write_words(tmp_path / "model", first=bos if with_template else None, **files)
        theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
        found = read_conventions(folder, ours, folder, 100)
        for text in TEXTS:
            tokens = ours.encode(text, special_tokens=True).tolist()
            assert [*found.first_tokens, *tokens] == theirs(text)["input_ids"], settings
        assert found.special_tokens == {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
        assert found.prefix_token == (theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id)


def test_the_token_map(tmp_path):
    """Counts only if tokenizer_config.json does not list every token."""
    for listed in (False, True):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        settings |= {"added_tokens_decoder": {}} if listed else {}
        files = {"tokenizer_config": settings, "special_tokens_map": {"bos_token": {"content": "<|im_start|>"}}}
        folder = write_words(tmp_path / "model", **files)
        theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
        found = read_conventions(folder, ours, folder, 100)
        assert (found.special_tokens["bos_token"], found.prefix_token) == (theirs.bos_token, theirs.bos_token_id)


def test_chat_templates(tmp_path):
    files = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "in the config"}}
    folder = write_words(tmp_path / "model", **files)
    for content in (None, "in its own file"):
        if content:
            (folder / "chat_template.jinja").write_text(content)
        found = read_conventions(folder, load_tokenizer(folder), folder, 100)
        assert found.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = read_conventions(folder, load_tokenizer(folder), folder, 100)
    assert found.chat_template == AutoTokenizer.from_pretrained(folder).get_chat_template() == "x"


def test_a_converted_gguf(tmp_path):
    """What `convert` writes of a GGUF file is read alike: TinyLlama's kind, with a beginning of text."""
    from mythos_jax.data.conventions import gguf_files
    from tests.data.test_sentence_piece import make_vocabulary, write

    vocabulary = make_vocabulary()
    path = write(tmp_path / "model.gguf", vocabulary)
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in gguf_files(path).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(path)
    found = read_conventions(path, ours, None, len(vocabulary[0]))
    random = np.random.default_rng(0)
    for text in [
        "The quick brown fox",
        "a  b\n\n",
        "漢字 😀",
        "<s>a</s>",
        "x".join(map(chr, random.integers(32, 900, 99))),
    ]:
        tokens = ours.encode(text, special_tokens=True).tolist()
        assert [*found.first_tokens, *tokens] == theirs(text)["input_ids"]  # which may have it twice
