"""Every example runs as a user would run it, and so do the notebook's cells; on a model that an example trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder, script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, and a run that `train_on_your_text.py` trained on it."""
    folder = tmp_path_factory.mktemp("examples")
    texts = folder / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text("".join(f"line {n} of text {i}: {'abc' * (n % 7)}\n" for n in range(40)))
    out = run(folder, "train_on_your_text.py", texts, "--workdir", "mine", "--steps", 4)
    assert "step 4: loss" in out
    assert "8 loops: " in out
    return folder


def test_training_again_resumes(folder):
    out = run(folder, "train_on_your_text.py", folder / "texts", "--workdir", "mine", "--steps", 6)
    assert "step 6: loss" in out


def test_load_and_generate(folder):
    out = run(folder, "load_and_generate.py", "mine/run", "line", "--max-new-tokens", 8)
    assert out.count("--- ") == 3
    assert "most likely next tokens: [" in out


def test_depth_and_halting(folder):
    out = run(folder, "depth_and_halting.py", "mine/run", "line", "--loops", 4)
    assert out.count("  loop ") == 4
    assert out.count("loops per token of the prompt") == 3


def test_convert_and_finetune(folder):
    out = run(folder, "convert_and_finetune.py", "mine/run", "--workdir", "tuned", "--sources", "texts", "--steps", 2)
    assert "bit-identical" in out
    assert "fine-tuned for 2 steps: loss" in out


def test_new_injection(folder):
    out = run(folder, "new_injection.py")
    assert "'gate': {'kernel': (64, 32)}" in out
    assert "of 16 loops per token" in out


def test_notebook(folder):
    """The code of the notebook, without its picture: plotting is an extra."""
    cells = json.loads((EXAMPLES / "loss_against_loops.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = "\n".join(cell for cell in code if "matplotlib" not in cell).replace('"runs/quickstart"', '"mine/run"')
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(code) > script.count("matplotlib")
