"""`mythos serve` with requests that the OpenAPI page allows, and more that it does not: JSON, never a fault of ours."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_jax.server.app import create_app
from mythos_jax.server.schemas import ChatRequest, CompletionRequest
from tests.fuzz.budget import budget
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
def schema(service):
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(service))


def assert_answered(response, service, generation=True):
    """With JSON, or a stream of events; errors as OpenAI's; and nothing stays behind."""
    assert response.status_code < 500, response.text
    kind = response.headers["content-type"][0].partition(";")[0]
    if response.status_code >= 400:
        assert kind == "application/json"
        assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}
    elif kind == "text/event-stream":
        assert response.content.endswith(b"data: [DONE]\n\n")
    else:
        assert kind in ("application/json", "text/plain")
    assert not service.inboxes
    assert service.engine.error is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [GenerationMode.NEGATIVE, GenerationMode.POSITIVE])
def test_generation(service, schema, path, mode):
    """`make fuzz`: 10,000 requests that the page forbids, and 2,000 that it allows."""
    full = 5000 if mode == GenerationMode.NEGATIVE else 1000
    seen = set()

    @budget(8, full)
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def run(case):
        if isinstance(case.body, dict) and "model" in case.body and case.body["model"] != NAME:
            seen.add(404)
            with contextlib.suppress(TypeError):
                case.body["model"] = NAME if isinstance(case.body["model"], str) else case.body["model"]
        response = case.call()
        seen.add(response.status_code)
        assert_answered(response, service)

    run()
    assert 400 in seen or mode == GenerationMode.POSITIVE


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics"])
def test_other_paths(service, schema, path):
    @budget(2, 200)
    @given(case=schema[path]["GET"].as_strategy())
    def run(case):
        assert_answered(case.call(), service)

    run()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [*CompletionRequest.model_fields, *ChatRequest.model_fields]


@pytest.mark.parametrize("path", PATHS)
def test_fields_with_any_value(service, schema, path):
    """A good request with some fields of other types. `make fuzz`: 4,000."""
    good = {"model": NAME, "max_tokens": 3}
    good |= {"prompt": "hi"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "hi"}]}
    operation = schema[path]["POST"]

    @budget(15, 2000)
    @given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
    def run(fields):
        body = json.dumps(good | fields).encode()
        case = operation.Case(body=body, media_type="application/json")
        assert_answered(case.call(headers={"content-type": "application/json"}), service)

    run()


@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode) | JSON.map(lambda tree: json.dumps(tree).encode()))
@budget(30, 2000)
def test_any_bytes(service, schema, body):
    """`make fuzz`: 2,000."""
    case = schema[PATHS[0]]["POST"].Case(body=body, media_type="application/json")
    response = case.call(headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert_answered(response, service)
