"""A text starts as the model's files say: in generation, in logits, and where special tokens are meant."""

from types import SimpleNamespace

import numpy as np
import pytest

import mythos_jax
from mythos_jax.cli import main
from mythos_jax.inference import text
from mythos_jax.porting.pretrained import save_pretrained
from tests.tiny import DENSE, variables
from tests.tokenizer_kinds import write_words


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One that puts a beginning of text, one that does not, and one whose files do not say."""
    folder = tmp_path_factory.mktemp("models")
    chat = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": "<|im_end|>"}
    for name, made in [
        ("bos", {"first": "<s>", "tokenizer_config": chat, "generation_config": {"eos_token_id": [5, 2]}}),
        ("none", {"tokenizer_config": chat}),
        ("unknown", {}),
    ]:
        save_pretrained(folder / name, DENSE, variables(DENSE))
        write_words(folder / name, **made)
    return {name: mythos_jax.load(folder / name) for name in ("bos", "none", "unknown")}


@pytest.mark.parametrize(
    ("model", "words", "special", "tokens"),
    [
        ("bos", "a b", False, [1, 6, 7]),
        ("bos", "", False, [1]),
        ("bos", "<|im_start|>a", False, [1, 0]),  # text is text: an unknown word
        ("bos", "<|im_start|>a<|im_end|>", True, [1, 4, 6, 5]),
        ("bos", "<s> a", True, [1, 6]),  # and not twice
        ("none", "a b", False, [6, 7]),
        ("none", "", False, [1]),  # something has to be there
        ("none", "<s> a", True, [1, 6]),
        ("unknown", "a b", False, [3, 6, 7]),
        ("unknown", "", False, [3]),
    ],
)
def test_logits_and_generation(models, monkeypatch, model, words, special, tokens):
    lm, seen = models[model], []

    def stub(model, variables, tokens_BT, lengths_B, *, stop_tokens, **_):
        seen.append((tokens_BT[0, : lengths_B[0]].tolist(), stop_tokens))
        return iter([SimpleNamespace(tokens=np.array([[6]]), loops=np.array([[1]]), lengths=np.array([1]))])

    monkeypatch.setattr(text, "stream", stub)
    assert lm.generate(words, special_tokens=special)
    stops = {"bos": (2, 3, 5), "none": (3, 5), "unknown": (3,)}
    assert seen == [(tokens, stops[model])]
    arguments = ["generate", str(lm.loaded.directory), words, *(["--special-tokens"] if special else [])]
    assert main(arguments) == 0
    assert seen[1] == seen[0]
    monkeypatch.setattr(text, "_logits", lambda model, variables, tokens_BT, *_: tokens_BT)
    assert lm.logits(words, special_tokens=special).tolist() == tokens


def test_a_run_follows_its_training_data(models, tmp_path):
    """Whatever its tokenizer would put: an end-of-document token before every text."""
    import dataclasses

    loaded = dataclasses.replace(models["bos"].loaded, step=3, directory=tmp_path)
    assert loaded.conventions.first_tokens == loaded.conventions.stop_tokens == (3,)
