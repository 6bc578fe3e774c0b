"""The speed benchmarks: what they compute from times, and that they compare equal computations."""

import dataclasses
import json
import time
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import own_loop, retrofit_study, serving, serving_measure
from benchmarks.roofline import exponent, unrolled_features
from benchmarks.serving_load import Load, Mix, Range, Reply, arrivals, draw_requests
from benchmarks.serving_report import draw, numbers, table
from benchmarks.serving_sides import BatchSide, HttpSide, Measured, events_of, generated
from benchmarks.steps import Shape, batch_of, config_of
from benchmarks.timing import median_and_range, ratios, time_in_turns
from benchmarks.utilisation import DENSE_1B, toy
from mythos_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from mythos_jax.flops import count_parameters
from mythos_jax.inference.generate import generate
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel
from mythos_jax.runs.state import Constants
from mythos_jax.serving.request import Finished, NewToken, Request, TakenBack
from mythos_jax.sharding import make_mesh, use_mesh
from mythos_jax.training.step import init_state, jitted_step
from tests import tiny
from tests.server.running import fake_service, running, talking_model
from tests.serving.fake_engine import FakeEngine


def test_the_exponent_of_a_power_law_does_not_depend_on_its_factor():
    sizes = [1, 2, 4, 8, 16]
    assert exponent(sizes, [3e-3 * n**1.25 for n in sizes]) == pytest.approx(1.25)
    # Noise in the logarithm that is not correlated with the size has no influence.
    assert exponent([1, 2, 4], [2.0, 1.0, 2.0]) == pytest.approx(0)


def test_sides_take_turns_and_first_calls_are_separate():
    calls = []
    times, first = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "ab" + "aabb" * 3
    assert {side: len(turns) for side, turns in times.items()} == {"a": 3, "b": 3}
    assert set(first) == {"a", "b"}


def test_ratios_are_within_each_repeat_and_cells_show_the_range():
    assert ratios([2.0, 8.0], [1.0, 2.0]) == [2.0, 4.0]
    assert median_and_range([0.003, 0.001, 0.0025], 1e3) == "2.5 (1.0 to 3.0)"


def test_the_unrolled_loop_equals_the_loop():
    config = ModelConfig(
        vocab_size=32, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=16, loop_layers=2, loops=3,
        injection="none",
    )  # fmt: skip
    model, tokens = Mythos(config), jnp.arange(12).reshape(2, 6)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    looped = jax.jit(lambda v: model.apply(v, tokens, method="features"))(variables)
    unrolled = jax.jit(lambda p: unrolled_features(config, p, tokens))(nn.unbox(variables)["params"])
    np.testing.assert_allclose(unrolled, looped, atol=1e-5)


def test_a_loop_of_ones_own_compiles_to_the_same_work():
    """`model.apply(…).logits` and optax: as many FLOPs, and no more memory, than the train step of `mythos train`."""
    config = config_of(replace(tiny.GQA_LAST, max_seq_len=64), Shape(4, 64))
    mesh, batch = make_mesh(config.mesh, jax.devices()[:1]), batch_of(config)
    state = init_state(config, mesh)
    step, params, optimizer_state = own_loop.make_step(config, state.variables)
    with use_mesh(mesh):
        ours = jitted_step(config).lower(state, batch, Constants()).compile()
    own = step.lower(params, optimizer_state, batch["tokens"], batch["targets"]).compile()
    assert own.cost_analysis()["flops"] == pytest.approx(ours.cost_analysis()["flops"], rel=0.01)
    memory, limit = own.memory_analysis(), ours.memory_analysis()
    assert memory.temp_size_in_bytes <= 1.01 * limit.temp_size_in_bytes
    assert memory.alias_size_in_bytes > 0.99 * memory.argument_size_in_bytes - batch["tokens"].nbytes * 2  # donated


def test_the_gpu_models_have_1_b_parameters_and_toys_keep_their_kind():
    assert 0.9e9 < count_parameters(DENSE_1B) < 1.1e9
    small = toy(dataclasses.replace(DENSE_1B, dtype="bfloat16"))
    assert count_parameters(small) < 1e6
    assert (small.remat, small.dtype) == ("full", "bfloat16")


def test_the_retrofit_study_shows_each_arm_at_each_depth(tmp_path):
    def result(seed, loops, value):
        rows = [
            {"difficulty": d, "loops": n, "value": value + 0.01 * d, "n": 100}
            for d in retrofit_study.DIFFICULTIES
            for n in loops
        ]
        return {"seed": seed, "steps": 7, "training_flops": 3.2e12, "accuracy": rows}

    depths = retrofit_study.DEPTHS
    runs = {
        "dense": [result(0, (1,), 0.25), result(1, (1,), 0.35)],
        "4 loops": [result(0, depths, 0.8), result(1, depths, 0.8)],
    }
    lines = retrofit_study.table(runs).splitlines()
    assert len(lines) == 2 + 1 + len(depths)
    assert lines[2].startswith("| dense | 7 | 3.2e+12 | 1 | 31 (26 to 36) | 32 (27 to 37) |")
    assert lines[-1].startswith("| 4 loops | 7 | 3.2e+12 | 8 | 81 (81 to 81) |")
    retrofit_study.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# A request for `serving`, whose prompt says which it is.
def asks(number, new_tokens, **fields):
    return Request(tokens=[number + 1, 2], max_new_tokens=new_tokens, seed=number, **fields)


def answered(listener, count, start):
    for i in range(count):
        listener([NewToken(i, 7, 2, True, None, (), start + i)])
    listener([Finished("length")])


def test_the_closed_loop_keeps_its_users_busy_and_no_more():
    running, most, order = [], [], []

    def send(request, listener):
        running.append((request, listener))
        most.append(len(running))
        order.append(request.tokens[0] - 1)
        if len(running) == 3 or len(order) == 7:  # all users wait: those who asked last are answered first
            for asked, listen in reversed(running.copy()):
                running.clear()
                answered(listen, asked.max_new_tokens, 0.0)

    load = Load(send, [asks(i, i + 1) for i in range(7)])
    assert load.closed(users=3) >= 0
    assert (max(most), order) == (3, list(range(7)))
    assert [reply.new_tokens for reply in load.finished] == list(range(1, 8))


def test_the_open_loop_counts_from_the_time_at_which_a_request_was_due():
    load = Load(lambda request, listener: answered(listener, 2, time.perf_counter()), [asks(i, 2) for i in range(3)])
    seconds = load.arriving([0.0, 0.02, 0.04])
    start = load.finished[0].due
    assert [reply.due - start for reply in load.finished] == pytest.approx([0.0, 0.02, 0.04])
    assert seconds >= 0.04
    mean_gap = np.diff(arrivals(4000, rate=50.0, seed=0)).mean()
    assert mean_gap == pytest.approx(1 / 50, rel=0.05)


def test_drafts_are_ahead_of_their_confirmation():
    def token(index, number, seconds, final=True):
        return NewToken(index, number, 1, final, None, (), seconds)

    reply = Reply(due=0.0)
    reply.note([token(0, 5, 1.0), token(1, 6, 1.5, False), token(2, 7, 1.5, False), token(3, 8, 1.5, False)], now=0.0)
    reply.note([token(1, 6, 2.0), TakenBack(2), token(2, 9, 4.0), token(3, 8, 5.0, False), token(3, 4, 6.0)], now=0.0)
    assert (reply.tokens, reply.ahead, reply.first_shown) == ([5, 6, 9, 4], [0.5], 1.0)


def test_a_failed_request_ends_the_measurement():
    load = Load(lambda request, listener: listener([Finished("failed", "out of pages")]), [asks(0, 2)])
    with pytest.raises(RuntimeError, match="out of pages"):
        load.closed(users=1)


def test_requests_are_the_seeds_and_within_their_ranges():
    text = np.arange(500, dtype=np.int32)
    mix = Mix(Range.parse("3-20"), Range(4, 9), 3, (None, Halting("latent", 0.1)), (0.0, 0.8))
    requests = draw_requests(text, mix, 300, seed=4)
    assert requests == draw_requests(text, mix, 300, seed=4)
    assert {len(r.tokens) for r in requests} == set(range(3, 21))
    assert {r.max_new_tokens for r in requests} == set(range(4, 10))
    assert {(r.halting is None, r.temperature) for r in requests} == {(a, b) for a in (True, False) for b in (0.0, 0.8)}
    assert all(np.diff(r.tokens).tolist() == [1] * (len(r.tokens) - 1) for r in requests)


def test_static_batches_give_each_request_its_own_tokens_and_run_to_the_deepest():
    model, variables, policy = Mythos(tiny.DENSE), tiny.variables(tiny.DENSE), Halting("latent", 0.35)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = Config(model=tiny.DENSE, data=DataConfig(seq_len=1))
    loaded = LoadedModel(Path(), config, model, variables, None, mesh, None)
    requests = [asks(0, 3, loops=3, halting=policy), asks(1, 5, loops=3, halting=policy)]
    measured = generated(loaded, width=2, room=5, rows=4).closed(requests, users=2)
    prompts = [request.tokens for request in requests]
    offline = generate(model, variables, prompts, max_new_tokens=5, loops=3, halting=policy, seed=[0, 1])
    for i, (reply, request) in enumerate(zip(measured.replies, requests, strict=True)):
        assert reply.tokens == offline.tokens[i, : request.max_new_tokens].tolist()
        assert reply.loops == offline.loops[i, : request.max_new_tokens].tolist()
    # Without the first token, whose loops the prompt ran; two rows, each as deep as the deeper one.
    assert offline.loops[:, 1:].min() < offline.loops[:, 1:].max()
    assert measured.executed == 2 * offline.loops.max(0)[1:].sum()


def test_static_batches_hold_requests_that_are_alike():
    batches = []

    def answer(batch):
        batches.append([request.tokens[0] - 1 for request in batch])
        return [([0] * request.max_new_tokens, [1] * request.max_new_tokens) for request in batch], 10

    requests = [asks(i, new, temperature=t) for i, (new, t) in enumerate([(9, 0), (1, 1), (2, 0), (3, 1), (1, 0)])]
    side = BatchSide(answer, lambda request: request.temperature, rows=2)
    measured = side.closed(requests, users=2)
    replace(side, by_length=True).closed(requests, users=2)
    side.arriving(requests, np.zeros(5))
    assert batches == [[0, 2], [4], [1, 3], [4, 2], [0], [1, 3], [0, 2], [1, 3], [4]]
    assert [reply.new_tokens for reply in measured.replies] == [9, 1, 2, 3, 1]
    assert measured.executed == 30


def test_what_a_stream_over_http_says():
    chunk = {"choices": [{"text": "ab", "mythos": {
        "tokens": [{"index": 0, "text": "a", "loops": 3, "ms": 1.5}, {"index": 1, "text": "b", "loops": 2, "ms": 2.5}],
        "provisional": [{"index": 2, "text": "c"}],
    }}]}  # fmt: skip
    assert [(e.index, e.loops, e.final) for e in events_of(chunk)] == [(0, 3, True), (1, 2, True), (2, 0, False)]
    ordinary = [{"choices": [{"text": "two words"}]}, {"choices": [], "usage": {"completion_tokens": 5}}]
    reply = Reply(due=1.0)
    for number, part in enumerate(ordinary):
        assert not reply.note(events_of(part), now=2.0 + number)
    assert reply.note([Finished("stop")], now=4.0)
    assert (reply.times, reply.new_tokens, reply.ended) == ([2.0], 5, 4.0)


def test_the_serving_tables_show_ratios_loops_and_latencies(tmp_path):
    def measured(seconds, executed, tokens):
        reply = Reply(0.0, [0.010, 0.014, 0.018], [1, 2, tokens], [2, 4, 3], first_shown=0.01, ended=0.018)
        return Measured(seconds, [reply], cpu=2 * seconds, executed=executed, steps=4)

    engine, full = [measured(1.0, 7, 5), measured(2.0, 7, 5)], [measured(2.0, 16, 6), measured(3.0, 16, 6)]
    truth = [Reply(0.0, [], [1, 2, 5], [2, 4, 3])]
    sides = {"engine": numbers(engine, full, truth), "all loops": numbers(full, full, truth)}
    assert sides["engine"]["ratio"] == [2.0, 1.5]
    lines = table("8 users", sides, "all loops").splitlines()
    assert lines[4] == (
        "| engine | 2 (2 to 3) | 1.75 (1.50 to 2.00) | 1.000 | 3.00 | 10.0 / 10.0 | 4.0 / 4.0 | 6.0 / 6.0 | 1.8 |"
    )
    times = "1.75 (1.50 to 2.00) times"
    assert lines[-3] == f"all loops: {times} the engine's time, {times} its CPU time."
    assert lines[-1] == "Replies with the tokens of offline generation: engine: 1 of 1; all loops: 0 of 1."
    draw({"8 users": sides, "32 users": sides}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_server_over_http_is_a_side_too():
    model = talking_model()
    with running(fake_service(FakeEngine(places=2, queue=8), model)) as server:
        side = HttpSide(f"{server.url}/v1", "", model.require_tokenizer().decode, None, {"loops": 3})
        requests = [asks(i, 2 + i, halting=Halting("latent", 0.1)) for i in range(5)]
        measured = side.closed(requests, users=3)
        assert [reply.new_tokens for reply in measured.replies] == [2, 3, 4, 5, 6]
        assert measured.replies[4].loops == [1, 2, 3, 1, 2, 3]
        assert all(reply.due < reply.times[0] <= reply.times[-1] <= reply.ended for reply in measured.replies)
        with pytest.raises(RuntimeError, match=r"HTTP 400.*loops"):
            HttpSide(f"{server.url}/v1", "", model.require_tokenizer().decode, None, {"loops": 9}).arriving(
                requests, np.zeros(5)
            )


def test_the_serving_benchmark_from_its_words_to_its_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving, "use_cores", lambda threads: None)
    monkeypatch.setattr("mythos_jax.runs.load.load_model", lambda path: talking_model())
    monkeypatch.setattr(serving_measure, "new_engine", lambda args, loaded, requests: FakeEngine(places=4, queue=9))
    (tmp_path / "text").write_text("words of the prompts " * 20)
    words = f"run --text {tmp_path}/text --only engine --users 3 --rates 400 --requests 6 --repeats 2 --overhead 0"
    words += f" --prompt 2-5 --new 3 --halting latent,none --json {tmp_path}/out.json --plot {tmp_path}/out.png"
    serving.main(words.split())
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(found) == ["3 users", "400 requests/s"]
    for load in found.values():
        assert list(load) == ["engine"]
        assert load["engine"]["tokens"] == 6 * 3
        assert len(load["engine"]["tokens_per_second"]) == 2
    printed = capsys.readouterr().out
    assert "6 requests, " in printed
    assert "**400 requests/s**; ratio: to 'engine'" in printed
    assert (tmp_path / "out.png").stat().st_size > 10_000
