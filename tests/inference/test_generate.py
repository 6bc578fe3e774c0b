"""Generation against a slow loop of full forward passes of the NumPy reference, one row at a time."""

from dataclasses import replace
from inspect import Parameter, signature

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.inference.generate import GenerateResult, Setup, State, decode, generate, prefill, stream
from mythos_jax.inference.request import prepare
from mythos_jax.inference.sampling import Sampling, position_noise
from mythos_jax.inference.text import stream_rows
from mythos_jax.language_model import LanguageModel
from mythos_jax.model.cache import init_cache
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from tests import reference
from tests.cached_reference import Decoder
from tests.tiny import GQA, HUGINN, MLA, V, exact, some_tokens, variables

T, N = 6, 6
FULL = T + N  # the prompts fill the context to the last token
LENGTHS = np.array([6, 3])
UNUSED = V - 1
NOISY = replace(HUGINN, loop_layers=1, prelude_layers=0, coda_layers=0)
PROMPTS = some_tokens(1, (2, T))


def model(config):
    return Mythos(replace(config, max_seq_len=FULL))


def call(config, prompts=PROMPTS, **keywords):
    """By default with a stop token that never comes, so that most tests share one compiled program."""
    keywords = {"lengths": LENGTHS, "max_new_tokens": N, "stop_tokens": [UNUSED], **keywords}
    return generate(model(config), variables(config), prompts, **keywords)


def _empty(B):
    """What a `State` holds besides its cache."""
    grid, row = jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32)
    return jnp.zeros(B, bool), jnp.int32(1), GenerateResult(grid, row, grid)


def _setup(config, halting, B):
    sampling = Sampling(*(np.full(B, value, dtype) for value, dtype in [(0, "f4"), (0, "i4"), (1, "f4"), (0, "u4")]))
    return Setup(Mythos(config), 5, None, variables(config), halting, sampling, np.zeros(1, np.int32))


def slowly(config, row, state=None, prompts=PROMPTS, loops=None, **keywords):
    """Greedy tokens and the loops their predecessors ran; the next token must win by a clear margin."""
    text, ran = list(prompts[row, : LENGTHS[row]]), []
    for _ in range(N):
        start = None if state is None else np.asarray(state[row, : len(text)], np.float64)
        truth = reference.forward(
            config, exact(variables(config)), np.array(text), loops or config.loops, initial_state=start, **keywords
        )
        second, first = np.sort(truth.logits[-1])[-2:]
        assert first - second > 1e-3
        text.append(int(truth.logits[-1].argmax()))
        ran.append(truth.loops[-1])
    return text[LENGTHS[row] :], ran


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_greedy_equals_slow_loop(config):
    """Ragged prompts: each row as if it were alone; beyond the trained depth."""
    prompts = np.where(np.arange(T) < LENGTHS[:, None], PROMPTS, -1)  # padding may be anything
    result = call(config, prompts, loops=5, stop_tokens=[UNUSED] if config is GQA else [])
    for row in range(2):
        tokens, ran = slowly(config, row, loops=5)
        np.testing.assert_array_equal(result.tokens[row], tokens)
        np.testing.assert_array_equal(result.loops[row], ran)
    np.testing.assert_array_equal(result.lengths, [N, N])
    assert result.tokens.dtype == result.lengths.dtype == result.loops.dtype == jnp.int32
    assert len(np.unique(result.tokens)) > 2
    assert UNUSED not in np.asarray(result.tokens)


@pytest.mark.parametrize(
    ("config", "criterion", "threshold"), [(GQA, "act", 0.6), (MLA, "latent", 0.1)], ids=["gqa_act", "mla_latent"]
)
def test_halting_equals_slow_loop(config, criterion, threshold):
    result = call(config, loops=5, halting=Halting(criterion, threshold))
    for row in range(2):
        tokens, ran = slowly(config, row, loops=5, criterion=criterion, threshold=threshold)
        np.testing.assert_array_equal(result.tokens[row], tokens)
        np.testing.assert_array_equal(result.loops[row], ran)
    assert len(np.unique(result.loops)) > 1


@pytest.mark.parametrize("start", [None, "zeros"])
def test_families_that_start_from_noise(start):
    result = call(NOISY, seed=[5, 6], initial_state=start)
    positions = np.broadcast_to(np.arange(FULL), (2, FULL))
    state = position_noise(NOISY, np.array([5, 6], np.uint32), positions)
    for row in range(2):
        tokens, _ = slowly(NOISY, row, state if start is None else np.zeros_like(state))
        np.testing.assert_array_equal(result.tokens[row], tokens)


def test_stop_tokens_end_a_row_and_all_rows_end_generation():
    free = call(GQA, loops=5)
    # The first row stops at its third token, the second row continues.
    stop = int(free.tokens[0, 2])
    length = [list(row).index(stop) + 1 if stop in row else N for row in np.asarray(free.tokens)]
    assert 1 < length[0] <= 3 < length[1]
    result = call(GQA, loops=5, stop_tokens=[stop])
    np.testing.assert_array_equal(result.lengths, length)
    for row in range(2):
        for name in ("tokens", "loops"):
            expected = np.where(np.arange(N) < length[row], getattr(free, name)[row], 0)
            np.testing.assert_array_equal(getattr(result, name)[row], expected)


def test_sampling_is_reproducible_and_independent_of_the_batch():
    keywords = {"loops": 5, "temperature": 1.5, "top_k": 20, "top_p": 0.95}
    first = call(GQA, seed=[7, 8], **keywords)
    np.testing.assert_array_equal(call(GQA, seed=[7, 8], **keywords).tokens, first.tokens)
    assert (call(GQA, seed=[9, 8], **keywords).tokens[0] != first.tokens[0]).any()
    # The same two requests, each in the other's row and next to a third one.
    other = some_tokens(2, (2, T))
    for row, place, seed in [(0, 1, [3, 7]), (1, 0, [8, 3])]:
        prompts, lengths = other.copy(), np.array([4, 4])
        prompts[place], lengths[place] = PROMPTS[row], LENGTHS[row]
        again = call(GQA, prompts, lengths=lengths, seed=seed, **keywords)
        np.testing.assert_array_equal(again.tokens[place], first.tokens[row])
    # One seed is every row's seed.
    shared = call(GQA, seed=7, **keywords)
    np.testing.assert_array_equal(shared.tokens[0], first.tokens[0])


def test_top_k_one_is_greedy():
    greedy = call(GQA, loops=5)
    np.testing.assert_array_equal(call(GQA, loops=5, temperature=2.0, top_k=1, seed=3).tokens, greedy.tokens)
    np.testing.assert_array_equal(call(GQA, loops=5, temperature=2.0, top_p=1e-6, seed=3).tokens, greedy.tokens)


def test_values_do_not_compile_anew():
    call(MLA, loops=5, halting=Halting("latent", 0.1))
    compiled = prefill._cache_size(), decode._cache_size()
    for keywords in [
        {"temperature": 0.7},
        {"temperature": 1},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.5},
        {"seed": 4},
        {"seed": [2**32 - 1, 0]},
        {"lengths": [1, 2]},
        {"lengths": None},
        {"halting": Halting("latent", 0.01)},
    ]:
        call(MLA, loops=5, **{"halting": Halting("latent", 0.1), **keywords})
    assert (prefill._cache_size(), decode._cache_size()) == compiled


@pytest.mark.parametrize(
    ("config", "keywords"),
    [
        (GQA, {"halting": Halting("act", 0.6), "temperature": 0.8, "seed": [3, 4]}),
        (MLA, {"halting": Halting("latent", 0.1)}),
        (NOISY, {"seed": [5, 6]}),
    ],
    ids=["gqa_act", "mla_latent", "noise"],
)
def test_prompts_in_chunks_give_the_same(config, keywords):
    """In chunks of 2, the last tokens of the rows are in the third chunk and in the second."""
    whole, before = call(config, loops=5, **keywords), prefill._cache_size()
    result = call(config, loops=5, prefill_chunk=2, **keywords)
    for name in ("tokens", "loops", "lengths"):
        np.testing.assert_array_equal(getattr(result, name), getattr(whole, name))
    call(config, loops=5, prefill_chunk=2, **{**keywords, "lengths": [1, 5]})
    assert prefill._cache_size() == before + 1


def test_a_stop_token_in_an_early_chunk_is_final():
    """The second row's first token is drawn in the second of three chunks, and ends the row."""
    keywords = {"loops": 5, "halting": Halting("act", 0.6)}
    free = call(GQA, **keywords)
    stop = int(free.tokens[1, 0])
    assert stop not in np.asarray(free.tokens[0])
    result = call(GQA, stop_tokens=[stop], prefill_chunk=2, **keywords)
    np.testing.assert_array_equal(result.lengths, [N, 1])
    np.testing.assert_array_equal(result.tokens, [free.tokens[0], [stop] + [0] * (N - 1)])


@pytest.mark.parametrize("chunk", [6, 1])
def test_halting_by_logits_spares_prompts(chunk):
    """Prompts run all loops however they are cut; the slow decoder in NumPy gives the same tokens and exits."""
    criterion, threshold = "kl", 0.02
    result = call(MLA, loops=5, halting=Halting(criterion, threshold), prefill_chunk=chunk)
    for row in range(2):
        slow = Decoder(MLA, exact(variables(MLA)), 5, criterion=criterion, threshold=threshold)
        logits, ran = slow.feed(PROMPTS[row, : LENGTHS[row]], is_prompt=True)
        for n in range(N):
            token = int(logits[-1].argmax())
            assert (result.tokens[row, n], result.loops[row, n]) == (token, ran[-1])
            logits, ran = slow.feed(np.array([token]), is_prompt=False)
        assert slow.margin > 1e-3
    np.testing.assert_array_equal(result.loops[:, 0], [5, 5])
    assert len(np.unique(result.loops)) >= 3


def test_bounded_cache_decodes_as_the_slow_decoder():
    result = call(MLA, loops=5, loop_cache="first", halting=Halting("latent", 0.1))
    for row in range(2):
        slow = Decoder(MLA, exact(variables(MLA)), 5, "first", criterion="latent", threshold=0.1)
        logits, ran = slow.feed(PROMPTS[row, : LENGTHS[row]], is_prompt=True)
        for n in range(N):
            token = int(logits[-1].argmax())
            assert (result.tokens[row, n], result.loops[row, n]) == (token, ran[-1])
            logits, ran = slow.feed(np.array([token]), is_prompt=False)
        assert slow.margin > 1e-3
    # With a slot for each loop there is nothing to approximate.
    wide = call(MLA, loops=5, loop_cache="modulo:9", halting=Halting("latent", 0.1))
    np.testing.assert_array_equal(wide.tokens, call(MLA, loops=5, halting=Halting("latent", 0.1)).tokens)


@pytest.mark.parametrize("every", [1, 2, 100])
def test_a_stream_is_what_generate_gives_in_pieces(every):
    stop = int(call(GQA, loops=5).tokens[0, 2])
    keywords = {"lengths": LENGTHS, "max_new_tokens": N, "loops": 5, "stop_tokens": [stop]}
    whole = call(GQA, **keywords)
    compiled = prefill._cache_size(), decode._cache_size()
    pieces = list(stream(model(GQA), variables(GQA), PROMPTS, every=every, **keywords))
    assert (prefill._cache_size(), decode._cache_size()) == compiled
    assert [piece.tokens.shape[1] for piece in pieces] == {1: [1] * N, 2: [1, 2, 2, 1], 100: [1, N - 1]}[every]
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces], axis=1), whole.tokens)
    np.testing.assert_array_equal(np.concatenate([piece.loops for piece in pieces], axis=1), whole.loops)
    np.testing.assert_array_equal(sum(piece.lengths for piece in pieces), whole.lengths)


def test_a_stream_ends_with_its_last_row_and_refuses_at_once():
    stop = int(call(GQA, loops=5).tokens[0, 1])
    keywords = {"max_new_tokens": N, "loops": 5, "stop_tokens": [stop]}
    pieces = list(stream(model(GQA), variables(GQA), PROMPTS[[0, 0]], every=1, **keywords))
    assert sum(piece.tokens.shape[1] for piece in pieces) <= 2
    assert list(stream(model(GQA), variables(GQA), PROMPTS, max_new_tokens=0)) == []
    with pytest.raises(ValueError, match="every: got 0, allowed: an integer >= 1"):
        stream(model(GQA), variables(GQA), PROMPTS, every=0)
    with pytest.raises(ValueError, match="top_k: got 41"):
        stream(model(GQA), variables(GQA), PROMPTS, max_new_tokens=N, top_k=V + 1)


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa_act", "mla_kl"])
def test_nothing_of_the_caches_size_is_copied(config):
    """Decoding writes in place: besides its arguments it needs far less memory than the cache, three rows at a time."""
    B, S = 3, 3001
    halting = Halting("act", 0.6, 1, 5) if config is GQA else Halting("kl", 0.02, 1, 5)
    cache = jax.eval_shape(lambda: init_cache(config, B, S, 5))
    cell = cache.loop[0].kv.keys
    state = State(cache, *jax.eval_shape(lambda: _empty(B)))
    setup = _setup(config, halting, B)
    compiled = decode.lower(setup, state, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    sizes = compiled.memory_analysis()
    assert sizes.alias_size_in_bytes >= sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))  # donated
    assert sizes.temp_size_in_bytes < cell.size * 4
    shape = "f32[" + ",".join(map(str, cell.shape)) + "]"
    copies = [line for line in compiled.as_text().splitlines() if f"= {shape}" in line and " copy(" in line]
    assert not copies, copies


def test_equal_models_share_the_program():
    call(GQA, loops=5)
    compiled = decode._cache_size()
    call(replace(GQA), loops=5)
    assert decode._cache_size() == compiled


def test_no_new_tokens_is_an_empty_result():
    result = call(GQA, max_new_tokens=0)
    assert result.tokens.shape == result.loops.shape == (2, 0)
    np.testing.assert_array_equal(result.lengths, [0, 0])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_new_tokens": N + 1}, "prompt: got 6 tokens and 7 new ones, allowed: at most max_seq_len, 12, together"),
        ({"tokens_BT": np.zeros((1, 13), int), "lengths": None}, "prompt: got 13 tokens and 6 new ones, allowed: at "),
        (
            {"tokens_BT": np.zeros((2, 0), int), "lengths": None},
            r"tokens: got shape \(2, 0\), an empty prompt, allowed",
        ),
        ({"tokens_BT": [[1, 2], [3]]}, "tokens: got rows of different lengths, allowed: "),
        ({"tokens_BT": np.zeros(3, int)}, r"tokens: got shape \(3,\), allowed: \[B, T\]"),
        ({"tokens_BT": np.zeros((2, 3)), "lengths": None}, "tokens: got float64, allowed: integers"),
        ({"tokens_BT": np.full((2, T), V)}, r"tokens: got \[40\], allowed: 0 to 39, the vocabulary"),
        ({"tokens_BT": np.full((2, T), -1)}, r"tokens: got \[-1\], allowed: 0 to 39, the vocabulary"),
        ({"lengths": [6, 0]}, r"lengths: got \[0\], allowed: from 1 \(no prompt is empty\) to 6"),
        ({"lengths": [7, 1]}, r"lengths: got \[7\], allowed: from 1 "),
        ({"lengths": [1]}, r"lengths: got shape \(1,\), allowed: one for each of the 2 rows"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1, allowed: an integer >= 0"),
        ({"temperature": -0.1}, "temperature: got -0.1, allowed: a number >= 0"),
        ({"temperature": float("nan")}, "temperature: got nan, allowed: a number >= 0"),
        ({"top_k": -1}, r"top_k: got -1, allowed: 0 \(all\) to the vocabulary size, 40"),
        ({"top_k": V + 1}, r"top_k: got 41, allowed: 0 \(all\) to the vocabulary size, 40"),
        ({"top_p": 0.0}, r"top_p: got 0.0, allowed: a number in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p: got 1.1, allowed: a number in \(0, 1\]"),
        ({"stop_tokens": [3, V]}, r"stop_tokens: got \[40\], allowed: 0 to 39, the vocabulary"),
        ({"seed": [1, 2, 3]}, r"seed: got shape \(3,\), allowed: one integer, or one for each of the 2 rows"),
        ({"seed": -1}, "seed: got -1, allowed: integers from 0 to 2"),
        ({"seed": 2**32}, "seed: got 4294967296, allowed: integers from 0 to 2"),
        ({"loops": 0}, "loops: got 0, allowed: an integer >= 1"),
        ({"prefill_chunk": 0}, "prefill_chunk: got 0, allowed: an integer >= 1"),
        ({"loop_cache": "2"}, "loop_cache: got '2', allowed: all, last, first, or modulo:N with N >= 1"),
        ({"loop_cache": "modulo:0"}, "loop_cache: got 'modulo:0', allowed: all, last, first, or modulo:N with N >= 1"),
        ({"initial_state": "noise"}, "initial_state: got noise, allowed: 'zeros' or None"),
        ({"halting": Halting("latent")}, "halting criterion: got 'latent', allowed with readout act: act"),
    ],
)
def test_bad_input(keywords, message):
    arguments = {"tokens_BT": PROMPTS, "lengths": LENGTHS, "max_new_tokens": N, **keywords}
    with pytest.raises(ValueError, match=message) as caught:
        generate(model(GQA), variables(GQA), **arguments)
    assert "\n" not in str(caught.value).strip() or "halting" in keywords
    assert not isinstance(caught.value, jax.errors.JAXTypeError)


@pytest.mark.parametrize(("one", "other"), [(generate, prepare), (stream_rows, LanguageModel.generate)])
def test_a_keyword_has_one_default(one, other):
    """Each signature shows its defaults, so they are written more than once."""
    first, second = signature(one).parameters, signature(other).parameters
    shared = [name for name, keyword in first.items() if name in second and keyword.kind is Parameter.KEYWORD_ONLY]
    assert len(shared) > 6
    assert {name: first[name].default for name in shared} == {name: second[name].default for name in shared}
