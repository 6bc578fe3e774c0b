"""Keys, limits, states of the server, numbers for Prometheus, and its end."""

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections import deque
from dataclasses import replace

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mythos_jax.errors import DONE, FAILED, INTERRUPTED, ConfigError
from mythos_jax.model.halting import Halting
from mythos_jax.server import completions
from mythos_jax.server.app import create_app
from mythos_jax.server.auth import read_key
from mythos_jax.server.choices import Choices
from mythos_jax.server.errors import ApiError
from mythos_jax.server.inbox import MOST_FOR_EACH, Bell, Inbox, Overflow
from mythos_jax.server.limits import Limits
from mythos_jax.server.model import Defaults
from mythos_jax.server.run import bind, serve
from mythos_jax.server.schemas import CompletionRequest
from mythos_jax.server.shapes import Writer
from mythos_jax.server.streams import stream
from mythos_jax.serving.request import Finished
from tests.server.running import NAME, fake_service, running
from tests.serving.fake_engine import FakeEngine

PROMPT = {"model": NAME, "prompt": [1], "max_tokens": 4}


def ask(service, *requests):
    """The replies of the application, without a network, to requests in turn."""

    async def all_of_them():
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(*request[:2], **dict(*request[2:])) for request in requests]

    service.engine.start()
    try:
        return asyncio.run(all_of_them())
    finally:
        service.engine.close(drain=False)


def completion(**fields):
    return ("POST", "/v1/completions", {"json": PROMPT | fields})


def test_a_key():
    """Is needed for all but the page and the state."""
    service = fake_service(key="s3cret")
    open_paths = ["/", "/app.js", "/style.css", "/health", "/ready"]
    closed = ["/v1/models", "/metrics", "/openapi.json", "/v1/nothing"]
    replies = ask(service, *(("GET", path) for path in open_paths + closed), completion())
    assert [reply.status_code for reply in replies] == [200] * 5 + [401] * 5
    assert replies[-1].json()["error"]["code"] == "invalid_api_key"
    assert replies[-1].headers["www-authenticate"] == "Bearer"
    headers = {
        "Bearer s3cret": 200,
        "bearer s3cret": 200,
        "Bearer s3cre": 401,
        "Basic s3cret": 401,
        b"Bearer \xff": 401,
    }
    requests = [("POST", "/v1/completions", {"json": PROMPT, "headers": {"authorization": key}}) for key in headers]
    assert [reply.status_code for reply in ask(fake_service(key="s3cret"), *requests)] == list(headers.values())


def test_where_keys_come_from(tmp_path, monkeypatch):
    monkeypatch.delenv("MYTHOS_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("MYTHOS_API_KEY", "of-the-environment")
    assert read_key(None) == "of-the-environment"
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    assert read_key(str(file)) == "of-the-file"
    for content in ["", "two words", "ключ", "a\nb"]:
        file.write_text(content)
        with pytest.raises(ConfigError, match=f"--api-key-file {file}: allowed: a key of 1 to"):
            read_key(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(str(tmp_path / "none"))
    monkeypatch.setenv("MYTHOS_API_KEY", "")
    with pytest.raises(ConfigError, match="MYTHOS_API_KEY: allowed"):
        read_key(None)


def test_pages_of_other_sites():
    """May not ask, unless they are allowed to; nor may a name that somebody else made for this machine."""
    origin = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, x-stainless-os",
    }
    preflight = ("OPTIONS", "/v1/completions", {"headers": origin})
    for key, status in [(None, 405), ("k", 401)]:
        (refused,) = ask(fake_service(key=key), preflight)
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (status, False)
    service = fake_service(origins=["https://page.example"], key="k")
    allowed, other, reply = ask(
        service,
        preflight,
        ("OPTIONS", "/v1/completions", {"headers": origin | {"origin": "https://other.example"}}),
        ("POST", "/v1/completions", {"json": PROMPT, "headers": {**origin, "authorization": "Bearer k"}}),
    )
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert allowed.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://page.example")
    assert reply.headers["access-control-expose-headers"] == "retry-after, x-request-id"
    assert "x-request-id" in reply.headers

    hosts = ["localhost", "localhost:8000", "127.0.0.1:80", "[::1]:8000", "evil.example", "localhost.evil.example:8000"]
    requests = [("GET", "/health", {"headers": {"host": host}}) for host in hosts]
    replies = ask(fake_service(local=True), *requests)
    assert [reply.status_code for reply in replies] == [200] * 4 + [403] * 2
    assert {reply.status_code for reply in ask(fake_service(local=True, key="k"), *requests)} == {200}


def test_the_page_asks_nothing_of_the_network():
    replies = ask(fake_service(), ("GET", "/"), ("GET", "/app.js"), ("GET", "/style.css"), ("GET", "/index.html"))
    assert [reply.status_code for reply in replies] == [200, 200, 200, 404]
    kinds = ["text/html; charset=utf-8", "text/javascript; charset=utf-8", "text/css; charset=utf-8"]
    assert [reply.headers["content-type"] for reply in replies[:3]] == kinds
    for reply in replies[:3]:
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "http" not in policy
        assert "unsafe" not in policy


def test_full():
    """The queue, and memory for bodies; nothing of a request that is refused stays behind."""
    with running(fake_service(FakeEngine(places=1, queue=2))) as server:
        server.engine.turns = threading.Semaphore(0)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(**PROMPT, n=4)
        assert error.value.response.headers["retry-after"] == "2"  # 1.5 seconds
        assert error.value.code == "queue_full"
        while server.engine.counters.occupied or server.engine.counters.queued:
            time.sleep(0.01)
        server.engine.turns = None
        assert client.completions.create(**PROMPT, n=3).choices[2].finish_reason == "length"
    service = fake_service(limits=Limits(buffered=100))
    large, small = ask(service, completion(prompt="x" * (2**16 + 100)), completion())
    assert (large.status_code, large.headers["retry-after"], small.status_code) == (429, "1", 200)
    assert service.buffered.bytes == 0


def test_large_bodies_do_not_keep_out_small_ones():
    service = fake_service(limits=Limits(buffered=100))
    with service.buffered.of_a_body() as add:
        add(2**16 - 1)
        assert service.buffered.bytes == 0
        add(2)
        assert service.buffered.bytes == 1
        add(99)
        assert service.buffered.bytes == 100
        (small,) = ask(service, completion())
        assert small.status_code == 200
        with pytest.raises(ApiError, match="too many requests"):
            add(1)
    assert service.buffered.bytes == 0


def test_a_text_counts_until_it_has_become_tokens(monkeypatch):
    service, seen = fake_service(), []
    monkeypatch.setattr(type(service.model), "encode", lambda self, text: seen.append(service.buffered.bytes) or [1])
    (reply,) = ask(service, completion(prompt="x" * (2**16 + 100)))
    assert reply.status_code == 200
    assert seen[0] >= 100
    assert service.buffered.bytes == 0


def test_states():
    for state, code in [("starting", "server_starting"), ("draining", "server_stopping")]:
        health, ready, reply = ask(fake_service(state=state), ("GET", "/health"), ("GET", "/ready"), completion())
        assert (health.status_code, ready.status_code, reply.status_code) == (200, 503, 503)
        assert reply.json()["error"]["code"] == code
        assert "retry-after" in reply.headers
    service = fake_service()
    service.engine.error = RuntimeError("no more\nmemory")
    health, ready, reply = ask(service, ("GET", "/health"), ("GET", "/ready"), completion())
    assert (health.status_code, ready.status_code, reply.status_code) == (503, 503, 503)
    assert reply.json()["error"]["message"] == "the engine has failed: no more memory"


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_of_the_server_is_json(monkeypatch, capsys, debug):
    """And the log has one line about it, without what was said; with --debug also where it was."""

    def fails(text):
        raise RuntimeError("broken\nhere")

    service = fake_service(debug=debug)
    monkeypatch.setattr(type(service.model), "encode", lambda self, text: fails(text))
    reply, after = ask(service, completion(prompt="my secret"), completion())
    assert (reply.status_code, after.status_code) == (500, 200)
    assert reply.json()["error"]["type"] == "server_error"
    log = capsys.readouterr().err.splitlines()
    assert ("Traceback (most recent call last):" in log) is debug
    assert [line.partition(": ")[2] for line in log if "broken here" in line] == ["RuntimeError: broken here"]
    assert reply.headers["x-request-id"] in log[0]
    assert "secret" not in "".join(log)


def test_the_log_has_numbers_and_no_words(capsys):
    ask(fake_service(), completion(prompt="my secret", max_tokens=3, n=2), ("GET", "/health"))
    (line,) = capsys.readouterr().err.splitlines()
    words = line.split(" ", 1)[1]
    assert words.startswith("POST /v1/completions 200 2 choices, 7 + 6 tokens, 24 loops, length, ")


def test_defaults_of_the_server():
    service = fake_service(defaults=Defaults(max_new_tokens=3, loops=2, halting=Halting.parse("latent:0.03")))
    own = {"halting": None, "loops": 4, "max_tokens": 2}
    one, other = ask(service, ("POST", "/v1/completions", {"json": {"model": NAME, "prompt": [1]}}), completion(**own))
    told = one.json()["choices"][0]["mythos"]
    assert ([token["loops"] for token in told["tokens"]], told["full_loops"]) == ([1, 2, 1], 2)
    told = other.json()["choices"][0]["mythos"]
    assert ([token["loops"] for token in told["tokens"]], told["full_loops"]) == ([4, 4], 4)


def test_a_model_without_text():
    service = fake_service()
    service.model = replace(service.model, tokenizer=None, conventions=None, chat=None)
    tokens, text, stop, chat = ask(
        service,
        completion(prompt=[1, 2], logprobs=1),
        completion(prompt="hi"),
        completion(stop="a"),
        ("POST", "/v1/chat/completions", {"json": {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}}),
    )
    assert tokens.json()["choices"][0]["text"] == ""
    assert len(tokens.json()["choices"][0]["mythos"]["tokens"]) == 4
    assert [reply.status_code for reply in (text, stop, chat)] == [400] * 3
    assert "the model has no tokenizer" in text.json()["error"]["message"]
    assert "the model has no chat template" in chat.json()["error"]["message"]


def test_metrics():
    service = fake_service()
    *_, page = ask(service, completion(halting="latent"), completion(model="x"), ("GET", "/none"), ("GET", "/metrics"))
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if not sample.labels
    }
    assert found["mythos_tokens_total"] == 4
    assert found["mythos_loops_total"] == 10  # 1 + 2 + 3 + 4
    assert found["mythos_full_loops_total"] == 16
    assert found["mythos_halting_saving"] == pytest.approx(6 / 16)
    assert found["mythos_prompt_tokens_total"] == 1
    assert found["mythos_time_to_first_token_seconds_count"] == 1
    assert found["mythos_inter_token_latency_seconds_count"] == 3
    assert found["mythos_request_duration_seconds_count"] == 1
    gauges = ["places", "occupied", "queued", "pages", "pages_used", "compiled", "cached_tokens_total", "drafted_total"]
    assert {f"mythos_{name}" for name in [*gauges, "accepted_total", "steps_total"]} <= set(found)
    counted = {
        (sample.labels["path"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.name == "mythos_requests_total"
    }
    assert counted == {("/v1/completions", "200"): 1, ("/v1/completions", "404"): 1, ("other", "404"): 1}


def test_a_signal_drains():
    """What is under way ends; what comes is told that the server stops; then the server ends by itself."""
    with running(fake_service()) as server:
        server.engine.turns = threading.Semaphore(9)  # some tokens may be parts of a character
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(**PROMPT | {"max_tokens": 30}, stream=True)
        first = next(stream)
        server.server.handle_exit(signal.SIGTERM, None)
        ready, health = (httpx.get(f"{server.url}/{path}", timeout=60) for path in ("ready", "health"))
        assert (ready.status_code, health.status_code) == (503, 200)
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(**PROMPT)
        assert error.value.status_code == 503
        server.engine.let(30)
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.server.code == DONE


def test_a_request_that_is_being_tokenized_is_under_way(monkeypatch, capsys):
    begun, go_on = threading.Event(), threading.Event()
    with running(fake_service()) as server:
        monkeypatch.setattr(type(server.service.model), "encode", lambda self, text: begun.set() or [go_on.wait(60)])
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        chunks = []
        fields = PROMPT | {"prompt": ["a", "b"], "stream": True}
        reader = threading.Thread(target=lambda: chunks.extend(client.completions.create(**fields)), daemon=True)
        reader.start()
        assert begun.wait(60)
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(0.5)
        assert server.thread.is_alive()
        assert not server.server.should_exit
        go_on.set()
        reader.join(60)
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"] * 2
        server.thread.join(60)
        assert not server.thread.is_alive()
    assert "mythos: SIGTERM: ending 1 requests" in capsys.readouterr().err


def test_a_body_that_arrives_after_a_signal_is_refused(monkeypatch):
    body = b'{"model": "tiny", "prompt": [1], "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(fake_service()) as server, socket.create_connection(server.address, timeout=60) as client:
        found_ready, require = threading.Event(), server.service.require_ready
        monkeypatch.setattr(server.service, "require_ready", lambda: (require(), found_ready.set()))
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:10])
        assert found_ready.wait(60)
        server.server.handle_exit(signal.SIGTERM, None)
        client.sendall(body[10:])
        answer = b""
        while piece := client.recv(65536):  # up to the end of the connection
            answer += piece
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"server_stopping" in answer


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, FAILED)])
def test_a_second_signal_ends_at_once(monkeypatch, number, code):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    with running(fake_service()) as server:
        server.engine.turns = threading.Semaphore(9)  # some tokens may be parts of a character
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(**PROMPT | {"max_tokens": 100}, stream=True)
        next(stream)
        server.server.handle_exit(signal.SIGTERM, None)
        assert not ended
        server.server.handle_exit(number, None)
        assert ended == [code]
        stream.close()


def test_what_does_not_end_in_time_is_cut_off():
    with running(fake_service(), drain_seconds=0.2) as server:
        server.engine.turns = threading.Semaphore(9)  # some tokens may be parts of a character
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(**PROMPT | {"max_tokens": 200}, stream=True)
        next(stream)
        server.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.server.code == DONE
        assert server.engine.cancelled


@pytest.mark.parametrize("says_so", [True, False])
def test_an_engine_that_fails(capsys, monkeypatch, says_so):
    """Every request hears of it, also if the engine could not say it, and the server ends with an error."""
    if not says_so:
        monkeypatch.setattr(FakeEngine, "_end_all", lambda self, event: None)
    with running(fake_service()) as server:
        server.engine.turns = threading.Semaphore(9)  # some tokens may be parts of a character
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(**PROMPT | {"max_tokens": 200}, stream=True)
        next(stream)
        server.engine.fail = MemoryError("no room\nfor it")
        with pytest.raises(openai.APIError, match=r"the engine has failed: .*no room for it"):
            list(stream)
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.server.code == FAILED
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mythos:")]
    assert lines == ["mythos: the engine has failed: MemoryError: no room for it"]


def test_a_start_that_fails(capsys):
    engine = FakeEngine()
    engine.start = lambda: 1 / 0
    with running(fake_service(engine)) as server:
        server.thread.join(60)
        assert server.server.code == FAILED
    assert "mythos: the engine has failed: ZeroDivisionError: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize("busy", [False, True])
def test_the_end_does_not_wait_for_texts_that_are_tokenized(monkeypatch, busy):
    ended, begun, go_on, codes = [], threading.Event(), threading.Event(), []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("mythos_jax.server.run._GRACE", 0.1)
    service = fake_service(state="starting")
    monkeypatch.setattr(type(service.model), "encode", lambda self, text: begun.set() or go_on.wait(120))
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
    words = (service, listener, service.engine.start, 0.1)
    server = threading.Thread(target=lambda: codes.append(serve(*words)), daemon=True)
    server.start()
    while service.state == "starting" or any(thread.name == "starting" for thread in threading.enumerate()):
        time.sleep(0.01)

    def ask_for_text():
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(url, json=PROMPT | {"prompt": "hi"}, timeout=60)

    clients = [threading.Thread(target=ask_for_text, daemon=True) for _ in range(2 if busy else 0)]
    for client in clients:
        client.start()
    assert not busy or begun.wait(60)
    service.engine.error = RuntimeError("no more")
    server.join(60)
    assert (codes, ended) == ([FAILED], [FAILED] if busy else [])
    go_on.set()
    for client in clients:
        client.join(5)
    service.engine.close(drain=False)


def test_addresses():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
            bind("127.0.0.1", port)
    for host in ["no.such.host.invalid", "a b", "x" * 300]:
        with pytest.raises(ConfigError, match="--host: got "):
            bind(host, 0)


def test_an_inbox_has_an_end():
    async def fill():
        inbox = Inbox(Bell(), most=10)
        listen_to = inbox.listener(3)
        event = Finished("length")
        thread = threading.Thread(target=lambda: [listen_to([event]) for _ in range(5)])
        thread.start()
        taken = 0
        while taken < 5:
            batches = await inbox.take(60)
            assert {choice for choice, _ in batches} == {3}
            taken += len(batches)
        thread.join()
        assert await inbox.take(0.01) == []
        for _ in range(1000):
            listen_to([event])
        assert len(inbox._batches) == 10 + MOST_FOR_EACH + 1
        with pytest.raises(Overflow):
            await inbox.take(60)

    asyncio.run(fill())


def test_a_reader_that_is_too_slow_is_cancelled_at_once():
    """Before it has read why."""

    async def read():
        service = fake_service(FakeEngine(delay=0.001))
        service.engine.start()
        body = CompletionRequest(**PROMPT | {"max_tokens": 200}, stream=True)
        wanted, prompts = await completions.read(service, body)
        choices = Choices(service, wanted, prompts, time.perf_counter())
        choices._inbox._most = 5
        choices.submit()
        events = stream(choices, Writer(completions.CompletionShape(), choices, "1"), lambda: None)._events
        while not choices._inbox._closed:
            await asyncio.sleep(0.01)
        last = [data async for data in events][-1]
        assert b'"code":"slow_reader"' in last
        assert service.engine.cancelled == [choices.choices[0].ticket]
        service.engine.close(drain=False)

    asyncio.run(read())


def test_no_event_waits_for_the_next():
    """Found by `make fuzz`: what came while a reader took the rest, and was taken with it, had woken it for nothing,
    and what came after that did not wake it."""

    async def read():
        inbox = Inbox(Bell())
        listen_to = inbox.listener(0)
        first, second, third = [Finished("length")], [Finished("stop")], [Finished("failed")]

        class Batches(deque):
            def popleft(self):
                if self[0][1] is first:
                    listen_to(second)
                return super().popleft()

        inbox._batches = Batches()
        listen_to(first)
        assert [events for _, events in await inbox.take(60)] == [first, second]
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(inbox.take(60))
        await asyncio.sleep(0.01)
        listen_to(third)
        assert await waiting == [(0, third)]

    asyncio.run(read())
