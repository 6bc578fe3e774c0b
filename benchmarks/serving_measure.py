"""The serving benchmark's sides, opened, and measured in turn."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.serving_load import Reply, arrivals
from benchmarks.serving_overhead import bare, equal_requests, served
from benchmarks.serving_report import Runs, numbers
from benchmarks.serving_sides import EngineSide, HttpSide, Measured, Side, generated, of_transformers
from mythos_jax.runs.load import LoadedModel
from mythos_jax.serving.engine import Engine
from mythos_jax.serving.options import EngineOptions
from mythos_jax.serving.request import Request

Sides = dict[str, Side]


def open_sides(
    args: argparse.Namespace, loaded: LoadedModel, requests: Sequence[Request]
) -> tuple[Sides, Callable[[], None]]:
    """The sides by name, and what is to be called at the end."""
    if args.url:
        decode, key = loaded.require_tokenizer().decode, os.environ.get("MYTHOS_API_KEY")
        return {"server": HttpSide(args.url, args.served, decode, key, args.fields)}, lambda: None
    width, room = max(len(r.tokens) for r in requests), max(r.max_new_tokens for r in requests)
    engine = new_engine(args, loaded, requests)
    engine.start()
    static = generated(loaded, width, room, args.places)
    sides = engine_sides(args, engine, requests) | {"static": static, "static, sorted": replace(static, by_length=True)}
    if args.against == "transformers":
        from benchmarks.storage import transformers_model

        sides["transformers"] = of_transformers(transformers_model(args.model), args.places)
    return {name: side for name, side in sides.items() if args.only in name}, engine.close


def new_engine(args: argparse.Namespace, loaded: LoadedModel, requests: Sequence[Request]) -> Engine:
    longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
    engine = Engine(loaded, EngineOptions(places=args.places, max_length=longest, queue=len(requests)))
    engine.warm_up()
    return engine


def engine_sides(args: argparse.Namespace, engine: Engine, requests: Sequence[Request]) -> Sides:
    sides: Sides = {"engine": EngineSide(engine)}
    if any(request.halting for request in requests):
        sides["all loops"] = EngineSide(engine, lambda request: replace(request, halting=None))
    if args.draft_loops:
        drafts = {"draft_loops": args.draft_loops, "draft_tokens": args.draft_tokens}
        sides["provisional"] = EngineSide(engine, lambda request: replace(request, **drafts))
    return sides


def measure_all(
    args: argparse.Namespace, sides: Sides, requests: Sequence[Request]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each load, the side that ratios are to, and the numbers of each side."""
    loads: dict[str, Callable[[Side], Measured]] = {}
    for users in filter(None, map(int, args.users.split(","))):
        loads[f"{users} users"] = lambda side, users=users: side.closed(requests, users)
    for rate in map(float, filter(None, args.rates.split(","))):
        times = arrivals(len(requests), rate, args.seed)
        loads[f"{rate:g} requests/s"] = lambda side, times=times: side.arriving(requests, times)
    baseline = "all loops" if "all loops" in sides else list(sides)[-1]
    truths = {name: truth_of(side, sides, requests) for name, side in sides.items()}
    for load, measure in loads.items():
        runs = rounds(sides, measure, args.repeats)
        yield load, baseline, {n: numbers(mine, runs[baseline], truths[n]) for n, mine in runs.items()}


def truth_of(side: Side, sides: Sides, requests: Sequence[Request]) -> list[Reply] | None:
    """The replies of offline generation, for a side that is not that itself."""
    static = sides.get("static")
    if static is None or not isinstance(side, EngineSide):
        return None
    return static.closed([side.change(request) for request in requests], users=32).replies


def rounds(sides: Sides, measure: Callable[[Side], Measured], repeats: int) -> Runs:
    """All sides in each round, after one that is not measured, in which programs are compiled."""
    runs: Runs = {name: [] for name in sides}
    for turn in range(-1, repeats):
        for name, side in sides.items():
            measured = measure(side)
            if turn >= 0:
                runs[name].append(measured)
    return runs


def overhead(
    args: argparse.Namespace, loaded: LoadedModel, engine: Engine, requests: Sequence[Request]
) -> tuple[list[float], list[float]]:
    """Seconds per step with `args.overhead` users: of the engine as it serves, and of its program alone; in turn."""
    unstarted = new_engine(args, loaded, requests)
    unstarted._programs.pace.update(engine._programs.pace)  # which depends on how busy the machine was
    shortest = min(requests, key=lambda request: len(request.tokens))
    equal = equal_requests(shortest, args.overhead, engine.layout.max_length)
    pairs = [(served(engine, equal), bare(unstarted, equal)) for _ in range(args.repeats + 1)][1:]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
