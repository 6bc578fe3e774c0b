"""`mythos_jax.load` and what one does with a model: text, logits and evaluations as the lower levels give them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mythos_jax
from mythos_jax.config import MeshConfig, ModelConfig
from mythos_jax.data.prepare import prepare
from mythos_jax.data.tokenizer import ByteTokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.evaluate import evaluate_model
from mythos_jax.inference.generate import decode, generate, prefill
from mythos_jax.inference.text import TextStream
from mythos_jax.model.halting import Halting
from mythos_jax.porting.pretrained import save_pretrained
from tests import tiny

CONFIG = ModelConfig(
    vocab_size=ByteTokenizer().vocab_size,
    dim=32,
    max_seq_len=64,
    loops=4,
    prelude_layers=1,
    coda_layers=0,
    n_heads=2,
    n_kv_heads=1,
    hidden_dim=48,
)
TEXTS = ["", "a", "some words that are longer than the others", "naïve — 漢字"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pretrained(folder / "plain", CONFIG, tiny.variables(CONFIG))
    noise = dataclasses.replace(CONFIG, initial_state="noise")
    save_pretrained(folder / "noise", noise, tiny.variables(noise))
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return mythos_jax.load(folder / "plain", tokenizer="bytes")


def test_the_parts_of_a_model(lm, folder):
    assert lm.config.model == lm.model.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, lm.variables["params"], tiny.variables(CONFIG)["params"])
    assert lm.tokenizer.end_of_document == ByteTokenizer().end_of_document
    assert repr(lm) == f"LanguageModel({str(folder / 'plain')!r})"
    assert mythos_jax.load(folder / "plain").tokenizer is None


def test_a_mesh_of_its_own(folder):
    lm = mythos_jax.load(folder / "plain", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert (lm.mesh.shape["data"], lm.mesh.shape["fsdp"], lm.mesh.shape["tensor"]) == (2, 2, 2)
    assert not lm.variables["params"]["embedding"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    "options",
    [
        {"loops": 3},
        {"halting": "latent:0.4", "loops": 6},
        {"temperature": 1.0, "top_k": 20, "seed": 3},
        {"draft_loops": 2},
    ],
    ids=str,
)
def test_each_text_of_a_list_continues_as_it_does_alone(lm, options):
    together = lm.generate(TEXTS, max_new_tokens=12, **options)
    assert together == [lm.generate(text, max_new_tokens=12, **options) for text in TEXTS]
    assert len(set(together)) == len(TEXTS)


def test_one_seed_per_text(lm):
    options = {"max_new_tokens": 12, "temperature": 1.0}
    first, second = lm.generate(["a", "a"], seed=[1, 2], **options)
    assert first != second
    assert [first, second] == [lm.generate("a", seed=seed, **options) for seed in (1, 2)]


def test_a_policy_is_written_or_made(lm):
    options = {"max_new_tokens": 8, "loops": 6}
    written = lm.generate("a", halting="latent:0.4", stream=True, **options)
    made = lm.generate("a", halting=Halting("latent", 0.4), stream=True, **options)
    assert list(written) == list(made)
    assert written.stats.loops == made.stats.loops
    assert 1 <= np.mean(made.stats.loops) < 6


def test_a_stream_of_a_text_is_the_text(lm):
    pieces = lm.generate(TEXTS[2], max_new_tokens=20, stream=True)
    assert isinstance(pieces, TextStream)
    assert pieces.stats.loops == []
    parts = list(pieces)
    assert len(parts) > 2
    assert "".join(parts) == lm.generate(TEXTS[2], max_new_tokens=20)
    assert pieces.stats.loops == [4] * len(pieces.stats.loops)
    assert 1 <= len(pieces.stats.loops) <= 20


def test_a_stream_of_texts_is_the_texts(lm):
    parts = list(lm.generate(TEXTS, max_new_tokens=20, stream=True))
    assert ["".join(part[i] for part in parts) for i in range(len(TEXTS))] == lm.generate(TEXTS, max_new_tokens=20)


def test_no_texts(lm):
    assert lm.generate([]) == []
    assert list(lm.generate([], stream=True)) == []
    assert lm.generate("a", max_new_tokens=0) == ""


def test_texts_of_different_lengths_share_a_program(lm):
    """As do the numbers of tokens that fit after them; and padding changes nothing."""
    stream = lm.generate("a" * 20, stream=True)
    "".join(stream)
    assert 1 <= len(stream.stats.loops) <= CONFIG.max_seq_len - 21  # as many as fit
    compiled = prefill._cache_size(), decode._cache_size()
    tokens = {}
    for text in ("abcdefg", "b" * 31):
        pieces = lm.generate(text, stream=True)
        tokens[text] = "".join(pieces)
    assert (prefill._cache_size(), decode._cache_size()) == compiled
    assert lm.generate("c" * 40) != ""  # of the next width
    plain = generate(lm.model, lm.variables, [[256, *b"abcdefg"]], max_new_tokens=56, stop_tokens=[256])
    assert tokens["abcdefg"] == lm.tokenizer.decode(plain.tokens[0, : int(plain.lengths[0])].tolist())


def test_the_default_is_as_many_tokens_as_fit(lm):
    with pytest.raises(ConfigError, match="prompt: got 63 tokens and 2 new ones, allowed: at most max_seq_len, 64"):
        lm.generate("a" * 62, max_new_tokens=2)
    stream = lm.generate("a" * 62, stream=True)
    assert "".join(stream) == lm.generate("a" * 62, max_new_tokens=1)
    assert len(stream.stats.loops) == 1


def test_logits_are_those_of_the_model(lm):
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 7))

    def logits(loops, **keywords):
        return tiny.run_traced(CONFIG, lm.variables, tokens_BT, jnp.int32(loops), **keywords).logits

    expected = logits(3)
    np.testing.assert_allclose(lm.logits(tokens_BT, loops=3), expected, atol=1e-5)
    one = lm.logits(tokens_BT[0].tolist(), loops=3)
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, expected[0], atol=1e-5)
    halted = logits(6, halting=Halting("latent", 0.4))
    np.testing.assert_allclose(lm.logits(tokens_BT, loops=6, halting="latent:0.4"), halted, atol=1e-5)
    assert np.abs(halted - logits(6)).max() > 1e-3


@pytest.mark.parametrize("name", ["plain", "noise"])
def test_greedy_text_follows_the_logits(folder, name):
    """Also for a model that starts from noise: generation and logits draw the same."""
    lm = mythos_jax.load(folder / name, tokenizer="bytes")
    logits_TV = lm.logits("ab", seed=5)
    assert logits_TV.shape == (3, CONFIG.vocab_size)
    first = int(logits_TV[-1].argmax())
    assert lm.generate("ab", max_new_tokens=1, seed=5) == lm.tokenizer.decode([first])


def test_evaluate_is_that_of_its_parts(lm, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} has words and more words " * 4)
    prepare([str(tmp_path / "text")], tmp_path / "data", seq_len=16, held_out_fraction=0.3)
    found = lm.evaluate(tmp_path / "data", loops=2, halting="latent:0.5")
    expected = evaluate_model(
        lm.loaded, data=str(tmp_path / "data"), loops=[2], halting=[Halting("latent", 0.5)], progress=False
    )
    assert found.to_json() == expected.to_json()
    assert len(found.results) == 2
    assert mythos_jax.evaluate(lm, tmp_path / "data", loops=[2]).to_json()["results"] == found.to_json()["results"][:1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.logits([CONFIG.vocab_size]), "tokens: got 258 to 258, allowed: 0 to 257"),
        (lambda lm: lm.logits([]), r"tokens: got .* of shape \(0,\), allowed: integers"),
        (lambda lm: lm.logits([0.5]), "tokens: got float"),
        (lambda lm: lm.logits([1] * 65), "tokens: got 65, allowed: at most max_seq_len, 64"),
        (lambda lm: lm.logits("a", loops=0), "loops: got 0, allowed: an integer >= 1"),
        (lambda lm: lm.logits("a", halting="latent:x"), "halting policy: got 'latent:x', allowed: CRITERION:THRESHOLD"),
        (lambda lm: lm.logits("a", halting="act"), "allowed with readout last"),
        (lambda lm: lm.generate("a", max_new_tokens=4, halting="act"), "allowed with readout last"),
        (lambda lm: lm.generate("a", halting="predicted"), "got 'predicted' for weights without a predictor; `mythos"),
        (
            lambda lm: lm.evaluate("none", halting="predicted"),
            "got 'predicted' for weights without a predictor; `mythos",
        ),
        (lambda lm: lm.generate("a" * 100), "prompt: got 101 tokens and 1 new ones, allowed: at most max_seq_len, 64"),
        (
            lambda lm: lm.generate("a", draft_loops=2, temperature=1.0),
            r"temperature: got 1.0, allowed: 0 \(greedy\) with draft_loops",
        ),
        (
            lambda lm: lm.generate("a", draft_loops=2, loop_cache="last"),
            "loop_cache: got last, allowed: all .a slot for",
        ),
        (lambda lm: lm.generate("a", max_new_tokens=4, draft_loops=5), "draft_loops: got 5, allowed: 1 to loops, 4"),
        (lambda lm: lm.evaluate(), "a pretrained model has no data of its own"),
    ],
)
def test_wrong_input_is_one_line(lm, call, message):
    with pytest.raises(ConfigError, match=message) as caught:
        call(lm)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_takes_tokens_only(folder):
    lm = mythos_jax.load(folder / "plain")
    assert lm.logits([1, 2]).shape == (2, CONFIG.vocab_size)
    for call in (lm.generate, lm.logits):
        with pytest.raises(ConfigError, match=r"has no tokenizer.json; allowed: a tokenizer of your own"):
            call("a")
