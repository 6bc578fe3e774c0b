"""lm-evaluation-harness on a small local multiple-choice task, a rolling perplexity and a generation, against a direct
computation from logits in float64. Run by `make test-torch`, whose environment has the lm-eval extra."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

if "CI" not in os.environ:  # there its absence is a failure
    pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

from mythos_jax.cli import main
from mythos_jax.inference.generate import generate
from mythos_jax.runs.load import load_model

CONFIG = {
    "name": "tiny",
    "model": {"dim": 32, "max_seq_len": 48, "loops": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 48},
    "training": {"steps": 3, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 1},
    "evaluation": {"batch_size": 4},
}
QUESTIONS = [
    {"question": "document 1 has", "choices": ["words", "and", "more"], "gold": 0},
    {"question": "more words", "choices": ["document", "0 words and more words than fit", "ä"], "gold": 1},
    {"question": "and " * 30, "choices": ["x", "words"], "gold": 1},  # longer than the context
    {"question": "has", "choices": ["a", "b", "c", "d"], "gold": 3},
]
TEXTS = [{"text": "document 3 has words and more words " * 3}, {"text": "short"}, {"text": "exactly " * 6}]
PROMPTS = [{"question": "doc", "gold": "x"}, {"question": "words and more", "gold": "y"}]

METRICS = ("acc", "acc_norm"), ("word_perplexity", "byte_perplexity", "bits_per_byte")


def task(place, name, documents, **fields):
    (place / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}},
        "test_split": "test",
    }
    (place / f"{name}.yaml").write_text(yaml.safe_dump({**common, **fields}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run and two tasks."""
    place = tmp_path_factory.mktemp("lm_eval")
    (place / "text").mkdir()
    for i in range(20):
        (place / "text" / f"{i}.txt").write_text(f"document {i} has words and more words " * 4)
    data = {"path": str(place / "data"), "sources": [str(place / "text")], "seq_len": 16, "held_out_fraction": 0.2}
    (place / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data}))
    assert main(["train", str(place / "config.yaml"), "--workdir", str(place / "run")]) == 0
    (place / "tasks").mkdir()
    names = [[{"metric": name} for name in metrics] for metrics in METRICS]
    choose = {"doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": names[0]}
    task(place / "tasks", "choose", QUESTIONS, output_type="multiple_choice", doc_to_text="{{question}}", **choose)
    read = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": names[1]}
    task(place / "tasks", "read", TEXTS, output_type="loglikelihood_rolling", **read)
    return place


@pytest.fixture(scope="module")
def likelihood(place):
    """Nats of each token of `tokens` but the first, one call a text, float64."""
    loaded = load_model(place / "run")

    @jax.jit
    def run(tokens, loops):
        return loaded.model.apply(loaded.variables, tokens, loops=loops).logits

    def nats(tokens, loops):
        width = loaded.model.config.max_seq_len  # padded behind, which a causal model cannot see
        padded = np.pad(np.array([tokens[:-1]], np.int32), ((0, 0), (0, width - len(tokens) + 1)))
        logits = np.asarray(run(padded, jnp.int32(loops))[0, : len(tokens) - 1], np.float64)
        return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]

    return nats


def evaluate(place, capsys, *words):
    capsys.readouterr()
    assert main(["eval", str(place / "run"), *words, "--json"]) == 0
    out = capsys.readouterr().out
    return json.loads(out)["results"]


def of(results, metric, loops):
    return next(r["value"] for r in results if (r["metric"], r["loops"], r["halting"]) == (metric, loops, None))


def test_multiple_choice_is_that_of_the_logits(place, likelihood, capsys):
    tasks = str(place / "tasks")
    results = evaluate(place, capsys, "--tasks", "choose", "--include-path", tasks, "--loops", "1,2")
    for loops in (1, 2):
        right, normed = [], []
        for q in QUESTIONS:
            scores = []
            for choice in q["choices"]:
                context, said = [256, *q["question"].rstrip().encode()], list(f" {choice}".encode())
                if q["question"].endswith(" "):  # the harness moves the space over
                    said = [32, *said]
                tokens = (context + said)[-49:]
                scores.append(-likelihood(tokens, loops)[-len(said) :].sum())
            lengths = [len(choice) for choice in q["choices"]]
            right.append(np.argmax(scores) == q["gold"])
            normed.append(np.argmax(np.array(scores) / lengths) == q["gold"])
        assert of(results, "acc", loops) == pytest.approx(np.mean(right))
        assert of(results, "acc_norm", loops) == pytest.approx(np.mean(normed))
    assert {r["mean_loops"] for r in results} == {1.0, 2.0}
    assert {r["samples"] for r in results} == {4}


def test_rolling_perplexity_is_that_of_the_logits(place, likelihood, capsys):
    path = str(place / "tasks" / "read.yaml")  # a file, rather than a name
    results = evaluate(place, capsys, "--tasks", path, "--loops", "2", "--halting", "latent:0.5")
    nats, size, words = 0.0, 0, 0
    for document in TEXTS:
        tokens = [256, *document["text"].encode()]
        for start in range(0, len(tokens) - 1, 48):  # a token is predicted once, in the last window from a full context
            end = min(start + 48, len(tokens) - 1)
            nats += likelihood(tokens[max(end - 48, 0) : end + 1], 2)[start - end :].sum()
        size += len(document["text"].encode())
        words += len(document["text"].split(" "))
    assert of(results, "bits_per_byte", 2) == pytest.approx(nats / size / math.log(2), abs=1e-5)
    assert of(results, "byte_perplexity", 2) == pytest.approx(math.exp(nats / size), abs=1e-4)
    halted = [r for r in results if r["halting"] == "latent"]
    assert len(halted) == 3
    assert all(1 <= r["mean_loops"] <= 2 for r in halted)
    page = (place / "run" / "report" / "index.html").read_text()
    assert "bits_per_byte" in page
    assert path in page


def test_generation_is_that_of_single_prompts(place, monkeypatch):
    from mythos_jax.evaluation.lm_eval import Adapter
    from mythos_jax.evaluation.policies import Setting

    class Request:
        def __init__(self, *arguments):
            self.args = arguments

    loaded = load_model(place / "run")
    keywords = {"until": ["\n", "e w"], "max_gen_toks": 12}
    got = Adapter(loaded, Setting(2), progress=False).generate_until(
        [Request(p["question"], keywords) for p in PROMPTS] + [Request("and " * 30, {"max_gen_toks": 3})]
    )
    for prompt, n, text in [("doc", 12, got[0]), ("words and more", 12, got[1]), ("and " * 30, 3, got[2])]:
        tokens = np.array([[256, *prompt.encode()]])[:, -(48 - n) :]
        result = generate(loaded.model, loaded.variables, tokens, max_new_tokens=n, loops=2, stop_tokens=(256,))
        whole = loaded.tokenizer().decode(result.tokens[0, : result.lengths[0]].tolist())
        assert text == (whole.split("\n")[0].split("e w")[0] if n == 12 else whole)


def test_what_nobody_knows_is_one_line(place, capsys):
    for words, line in [
        (["--tasks", "missing.yaml"], "--tasks: missing.yaml: no such file"),
        (["--tasks", "choose", "--include-path", "nowhere"], "--include-path: nowhere: no such folder"),
    ]:
        assert main(["eval", str(place / "run"), *words]) == 2
        assert line in capsys.readouterr().err.splitlines()[-1]
