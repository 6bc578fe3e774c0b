"""Evaluation against logits computed one depth and one threshold at a time, and what a report holds."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import jax
import numpy as np
import pytest

from mythos_jax.config import MeshConfig, ModelConfig
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.loop_trace import LoopTrace, trace_loops
from mythos_jax.evaluation.policies import Setting, fixed
from mythos_jax.evaluation.ranks import rank_correlation
from mythos_jax.evaluation.results import Evaluation
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.report.page import write_report
from mythos_jax.report.tables import format_table
from mythos_jax.sharding import make_mesh
from tests.tiny import variables

MODEL = ModelConfig(vocab_size=40, dim=32, max_seq_len=16, loops=3, n_heads=2, n_kv_heads=1, hidden_dim=48)
EXPERTS = replace(MODEL, feed_forward="moe", n_experts=4, experts_per_token=2, expert_dim=16)
THRESHOLDS = (0.2, 0.26)  # what tokens of this model move in their third to fifth loop
SETTINGS = fixed([1, 2, 5]) + [Setting(5, Halting("latent", threshold)) for threshold in THRESHOLDS]
MESH = MeshConfig()

TRACES = []


class Counted(Mythos):
    """The model, noting each time it is traced."""

    def loop(self, *arguments, **keywords):
        TRACES.append(keywords["loops"])
        return super().loop(*arguments, **keywords)


@pytest.fixture(scope="module")
def place():
    """A model, its weights, and two batches, the second one padded."""
    model, rng = Mythos(MODEL), np.random.default_rng(0)
    batches = []
    for rows in [8, 5]:
        tokens = rng.integers(0, 40, (8, 13)).astype(np.int32)
        mask = (np.arange(8) < rows)[:, None] & np.ones((8, 12), bool)
        mask[0, 9:] = False
        batches.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask})
    return model, variables(MODEL), batches


@pytest.fixture(scope="module")
def found(place):
    _, variables, batches = place
    mesh = make_mesh(MESH)
    return evaluate_depths(Counted(MODEL), variables, batches, SETTINGS, mesh=mesh, bytes_per_token=2.5, progress=False)


@pytest.fixture(scope="module")
def truth(place):
    """Of each setting the nats and loops of every token that counts."""
    model, weights, batches = place

    @jax.jit
    def run(tokens, loops, halting):
        out = model.apply(weights, tokens, loops=loops, halting=halting)
        return out.logits, out.loops

    answers = {}
    for setting in SETTINGS:
        nats, loops = [], []
        for batch in batches:
            logits, ran = jax.device_get(run(batch["tokens"], setting.loops, setting.halting))
            p = np.exp(logits.astype(np.float64))
            chosen = np.take_along_axis(p / p.sum(-1, keepdims=True), batch["targets"][..., None], -1)[..., 0]
            nats.append(-np.log(chosen)[batch["mask"]])
            loops.append(ran[batch["mask"]])
        answers[setting] = np.concatenate(nats), np.concatenate(loops)
    return answers


def test_losses_and_loops_are_those_of_single_calls(found, truth):
    results, _ = found
    for result, (nats, loops) in zip(results, truth.values(), strict=True):
        assert result.loss == pytest.approx(nats.mean(), abs=1e-5)
        assert result.bits_per_byte == pytest.approx(nats.mean() / math.log(2) / 2.5, abs=1e-5)
        assert result.mean_loops == pytest.approx(loops.mean(), abs=1e-9)
        assert result.tokens == len(nats)
    assert len({round(result.loss, 4) for result in results[:3]}) == 3
    assert 1 < results[4].mean_loops < results[3].mean_loops < 5


def test_fixed_depths_are_one_program_and_so_is_each_criterion(found):
    assert len(TRACES) == 2


def test_traces_and_ranks_are_of_the_tokens_that_count(found, truth):
    results, traces = found
    deepest, _ = truth[SETTINGS[2]]
    assert [trace.setting for trace in traces] == SETTINGS[3:]
    for trace, result in zip(traces, results[3:], strict=True):
        _, loops = truth[trace.setting]
        np.testing.assert_array_equal(trace.loops_NT[trace.mask_NT], loops)
        np.testing.assert_allclose(trace.nats_NT[trace.mask_NT], deepest, atol=1e-5)
        assert result.rank_correlation == rank_correlation(trace.nats_NT[trace.mask_NT], loops)
    assert results[0].rank_correlation is None


def test_a_look_inside_is_one_loop_after_the_other(place):
    model, (_, _, batches) = Mythos(EXPERTS), place
    weights = variables(EXPERTS)
    inside = trace_loops(model, weights, batches[0], 3, mesh=make_mesh(MESH, jax.devices()[:1]))
    one = jax.jit(lambda state: model.apply(weights, batches[0]["tokens"], loops=1, initial_state=state))
    state = one(np.zeros((8, 12, 32), np.float32)).aux.injected_BTD
    for loop in range(3):
        out = one(state)
        change = np.linalg.norm(out.state - state, axis=-1) / np.linalg.norm(out.state, axis=-1)
        wanted = np.quantile(change[batches[0]["mask"]], [0.1, 0.5, 0.9])
        np.testing.assert_allclose(inside.change_L3[loop], wanted, rtol=1e-4)
        load = out.aux.expert_load / out.aux.expert_load.sum()
        np.testing.assert_allclose(inside.expert_share_LGE[loop], load, atol=1e-6)
        state = out.state
    assert len(np.unique(inside.expert_share_LGE[:, 0], axis=0)) == 3


class Reader(HTMLParser):
    """What stands in a page; fails where a tag is not closed."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_stands_alone(found, tmp_path):
    results, traces = found
    about = {"name": "<tiny>", "step": 7, "seed": 3, "loops": 2, "parameters": 1234, "data": "data/x"}
    inside = LoopTrace(96, np.array([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3]]), np.full((2, 1, 4), 0.25))
    says = lambda tokens: "".join(chr(97 + t) for t in tokens)  # noqa: E731
    evaluation = Evaluation(results, about, traces, inside, says)
    numbers, document = write_report(tmp_path / "report", evaluation, "mythos eval <tiny>")
    saved = json.loads(numbers.read_text())
    assert saved["step"] == 7
    assert [(row["loops"], row["threshold"]) for row in saved["results"]] == [(s.loops, s.threshold) for s in SETTINGS]
    page = Reader(document.read_text())
    assert not [value for _, given in page.tags for name, value in given.items() if name in ("src", "href")]
    assert "url(" not in document.read_text()
    pictures = [given for tag, given in page.tags if tag == "svg" and given.get("role") == "img"]
    assert len(pictures) == 5
    assert all(len(given["aria-label"]) > 40 for given in pictures)
    words = "".join(page.words)
    for wanted in ["mythos eval <tiny>", "step 7", "seed 3", f"{results[4].loss:.4f}", "latent 0.2", "expert 3"]:
        assert wanted in words
    shown = next(given for tag, given in page.tags if tag == "pre")
    assert f"{traces[0].loops_NT[traces[0].mask_NT].mean():.2f}" in shown["aria-label"] or (
        f"{traces[1].loops_NT[traces[1].mask_NT].mean():.2f}" in shown["aria-label"]
    )
    assert format_table(results).count("\n") == len(SETTINGS)
