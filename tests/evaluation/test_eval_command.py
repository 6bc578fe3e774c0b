"""What `mythos eval` prints and writes where something is in the way: the numbers come first. See faults.md, 10."""

import json
import math

import pytest

from mythos_jax.cli import main
from mythos_jax.commands import eval as command
from mythos_jax.evaluation.policies import fixed
from mythos_jax.evaluation.results import Evaluation, HarnessTasks, HeldOutText, Measurement, ModelInfo
from mythos_jax.porting.pretrained import save_pretrained
from mythos_jax.report.tables import format_table
from tests.tiny import DENSE, variables


def some_evaluation(value=1.25, **options):
    results = [Measurement(s, "bits_per_byte", value, False, s.loops, 8, loss=value) for s in fixed([1, 2])]
    return Evaluation(ModelInfo("tiny", None, None, 2, 1234), HeldOutText("data/x", 12), results, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_pretrained(folder, DENSE, variables(DENSE))
    return str(folder)


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Sets what the evaluation finds, and works in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def evaluate(evaluation):
        monkeypatch.setattr(command, "_evaluate", lambda *_, **__: evaluation)
        return evaluation

    return evaluate


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_numbers_are_printed_before_the_report_fails(model, found, tmp_path, capsys, flags):
    evaluation = found(some_evaluation())
    (tmp_path / "reports").write_text("a file in the way")
    assert main(["eval", model, "--data", "x", *flags]) == 1
    out, err = capsys.readouterr()
    if flags:
        assert json.loads(out) == evaluation.to_json()
    else:
        assert out == format_table(evaluation) + "\n"
    lines = err.splitlines()
    assert "cannot be written: there will be numbers but no report; allowed: --out DIR" in lines[0]  # at once
    assert lines[-1].startswith("mythos: reports/tiny: the report cannot be written (")


def test_the_report_goes_elsewhere(model, found, tmp_path, capsys):
    evaluation = found(some_evaluation())
    (tmp_path / "reports").write_text("a file in the way")
    assert main(["eval", model, "--data", "x", "--out", "else/where"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "report: else/where/index.html, else/where/evaluation.json"
    assert json.loads((tmp_path / "else" / "where" / "evaluation.json").read_text()) == evaluation.to_json()


def test_an_output_that_cannot_be_written_is_refused_at_once(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_evaluate", lambda *_, **__: pytest.fail("computed first"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["eval", model, "--data", "x", "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"mythos: --out: {out}: cannot be written\n"


def test_nan_is_printed_and_null_in_json(model, found, capsys):
    found(some_evaluation(math.nan))
    assert main(["eval", model, "--data", "x"]) == 0
    assert "nan" in capsys.readouterr().out
    assert main(["eval", model, "--data", "x", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["results"]
    assert [row["loss"] for row in rows] == [None, None]


def test_failures_come_after_the_numbers(model, found, tmp_path, capsys):
    evaluation = found(some_evaluation(failures=["--tasks: a: broken"]))
    assert main(["eval", model, "--tasks", "a,b"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(format_table(evaluation) + "\n")
    assert err.splitlines()[-1] == "mythos: --tasks: a: broken"
    assert (tmp_path / "reports" / "tiny" / "index.html").is_file()
    found(Evaluation(evaluation.model, HarnessTasks(["a"], None, 0), [], failures=["--tasks: a: broken"]))
    assert main(["eval", model, "--tasks", "a", "--out", "none"]) == 1
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "none").exists()
