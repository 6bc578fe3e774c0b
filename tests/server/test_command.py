"""`mythos serve` on the command line."""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from mythos_jax.cli import main
from mythos_jax.commands import serve
from mythos_jax.commands.arguments import byte_count
from tests import talker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talker.save(tmp_path_factory.mktemp("talkers") / "model")


def refused(capsys, *words):
    """The one line of a command that is refused."""
    try:
        code = main(["serve", *map(str, words)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mythos: ")]
    assert len(lines) == 1
    return lines[0]


def test_sizes():
    sizes = {"2GiB": 2 << 30, "512MB": 512_000_000, "1000000": 10**6, "1.5k": 1536, "3 gib": 3 << 30, "7b": 7}
    assert {text: byte_count(text) for text in sizes} == sizes
    for text in ["", "0", "-1", "GiB", "1PiB", "1e9", "nan", "9" * 30, "1 2", "٣"]:
        with pytest.raises(argparse.ArgumentTypeError, match="allowed: a number of bytes"):
            byte_count(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "65536"], "--port: got 65536, allowed: an integer from 0 to 65535"),
        (["--cache-bytes", "much"], "--cache-bytes: got 'much', allowed: a number of bytes, such as 2GiB"),
        (["--cache-bytes", "1KB"], "cache_bytes: got 1,000, allowed: at least "),
        (["--places", "0"], "--places: got 0, allowed: an integer >= 1"),
        (["--max-length", "1000"], "max_length: got 1000, allowed: 2 to max_seq_len, 256"),
        (["--loops", "9"], "loops: got 9, allowed: "),
        (["--halting", "gate"], "halting criterion: got 'gate'"),
        (["--halting", "never"], "halting criterion: got 'never'"),
        (["--allow-origin", "example.org"], "--allow-origin: got 'example.org', allowed: SCHEME://HOST[:PORT]"),
        (["--allow-origin", "https://example.org/a"], "--allow-origin: got 'https://example.org/a', allowed: "),
        (["--served-name", " "], "--served-name: got ' ', allowed: a name"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere: cannot be read"),
        (["--chat-template", "nowhere"], "chat template nowhere: cannot be read"),
        (["--host", "no.such.host.invalid"], "--host: got 'no.such.host.invalid', allowed: "),
        (["--model.dim", "3"], "--model.dim: fixed by the run"),
    ],
)
def test_wrong_words(capsys, folder, words, message):
    port = [] if "--port" in words else ["--port", "0"]
    assert message in refused(capsys, folder, *port, *words)


def test_a_port_that_is_taken(capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--host 127.0.0.1 --port {port}: cannot listen there" in refused(capsys, folder, "--port", port)


def test_without_the_extra(capsys, folder, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    line = refused(capsys, folder)
    assert line == "mythos: serve: needs uvicorn; allowed: pip install '.[serve]' in the checkout"


def test_what_clients_call_the_model(tmp_path, monkeypatch):
    (tmp_path / "runs" / "quick").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "quick")
    assert serve._name(str(tmp_path / "runs" / "quick")) == "quick"
    assert serve._name(".") == "quick"
    assert serve._name("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert serve._name("smollm2") == "smollm2"


# `mythos`, whose engine makes no step while the file of the first argument is there.
HELD = """
import sys, time
from pathlib import Path
from mythos_jax.__main__ import main
from mythos_jax.serving.programs import Programs

steps, hold = Programs.steps, Path(sys.argv.pop(1))

def held(*arguments):
    while hold.exists():
        time.sleep(0.01)
    return steps(*arguments)

Programs.steps = held
sys.exit(main())
"""


@pytest.mark.slow
def test_from_start_to_end(folder, tmp_path):
    """The address is printed when requests are answered; SIGTERM lets a stream end; the exit code is 0."""
    words = ["serve", folder, "--port", "0", "--places", "2", "--served-name", "mine", "--max-length", "256"]
    (tmp_path / "key").write_text("k")
    words += ["--api-key-file", tmp_path / "key", "--halting", "latent:0.5"]
    hold = tmp_path / "hold"
    command = [sys.executable, "-c", HELD, str(hold), *map(str, words)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("mythos: serving mine at http://127.0.0.1:")
            key = {"authorization": "Bearer k"}
            with httpx.Client(base_url=line.split()[-1], headers=key, timeout=60) as client:
                assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["mine", "model"]
                hold.touch()  # the stream has begun before the signal, and its tokens come after it
                body = {"model": "model", "prompt": "The lazy", "max_tokens": 245, "stream": True, "temperature": 0}
                with client.stream("POST", "/v1/completions", json=body) as reply:
                    assert reply.status_code == 200
                    process.send_signal(signal.SIGTERM)
                    errors = [process.stderr.readline()]
                    while errors[-1] and "mythos: SIGTERM: ending 1 requests" not in errors[-1]:
                        errors.append(process.stderr.readline())
                    hold.unlink()
                    *texts, last = [text for text in reply.iter_lines() if text.startswith("data: ")]
                    assert (len(texts) > 1, last) == (True, "data: [DONE]")
            assert process.wait(30) == 0
        finally:
            process.kill()
        errors = "".join([*errors, process.stderr.read()])
    assert "mythos: SIGTERM: ending 1 requests" in errors
    assert re.search(r"memory of a device: weights \d+ MiB, cache \d+ MiB, programs \d+ MiB", errors)
    assert "Traceback" not in errors


def test_less_depth_than_the_model_s(monkeypatch, folder):
    """Is what requests get that do not say."""
    seen = []
    monkeypatch.setattr("mythos_jax.server.run.serve", lambda service, *_: seen.append(service) or 0)
    assert main(["serve", str(folder), "--port", "0", "--max-loops", "1", "--places", "2"]) == 0
    (service,) = seen
    card = service.model.card("x", service.defaults)["mythos"]
    assert (card["loops"], card["max_loops"], card["max_length"]) == (1, 1, 256)
    assert service.state == "starting"
    assert service.local


def test_a_signal_while_it_loads_ends_it(monkeypatch, capsys, folder):
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code) or sys.exit(code))
    monkeypatch.setattr(serve, "load_named", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        main(["serve", str(folder), "--port", "0"])
    assert codes == [0]
    assert "mythos: SIGTERM: ended while it was loading" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
