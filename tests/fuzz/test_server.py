"""`mythos serve` with requests that the OpenAPI page allows, and more that it does not: JSON, never a fault of ours.

`make fuzz`: 2,000 that schemathesis makes to be refused and 400 to be taken, 6,000 with fields of any type and value,
and 4,000 of any bytes.
"""

import asyncio
import json
import time
from collections import Counter

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_jax.server.app import create_app
from mythos_jax.server.schemas import ChatRequest, CompletionRequest
from tests.fuzz.budget import FULL, budget
from tests.server.running import NAME, fake_service
from tests.serving.fake_engine import FakeEngine

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode  # noqa: E402

PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def service():
    engine = FakeEngine(places=8)
    engine.start()
    yield fake_service(engine)
    engine.close(drain=False)


@pytest.fixture(scope="module")
def app(service):
    return create_app(service)


@pytest.fixture(scope="module")
def schema(app):
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.fixture(scope="module")
def post(app):
    """Sends a body to a path, in one event loop for all."""
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60)

        def send(path, body):
            headers = {"content-type": "application/json"}
            return runner.run(client.post(path, content=body, headers=headers))

        yield send
        runner.run(client.aclose())


SEEN: Counter[int] = Counter()


@pytest.fixture(scope="module", autouse=True)
def count():
    yield
    if FULL:
        print(f"requests by status: {dict(sorted(SEEN.items()))}")


def assert_answered(status, kind, content, service):
    """With JSON, or a stream of events; errors as OpenAI's; and nothing stays behind."""
    SEEN[status] += 1
    assert status < 500, content
    if status >= 400:
        assert kind == "application/json"
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    elif kind.startswith("text/event-stream"):
        assert content.endswith(b"\n\n")  # schemathesis reads so many events only
    else:
        assert kind.partition(";")[0] in ("application/json", "text/plain")
    for _ in range(6000):  # the answer may be here before its sender has cleaned up
        if service.inboxes:
            time.sleep(0.01)
    assert not service.inboxes
    assert service.engine.error is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [GenerationMode.NEGATIVE, GenerationMode.POSITIVE])
def test_generation(service, schema, path, mode):
    @budget(8, 1000 if mode == GenerationMode.NEGATIVE else 200)
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def run(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # of which the page knows nothing
        response = case.call(timeout=60)
        assert_answered(response.status_code, response.headers["content-type"][0], response.content, service)

    run()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics"])
def test_other_paths(service, schema, path):
    @budget(2, 20)
    @given(case=schema[path]["GET"].as_strategy())
    def run(case):
        response = case.call(timeout=60)
        assert_answered(response.status_code, response.headers["content-type"][0], response.content, service)

    run()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields})


@pytest.mark.parametrize("path", PATHS)
def test_fields_with_any_value(service, post, path):
    """A good request, but for some fields."""
    good = {"model": NAME, "max_tokens": 3}
    good |= {"prompt": "hi"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "hi"}]}

    @budget(30, 3000)
    @given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
    def run(fields):
        response = post(path, json.dumps(good | fields).encode())
        assert_answered(response.status_code, response.headers["content-type"], response.content, service)

    run()


@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode) | JSON.map(lambda tree: json.dumps(tree).encode()))
@budget(40, 4000)
def test_any_bytes(service, post, body):
    response = post(PATHS[0], body)
    assert response.status_code == 400
    assert_answered(response.status_code, response.headers["content-type"], response.content, service)
