"""`mythos watch` as a user calls it."""

import codecs
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from mythos_jax.cli import main


@pytest.fixture
def made(make_run):
    made = make_run()
    made.log({"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5})
    return made


def test_once_and_in_a_pipe(made, capsys):
    for flags in ([], ["--once"]):
        assert main(["watch", str(made.path), *flags]) == 0
        out = capsys.readouterr().out
        assert out.startswith("tiny  ended  step 2 of 100 (2%)\n")
        assert "\x1b" not in out


def test_json(made, make_run, capsys):
    assert main(["watch", str(made.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(run["step"], run["steps"], run["last"]["loss"]) for run in found["runs"]] == [(2, 100, 2.5)]
    assert "losses_at_equal_steps" not in found
    assert main(["watch", str(made.path), str(make_run("b").path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["losses_at_equal_steps"][-1] == {"step": 2, "losses": [2.5, None]}


def test_a_page_that_stays_as_it_is(made, tmp_path, capsys):
    assert main(["watch", str(made.path), "--html", str(tmp_path / "a.html"), "--once"]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path}/a.html\n"
    assert "<h2>Loss</h2>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_what_a_file_says_is_shown_without_control_characters(made, capsys):
    made.event("end", 1.0, step=2, how="failed", message="\x1b[31mred[bold]\x07")
    assert main(["watch", str(made.path)]) == 0
    assert "?[31mred[bold]?" in capsys.readouterr().out


def test_a_page_that_cannot_be_written(made, tmp_path, capsys):
    assert main(["watch", str(made.path), "--html", str(tmp_path / "no" / "a.html")]) == 2
    problem = "cannot be written (No such file or directory)"
    assert capsys.readouterr().err == f"mythos: --html {tmp_path}/no/a.html: {problem}\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["nothing"], "nothing: no such directory; allowed: a run directory, which `mythos train` makes"),
        ([".", "--html", "x", "--port", "0"], "--port: got it with --html, allowed: one of --json, --html, --port"),
        (
            [".", "--once", "--port", "0"],
            "--once: got it with --port, allowed: --once --html FILE for a page that stays",
        ),
        ([".", "--every", "0"], "argument --every: got 0.0, allowed: a number in [0.2, 86400]"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_wrong_input_is_one_line(words, problem, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["watch", *words])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith(f"mythos: {problem}")
    assert error.count("\n") == 1


CODE = """
import sys
from mythos_jax.cli import main
code = main(sys.argv[1:])
heavy = [name for name in ("jax", "numpy", "etils", "tqdm") if name in sys.modules]
sys.exit(f"imports {heavy}" if heavy else code)
"""


def read_until(terminal, text=None, seconds=60):
    """What a terminal shows, up to a text that must come, or to the end."""
    seen, end, decoder = "", time.monotonic() + seconds, codecs.getincrementaldecoder("utf-8")("replace")
    while text is None or text not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += decoder.decode(os.read(terminal, 65536))
            except OSError:  # the program has ended
                break
    assert text is None or text in seen
    return seen


def test_live_in_a_terminal(made):
    """It follows the run, ends with 0 on Ctrl-C, gives the screen back, leaves the last view, and needs no jax."""
    terminal, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "30", "LC_ALL": "C.UTF-8"}
    command = [sys.executable, "-c", CODE, "watch", str(made.path), "--every", "0.2"]
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment) as process:
        os.close(other)
        first = read_until(terminal, "2.5000")
        assert "\x1b[?1049h" in first
        made.log({"step": 3, "loss": 1.75})
        read_until(terminal, "1.7500")
        process.send_signal(signal.SIGINT)
        last = read_until(terminal)
        assert "step 3\x1b[0m\r\n" in last.split("\x1b[?1049l")[1]
        assert "\x1b[?1049l" in last
        assert "Traceback" not in last
        assert "1.7500" in last.split("\x1b[?1049l")[1]
        assert process.wait(60) == 0
    os.close(terminal)
