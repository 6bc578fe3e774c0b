"""Clients that send what is no request, or send it slowly, do not read, or vanish."""

import contextlib
import json
import socket
import threading
import time

import pytest

from mythos_jax.server.limits import Limits
from mythos_jax.server.protocol import ConnectionLimits
from tests.server.running import NAME, fake_service, running
from tests.serving.fake_engine import FakeEngine

LIMITS = Limits(body=20_000, body_seconds=60, keep_alive_seconds=0.1)
CONNECTION = ConnectionLimits(connections=40, header_seconds=60, stall_seconds=0.5, idle_seconds=60)
SECONDS = 60  # for what must happen, on a busy machine
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    with running(fake_service(FakeEngine(places=2, queue=2), limits=LIMITS), limits=CONNECTION) as found:
        yield found


@pytest.fixture(scope="module")
def impatient():
    """With short limits for what a client sends, which a client that a busy machine holds up may miss."""
    connection = ConnectionLimits(header_seconds=0.4, idle_seconds=1)
    with running(fake_service(limits=Limits(body_seconds=0.4)), limits=connection) as found:
        yield found


@contextlib.contextmanager
def connected(server, receive_buffer=None):
    with socket.socket() as client:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(SECONDS)
        client.connect(server.address)
        yield client


def read_all(client):
    """Up to the end of the connection, which must come."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            data += piece
    return data


def talk(server, data):
    with connected(server) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has answered before it has read all
            client.sendall(data)
        return read_all(client)


def post(body, path=COMPLETIONS, kind="application/json", **headers):
    """The bytes of a request after which the connection ends."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {kind}"] if kind else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def asked(**fields):
    return {"model": NAME, "prompt": [1], "max_tokens": 2} | fields


def status_and_error(answer):
    """Of one reply, which must be JSON as OpenAI's errors are."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"content-type: application/json" in head
    assert "\n" not in error["message"]
    return int(head.split()[1]), error


def assert_serves(server):
    answer = talk(server, post(asked()))
    assert answer.startswith(b"HTTP/1.1 200 "), answer


BODIES = {
    "empty": (b"", 400),
    "no JSON": (b"{", 400),
    "not UTF-8": (b'{"model": "\xff"}', 400),
    "half a character": (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
    "NaN": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
    "infinity": (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400),
    "many digits": (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 10_000 + b"}", 400),
    "deep": (b"[" * 20_000, 400),
    "deep and whole": (b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
    "a key twice": (b'{"model": "tiny", "model": "tiny", "prompt": "a"}', 400),
    "many keys": (json.dumps({f"k{i}": 0 for i in range(1500)}).encode(), 400),
    "a list": (b"[1, 2]", 400),
    "null": (b"null", 400),
    "a number": (b"1e400", 400),
    "UTF-16": ('{"model": "tiny", "prompt": "a"}'.encode("utf-16"), 400),
    "with a mark": (b'\xef\xbb\xbf{"model": "tiny", "prompt": "a"}', 400),
    "too large": (b" " * 20_001, 413),
    "much too large": (b" " * 2_000_000, 413),
    "a foreign token": (json.dumps(asked(prompt=[402])).encode(), 400),
    "a negative token": (json.dumps(asked(prompt=[-1])).encode(), 400),
    "a wide token": (json.dumps(asked(prompt=[2**40])).encode(), 400),
    "true for one": (json.dumps(asked(max_tokens=True)).encode(), 400),
    "no prompt": (json.dumps(asked(prompt=[])).encode(), 400),
    "an empty list": (json.dumps(asked(prompt=[[1], []])).encode(), 400),
    "many replies": (json.dumps(asked(prompt=[[1]] * 100, n=100)).encode(), 400),
    "a surrogate as a name": (b'{"\\ud800": 1}', 400),
    "control characters": (json.dumps(asked(**{"a\x00\x1b[31m\u2028": 1})).encode(), 400),
    "an unknown criterion": (json.dumps(asked(halting="never:1")).encode(), 400),
    "a threshold that is none": (json.dumps(asked(halting="latent:nan")).encode(), 400),
    "no policy": (json.dumps(asked(min_loops=2)).encode(), 400),
    "bounds in reverse": (json.dumps(asked(halting="latent", min_loops=2, max_loops=1)).encode(), 400),
    "a model of bytes": (json.dumps(asked(model="\x00")).encode(), 404),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(server, name):
    body, status = BODIES[name]
    got, error = status_and_error(talk(server, post(body)))
    assert (got, bool(error["message"])) == (status, True)


MESSAGES = [
    [],
    [{}],
    "hi",
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "root", "content": "hi"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": "hi", "content_type": "x"}],
    [{"role": "assistant", "content": "hi", "tool_calls": [{"id": "1"}]}],
    [{"role": "user", "content": "x" * 15_000}],
]


@pytest.mark.parametrize("messages", MESSAGES)
def test_messages(server, messages):
    status, error = status_and_error(talk(server, post({"model": NAME, "messages": messages}, CHAT)))
    assert status == 400
    assert error["param"].startswith("messages")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(asked(), kind="text/plain"), 415),
        (post(asked(), kind=None), 415),
        (post(asked(), kind="application/json; charset=latin-1"), 415),
        (post(asked(), content_encoding="gzip"), 415),
        (post(asked(), path="/v1/nothing"), 404),
        (post(asked(), path="/v1/models"), 405),
        (post(asked(), path="/../../etc/passwd"), 404),
        (post(asked(), path="/%2e%2e/%00"), 404),
        (b"GET /v1/models/none HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + b"X: y\r\n" * 1000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + post(b" " * 60_000), 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5, 6\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
            400,
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nContent-Length: 100000\r\n\r\n",
            413,
        ),
    ],
)
def test_what_is_no_request(server, data, status):
    assert status_and_error(talk(server, data))[0] == status


def test_chunked_bodies_are_read(server):
    body = json.dumps(asked()).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    data = head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    assert talk(server, data).startswith(b"HTTP/1.1 200 ")
    endless = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n"
    assert status_and_error(talk(server, endless + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 100))[0] == 413


def dribble(client, data):
    """Sends a byte now and then until the other side ends it; what that said."""
    started = time.monotonic()
    client.setblocking(False)
    answer = b""
    for byte in data:
        try:
            client.send(bytes([byte]))
            answer += client.recv(65536)
            if not answer:
                break
        except BlockingIOError:
            pass
        except OSError:
            break
        if time.monotonic() - started > SECONDS:
            pytest.fail("still connected")
        time.sleep(0.03)
    else:
        pytest.fail("still connected")
    return answer


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 1000,  # headers without end
        b"\r\n" * 4000,
        HEAD + b"Content-Length: 8000\r\n\r\n" + b" " * 8000,  # a body without end: after its headers
    ],
)
def test_slow_requests_end(impatient, data):
    head, separator, body = data.partition(b"\r\n\r\n")
    with connected(impatient) as client:
        if body.strip(b"\r\n") or b"Content-Length" in head:
            client.sendall(head + separator)
            data = body
        answer = dribble(client, data)
    assert not answer or answer[9:12] in (b"408", b"400")
    assert_serves_soon(impatient)


def test_a_connection_that_says_nothing_ends(impatient):
    with connected(impatient) as client:
        status, error = status_and_error(read_all(client))
    assert (status, error["message"]) == (408, "headers: not here after 0.4 seconds")


def test_a_body_that_dribbles_after_its_answer_ends(impatient):
    """The request was refused before its body came; the connection does not stay for it."""
    with connected(impatient) as client:
        client.sendall(b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n")
        dribble(client, b" " * 5000)


def test_a_connection_is_used_again(server, impatient):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(server) as client:
        for _ in range(3):
            client.sendall(request)
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            if not answer.endswith(b'{"status":"ok"}'):  # it may come in two pieces
                assert client.recv(65536) == b'{"status":"ok"}'
            (connection,) = [c for c in server.server.server_state.connections if c.client == client.getsockname()]
            assert connection._headers_timer is None  # it may be idle for longer than headers may take
        client.sendall(request * 3)  # all at once
        answers = b""
        while answers.count(b'{"status":"ok"}') < 3:
            answers += client.recv(65536)
    with connected(impatient) as client:
        client.sendall(request)
        assert read_all(client).endswith(b'{"status":"ok"}')  # it ends when nothing comes


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/nothing HTTP/1.1\r\n", b"404"),
        (b"GET /v1/completions HTTP/1.1\r\n", b"405"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Type: text/plain\r\n", b"415"),
    ],
)
def test_a_client_that_is_refused_before_its_body_came_hears_why(server, head, status):
    """Its body is not met by an end of the connection, which could come before the answer; and it may ask again."""
    with connected(server) as client:
        client.sendall(head + b"Host: localhost\r\nContent-Length: 1000000\r\n\r\n")
        time.sleep(0.1)
        client.sendall(b" " * 1_000_000)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answers = read_all(client)
    assert answers[9:12] == status
    assert answers.endswith(b'{"status":"ok"}')


def test_too_many_connections(server):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server)) for _ in range(CONNECTION.connections + 1)]
        assert status_and_error(read_all(clients[-1]))[0] == 503
    assert_serves_soon(server)


def assert_serves_soon(server):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(AssertionError):
            return assert_serves(server)
        time.sleep(0.02)
    assert_serves(server)
    return None


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("nothing happened")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_frees_its_place(server, monkeypatch, streaming):
    monkeypatch.setattr(server.engine, "turns", threading.Semaphore(9))
    before = len(server.engine.cancelled)
    with connected(server) as client:
        client.sendall(post(asked(max_tokens=200, stream=streaming)))
        wait_for(lambda: server.engine.counters.occupied == 1)
        if streaming:
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
    wait_for(lambda: server.engine.counters.occupied == 0)
    assert len(server.engine.cancelled) == before + 1
    wait_for(lambda: not server.service.inboxes)


def test_a_client_that_leaves_the_queue_is_forgotten(server, monkeypatch):
    """And who waits in a stream hears that the connection lives."""
    monkeypatch.setattr(server.engine, "turns", threading.Semaphore(9))
    with connected(server) as first, connected(server) as second:
        first.sendall(post(asked(max_tokens=100, n=2)))
        wait_for(lambda: server.engine.counters.occupied == 2)
        second.sendall(post(asked(max_tokens=100, stream=True)))
        wait_for(lambda: server.engine.counters.queued == 1)
        heard = b""
        while b": keep-alive\n\n" not in heard:
            heard += second.recv(4096)
        assert b"data:" not in heard
        second.close()
        wait_for(lambda: server.engine.counters.queued == 0)
        assert server.engine.counters.occupied == 2
    wait_for(lambda: server.engine.counters.occupied == 0)


def test_a_client_that_does_not_read_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(server.engine, "turns", threading.Semaphore(0))
    with connected(server, receive_buffer=1024) as client:
        # Replies of some megabytes, more than the buffers of two sockets hold.
        client.sendall(post(asked(max_tokens=240, n=4, logprobs=20, stream=True)))
        wait_for(lambda: server.engine.counters.occupied == 2)
        server.engine.let(1000)
        wait_for(lambda: not server.service.inboxes)
    wait_for(lambda: server.engine.counters.occupied == 0)
    assert_serves(server)


def test_many_bad_requests_at_once(server):
    """They leave nothing behind."""
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            for body, _ in list(BODIES.values())[:20]:
                client = stack.enter_context(connected(server))
                with contextlib.suppress(OSError):
                    client.sendall(post(body)[: len(post(body)) * 2 // 3])
    assert_serves_soon(server)
    wait_for(lambda: len(server.server.server_state.connections) <= 1)
    assert not server.service.inboxes
