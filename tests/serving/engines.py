"""Engines of tiny models, requests drawn at random, and what `generate` gives for them."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mythos_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from mythos_jax.inference.generate import stream
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import LoadedModel
from mythos_jax.serving.engine import Engine
from mythos_jax.serving.live import Ticket
from mythos_jax.serving.options import EngineOptions
from mythos_jax.serving.request import Event, Finished, NewToken, Request, TakenBack
from mythos_jax.sharding import make_mesh, use_mesh
from tests.model.test_predictor import with_predictor
from tests.tiny import V, halting

LENGTH, PROMPT = 64, 40  # tokens of a request in all, and of a prompt at most
# For tiny random models: some tokens stop early, some do not.
THRESHOLDS = {
    "act": 0.7,
    "latent": 0.3,
    "cosine": 0.05,
    "gate": 0.6,
    "kl": 0.05,
    "entropy": 0.1,
    "argmax": 2.0,
    "predicted": 2.0,
}


def tiny_model(config: ModelConfig, **mesh: int) -> LoadedModel:
    """On one device, or on as many as the axes of the mesh take."""
    config = replace(config, max_seq_len=LENGTH)
    weights = {"balance": {}, **jax.device_put(with_predictor(config))}
    devices = jax.devices()[: math.prod(mesh.values())]
    device_mesh = make_mesh(MeshConfig(**{"fsdp": 1, **mesh}), devices)
    run = Config(model=config, data=DataConfig(seq_len=8))
    return LoadedModel(Path("tiny"), run, Mythos(config), weights, None, device_mesh, None)


def started(config: ModelConfig, options: EngineOptions = EngineOptions(places=8), **mesh: int) -> Engine:  # noqa: B008
    engine = Engine(tiny_model(config, **mesh), options)
    engine.warm_up()
    engine.start()
    return engine


@dataclass
class Heard:
    """The events of a request; `done` is set with the last of them."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, events: Sequence[Event]) -> None:
        self.events.extend(events)
        if isinstance(events[-1], Finished):
            self.done.set()

    @property
    def final(self) -> list[NewToken]:
        return [event for event in self.events if isinstance(event, NewToken) and event.final]

    @property
    def result(self) -> tuple[list[int], list[int]]:
        """Tokens, and the loops of each."""
        return [x.token for x in self.final], [x.loops for x in self.final]

    @property
    def reason(self) -> str:
        """Of its end, of which there is one."""
        assert self.done.wait(120)
        ends = [event for event in self.events if isinstance(event, Finished)]
        assert len(ends) == 1
        assert self.events[-1] is ends[0]
        return ends[0].reason


def ask(engine: Engine, request: Request) -> tuple[Ticket, Heard]:
    heard = Heard()
    return engine.submit(request, heard), heard


def random_requests(config: ModelConfig, count: int, criteria: Sequence[str], seed: int = 0) -> list[Request]:
    """All kinds of them. A criterion of "" is no policy."""
    random = np.random.default_rng(seed)
    return [_request(config, criteria[i % len(criteria)], random) for i in range(count)]


def _request(config: ModelConfig, criterion: str, random: Any) -> Request:
    length = int(random.integers(1, PROMPT))
    policy = None
    if criterion:
        threshold = min(THRESHOLDS[criterion] * random.uniform(0.5, 1.6), 1.0 if criterion in ("act", "gate") else 9.0)
        policy = halting(criterion, threshold, int(random.integers(1, 3)), int(random.integers(1, config.loops + 1)))
    loops = config.loops if policy else int(random.integers(2, config.loops + 1))
    drafts = random.random() < 0.4 and not (policy and policy.reads_logits)
    stops = random.integers(0, V, 2).tolist() if random.random() < 0.5 else []
    return Request(
        tokens=random.integers(0, V, length).tolist(),
        max_new_tokens=int(random.integers(1, LENGTH - length + 1)),
        loops=loops,
        halting=policy,
        temperature=float(random.choice([0, 0.7, 1.3])),
        top_k=int(random.choice([0, 5])),
        top_p=float(random.choice([1, 0.8])),
        seed=int(random.integers(0, 2**32)),
        stop_tokens=stops,
        draft_loops=int(random.integers(1, loops + 1)) if drafts else None,
        draft_tokens=int(random.integers(1, 4)),
    )


def offline(loaded: LoadedModel, request: Request, **options: Any) -> tuple[list[int], list[int]]:
    """What `generate` gives, with shapes that all requests share: tokens, and the loops of each."""
    tokens_1T = np.zeros((1, PROMPT), np.int32)
    tokens_1T[0, : len(request.tokens)] = request.tokens
    with use_mesh(loaded.mesh):
        pieces = stream(
            loaded.model,
            loaded.variables,
            tokens_1T,
            [len(request.tokens)],
            max_new_tokens=request.max_new_tokens,
            room=LENGTH,
            every=LENGTH,
            loops=request.loops,
            halting=request.halting,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
            **options,
        )
        parts = list(pieces)
    tokens, loops = (
        np.concatenate([getattr(part, name)[0, : part.lengths[0]] for part in parts]).tolist()
        for name in ("tokens", "loops")
    )
    # Stop tokens are looked for here, since their number is compiled in.
    end = next((i + 1 for i, token in enumerate(tokens) if token in request.stop_tokens), len(tokens))
    return tokens[:end], loops[:end]


def check_drafts(heard: Heard) -> None:
    """Every draft is confirmed or taken back before its place is final, and final tokens come in order."""
    drafts: dict[int, int] = {}
    count = 0
    for event in heard.events:
        if isinstance(event, TakenBack):
            assert drafts, "nothing to take back"
            drafts = {index: token for index, token in drafts.items() if index < event.index}
        elif isinstance(event, NewToken) and event.final:
            assert event.index == count
            assert drafts.pop(event.index, event.token) == event.token
            count += 1
        elif isinstance(event, NewToken):
            assert event.index >= count
            assert event.index not in drafts
            drafts[event.index] = event.token
    assert not drafts


def is_sensitive(loaded: LoadedModel, request: Request, result: Any, **options: Any) -> bool:
    """Whether `generate` gives this result with weights that differ by a few parts in ten million: then it depends on a
    comparison, of two logits or with a threshold, that float32 cannot decide."""
    for seed in range(30):
        random = np.random.default_rng(seed)

        def nudge(x: Any, random: Any = random) -> Any:
            return x * (1 + 5e-7 * random.standard_normal(x.shape).astype(np.float32))

        nudged = replace(loaded, variables=jax.tree.map(nudge, loaded.variables))
        if offline(nudged, request, **options) == result:
            return True
    return False


def assert_as_offline(
    loaded: LoadedModel, requests: Sequence[Request], results: Sequence[Any], allowed: int = 0, **options: Any
) -> None:
    """Token for token, and loop for loop. allowed: results that may differ where float32 cannot decide."""
    wanted = [offline(loaded, request, **options) for request in requests]
    differ = [i for i, result in enumerate(results) if result != wanted[i]]
    assert len(differ) <= allowed, [(requests[i], results[i], wanted[i]) for i in differ[:3]]
    for i in differ:
        assert is_sensitive(loaded, requests[i], results[i], **options), requests[i]
