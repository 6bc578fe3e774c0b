"""What is trained on in a conversation, against the tokens of its beginnings, which are made one by one."""

import json

import pytest
from tokenizers import Tokenizer

from mythos_jax.data.chat_encoder import make_chat_encoder
from mythos_jax.data.chat_record import RecordError, parse_record
from mythos_jax.data.chat_template import ChatTemplate
from mythos_jax.data.tokenizer import load_tokenizer
from tests.chats import CHATML, MARKED, dialogue, golden_template, turn, write_model

TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
STOPS = ("<|im_end|>", "</s>", "<|endoftext|>")
TURNS = dialogue("Is 3 < 5?", "Yes 漢字 🎉.", " and é? ", "No,\n\nit is not.", system="Be brief.")
# Templates of which the text up to an answer is always the beginning of the whole text.
CONCATENATE = ("chatml", "qwen2_5", "llama3_1", "zephyr", "olmo2")


class Model:
    def __init__(self, folder, template, room=4096, kind="byte_level"):
        folder = write_model(folder, template, kind)
        self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.template = ChatTemplate(template, "test", TOKENS)
        self.encoder = make_chat_encoder(folder, load_tokenizer(folder), "", room - 1)

    def ids(self, messages, prompt=False):
        return self.backend.encode(self.template.render(messages, prompt=prompt), add_special_tokens=False).ids

    def encode(self, record):
        return self.encoder.encode(parse_record(record)).samples

    def expected(self, messages):
        """The ids of the whole text, and the weights of what follows the prompt of each answer up to its end."""
        whole = self.ids(messages)
        weights = [0.0] * len(whole)
        stops = [self.backend.token_to_id(name) for name in STOPS]
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = len(self.ids(messages[:i], prompt=True)), len(self.ids(messages[: i + 1]))
                assert whole[:start] == self.ids(messages[:i], prompt=True)
                # White space after the token that ends the answer is not the model's.
                end = next((j + 1 for j in range(start, end) if whole[j] in stops), end)
                weights[start:end] = [message.get("weight", 1.0)] * (end - start)
        return whole, weights


@pytest.mark.parametrize("name", CONCATENATE)
def test_answers_and_what_ends_them(name, tmp_path):
    model = Model(tmp_path, golden_template(name))
    (sample,) = model.encode(TURNS)
    assert (sample.tokens.tolist(), sample.weights.tolist()) == model.expected(TURNS["messages"])
    assert 0 < sum(sample.weights) < len(sample.tokens) / 2
    ends = [token for token, weight in zip(sample.tokens.tolist(), sample.weights, strict=True) if weight][-1]
    assert model.backend.id_to_token(ends) in STOPS or sample.unended


@pytest.mark.parametrize("kind", ["llama", "gemma", "unigram_bytes", "metaspace"])
def test_tokenizers_with_marks_for_spaces(kind, tmp_path):
    """Whose tokens stand for other characters than those of the text."""
    model = Model(tmp_path, CHATML, kind=kind)
    (sample,) = model.encode(TURNS)
    assert (sample.tokens.tolist(), sample.weights.tolist()) == model.expected(TURNS["messages"])


def test_a_beginning_of_text_is_there_once(tmp_path):
    model = Model(tmp_path, golden_template("mistral"))
    record = dialogue("a", "b", "c", "d")
    (sample,) = model.encode(record)
    assert (sample.tokens.tolist(), sample.weights.tolist()) == model.expected(record["messages"])
    assert sample.tokens.tolist().count(model.backend.token_to_id("<s>")) == 1


def test_weights_of_messages(tmp_path):
    model = Model(tmp_path, CHATML)
    messages = [
        turn("user", "a"),
        turn("assistant", "b", weight=0),
        turn("user", "c"),
        turn("assistant", "d", weight=0.5),
    ]
    (sample,) = model.encode({"messages": messages})
    assert (sample.tokens.tolist(), sample.weights.tolist()) == model.expected(messages)
    assert set(sample.weights) == {0, 0.5}


def test_marks_of_the_template_are_taken_as_they_are(tmp_path):
    model = Model(tmp_path, MARKED)
    (sample,) = model.encode(TURNS)
    assert sample.tokens.tolist() == model.ids(TURNS["messages"])
    trained = [i for i, weight in zip(sample.tokens.tolist(), sample.weights, strict=True) if weight]
    assert model.backend.decode(trained, skip_special_tokens=False) == "Yes 漢字 🎉.No,\n\nit is not."


def test_an_answer_has_a_text_of_its_own_where_the_template_rewrites_earlier_ones(tmp_path):
    """Qwen3 leaves out the thoughts of earlier turns."""
    model = Model(tmp_path, golden_template("qwen3"))
    messages = dialogue("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")["messages"]
    first, second = model.encode({"messages": messages})
    for sample, end in [(first, 2), (second, 4)]:
        prompt, whole = model.ids(messages[: end - 1], prompt=True), model.ids(messages[:end])
        assert sample.tokens.tolist() == whole
        # All but the line break after the end.
        assert sample.weights.tolist() == [0.0] * len(prompt) + [1.0] * (len(whole) - len(prompt) - 1) + [0.0]
    text = model.backend.decode(second.tokens.tolist())
    assert "x" not in text
    assert "y" in text


def test_a_template_that_hides_where_an_answer_begins_is_refused(tmp_path):
    """DeepSeek R1's prompt ends with an opened thought, which the answer in a conversation does not have."""
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}"
    )
    with pytest.raises(RecordError, match=r"ends a prompt with .*<assistant><think>.*but writes message 2 otherwise"):
        Model(tmp_path, template).encode(dialogue("a", "b"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no thanks') }}", "chat template of .*: no thanks"),
        ("{{ messages.nothing.more }}", "chat template of .*: .*has no attribute"),
        ("{{ messages[0].content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}", "marks no words"),
        (None, "the tokenizer has no chat template; allowed: "),
    ],
)
def test_templates_that_fail(template, reason, tmp_path):
    folder = write_model(tmp_path, template)
    encoder = make_chat_encoder(folder, load_tokenizer(folder), "", 64)
    with pytest.raises(RecordError, match=reason) as error:
        encoder.encode(parse_record(dialogue("a", "b")))
    assert "\n" not in str(error.value)


def test_the_role_of_the_answer_is_the_template_s(tmp_path):
    """Huginn's answers have the role Huginn."""
    model = Model(tmp_path, golden_template("huginn"))
    (sample,) = model.encode(dialogue("a", "b"))
    renamed = [turn("user", "a"), turn("Huginn", "b")]
    assert sample.tokens.tolist() == model.ids(renamed)
    assert 0 < sample.weights.sum() <= len(model.ids(renamed)) - len(model.ids(renamed[:1], prompt=True))


def test_tools_and_calls_reach_the_template(tmp_path):
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}}
    messages = [turn("user", "?"), {"role": "assistant", "content": None, "tool_calls": [call]}, turn("tool", "")]
    for value in (tools, json.dumps(tools)):
        (sample,) = Model(tmp_path, template).encode({"messages": messages, "tools": value})
        text = load_tokenizer(tmp_path).spell(sample.tokens.tolist())
        assert text == json.dumps(tools) + "<user>?<assistant>Oslo<tool>"


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_calls_that_the_template_does_not_write_are_refused(template, tmp_path):
    """The answer would be nothing, and be learnt."""
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = [turn("user", "?"), answer, turn("tool", "rain"), turn("assistant", "Rain.")]
    with pytest.raises(RecordError, match="does not write the tool_calls of message 2") as error:
        Model(tmp_path, template).encode({"messages": messages})
    assert "\n" not in str(error.value)


def test_calls_that_are_not_trained_on_need_not_be_written(tmp_path):
    model = Model(tmp_path, CHATML)
    call = {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0}
    messages = [turn("user", "?"), call, turn("tool", "rain"), turn("assistant", "Rain.")]
    (sample,) = model.encode({"messages": messages})
    trained = sample.tokens[sample.weights > 0].tolist()
    assert model.backend.decode(trained, skip_special_tokens=False) == "Rain.<|im_end|>"


@pytest.mark.parametrize(("template", "unwritten"), [(CHATML, True), ("{{ tools or '' }}" + CHATML, False)])
def test_tools_that_the_template_does_not_write_are_counted(template, unwritten, tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    model = Model(tmp_path, template)
    record = parse_record({**dialogue("a", "b"), "tools": tools})
    assert model.encoder.encode(record).unwritten_tools is unwritten
    assert not model.encoder.encode(parse_record(dialogue("a", "b"))).unwritten_tools


class TestCompletions:
    """TRL's: the completion is trained on, with the end that is put after it."""

    def encode(self, record, tmp_path, **settings):
        folder = write_model(tmp_path, None, **settings)
        tokenizer = load_tokenizer(folder)
        (sample,) = make_chat_encoder(folder, tokenizer, "", 4095).encode(parse_record(record)).samples
        return Tokenizer.from_file(str(folder / "tokenizer.json")), sample.tokens.tolist(), sample.weights.tolist()

    def test_of_texts(self, tmp_path):
        backend, ids, weights = self.encode({"prompt": "The sky is", "completion": " blue."}, tmp_path)
        end = backend.token_to_id("<|im_end|>")
        prompt, whole = (
            backend.encode(text, add_special_tokens=False).ids for text in ("The sky is", "The sky is blue.")
        )
        assert ids == [*whole, end]
        assert weights == [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))

    def test_with_a_beginning_of_text(self, tmp_path):
        for prompt in ("The sky is", "<s>The sky is"):
            backend, ids, weights = self.encode(
                {"prompt": prompt, "completion": " blue.<|im_end|>"}, tmp_path, add_bos_token=True
            )
            begin, end = (backend.token_to_id(name) for name in ("<s>", "<|im_end|>"))
            assert (ids.count(begin), ids[0], ids.count(end), ids[-1]) == (1, begin, 1, end)
            assert weights.index(1.0) == 1 + len(backend.encode("The sky is", add_special_tokens=False).ids)

    def test_without_a_prompt_the_first_token_is_predicted_from_nothing(self, tmp_path):
        _, ids, weights = self.encode({"prompt": "", "completion": "abc"}, tmp_path)
        assert weights == [0.0] + [1.0] * (len(ids) - 1)

    def test_of_messages(self, tmp_path):
        """Answers in the prompt are not trained on."""
        messages = dialogue("a", "b", "c", "d")["messages"]
        model = Model(tmp_path / "m", CHATML)
        (sample,) = model.encode({"prompt": messages[:3], "completion": messages[3:]})
        whole, weights = model.expected([messages[0], {**messages[1], "weight": 0.0}, *messages[2:]])
        assert (sample.tokens.tolist(), sample.weights.tolist()) == (whole, weights)
