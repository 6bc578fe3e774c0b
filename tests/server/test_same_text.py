"""What the server says is what `LanguageModel` says, with the real engine behind it."""

import openai
import pytest

from mythos_jax.language_model import LanguageModel
from mythos_jax.runs.load import load_model
from mythos_jax.server.model import served_model
from mythos_jax.server.service import Service
from mythos_jax.serving.engine import Engine
from mythos_jax.serving.options import EngineOptions
from tests import talker
from tests.server.running import NAME, running

QUESTION = [{"role": "user", "content": "Is the fox quick?"}]
TOKENS = 24
SAMPLED = {"temperature": 1.3, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LanguageModel(load_model(talker.save(tmp_path_factory.mktemp("talkers") / "model")))


@pytest.fixture(scope="module")
def client(model):
    engine = Engine(model.loaded, EngineOptions(places=4, max_length=128, prefill_chunk=16))
    engine.warm_up()
    service = Service(engine, served_model(model.loaded, [NAME], max_length=128))
    with running(service) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def told(stream):
    """The text of a stream of either kind."""
    choices = [chunk.choices[0] for chunk in stream]
    return "".join(choice.text if hasattr(choice, "text") else choice.delta.content or "" for choice in choices)


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({"temperature": 0}, {}),
        (SAMPLED, {"halting": "latent:0.6", "loops": 2}),
        (SAMPLED, {"provisional": True}),
    ],
    ids=str,
)
def test_an_answer(model, client, fields, extra):
    """Whole and in a stream, with and without drafts, at a depth and with a policy of its own."""
    own = {name: value for name, value in extra.items() if name != "provisional"}
    expected = model.chat(QUESTION, max_new_tokens=TOKENS, **fields, **own)
    asked = {"model": NAME, "messages": QUESTION, "max_tokens": TOKENS, **fields, "extra_body": extra}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.content == expected
    assert told(client.chat.completions.create(**asked, stream=True)) == expected
    assert len(expected) > 5


def test_a_continuation(model, client):
    asked = {"model": NAME, "prompt": "The lazy", "max_tokens": TOKENS, **SAMPLED}
    expected = model.generate("The lazy", max_new_tokens=TOKENS, **SAMPLED)
    assert client.completions.create(**asked).choices[0].text == expected
    assert told(client.completions.create(**asked, stream=True)) == expected
    several = client.completions.create(**asked, n=2)
    second = model.generate("The lazy", max_new_tokens=TOKENS, **{**SAMPLED, "seed": 8})
    assert [choice.text for choice in several.choices] == [expected, second]
    stop = expected[8:11]
    assert client.completions.create(**asked, stop=stop).choices[0].text == expected[: expected.index(stop)]


def test_what_the_model_cannot_do(client):
    for extra in [{"halting": "gate"}, {"halting": "predicted"}, {"loops": 3}]:
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model=NAME, prompt="a", extra_body=extra)
        assert error.value.param in extra
