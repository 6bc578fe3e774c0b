"""Many requests at once against `generate`, one at a time."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from mythos_jax.errors import ConfigError
from mythos_jax.flops import cache_bytes
from mythos_jax.model.halting import Halting
from mythos_jax.serving.engine import Engine
from mythos_jax.serving.options import PAGE, EngineOptions
from mythos_jax.serving.places import EMPTY, LOOPING, WAITING
from mythos_jax.serving.request import BusyError, NewToken, Request
from mythos_jax.serving.step import _reads
from tests.serving.engines import (
    Heard,
    ask,
    assert_as_offline,
    check_drafts,
    offline,
    random_requests,
    started,
    tiny_model,
)
from tests.tiny import GQA, HUGINN, MLA, OURO, V

CRITERIA = ("", "", "latent", "gate", "kl", "argmax", "predicted")
PROMPT = list(range(20))
NOT_FROZEN = replace(GQA, freeze_halted=False, feed_forward="dense", prelude_layers=0, coda_layers=0)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What is compiled while a test runs."""
    names: list[str] = []

    def listen(name: str, _: float, **__: Any) -> None:
        if name.endswith("backend_compile_duration"):
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_two_hundred_mixed_requests(engine, compiled):
    """Depths, policies, temperatures, lengths, drafts, arrivals at random, and some cancelled in the middle."""
    config, random = engine.loaded.config.model, np.random.default_rng(1)
    requests, asked = random_requests(config, 200, CRITERIA), []
    for i, request in enumerate(requests):
        asked.append(ask(engine, request))
        if random.random() < 0.3:
            time.sleep(random.exponential(0.01))
        if i % 10 == 9:
            engine.cancel(asked[int(random.integers(max(i - 8, 0), i + 1))][0])
    reasons = [heard.reason for _, heard in asked]
    assert not compiled
    whole = [i for i, reason in enumerate(reasons) if reason in ("stop", "length")]
    assert len(whole) >= 180
    results = [heard.result for _, heard in asked]
    assert_as_offline(engine.loaded, [requests[i] for i in whole], [results[i] for i in whole], allowed=3)
    for i in whole:
        check_drafts(asked[i][1])
        ends_with_stop = results[i][0][-1] in requests[i].stop_tokens
        assert reasons[i] == ("stop" if ends_with_stop else "length")
    for i in set(range(200)) - set(whole):
        assert reasons[i] == "cancelled"
        tokens, _ = offline(engine.loaded, requests[i])
        assert results[i][0] == tokens[: len(results[i][0])] or len(results[i][0]) == 0
    assert_idle(engine)
    assert engine.counters.accepted > 0
    assert engine.counters.drafted > engine.counters.accepted


def assert_idle(engine: Engine) -> None:
    """No place and no page is lost."""
    until, counters = time.monotonic() + 60, engine.counters
    while (counters.occupied or counters.pages_used) and time.monotonic() < until:
        time.sleep(0.005)
    assert (counters.occupied, counters.queued, counters.pages_used) == (0, 0, 0)
    assert counters.requests_started == counters.requests_finished


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine's thread stands still in the block: what is asked for there comes at once for it."""
    stands, go_on = threading.Event(), threading.Event()
    engine.submit(Request(PROMPT, 1), lambda events: (stands.set(), go_on.wait(120)))
    assert stands.wait(60)
    try:
        yield
    finally:
        go_on.set()


@pytest.mark.parametrize(
    ("config", "criteria", "rule"),
    [
        pytest.param(GQA, ("", "act"), "all", id="act, experts"),
        pytest.param(NOT_FROZEN, ("",), "all", id="act, not frozen"),
        pytest.param(replace(HUGINN, loop_layers=1), ("", "entropy"), "all", id="noise"),
        pytest.param(MLA, ("", "cosine"), "last", id="mla, last loop only"),
    ],
)
def test_families(config, criteria, rule):
    """Of each family 16 requests on a cache that has room for three of the longest, so that they wait for pages."""
    room = 9 * PAGE * cache_bytes(config, config.loops, rule)
    engine = started(config, EngineOptions(4, room, max_length=48, loop_cache=rule, prefill_chunk=16))
    assert engine.layout.pages == 9
    requests = [
        replace(
            request,
            tokens=request.tokens[:30],
            loops=config.loops,
            max_new_tokens=min(request.max_new_tokens, 18),
            draft_loops=request.draft_loops if rule == "all" else None,
        )
        for request in random_requests(engine.loaded.config.model, 16, criteria)
    ]
    asked = [ask(engine, request)[1] for request in requests]
    engine.close(drain=True)
    assert all(heard.reason in ("stop", "length") for heard in asked)
    results = [heard.result for heard in asked]
    assert_as_offline(engine.loaded, requests, results, allowed=1, loop_cache=rule, prefill_chunk=16)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        ask(engine, requests[0])


@pytest.mark.slow
def test_a_mesh_of_four_devices():
    config = replace(OURO, loop_layers=1)
    engine = started(config, EngineOptions(places=4, max_length=32, prefill_chunk=16), fsdp=2, tensor=2)
    requests = [Request(PROMPT, 8, seed=i, temperature=1.0, halting=Halting("latent", 0.3)) for i in range(4)]
    requests[1] = replace(requests[1], draft_loops=1)
    asked = [ask(engine, request)[1] for request in requests]
    engine.close()
    assert_as_offline(tiny_model(config), requests, [heard.result for heard in asked], allowed=1)


def test_loops_that_are_executed_are_those_that_the_policies_ask_for(engine):
    assert ask(engine, Request(PROMPT, 3))[1].reason == "length"  # what was under way before has been counted
    before = replace(engine.counters)
    requests = [
        replace(request, draft_loops=None)
        for request in random_requests(engine.loaded.config.model, 30, ("", "latent", "gate"), seed=5)
    ]
    asked = [ask(engine, request)[1] for request in requests]
    assert all(heard.reason != "failed" for heard in asked)
    # The first token of each follows from the prompt.
    wanted = sum(event.loops for heard in asked for event in heard.final if event.index > 0)
    assert_idle(engine)
    assert engine.counters.loops - before.loops == wanted
    spent = sum(event.loops for heard in asked for event in heard.final)
    assert engine.counters.token_loops - before.token_loops == spent


def test_prompts_that_begin_alike_are_read_once(engine):
    before = replace(engine.counters)
    first, again = Request(PROMPT * 2, 8, seed=1), Request([*PROMPT, *PROMPT[:15], 3, 3], 8, seed=2, temperature=1.0)
    other = replace(again, halting=Halting("latent", 0.3))  # keys and values depend on the policy
    results = []
    for request in (first, again, other, again):
        _, heard = ask(engine, request)
        assert heard.reason == "length"
        results.append(heard.result)
    assert_as_offline(engine.loaded, (first, again, other, again), results)
    assert engine.counters.cached_tokens - before.cached_tokens == 32 + 32


def test_log_probabilities(engine):
    request = Request(PROMPT, 6, temperature=1.0, seed=3, logprobs=4)
    _, heard = ask(engine, request)
    assert heard.reason == "length"
    tokens, _ = offline(engine.loaded, request)
    loaded = engine.loaded
    logits = jax.jit(loaded.model.apply)(loaded.variables, np.array([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    truth = np.asarray(jax.nn.log_softmax(logits))
    for event, row in zip(heard.final, truth, strict=True):
        best = np.argsort(-row)[:4]
        assert [token for token, _ in event.alternatives] == best.tolist()
        np.testing.assert_allclose([value for _, value in event.alternatives], row[best], atol=1e-4)
        np.testing.assert_allclose(event.logprob, row[event.token], atol=1e-4)


def test_cancelled_requests_leave(engine):
    stands, go_on = threading.Event(), threading.Event()
    first = Heard()

    def hear(events):  # the engine has begun, and goes on when all are cancelled
        first(events)
        stands.set()
        go_on.wait(120)

    waiting = [(engine.submit(Request(PROMPT, 40), hear), first)]
    waiting += [ask(engine, Request(PROMPT, 40, seed=i)) for i in range(1, 20)]
    assert stands.wait(60)
    for ticket, _ in waiting:
        engine.cancel(ticket)
    go_on.set()
    assert [heard.reason for _, heard in waiting] == ["cancelled"] * 20
    assert_idle(engine)
    engine.cancel(waiting[0][0])  # again, for nothing
    _, heard = ask(engine, Request(PROMPT, 3))
    assert heard.reason == "length"


def test_cancelled_while_it_is_read_and_while_it_shows_drafts(engine, monkeypatch):
    read_chunk = engine._read_chunk
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_read_chunk", lambda live, size: (read_chunk(live, size), engine.cancel(live.ticket)))
        _, heard = ask(engine, Request([7, *PROMPT, *PROMPT], 20))
        assert heard.reason == "cancelled"
        assert not heard.final
    shown = threading.Event()
    with_drafts = Heard()

    def hear(events):
        with_drafts(events)
        if any(isinstance(event, NewToken) and not event.final for event in events):
            shown.set()

    ticket = engine.submit(Request(PROMPT, 44, draft_loops=1, temperature=3.0, draft_tokens=3), hear)
    assert shown.wait(60)
    engine.cancel(ticket)
    assert with_drafts.reason in ("cancelled", "length")
    check_drafts(with_drafts)
    assert_idle(engine)


def test_a_listener_may_submit_and_cancel(engine):
    """Requests that are asked for and cancelled in the engine's own thread."""
    others: list[Any] = []

    def hear(events):
        if not others:
            others.extend(ask(engine, Request(PROMPT, 9, seed=i)) for i in range(2))
            engine.cancel(others[0][0])

    engine.submit(Request(PROMPT, 5), hear)
    until = time.monotonic() + 60
    while len(others) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert [heard.reason for _, heard in others] == ["cancelled", "length"]
    assert_idle(engine)


def test_prompts_are_read_in_turn(engine):
    """A short prompt that comes later is read before the end of a long one."""
    with held(engine):
        before = [ask(engine, Request(list(range(i, i + 20)) * 2, 2)) for i in range(6)]  # they keep it busy
        long, short = ask(engine, Request([5] * 62, 1))[1], ask(engine, Request([6] * 2, 1))[1]
    assert [heard.reason for heard in (long, short)] == ["length"] * 2
    assert short.final[0].seconds < long.final[0].seconds
    assert [heard.reason for _, heard in before] == ["length"] * 6


def test_a_draft_follows_a_token_that_has_halted_before_its_draft():
    """The token of place 1 has halted after a loop and waits for that of place 0; drafts begin after two loops."""
    three = np.ones(3, np.int32)
    terms = SimpleNamespace(draft_loops_P=three * 2)
    work = SimpleNamespace(
        phase_P=np.array([LOOPING, WAITING, EMPTY]),
        head_P=np.array([True, False, False]),
        drafted_P=np.array([True, False, False]),
        loop_P=np.array([2, 1, 0]),
    )
    final, draft, _ = _reads(terms, work, np.array([1, 2, 0]))
    assert not final.any()
    assert draft.tolist() == [False, True, False]


def test_a_listener_that_fails_stops_only_its_own_request(engine):
    def fails(events):
        raise RuntimeError("no")

    engine.submit(Request(PROMPT, 30), fails)
    _, heard = ask(engine, Request(PROMPT, 5))
    assert heard.reason == "length"
    assert_idle(engine)


def test_a_full_queue_refuses():
    engine = Engine(tiny_model(MLA), EngineOptions(places=2, max_length=32, queue=1))
    asked = [ask(engine, Request(PROMPT, 2)) for _ in range(3)]  # it is not started: all wait
    with pytest.raises(BusyError, match="queue: got 3 waiting requests, allowed: 3") as error:
        ask(engine, Request(PROMPT, 2))
    assert error.value.retry_after > 0
    engine.close()
    engine.close()
    assert [heard.reason for _, heard in asked] == ["cancelled"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "tokens: got shape"),
        ({"tokens": [V]}, "tokens: got \\[40\\], allowed: 0 to 39"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_new_tokens": 60}, "20 tokens and 60 new ones, allowed: at most max_seq_len, 64, together"),
        ({"loops": 0}, "loops: got 0"),
        ({"loops": 4}, "loops: got 4, allowed: at most 3"),
        ({"halting": Halting("act")}, "halting criterion: got 'act'"),
        ({"loops": 2.5}, "loops: got 2.5, allowed: an integer"),
        (
            {"halting": Halting("latent", 0.3, min_loops=2**40)},
            "min_loops: got 1099511627776, allowed: an integer of 32",
        ),
        ({"draft_loops": 1, "draft_tokens": 1.5}, "draft_tokens: got 1.5"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**32}, "seed: got 4294967296"),
        ({"stop_tokens": [V]}, "stop_tokens: got"),
        ({"stop_tokens": [1] * 9}, "stop_tokens: got 9 of them, allowed: at most 8"),
        ({"logprobs": 21}, "logprobs: got 21"),
        ({"draft_loops": 0}, "draft_loops: got 0"),
        ({"draft_loops": 1, "draft_tokens": 8}, "draft_tokens: got 8, allowed: 1 to 3"),
        ({"draft_loops": 1, "halting": Halting("kl")}, "halting criterion: got 'kl'"),
    ],
)
def test_what_cannot_be_is_refused(engine, change, message):
    with pytest.raises(ConfigError, match=message):
        ask(engine, replace(Request(PROMPT, 4), **change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"places": 0}, "places: got 0"),
        ({"max_length": 65}, "max_length: got 65, allowed: 2 to max_seq_len, 64"),
        ({"max_loops": 0}, "max_loops: got 0"),
        ({"queue": -1}, "queue: got -1"),
        ({"prefill_chunk": 0}, "prefill_chunk: got 0"),
        ({"cache_bytes": 1000}, "cache_bytes: got 1,000, allowed: at least"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_model(MLA), EngineOptions(**options))


def test_events_say_when(engine):
    _, heard = ask(engine, Request(PROMPT, 5))
    assert heard.reason == "length"
    seconds = [event.seconds for event in heard.events if isinstance(event, NewToken)]
    assert seconds == sorted(seconds)
    assert [event.index for event in heard.final] == list(range(5))


def test_memory_of_a_device(engine):
    layout, memory = engine.layout, engine.memory
    assert memory["cache"] == layout.pages * PAGE * cache_bytes(OURO, layout.max_loops)
    assert memory["weights"] == sum(x.nbytes for x in jax.tree.leaves(engine.loaded.variables))
    assert memory["programs"] > 0
