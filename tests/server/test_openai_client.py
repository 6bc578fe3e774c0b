"""The `openai` client, unchanged, against a running server."""

import asyncio
import json
import threading

import httpx
import openai
import pytest

from mythos_jax.serving.request import Request
from tests.server.running import NAME, fake_service, running
from tests.serving.fake_engine import FakeEngine

QUESTION = [{"role": "user", "content": "hi"}]


def letters(request: Request) -> list[int]:
    """Letters of the tokenizer's alphabet, so that texts are easy to tell."""
    start = sum(request.tokens) + request.seed
    return [64 + (start + i) % 26 for i in range(request.max_new_tokens)]


@pytest.fixture(scope="module")
def server():
    with running(fake_service(FakeEngine(answer=letters))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == NAME
    assert model.mythos["chat"] is True
    assert client.models.retrieve(NAME).id == NAME


def test_completion(client, server):
    reply = client.completions.create(model=NAME, prompt="The lazy", max_tokens=6, seed=3, temperature=0)
    text = reply.choices[0].text
    tokens = server.service.model.encode("The lazy")
    expected = [64 + (sum(tokens) + 3 + i) % 26 for i in range(6)]
    assert text == server.service.model.tokenizer.decode(expected)
    assert len(text) == 6
    assert (reply.choices[0].finish_reason, reply.object, reply.model) == ("length", "text_completion", NAME)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(tokens), 6)
    assert reply.usage.total_tokens == len(tokens) + 6
    assert reply.usage.loops == 24
    told = reply.choices[0].mythos
    assert [token["text"] for token in told["tokens"]] == list(text)
    assert [token["loops"] for token in told["tokens"]] == [4] * 6
    assert (told["loops_mean"], told["full_loops"], told["seed"]) == (4.0, 4, 3)


def test_tokens_as_prompt_and_several_prompts(client):
    one = client.completions.create(model=NAME, prompt=[5, 6], max_tokens=3, seed=0)
    several = client.completions.create(model=NAME, prompt=[[5, 6], [7]], n=2, max_tokens=3, seed=0)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert texts[0] == one.choices[0].text
    assert texts[1][:2] == texts[0][1:]  # the second of a prompt has the next seed
    assert several.usage.prompt_tokens == 3


def test_stream_is_the_same_text(client):
    fields = {"model": NAME, "messages": QUESTION, "max_tokens": 20, "seed": 5}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends == [None] * (len(ends) - 1) + ["length"]
    told = [token for chunk in chunks[1:-2] for token in chunk.choices[0].mythos["tokens"]]
    assert [token["index"] for token in told] == list(range(20))
    assert "".join(token["text"] for token in told) == text
    assert all(token["ms"] >= 0 for token in told)
    assert chunks[-2].choices[0].mythos["loops_mean"] == whole.choices[0].mythos["loops_mean"]


def test_the_client_s_own_stream_helper(client):
    fields = {"model": NAME, "messages": QUESTION, "seed": 1}
    whole = client.chat.completions.create(**fields, max_tokens=9).choices[0].message.content
    with client.chat.completions.stream(**fields, max_tokens=20, stop=whole[6:]) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == whole[:6]
    assert stream.get_final_completion().choices[0].message.content == whole[:6]


def test_stop(client):
    fields = {"model": NAME, "prompt": [1], "max_tokens": 26, "seed": 0}
    whole = client.completions.create(**fields).choices[0].text
    stopped = client.completions.create(**fields, stop=[whole[7:10], "nowhere"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (whole[:7], "stop")
    assert stopped.usage.completion_tokens == 10
    chunks = list(client.completions.create(**fields, stop=whole[7:10], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:7]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs(client):
    chat = client.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=3, logprobs=True, top_logprobs=2, seed=0
    ).choices[0]
    assert [entry.token for entry in chat.logprobs.content] == list(chat.message.content)
    assert [entry.bytes for entry in chat.logprobs.content] == [list(c.encode()) for c in chat.message.content]
    assert [[top.logprob for top in entry.top_logprobs] for entry in chat.logprobs.content] == [[-0.5, -1.5]] * 3
    text = client.completions.create(model=NAME, prompt=[1], max_tokens=3, logprobs=2, seed=0).choices[0]
    assert text.logprobs.tokens == list(text.text)
    assert text.logprobs.token_logprobs == [-0.5] * 3
    assert text.logprobs.text_offset == [0, 1, 2]
    assert all(top[token] == -0.5 for top, token in zip(text.logprobs.top_logprobs, text.text, strict=True))
    chunks = list(client.completions.create(model=NAME, prompt=[1], max_tokens=3, logprobs=0, seed=0, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2]
    assert {part.top_logprobs for part in parts} == {None}
    text = client.completions.create(model=NAME, prompt=[1], max_tokens=3, logprobs=0, seed=0).choices[0]
    assert (text.logprobs.token_logprobs, text.logprobs.top_logprobs) == ([-0.5] * 3, None)
    assert client.completions.create(model=NAME, prompt=[1], max_tokens=1).choices[0].logprobs is None


def test_depth_and_halting(client):
    """Our fields go through `extra_body`, as those of every server do."""
    extra = {"loops": 3, "halting": "latent:0.03", "min_loops": 1}
    reply = client.completions.create(model=NAME, prompt=[1], max_tokens=6, extra_body=extra).choices[0]
    assert [token["loops"] for token in reply.mythos["tokens"]] == [1, 2, 3, 1, 2, 3]
    assert (reply.mythos["loops_mean"], reply.mythos["full_loops"]) == (2.0, 3)


def test_provisional(client, server, monkeypatch):
    """Drafts come first, and the final text is the same; a client that does not know of them sees that only."""
    fields = {"model": NAME, "messages": QUESTION, "max_tokens": 12, "seed": 2}
    whole = client.chat.completions.create(**fields)
    extra = {"provisional": True, "draft_tokens": 4}
    monkeypatch.setattr(server.engine, "turns", threading.Semaphore(0))
    chunks = []
    for chunk in client.chat.completions.create(**fields, stream=True, extra_body=extra):
        chunks.append(chunk)
        server.engine.let()  # steps do not come together
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    shown: dict[int, str] = {}
    final = {}
    withdrawn = 0
    for chunk in chunks[1:-1]:
        told = chunk.choices[0].mythos
        if (back := told.get("taken_back")) is not None:
            withdrawn += sum(index >= back for index in shown)
            shown = {index: text for index, text in shown.items() if index < back}
        for token in told["tokens"]:
            assert shown.pop(token["index"], token["text"]) == token["text"]
            final[token["index"]] = token["text"]
        shown |= {draft["index"]: draft["text"] for draft in told.get("provisional", [])}
    assert "".join(final.values()) == whole.choices[0].message.content
    last = chunks[-1].choices[0].mythos
    assert withdrawn
    assert last["drafted"] > last["accepted"] > 0


def test_characters_that_end_lines_elsewhere(server, monkeypatch):
    """A client that reads a stream line by line, with whatever it takes for one, gets whole events."""
    text = "a\u2028b\u2029c\x85d\x1ce\x0bf"
    tokens = server.service.model.tokenizer.encode(text).tolist()
    monkeypatch.setattr(server.engine, "answer", lambda request: tokens)
    body = {"model": NAME, "prompt": "a", "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
        told = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in told) == text


def test_errors(client):
    def fails(kind, **fields):
        with pytest.raises(kind) as error:
            client.chat.completions.create(**({"model": NAME, "messages": QUESTION} | fields))
        return error.value

    error = fails(openai.NotFoundError, model="gpt-4o")
    assert (error.code, error.param) == ("model_not_found", "model")
    assert f"allowed: {NAME}" in error.message
    assert fails(openai.BadRequestError, temperature=-1).param == "temperature"
    assert fails(openai.BadRequestError, tools=[{"type": "function", "function": {"name": "f"}}]).param == "tools"
    assert fails(openai.BadRequestError, extra_body={"tempratur": 1}).param == "tempratur"
    assert fails(openai.BadRequestError, max_tokens=10_000).code == "context_length_exceeded"
    assert fails(openai.BadRequestError, extra_body={"halting": "nonsense"}).param == "halting"
    assert fails(openai.BadRequestError, extra_body={"halting": "act"}).param == "halting"
    assert fails(openai.BadRequestError, extra_body={"loops": 5}).param == "loops"


@pytest.mark.parametrize(
    ("stop", "got"),
    [("", '""'), ("x" * 257, '"xxx'), (["a"] * 17, "a list of 17"), (["a", ""], "a list of 2"), (5, "5")],
)
def test_wrong_stops(client, stop, got):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt=[1], stop=stop)
    assert (error.value.param, error.value.code) == ("stop", "not_allowed")
    assert f"stop: got {got}" in error.value.message
    allowed = "allowed: a text of 1 to 256 characters, or a list of at most 16 such texts"
    assert allowed in error.value.message


def test_the_most_stops(client):
    for stop in (["~" * 256] * 16, "~", [], None):
        assert client.completions.create(model=NAME, prompt=[1], max_tokens=2, stop=stop).usage.completion_tokens == 2


def test_the_async_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            fields = {"model": NAME, "messages": QUESTION, "max_tokens": 8}
            several = (client.chat.completions.create(**fields, seed=i) for i in range(5))
            whole = await asyncio.gather(*several)
            stream = await client.chat.completions.create(**fields, seed=3, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == whole[3].choices[0].message.content

    asyncio.run(ask())
