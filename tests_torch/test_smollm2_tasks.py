"""SmolLM2 on tasks of lm-evaluation-harness: as with the harness's `hf` backend, transformers on the same GGUF file.

Both read text with the tokenizer that we make of the file: transformers' own does not split digits apart.
"""

import json
import os

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer

if "CI" not in os.environ:  # in CI, a missing package is a failure
    pytest.importorskip("accelerate", reason="the environment is older than this test")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mythos_jax.data.gguf import tokenizer_json
from mythos_jax.evaluation.lm_eval import Adapter
from mythos_jax.evaluation.policies import Setting
from mythos_jax.porting.hub import resolve
from mythos_jax.runs.load import load_model

QUESTIONS = [
    ("The capital of France is", [" London", " Paris", " Berlin"], 1),
    ("Water freezes at a temperature of 0 degrees", [" Celsius", " Kelvin"], 0),
    ("Two plus two equals", [" five", " four", " twenty-two"], 1),
    ("def add(a, b):\n    return", [" a - b", " a + b"], 1),
    ("Zażółć gęślą", [" jaźń", " banana"], 0),
    ("", ["The sun rises in the east.", "East the in rises sun the."], 0),
    ("The opposite of hot is ", ["cold", "warm", "a 12-inch ruler"], 0),
    ("In 1969 the first people walked on the", [" moon", " sun", " sea"], 0),
]
PROMPTS = [
    ("Question: What is the capital of Italy?\nAnswer: The capital of Italy is", " Rome."),
    ("1, 2, 3, 4, 5,", " 6, 7, 8, 9,"),
    ("<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n", "Hello!"),
    ("Once upon a time", "x"),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Light travels 299792 kilometres in one second.\n\nSound is slower: 343 metres.",
    "日本語の文章も少しだけ。",
]
DOCUMENTS = {
    "choose": [{"q": question, "choices": choices, "gold": gold} for question, choices, gold in QUESTIONS],
    "answer": [{"q": question, "gold": gold} for question, gold in PROMPTS],
    "read": [{"text": text} for text in TEXTS],
}
FIELDS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{gold}}",
        "generation_kwargs": {"until": ["\n\n", "dragon"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_tasks(folder):
    for name, documents in DOCUMENTS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        dataset = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**dataset, "test_split": "test", **FIELDS[name]}))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Ours and theirs: the numbers of every task, and the answer to every request."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    file = resolve("smollm2")
    original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    backend = Tokenizer.from_str(tokenizer_json(file).decode())
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    models = [
        Adapter(load_model("smollm2"), Setting(1), progress=False),
        HFLM(pretrained=original, tokenizer=tokenizer, batch_size=1),
    ]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return [simple_evaluate(model, tasks=list(DOCUMENTS), task_manager=manager, bootstrap_iters=0) for model in models]


def answers(report, task):
    """The answers to all requests of all documents of a task."""
    return [answer for sample in report["samples"][task] for (answer,) in sample["resps"]]


def test_multiple_choice(reports):
    ours, theirs = (answers(report, "choose") for report in reports)
    assert len(ours) == sum(len(choices) for _, choices, _ in QUESTIONS)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=0, atol=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for metric in ("acc,none", "acc_norm,none"):
        ours, theirs = (report["results"]["choose"][metric] for report in reports)
        assert ours == theirs
        assert 0.5 < ours < 1


def test_generation(reports):
    ours, theirs = (answers(report, "answer") for report in reports)
    assert ours == theirs
    assert [report["results"]["answer"]["exact_match,none"] for report in reports] == [0.5, 0.5]


def test_rolling_log_likelihood(reports):
    ours, theirs = (answers(report, "read") for report in reports)
    assert len(ours) == len(TEXTS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    ours, theirs = (report["results"]["read"]["bits_per_byte,none"] for report in reports)
    assert ours == pytest.approx(theirs, abs=1e-4)
