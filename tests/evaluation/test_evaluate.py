"""Evaluation against logits computed one depth and one threshold at a time, and the content of a report."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import jax
import numpy as np
import pytest

from mythos_jax.config import MeshConfig
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.loop_trace import trace_loops
from mythos_jax.evaluation.policies import Setting, fixed
from mythos_jax.evaluation.ranks import rank_correlation
from mythos_jax.evaluation.results import Evaluation, HeldOutText, LoopTrace, ModelInfo
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.report.page import write_report
from mythos_jax.report.tables import format_table
from mythos_jax.sharding import make_mesh
from tests.tiny import DENSE, moe_fields, variables

EXPERTS = replace(DENSE, **moe_fields(4))
THRESHOLDS = (0.2, 0.26)  # how far tokens of this model move in their third to fifth loop
SETTINGS = fixed([1, 2, 5]) + [Setting(5, Halting("latent", threshold)) for threshold in THRESHOLDS]
MESH = MeshConfig()

TRACES = []


class Counted(Mythos):
    """The model, noting each time it is traced."""

    def loop(self, *arguments, **keywords):
        TRACES.append(keywords["loops"])
        return super().loop(*arguments, **keywords)


@pytest.fixture(scope="module")
def setup():
    """A model, its weights, and two batches, of which the second is padded."""
    model, rng = Mythos(DENSE), np.random.default_rng(0)
    batches = []
    for rows in [8, 5]:
        tokens = rng.integers(0, 40, (8, 13)).astype(np.int32)
        mask = (np.arange(8) < rows)[:, None] & np.ones((8, 12), bool)
        mask[0, 9:] = False
        batches.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask})
    return model, variables(DENSE), batches


@pytest.fixture(scope="module")
def measured(setup):
    _, variables, batches = setup
    mesh = make_mesh(MESH)
    return evaluate_depths(Counted(DENSE), variables, batches, SETTINGS, mesh=mesh, bytes_per_token=2.5, progress=False)


@pytest.fixture(scope="module")
def expected(setup):
    """For each setting, the nats and loops of every scored token."""
    model, weights, batches = setup

    @jax.jit
    def run(tokens, loops, halting):
        out = model.apply(weights, tokens, loops=loops, halting=halting)
        return out.logits, out.loops

    by_setting = {}
    for setting in SETTINGS:
        nats, loops = [], []
        for batch in batches:
            logits, ran = jax.device_get(run(batch["tokens"], setting.loops, setting.halting))
            p = np.exp(logits.astype(np.float64))
            chosen = np.take_along_axis(p / p.sum(-1, keepdims=True), batch["targets"][..., None], -1)[..., 0]
            nats.append(-np.log(chosen)[batch["mask"]])
            loops.append(ran[batch["mask"]])
        by_setting[setting] = np.concatenate(nats), np.concatenate(loops)
    return by_setting


def test_losses_and_loops_equal_those_of_single_calls(measured, expected):
    results, _ = measured
    for result, (nats, loops) in zip(results, expected.values(), strict=True):
        assert result.loss == pytest.approx(nats.mean(), abs=1e-5)
        assert result.value == pytest.approx(nats.mean() / math.log(2) / 2.5, abs=1e-5)
        assert result.mean_loops == pytest.approx(loops.mean(), abs=1e-9)
        assert result.n == len(nats)
    assert len({round(result.loss, 4) for result in results[:3]}) == 3
    assert 1 < results[4].mean_loops < results[3].mean_loops < 5


def test_fixed_depths_share_one_program_and_so_do_thresholds(measured):
    assert len(TRACES) == 2


def test_loop_usage_is_that_of_the_scored_tokens(measured, expected):
    _, usages = measured
    deepest_nats, _ = expected[SETTINGS[2]]
    assert [usage.setting for usage in usages] == SETTINGS[3:]
    for usage in usages:
        _, loops = expected[usage.setting]
        np.testing.assert_array_equal(usage.loops_N, loops)
        np.testing.assert_allclose(usage.hardness_N, deepest_nats, atol=1e-5)
        assert usage.rank_correlation == rank_correlation(usage.hardness_N, loops)
        shown = [np.concatenate([getattr(s, name) for s in usage.samples]) for name in ("loops_T", "nats_T")]
        np.testing.assert_array_equal(shown, [usage.loops_N, usage.hardness_N])  # few enough to be shown in full


def test_samples_end_after_600_tokens(setup):
    _, variables, batches = setup
    batch = {name: np.tile(array, (8, 1)) for name, array in batches[0].items()}  # 64 rows, of 9 or 12 scored tokens
    settings = [Setting(1), Setting(2, Halting("latent", 0.2))]
    mesh = make_mesh(MESH)
    _, (usage,) = evaluate_depths(
        Mythos(DENSE), variables, [batch], settings, mesh=mesh, bytes_per_token=1, progress=False
    )
    assert sum(len(sample.tokens_T) for sample in usage.samples) == 600
    first = batch["mask"][0]
    np.testing.assert_array_equal(usage.samples[0].tokens_T, batch["targets"][0][first])


def test_a_loop_trace_equals_loops_run_one_by_one(setup):
    model, (_, _, batches) = Mythos(EXPERTS), setup
    weights = variables(EXPERTS)
    trace = trace_loops(model, weights, batches[0], 3, mesh=make_mesh(MESH, jax.devices()[:1]))
    one = jax.jit(lambda state: model.apply(weights, batches[0]["tokens"], loops=1, initial_state=state))
    state = one(np.zeros((8, 12, 32), np.float32)).aux.injected_BTD
    for loop in range(3):
        out = one(state)
        change = np.linalg.norm(out.state - state, axis=-1) / np.linalg.norm(out.state, axis=-1)
        expected = np.quantile(change[batches[0]["mask"]], [0.1, 0.5, 0.9])
        np.testing.assert_allclose(trace.change_L3[loop], expected, rtol=1e-4)
        load = out.aux.expert_load / out.aux.expert_load.sum()
        np.testing.assert_allclose(trace.expert_share_LGE[loop], load, atol=1e-6)
        state = out.state
    assert len(np.unique(trace.expert_share_LGE[:, 0], axis=0)) == 3


class Page(HTMLParser):
    """The tags and words of a page; fails if a tag is not closed."""

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


@pytest.fixture
def evaluation(measured):
    results, usage = measured
    trace = LoopTrace(96, np.array([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3]]), np.full((2, 1, 4), 0.25))
    decode = lambda tokens: "".join(chr(97 + t) for t in tokens)  # noqa: E731
    return Evaluation(ModelInfo("<tiny>", 7, 3, 2, 1234), HeldOutText("data/x", 12), results, usage, trace, decode)


def test_the_json_of_an_evaluation(evaluation):
    tree = json.loads(json.dumps(evaluation.to_json()))
    results, inside = tree.pop("results"), tree.pop("inside")
    model = {"name": "<tiny>", "step": 7, "seed": 3, "loops": 2, "parameters": 1234, "weights": "float32"}
    assert tree == {**model, "data": "data/x"}
    assert [(row["loops"], row["threshold"]) for row in results] == [(s.loops, s.threshold) for s in SETTINGS]
    assert results[4] == {
        "loops": 5,
        "loss": evaluation.results[4].loss,
        "bits_per_byte": evaluation.results[4].value,
        "mean_loops": evaluation.results[4].mean_loops,
        "tokens": evaluation.results[4].n,
        "halting": "latent",
        "threshold": THRESHOLDS[1],
        "approximate": False,
        "expected_logits": False,
        "rank_correlation": evaluation.loop_usage[1].rank_correlation,
    }
    assert results[0]["rank_correlation"] is None
    assert (inside["tokens"], inside["expert_share"][0]) == (96, [[0.25] * 4])


def test_the_page_is_self_contained(evaluation, tmp_path):
    numbers, path = write_report(tmp_path / "report", evaluation, "mythos eval <tiny>")
    assert json.loads(numbers.read_text()) == evaluation.to_json()
    page = Page(path.read_text())
    assert not [value for _, given in page.tags for name, value in given.items() if name in ("src", "href")]
    assert "url(" not in path.read_text()
    assert "prefers-color-scheme" in "".join(page.words)  # the style sheet
    charts = [given for tag, given in page.tags if tag == "svg" and given.get("role") == "img"]
    assert len(charts) == 5
    assert all(len(given["aria-label"]) > 40 for given in charts)
    words = "".join(page.words)
    loss = f"{evaluation.results[4].loss:.4f}"
    for text in ["mythos eval <tiny>", "step 7", "seed 3", loss, "latent 0.2", "expert 3"]:
        assert text in words
    heat_map = next(given for tag, given in page.tags if tag == "pre")
    widest = max(evaluation.loop_usage, key=lambda usage: usage.loops_N.std())
    assert f"{widest.loops_N.mean():.2f} on average" in heat_map["aria-label"]
    assert format_table(evaluation).count("\n") == len(SETTINGS)
