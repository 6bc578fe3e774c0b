"""Progress on a terminal, in a log, and on a standard error that nobody reads."""

import io
import os
import subprocess
import sys
import time

import pytest

from mythos_jax import progress
from mythos_jax.processes import log0
from mythos_jax.progress import Progress
from mythos_jax.streams import print_result


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_where_there_is_no_terminal_a_line_is_printed_now_and_then(clock, capsys):
    with Progress(200, "train x", "step", start=100) as bar:
        for step in range(101, 201):
            clock[0] += 1
            bar.update(note=f"loss {step}" if step % 7 == 0 else "")
    assert capsys.readouterr().err.splitlines() == [
        "train x: 130 of 200 steps, loss 126",
        "train x: 160 of 200 steps, loss 154",
        "train x: 190 of 200 steps, loss 189",
    ]


@pytest.mark.parametrize(("total", "line"), [(60_000_000, "x: 31.0 of 60.0 MB\n"), (None, "x: 31.0 MB\n")])
def test_bytes_are_shown_in_megabytes(clock, capsys, total, line):
    with Progress(total, "x", "B") as bar:
        clock[0] += 31
        bar.update(31_000_000)
    assert capsys.readouterr().err == line


def test_nothing_is_shown_of_short_work_or_on_request(clock, capsys):
    for seconds, show in [(29, True), (100, False)]:
        with Progress(2, "x", "step", show=show) as bar:
            clock[0] += seconds
            bar.update()
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Gone(Terminal):
    """A terminal whose window was closed."""

    def write(self, text):
        raise OSError(5, "Input/output error")


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(2, "x", "step") as bar:
        time.sleep(0.11)  # of tqdm
        bar.update(2, note="loss 1.0")
    assert "\rx: 100%" in terminal.getvalue()
    assert "loss 1.0" in terminal.getvalue()


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def closed_file():
    file = open(os.devnull, "w")  # noqa: SIM115
    file.close()
    return file


@pytest.mark.parametrize("make", [Gone, closed_pipe, closed_file, lambda: None])
def test_work_goes_on_when_nobody_reads(monkeypatch, clock, make):
    monkeypatch.setattr(sys, "stderr", make())
    monkeypatch.setattr(sys, "stdout", make())
    with Progress(3, "x", "step") as bar:
        for _ in range(3):
            clock[0] += 60
            bar.update(note="loss 1.0")
        log0("resuming")
        print_result("done")


def test_a_file_does_not_become_standard_error(tmp_path):
    """With `2>&-`, the first file that is opened would be number 2, and get what C++ code prints."""
    program = "from mythos_jax.streams import replace_closed; replace_closed(); print(open({!r}, 'w').fileno() > 2)"
    command = [sys.executable, "-c", program.format(str(tmp_path / "file"))]
    result = subprocess.run(["bash", "-c", 'exec "$@" 2>&-', "-", *command], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("True\n", 0)
