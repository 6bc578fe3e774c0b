"""lm-evaluation-harness where something is odd: answers that have no token of their own or too many, stop texts that
are special tokens, task files with mistakes, tasks that fail. See faults.md, 11, 12 and 21."""

import inspect
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

if "CI" not in os.environ:  # in CI, a missing package is a failure
    pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

from lm_eval.evaluator import simple_evaluate

from mythos_jax.cli import main
from mythos_jax.config import ModelConfig
from mythos_jax.evaluation import lm_eval, scoring
from mythos_jax.evaluation.lm_eval import Adapter
from mythos_jax.evaluation.policies import Setting
from mythos_jax.inference.state import GenerateResult
from mythos_jax.porting.pretrained import save_pretrained
from mythos_jax.runs.load import load_model
from tests import tiny, tokenizer_kinds

pytestmark = pytest.mark.usefixtures("unoptimized")

CONFIG = ModelConfig(
    vocab_size=512, max_seq_len=32, **{k: v for k, v in tiny.DENSE_FIELDS.items() if k != "max_seq_len"}
)
CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{c}}",
    "doc_to_target": "g",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
ANSWER = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "x",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
}


class Request:
    def __init__(self, *arguments):
        self.args = arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    for kind in ("byte_level", "llama"):
        save_pretrained(folder / kind, CONFIG, tiny.variables(CONFIG))
        (folder / kind / "tokenizer.json").write_text(Path(tokenizer_kinds.save(kind, folder)).read_text())
    return folder


def write_task(folder, name, documents, **fields):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    dataset = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(dataset | fields))
    return str(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def nats(folder):
    """The log-likelihood of tokens after others, in float64."""
    loaded = load_model(folder / "byte_level")
    run = jax.jit(lambda tokens: loaded.model.apply(loaded.variables, tokens, loops=2).logits)

    def log_likelihood(context, answer):
        tokens = [*context, *answer]
        padded = np.zeros((1, CONFIG.max_seq_len), np.int32)  # at the end, where a causal model does not see it
        padded[0, : len(tokens) - 1] = tokens[:-1]
        logits = np.asarray(run(padded)[0, : len(tokens) - 1], np.float64)[-len(answer) :]
        return float((logits[np.arange(len(answer)), answer] - np.log(np.exp(logits).sum(-1))).sum())

    return log_likelihood


def test_an_answer_that_merges_into_its_context_is_scored_alone(folder, nats):
    loaded = load_model(folder / "byte_level")
    tokenizer = loaded.require_tokenizer()
    end, encode = tokenizer.end_of_document, lambda text: tokenizer.encode(text).tolist()
    context, answer = next((w[:-1], w[-1]) for w in ["the", "quick", "lazy"] if len(encode(w)) <= len(encode(w[:-1])))
    pairs = (context, answer), (context, "zz"), ("a", ""), ("", "the"), (" ", "the")
    asked = [Request(*pair) for pair in pairs]
    got = Adapter(loaded, Setting(2), progress=False).loglikelihood(asked)
    alone = nats([end, *encode(context)], encode(answer))
    assert got[0][0] == pytest.approx(alone, abs=1e-4)
    assert got[1][0] == pytest.approx(nats([end, *encode(context)], encode("zz")), abs=1e-4)
    assert got[2] == (0.0, True)
    assert got[3][0] == pytest.approx(nats([end], encode("the")), abs=1e-4)
    assert got[4][0] == pytest.approx(nats([end], encode(" the")), abs=1e-4)


def test_an_answer_longer_than_the_context_is_scored_in_windows(folder, nats):
    loaded = load_model(folder / "byte_level")
    tokenizer = loaded.require_tokenizer()
    question, answer = tokenizer.encode("a").tolist(), tokenizer.encode(" q" * 25).tolist()
    assert len(answer) > 32
    ((got, _),) = Adapter(loaded, Setting(2), progress=False).loglikelihood([Request("a", " q" * 25)])
    # The harness's own windows of 32 tokens: the last one is filled up on the left with tokens that are not scored.
    first = nats(question[-1:], answer[:32])
    rest = nats(answer[len(answer) - 33 : 32], answer[32:])
    assert got == pytest.approx(first + rest, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "until", "expected"),
    [
        ("byte_level", [tokenizer_kinds.OTHER], " yes "),
        ("byte_level", [tokenizer_kinds.OTHER, "es"], " y"),
        ("byte_level", ["\n"], " yes  more"),
        ("llama", [tokenizer_kinds.OTHER], " yes "),
        ("llama", [], " yes  more\ntext"),
    ],
)
def test_a_special_token_is_a_stop_text(folder, monkeypatch, kind, until, expected):
    """A stub says " yes <|im_end|> more\\ntext", as a chat model would go on, and stops where it is told to."""
    loaded = load_model(folder / kind)
    tokenizer = loaded.require_tokenizer()
    special = tokenizer_kinds.backend(kind).token_to_id(tokenizer_kinds.OTHER)
    encode = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    start = len(encode("a")) if kind == "llama" else 0  # its tokens of " yes" are those after another word
    said = [*encode("a yes ")[len(encode("a")) :], special, *encode("a more\ntext")[len(encode("a")) :]]
    assert start == 0 or tokenizer.decode(encode("a yes ")) == "a yes "

    def stub(model, variables, tokens, lengths, *, stop_tokens, **_):
        ends = [i + 1 for i, token in enumerate(said) if token in stop_tokens]
        n = min([len(said), *ends])
        rows = np.array([said[:n]] * len(tokens))
        return GenerateResult(rows, np.full(len(tokens), n), np.ones_like(rows))

    monkeypatch.setattr(scoring, "generate", stub)
    monkeypatch.setattr(scoring, "replicate", lambda x: x)
    answer = Adapter(loaded, Setting(2), progress=False).generate_until([Request("a", {"until": until})])
    assert answer == [expected]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unknown_key": 1}, "unexpected keyword argument 'unknown_key'"),
        ({"generation_kwargs": {"temperature": None}}, "float() argument must be"),
        ({"generation_kwargs": {"until": ["\n"], "max_gen_toks": 32}}, "max_gen_toks: got 32, allowed: 1 to 31"),
        (
            {"generation_kwargs": {"until": ["\n"], "max_gen_toks": "many"}},
            "max_gen_toks: got 'many', allowed: a number",
        ),
        (
            {"generation_kwargs": {"until": [3], "max_gen_toks": 4}},
            "until: got [3], allowed: a text or a list of texts",
        ),
        ({"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "top_p": 0}}, "top_p: got 0"),
        ({"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "temperature": -1}}, "temperature: got -1"),
        ({"output_type": "guess"}, "Got invalid output_type 'guess'"),
        ({"doc_to_text": "{{nothing.at.all}}"}, "'nothing' is undefined"),
        ({"test_split": "missing"}, "missing"),
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}, "nowhere"),
    ],
    ids=str,
)
def test_a_task_file_with_a_mistake_is_one_line(folder, tmp_path, capsys, monkeypatch, fields, message):
    """Found before anything is computed, also where another task comes first."""
    monkeypatch.setattr(scoring, "score", None)
    monkeypatch.setattr(scoring, "generate", None)
    good = write_task(tmp_path, "good", [{"q": "a"}], **ANSWER)
    bad = write_task(tmp_path, "bad", [{"q": "a"}, {"q": "b"}], **(ANSWER | fields))
    assert main(["eval", str(folder / "byte_level"), "--tasks", f"{good},{bad}"]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("mythos: ")]
    assert not out
    assert len(lines) == 1
    assert f"--tasks: {bad}: " in lines[0]
    assert message in lines[0]


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "{", "a: !function nothing.at_all\n"])
def test_no_task_file(folder, tmp_path, capsys, content):
    (tmp_path / "task.yaml").write_text(content)
    assert main(["eval", str(folder / "byte_level"), "--tasks", str(tmp_path / "task.yaml")]) == 2
    assert "task.yaml: " in capsys.readouterr().err.splitlines()[-1]


def test_limits_are_positive(folder, tmp_path):
    import mythos_jax

    lm = mythos_jax.load(folder / "byte_level")
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"--limit: got {limit}, allowed: an integer >= 1"):
            lm.evaluate_on_tasks([write_task(tmp_path, "good", [{"q": "a"}], **ANSWER)], limit=limit)


def test_a_task_that_fails_does_not_end_the_others(folder, tmp_path, capfd, monkeypatch):
    """Its line comes after the numbers, which are printed and written; exit code 1."""
    monkeypatch.chdir(tmp_path)
    real = Adapter.generate_until

    def fail(self, requests, disable_tqdm=False):
        if requests[0].args[0] == "bad":
            raise KeyError("broken")
        return real(self, requests)

    monkeypatch.setattr(Adapter, "generate_until", fail)
    names = [write_task(tmp_path, name, [{"q": name}], **ANSWER) for name in ("one", "bad", "two")]
    assert main(["eval", str(folder / "byte_level"), "--tasks", ",".join(names), "--json"]) == 1
    out, err = capfd.readouterr()
    tree = json.loads(out)
    assert [row["task"] for row in tree["results"]] == ["one", "two"]
    assert tree["failures"] == [f"--tasks: {names[1]} at 2 loops: KeyError: 'broken'"]
    assert tree["failures"][0] in err.splitlines()[-1]
    assert json.loads((tmp_path / "reports" / "byte_level" / "evaluation.json").read_text()) == tree
    assert "Traceback" not in err
    assert "not a git repository" not in err


def test_one_document_that_merges_does_not_end_a_task(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_task(
        tmp_path, "merge", [{"q": "th", "c": ["e", "k"], "g": 0}, {"q": "a", "c": ["b", "c"], "g": 1}], **CHOOSE
    )
    assert main(["eval", str(folder / "byte_level"), "--tasks", path, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["samples"] == 2


@pytest.mark.parametrize("adds", [True, False])
def test_a_text_starts_as_the_files_say(folder, nats, adds):
    """With a beginning of text, which rolling likelihoods do not count; or with nothing, but then an answer without a
    context comes after the prefix token, as in the harness."""
    place = folder / f"adds_{adds}"
    shutil.copytree(folder / "byte_level", place)
    settings = {"bos_token": tokenizer_kinds.OTHER, "add_bos_token": adds}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_model(place)
    bos = tokenizer_kinds.backend("byte_level").token_to_id(tokenizer_kinds.OTHER)
    ids = {text: loaded.require_tokenizer().encode(text).tolist() for text in ("a", " b", "lazy dog")}
    adapter = Adapter(loaded, Setting(2), progress=False)
    assert adapter.prefix_token_id == bos
    name = tokenizer_kinds.OTHER  # in a task it is that token, and not put twice
    pairs = ("a", " b"), ("", "lazy dog"), (f"{name}a", " b"), ("", f"{name}lazy dog")
    got = [likelihood for likelihood, _ in adapter.loglikelihood([Request(*pair) for pair in pairs])]
    alone, after = nats([bos], ids["lazy dog"]), nats([bos, *ids["a"]], ids[" b"])
    expected = [after if adds else nats(ids["a"], ids[" b"]), alone, after, alone]
    assert got == pytest.approx(expected, abs=1e-4)
    assert adapter.loglikelihood_rolling([Request("lazy dog")]) == pytest.approx([alone], abs=1e-4)


def test_seeds_are_the_harness_own(folder, monkeypatch):
    """Those that its `simple_evaluate` has by default, also for the examples that were drawn before; or one for all."""
    given = []
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *_, **keywords: given.append(keywords) or {"results": {}})
    fields = CHOOSE | {"num_fewshot": 2, "fewshot_split": "test"}
    task = write_task(folder, "few", [{"q": f"question {i}", "c": ["x", "y"], "g": i % 2} for i in range(20)], **fields)
    loaded = load_model(folder / "byte_level")
    for seed in (None, 7):
        lm_eval.run_harness(loaded, [task], [Setting(2)], seed=seed, progress=False)
    names = [f"{kind}random_seed" for kind in ("", "numpy_", "torch_", "fewshot_")]
    theirs = inspect.signature(simple_evaluate).parameters
    assert [given[0][name] for name in names] == [theirs[name].default for name in names] == [0, 1234, 1234, 1234]
    assert [given[1][name] for name in names] == [7] * 4
    contexts = []
    for keywords, seed in [(given[0], 1234), (given[1], 7)]:
        (task,) = keywords["tasks"]
        before = [request.args[0] for request in task.instances]
        task.set_fewshot_seed(seed=seed)
        task.build_all_requests(rank=0, world_size=1)
        contexts.append([request.args[0] for request in task.instances])
        assert contexts[-1] == before
    assert contexts[0] != contexts[1]
