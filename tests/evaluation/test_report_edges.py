"""Reports of evaluations with NaN, infinities, single points and nothing: a page that says so, and valid JSON."""

import json
import math
import re
from itertools import product
from xml.etree import ElementTree

import numpy as np
import pytest

from mythos_jax.evaluation.policies import Setting, fixed
from mythos_jax.evaluation.results import (
    Evaluation,
    HarnessTasks,
    HeldOutText,
    LoopTrace,
    LoopUsage,
    Measurement,
    ModelInfo,
    ReasoningTask,
    Sample,
)
from mythos_jax.model.halting import Halting
from mythos_jax.report.heat_map import END_OF_DOCUMENT, text_map
from mythos_jax.report.page import render_page, write_report
from mythos_jax.report.svg import Axis, Series, line_chart
from mythos_jax.report.tables import format_table
from tests import tokenizer_kinds

VALUES = {"nan": math.nan, "inf": math.inf, "huge": 1e300, "zero": 0.0, "one": 1.0}
HALTED = [Setting(4, Halting("latent", threshold)) for threshold in (0.1, 0.2)]
MODEL = ModelInfo("tiny", 7, 3, 2, 1234)


def measurement(setting, value, group=None, metric="bits_per_byte"):
    return Measurement(setting, metric, value, False, mean_loops=float(setting.loops), n=8, group=group, loss=value)


def evaluation(data, values, settings, groups=(None,), loops=(1, 2, 3, 4), metric="bits_per_byte"):
    """values, in turn, of all settings of all groups."""
    pairs = list(product(groups, settings))
    results = [measurement(setting, values[i % len(values)], group, metric) for i, (group, setting) in enumerate(pairs)]
    is_task = isinstance(data, ReasoningTask)
    hardness = np.resize(np.array([1.0, 2.0] if is_task else values), len(loops))
    sample = Sample(np.arange(len(loops)), np.array(loops), hardness, difficulty=1)
    halted = [] if isinstance(data, HarnessTasks) else [s for s in settings if s.halting is not None]
    usage = [LoopUsage(s, hardness, np.array(loops), [sample]) for s in halted]
    quantiles = np.resize(np.array(values), (3, 3))
    trace = LoopTrace(96, quantiles, np.full((3, 1, 2), values[0]))
    return Evaluation(MODEL, data, results, usage, trace)


@pytest.mark.parametrize("data", [HeldOutText("data/x", 12), ReasoningTask("p_hop", [1]), HarnessTasks(["t"], None, 0)])
@pytest.mark.parametrize("values", [["nan"], ["inf", "one"], ["one", "nan", "huge"], ["zero"], ["one"]], ids=",".join)
@pytest.mark.parametrize("settings", [fixed([2]), fixed([1, 2]), fixed([2]) + HALTED], ids=["one", "two", "halted"])
def test_odd_numbers_make_a_page_that_says_so(data, values, settings, tmp_path):
    groups = {HeldOutText: [None], ReasoningTask: [1, 2], HarnessTasks: ["t", "u"]}[type(data)]
    found = evaluation(data, [VALUES[value] for value in values], settings, groups)
    numbers, page = write_report(tmp_path, found, "mythos eval")
    tree = json.loads(numbers.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert tree == found.to_json()
    shown = [m.value for m in found.results]
    odd = sum(not math.isfinite(value) for value in shown)
    assert ("Not a number" in page.read_text()) == bool(odd)
    if odd:
        assert f"{odd} of {len(shown)} measurements are NaN or infinite" in page.read_text()
    assert format_table(found).count("\n") >= len(shown)
    assert not re.search(r'(="|points="[^"]*)(nan|inf)', page.read_text())  # no coordinates


def test_tasks_that_failed_are_on_the_page():
    """Also where the fixed depth failed and only a policy has numbers, or no number at all is left."""
    data = HarnessTasks(["t"], None, 0)
    for settings in (HALTED, fixed([1]), []):
        results = [measurement(setting, 0.5, "t", "acc") for setting in settings]
        page = render_page(Evaluation(MODEL, data, results, failures=["--tasks: u: <broken>"]), "mythos eval")
        assert "--tasks: u: &lt;broken&gt;" in page
    one = [measurement(Setting(1), 0.5, "t", "acc"), measurement(Setting(2), 0.6, "u", "acc")]
    assert "<td>0.6</td>" in render_page(Evaluation(MODEL, data, one), "mythos eval")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1, math.nan)],
        [(1, 2.0)],
        [(1, 1.0), (2, 1.0 + 1e-16)],
        [(1, 5e-324), (2, 1e-323)],
        [(1, 1e99), (2, 1e-99)],
    ],
    ids=str,
)
def test_charts_of_few_points(points, log):
    chart = line_chart([Series("a", points)], Axis("x", log=log), Axis("y", log=log), alt="a chart")
    if any(math.isfinite(y) and y > (1e-100 if log else 0) for _, y in points):
        svg = ElementTree.fromstring(chart)
        for element in svg.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
                assert math.isfinite(float(element.get(name, 0)))
    else:
        assert "none of its values is a finite number" in chart


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace", "word_piece", "end_of_word"])
def test_the_heat_map_has_the_spaces_of_the_text(kind):
    tokenizer = tokenizer_kinds.backend(kind)
    tokens = tokenizer.encode("the lazy dog jumps", add_special_tokens=False).ids
    tokens = [*tokens, tokenizer.token_to_id(tokenizer_kinds.END), *tokens]
    loops = np.ones(len(tokens))
    sample = Sample(np.array(tokens), loops, loops)
    usage = LoopUsage(HALTED[0], loops, loops, [sample])
    spans = ElementTree.fromstring(text_map(usage, tokenizer.decode).partition("</div>")[2])
    text = tokenizer.decode(tokens[: len(tokens) // 2])
    assert "".join(spans.itertext()) == text + END_OF_DOCUMENT + text
