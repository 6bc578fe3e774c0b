"""What the serving benchmark compares: our engine, static batches of ours and of transformers', servers over HTTP."""

import copy
import json
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from benchmarks.serving_load import Counted, Load, Reply
from mythos_jax.inference.generate import decode, prefill_all
from mythos_jax.inference.request import prepare
from mythos_jax.runs.load import LoadedModel
from mythos_jax.serving.request import Event, Finished, Listener, NewToken, Request, TakenBack
from mythos_jax.sharding import use_mesh

if TYPE_CHECKING:
    from mythos_jax.serving.engine import Engine

PREFILL_CHUNK = 32  # of static batches: few columns of padding, one program


@dataclass
class Measured:
    """One run of all requests.

    executed: loops run for new tokens, also those that nobody needed. It is the last token of the prompt that predicts
    the first new one, so the loops of that are not among them. steps: of the engine. None: the side does not tell.
    cpu: seconds of this process on all cores, which are less sensitive to what else the machine does.
    """

    seconds: float
    replies: list[Reply]
    cpu: float | None = None
    executed: int | None = None
    steps: int | None = None
    drafted: int = 0
    accepted: int = 0


class Side(Protocol):
    def closed(self, requests: Sequence[Request], users: int) -> Measured: ...

    def arriving(self, requests: Sequence[Request], times: np.ndarray) -> Measured: ...


@dataclass
class EngineSide:
    """An engine that is warm and started. change: what this side makes of a request."""

    engine: "Engine"
    change: Callable[[Request], Request] = field(default=lambda request: request)

    def closed(self, requests: Sequence[Request], users: int) -> Measured:
        return self._measure(requests, lambda load: load.closed(users))

    def arriving(self, requests: Sequence[Request], times: np.ndarray) -> Measured:
        return self._measure(requests, lambda load: load.arriving(times))

    def _measure(self, requests: Sequence[Request], run: Callable[[Load], float]) -> Measured:
        load, before = Load(self.engine.submit, [self.change(r) for r in requests]), copy.copy(self.engine.counters)
        cpu = time.process_time()
        seconds, after = run(load), self.engine.counters
        cpu = time.process_time() - cpu

        def grown(name: str) -> int:
            return getattr(after, name) - getattr(before, name)

        names = {"executed": "loops", "steps": "steps", "drafted": "drafted", "accepted": "accepted"}
        return Measured(seconds, load.finished, cpu, **{ours: grown(theirs) for ours, theirs in names.items()})


Answer = tuple[list[int], list[int | None]]  # new tokens, and the loops of each


@dataclass
class BatchSide:
    """Batches that are answered when their last token is there.

    answer: the new tokens of a batch's rows, and the loops that the batch executed. alike: requests that share a
    batch are equal in this. by_length: batches are of requests for about as many new tokens, which only a server that
    knows all requests in advance can do.
    """

    answer: Callable[[Sequence[Request]], tuple[list[Answer], int | None]]
    alike: Callable[[Request], Hashable]
    by_length: bool = False
    rows: int = 32  # at most, in the open loop

    def closed(self, requests: Sequence[Request], users: int) -> Measured:
        """As many rows as users. The batches are ready made: no user's thinking time is counted."""
        start, cpu = time.perf_counter(), time.process_time()
        measured = Measured(0.0, [Reply(0.0) for _ in requests])
        for numbers in self._batches(requests, users):
            now = time.perf_counter()
            self._run(requests, numbers, dict.fromkeys(numbers, now), measured)
        measured.seconds, measured.cpu = time.perf_counter() - start, time.process_time() - cpu
        return measured

    def arriving(self, requests: Sequence[Request], times: np.ndarray) -> Measured:
        """A batch is made of what waits when the last one has ended."""
        start, cpu = time.perf_counter(), time.process_time()
        measured = Measured(0.0, [Reply(0.0) for _ in requests])
        left = list(range(len(requests)))
        while left:
            time.sleep(max(0.0, start + times[left[0]] - time.perf_counter()))
            waiting = [i for i in left if start + times[i] <= time.perf_counter()]
            kind = self.alike(requests[left[0]])
            numbers = [i for i in waiting if self.alike(requests[i]) == kind][: self.rows] or left[:1]
            left = [i for i in left if i not in numbers]
            self._run(requests, numbers, {i: start + times[i] for i in numbers}, measured)
        measured.seconds, measured.cpu = time.perf_counter() - start, time.process_time() - cpu
        return measured

    def _batches(self, requests: Sequence[Request], rows: int) -> Iterator[list[int]]:
        def kind(i: int) -> str:
            return repr(self.alike(requests[i]))

        numbers = range(len(requests))
        order = sorted(numbers, key=lambda i: requests[i].max_new_tokens) if self.by_length else numbers
        for _, group in groupby(sorted(order, key=kind), key=kind):
            members = list(group)
            yield from (members[i : i + rows] for i in range(0, len(members), rows))

    def _run(
        self, requests: Sequence[Request], numbers: Sequence[int], due: dict[int, float], measured: Measured
    ) -> None:
        answers, executed = self.answer([requests[i] for i in numbers])
        now = time.perf_counter()
        for i, (tokens, loops) in zip(numbers, answers, strict=True):
            times = [now] * len(tokens)
            measured.replies[i] = Reply(due[i], times, tokens, loops, first_shown=now, ended=now, reason="length")
        if executed is not None:
            measured.executed = (measured.executed or 0) + executed


def generated(loaded: LoadedModel, width: int, room: int, rows: int) -> BatchSide:
    """Static batches by `inference.generate`. width, room: of the longest prompt and reply of all."""

    def answer(batch: Sequence[Request]) -> tuple[list[Answer], int | None]:
        first, most = batch[0], max(r.max_new_tokens for r in batch)
        # Rows in powers of two, so that few programs exist.
        rows = [*batch, *[batch[-1]] * ((1 << (len(batch) - 1).bit_length()) - len(batch))]
        tokens, lengths = np.zeros((len(rows), width), np.int32), [len(r.tokens) for r in rows]
        for row, request in zip(tokens, rows, strict=True):
            row[: len(request.tokens)] = request.tokens
        with use_mesh(loaded.mesh):
            job = prepare(
                loaded.model,
                loaded.variables,
                tokens,
                lengths,
                max_new_tokens=most,
                room=room,
                loops=first.loops,
                halting=first.halting,
                temperature=first.temperature,
                top_k=first.top_k,
                top_p=first.top_p,
                seed=[r.seed for r in rows],
                prefill_chunk=PREFILL_CHUNK,
            )
            result = jax.device_get(decode(job.setup, prefill_all(job), np.int32(most)).result)
        # Every row is computed until the last one is done, in each token and in the batch as a whole.
        executed = len(batch) * int(result.loops[: len(batch), 1:most].max(0).sum())
        answers = [
            (result.tokens[i, : r.max_new_tokens].tolist(), result.loops[i, : r.max_new_tokens].tolist())
            for i, r in enumerate(batch)
        ]
        return answers, executed

    return BatchSide(answer, lambda r: (r.loops, r.halting, r.temperature, r.top_k, r.top_p), rows=rows)


def of_transformers(model: Any, rows: int) -> BatchSide:
    """Static batches by transformers' `generate`, padded on the left; greedy only."""
    import torch

    def answer(batch: Sequence[Request]) -> tuple[list[Answer], int | None]:
        width, most = max(len(r.tokens) for r in batch), max(r.max_new_tokens for r in batch)
        tokens = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, request in enumerate(batch):
            tokens[i, width - len(request.tokens) :] = torch.tensor(request.tokens)
            mask[i, width - len(request.tokens) :] = 1
        with torch.inference_mode():
            all_tokens = model.generate(
                tokens, attention_mask=mask, do_sample=False, min_new_tokens=most, max_new_tokens=most, pad_token_id=0
            )
        rows = all_tokens[:, width:].tolist()
        return [(row[: r.max_new_tokens], [None] * r.max_new_tokens) for row, r in zip(rows, batch, strict=True)], None

    return BatchSide(answer, lambda r: (), rows=rows)


class HttpSide:
    """A server with OpenAI's API, reached over HTTP: POST URL/completions, streaming.

    model: its name there; empty: the first one that the server lists. text: what a prompt is as text. fields: what is
    sent beside OpenAI's own. Our own server tells the loops of each token; of others, every piece of text counts as the
    arrival of a token, and `usage` says how many there were.
    """

    def __init__(
        self, url: str, model: str, text: Callable[[Sequence[int]], str], key: str | None, fields: dict[str, Any]
    ):
        import httpx

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(
            base_url=url.rstrip("/"), headers=headers, timeout=600, limits=limits, trust_env=False
        )
        self._model = model or self._client.get("/models").raise_for_status().json()["data"][0]["id"]
        self._text, self._fields = text, fields

    def closed(self, requests: Sequence[Request], users: int) -> Measured:
        with ThreadPoolExecutor(users) as pool:
            load = self._load(requests, pool)
            return Measured(load.closed(users), load.finished)

    def arriving(self, requests: Sequence[Request], times: np.ndarray) -> Measured:
        with ThreadPoolExecutor(len(requests)) as pool:
            load = self._load(requests, pool)
            return Measured(load.arriving(times), load.finished)

    def _load(self, requests: Sequence[Request], pool: ThreadPoolExecutor) -> Load:
        return Load(lambda request, listener: pool.submit(self._ask, request, listener), requests)

    def _ask(self, request: Request, listener: Listener) -> None:
        try:
            with self._client.stream("POST", "/completions", json=self._body(request)) as response:
                if response.status_code != 200:
                    raise RuntimeError(f"HTTP {response.status_code}: {response.read().decode(errors='replace')[:300]}")
                for line in response.iter_lines():
                    if line.startswith("data:") and "[DONE]" not in line:
                        listener(events_of(json.loads(line[5:])))
            listener([Finished("length")])
        except Exception as error:
            listener([Finished("failed", f"{type(error).__name__}: {error}")])

    def _body(self, request: Request) -> dict[str, Any]:
        body = {
            "model": self._model,
            "prompt": self._text(request.tokens),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }
        if request.halting is not None:
            threshold = request.halting.threshold
            body["halting"] = request.halting.criterion + ("" if threshold is None else f":{threshold}")
        return body


def events_of(chunk: dict[str, Any]) -> list[Event | Counted]:
    """What a chunk of a stream says, as the engine would have said it."""
    events: list[Event | Counted] = []
    for choice in chunk.get("choices", ()):
        ours = choice.get("mythos", {})
        if "taken_back" in ours:
            events.append(TakenBack(ours["taken_back"]))
        if "tokens" in ours or "provisional" in ours:
            for final, name in [(True, "tokens"), (False, "provisional")]:
                for token in ours.get(name, ()):
                    events.append(NewToken(token["index"], -1, token.get("loops", 0), final, None, (), 0.0))
        elif choice.get("text"):
            events.append(NewToken(-1, -1, 0, True, None, (), 0.0))
    if chunk.get("usage"):
        events.append(Counted(chunk["usage"]["completion_tokens"]))
    return events
