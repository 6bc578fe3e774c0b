"""lm-evaluation-harness on local tasks (multiple choice, rolling perplexity, generation), compared with a direct
computation from the logits in float64. `make test-torch` sets up the environment, with the lm-eval extra."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

if "CI" not in os.environ:  # in CI, a missing package is a failure
    pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

from mythos_jax.cli import main
from mythos_jax.inference.generate import generate
from mythos_jax.runs.load import load_model
from tests.tiny import DENSE_FIELDS

pytestmark = pytest.mark.usefixtures("unoptimized")

CONFIG = {
    "name": "tiny",
    "model": {**DENSE_FIELDS, "max_seq_len": 48},
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


def task(workspace, name, documents, **fields):
    (workspace / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(workspace / f"{name}.jsonl")}},
        "test_split": "test",
    }
    (workspace / f"{name}.yaml").write_text(yaml.safe_dump({**common, **fields}))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A directory with a run and two tasks."""
    workspace = tmp_path_factory.mktemp("lm_eval")
    (workspace / "text").mkdir()
    for i in range(20):
        (workspace / "text" / f"{i}.txt").write_text(f"document {i} has words and more words " * 4)
    data = {
        "path": str(workspace / "data"),
        "sources": [str(workspace / "text")],
        "seq_len": 16,
        "held_out_fraction": 0.2,
    }
    (workspace / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data}))
    assert main(["train", str(workspace / "config.yaml"), "--workdir", str(workspace / "run")]) == 0
    (workspace / "tasks").mkdir()
    names = [[{"metric": name} for name in metrics] for metrics in METRICS]
    choose = {"doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": names[0]}
    task(workspace / "tasks", "choose", QUESTIONS, output_type="multiple_choice", doc_to_text="{{question}}", **choose)
    read = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": names[1]}
    task(workspace / "tasks", "read", TEXTS, output_type="loglikelihood_rolling", **read)
    return workspace


@pytest.fixture(scope="module")
def likelihood(workspace):
    """A function from tokens and loops to the loss of each token but the first, in nats, float64; one call per text."""
    loaded = load_model(workspace / "run")

    @jax.jit
    def run(tokens, loops):
        return loaded.model.apply(loaded.variables, tokens, loops=loops).logits

    def nats(tokens, loops):
        width = loaded.model.config.max_seq_len  # padded at the end, where a causal model does not see it
        padded = np.pad(np.array([tokens[:-1]], np.int32), ((0, 0), (0, width - len(tokens) + 1)))
        logits = np.asarray(run(padded, jnp.int32(loops))[0, : len(tokens) - 1], np.float64)
        return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]

    return nats


def evaluate(workspace, capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", str(workspace / "run"), *arguments, "--json"]) == 0
    out = capsys.readouterr().out
    return json.loads(out)["results"]


def value_of(results, metric, loops):
    return next(r["value"] for r in results if (r["metric"], r["loops"], r["halting"]) == (metric, loops, None))


def test_multiple_choice_agrees_with_logits(workspace, likelihood, capsys):
    tasks = str(workspace / "tasks")
    results = evaluate(workspace, capsys, "--tasks", "choose", "--include-path", tasks, "--loops", "1,2")
    for loops in (1, 2):
        correct, correct_norm = [], []
        for q in QUESTIONS:
            scores = []
            for choice in q["choices"]:
                context, answer = [256, *q["question"].rstrip().encode()], list(f" {choice}".encode())
                if q["question"].endswith(" "):  # the harness moves the space into the answer
                    answer = [32, *answer]
                tokens = (context + answer)[-49:]
                scores.append(-likelihood(tokens, loops)[-len(answer) :].sum())
            lengths = [len(choice) for choice in q["choices"]]
            correct.append(np.argmax(scores) == q["gold"])
            correct_norm.append(np.argmax(np.array(scores) / lengths) == q["gold"])
        assert value_of(results, "acc", loops) == pytest.approx(np.mean(correct))
        assert value_of(results, "acc_norm", loops) == pytest.approx(np.mean(correct_norm))
    assert {r["mean_loops"] for r in results} == {1.0, 2.0}
    assert {r["samples"] for r in results} == {4}


def test_rolling_perplexity_agrees_with_logits(workspace, likelihood, capsys):
    path = str(workspace / "tasks" / "read.yaml")  # a file instead of a name
    results = evaluate(workspace, capsys, "--tasks", path, "--loops", "2", "--halting", "latent:0.5")
    nats, size = 0.0, 0
    for document in TEXTS:
        tokens = [256, *document["text"].encode()]
        for start in range(0, len(tokens) - 1, 48):  # each token is predicted once, from a full context if possible
            end = min(start + 48, len(tokens) - 1)
            nats += likelihood(tokens[max(end - 48, 0) : end + 1], 2)[start - end :].sum()
        size += len(document["text"].encode())
    assert value_of(results, "bits_per_byte", 2) == pytest.approx(nats / size / math.log(2), abs=1e-5)
    assert value_of(results, "byte_perplexity", 2) == pytest.approx(math.exp(nats / size), abs=1e-4)
    halted = [r for r in results if r["halting"] == "latent"]
    assert len(halted) == 3
    assert all(1 <= r["mean_loops"] <= 2 for r in halted)
    page = (workspace / "run" / "report" / "index.html").read_text()
    assert "bits_per_byte" in page
    assert path in page


def test_generation_agrees_with_single_prompts(workspace, monkeypatch):
    from mythos_jax.evaluation.lm_eval import Adapter
    from mythos_jax.evaluation.policies import Setting

    class Request:
        def __init__(self, *arguments):
            self.args = arguments

    loaded = load_model(workspace / "run")
    keywords = {"until": ["\n", "e w"], "max_gen_toks": 12}
    got = Adapter(loaded, Setting(2), progress=False).generate_until(
        [Request(p["question"], keywords) for p in PROMPTS] + [Request("and " * 30, {"max_gen_toks": 3})]
    )
    for prompt, n, text in [("doc", 12, got[0]), ("words and more", 12, got[1]), ("and " * 30, 3, got[2])]:
        tokens = np.array([[256, *prompt.encode()]])[:, -(48 - n) :]
        result = generate(loaded.model, loaded.variables, tokens, max_new_tokens=n, loops=2, stop_tokens=(256,))
        whole = loaded.require_tokenizer().decode(result.tokens[0, : result.lengths[0]].tolist())
        assert text == (whole.split("\n")[0].split("e w")[0] if n == 12 else whole)


def test_unknown_tasks_and_folders_are_one_line(workspace, capsys):
    for arguments, line in [
        (["--tasks", "missing.yaml"], "--tasks: missing.yaml: no such file"),
        (["--tasks", "choose", "--include-path", "nowhere"], "--include-path: nowhere: no such folder"),
    ]:
        assert main(["eval", str(workspace / "run"), *arguments]) == 2
        assert line in capsys.readouterr().err.splitlines()[-1]
