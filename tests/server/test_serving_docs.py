"""docs/serving.md says what there is: its example runs, and its names are those of the server."""

import re
from pathlib import Path

import httpx
import pytest

from mythos_jax.cli import build_parser
from mythos_jax.commands.words import find_parser
from tests.server.running import fake_service, running
from tests.serving.fake_engine import FakeEngine

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server():
    with running(
        fake_service(FakeEngine(answer=lambda request: [64 + i % 26 for i in range(request.max_new_tokens)]))
    ) as found:
        yield found


def test_the_example_with_the_openai_client(server, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "http://127.0.0.1:8000/v1" in example
    exec(example.replace("http://127.0.0.1:8000", server.url), {})
    first, second, *tokens = capsys.readouterr().out.splitlines()
    assert len(first) == len(second) == 32
    assert tokens == [f"{letter!r} {i % 4 + 1} loops" for i, letter in enumerate(first)]


def test_the_metrics(server):
    text = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=60).text
    kinds = dict(re.findall(r"^# TYPE (mythos_\w+) (\w+)", text, re.MULTILINE))
    known = {name for name, kind in kinds.items() if not name.endswith("_created")}
    assert set(re.findall(r"mythos_(?!jax)\w+", PAGE.partition("## Metrics")[2].partition("##")[0])) == known


def test_the_paths(server):
    paths = httpx.get(f"{server.url}/openapi.json", trust_env=False, timeout=60).json()["paths"]
    assert set(re.findall(r"`(?:GET|POST) (/\S*)`", PAGE)) | {"/v1/models/{name}"} == {*paths, "/openapi.json", "/"}


def test_the_flags():
    actions = find_parser(build_parser(), ["serve"])._actions
    known = {flag for action in actions for flag in action.option_strings} - {"-h", "--help", "--debug"}
    text = re.sub(r"(?m)^ *python -m benchmarks.*$", "", PAGE)  # those have flags of their own
    assert set(re.findall(r"--[a-z][\w-]*", text)) - {"--no-deps", "--mesh"} == known
