"""Chat templates against transformers' texts, and answers against plain generation."""

import json

import numpy as np
import pytest

from mythos_jax.data.chat_template import ChatTemplate
from mythos_jax.errors import ConfigError
from mythos_jax.inference import generate as generation
from mythos_jax.inference.chat import Chat, as_messages
from mythos_jax.language_model import load
from mythos_jax.runs.load import load_model
from tests import talker
from tests.tokenizer_kinds import END, OTHER

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
GOLDEN = json.loads((talker.TEMPLATES / "golden.json").read_text(encoding="utf-8"))
CONVERSATIONS = json.loads((talker.TEMPLATES / "conversations.json").read_text(encoding="utf-8"))
HEADER = f"{END}assistant\n"


def template(name):
    return ChatTemplate.from_file(talker.TEMPLATES / f"{name}.jinja", TOKENS)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_texts_are_those_of_transformers(name):
    made = template(name)
    for case, expected in GOLDEN[name].items():
        conversation, _, prompt = case.partition("+")
        if expected is None:
            with pytest.raises(ConfigError, match=f"chat template .*{name}.jinja: ") as error:
                made.render(CONVERSATIONS[conversation], prompt=bool(prompt))
            assert "\n" not in str(error.value)
        else:
            assert made.render(CONVERSATIONS[conversation], prompt=bool(prompt)) == expected


@pytest.mark.parametrize(
    ("name", "role", "end"),
    [
        ("chatml", "assistant", "<|im_end|>\n"),
        ("llama3_1", "assistant", "<|eot_id|>"),
        ("mistral", "assistant", "</s> "),
        ("huginn", "Huginn", "<|end_turn|>"),  # by whose name the model is addressed
        ("zephyr", "assistant", "</s>\n"),
    ],
)
def test_what_surrounds_an_answer(name, role, end):
    assert (template(name).answer_role, template(name).answer_end) == (role, end)
    silent = ChatTemplate("{{ messages[0].content }}{{ raise_exception('no') if messages[1:] }}", "here", {})
    assert (silent.answer_role, silent.answer_end) == ("assistant", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for x in", "line 1: "),
        ("a\n{% nonsense %}", "line 2: Encountered unknown tag 'nonsense'"),
        ("{{ raise_exception('no\nway') }}", "no way"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "got attribute '__class__'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "got attribute '_x'"),
        ("{% include 'etc/passwd' %}", "no loader"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{{ " + "(" * 5000 + "}}", "nested too deeply"),
    ],
)
def test_a_wrong_template_is_one_line(source, message):
    with pytest.raises(ConfigError, match=r"^chat template here: ") as error:
        ChatTemplate(source, "here", {}).render([{"role": "user", "content": "a"}])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_reaches_data_only(tmp_path):
    """Attributes of what the environment adds are nothing, and objects come as their type's name."""
    for source in ("strftime_now.__globals__", "dict.__init__", "raise_exception.__code__", "messages[0].file.read"):
        message = {"role": "user", "content": "a", "file": (tmp_path / "x")}
        assert ChatTemplate(f"{{{{ {source} }}}}", "here", {}).render([message]) == ""
    assert ChatTemplate("{{ messages[0].file }}", "here", {}).render([message]) == "<PosixPath>"
    assert ChatTemplate("{{ strftime_now('%Y') | int > 2000 }}", "here", {}).render([]) == "True"


@pytest.mark.parametrize("content", [None, b"\xff{{"])
def test_a_template_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "t.jinja"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"chat template .*t\.jinja: (cannot be read|not text)"):
        ChatTemplate.from_file(path, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talker.save(tmp_path_factory.mktemp("talkers") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


def plain(loaded, tokens, n, **options):
    """The tokens of an answer by `generate`, up to a stop token."""
    stops = loaded.conventions.stop_tokens
    out = generation.generate(loaded.model, loaded.variables, [tokens], max_new_tokens=n, stop_tokens=stops, **options)
    return np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()


def test_special_tokens_of_the_template_are_meant(loaded):
    chat, tokenizer = Chat(loaded), loaded.tokenizer
    end, other = (tokenizer.special_token(name) for name in (END, OTHER))
    words = [tokenizer.encode(text).tolist() for text in ("user\nhi", "\n", "assistant\n")]
    assert chat.tokens(as_messages("hi")) == [end, *words[0], other, *words[1], end, *words[2]]


def test_nothing_is_put_before_what_the_template_writes(tmp_path):
    """A beginning of text stands there once, although the tokenizer puts one, too, and only if the template has it."""
    settings = {"bos_token": OTHER, "add_bos_token": True, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    loaded = load_model(talker.save(tmp_path / "m", tokenizer_config=settings))
    bos = loaded.tokenizer.special_token(OTHER)
    assert loaded.conventions.first_tokens == (bos,)
    assert Chat(loaded).tokens(as_messages("a")) == [bos, *loaded.tokenizer.encode("a")]
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    assert Chat(loaded, tmp_path / "own.jinja").tokens(as_messages("a")) == loaded.tokenizer.encode("a").tolist()


def test_what_the_template_writes_after_an_answer_ends_it(tmp_path):
    """Also where no file names it, and where the template is the user's own."""
    loaded = load_model(talker.save(tmp_path / "m", tokenizer_config={"eos_token": END}))
    end, other = (loaded.tokenizer.special_token(name) for name in (END, OTHER))
    assert loaded.conventions.stop_tokens == (end,)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>" + END + "{% endfor %}")
    assert Chat(loaded, tmp_path / "own.jinja").stop_tokens == tuple(sorted((end, other)))


def test_an_answer_is_what_follows_and_ends_at_a_stop_token(loaded, folder, tmp_path):
    chat = Chat(loaded)
    tokens = chat.tokens(as_messages("hi"))
    answer = plain(loaded, tokens, 12)
    stream = chat.stream(as_messages("hi"), max_new_tokens=12)
    assert "".join(stream) == loaded.tokenizer.decode(answer)
    assert len(stream.stats.loops) == len(answer) == 12
    # The same model, but generation_config.json says that its sixth token ends an answer, or another that never comes.
    shorter = talker.save(tmp_path / "m", generation_config={"eos_token_id": [answer[5], 401]})
    first = answer.index(answer[5])
    lm = load(shorter)
    assert lm.chat("hi", max_new_tokens=12) == loaded.tokenizer.decode(answer[:first])
    assert lm.chat("hi", max_new_tokens=12, draft_loops=1) == loaded.tokenizer.decode(answer[:first])


@pytest.mark.parametrize("options", [{"halting": "latent:0.4", "loops": 4}, {"halting": "kl:0.1", "loops": 4}], ids=str)
def test_a_cache_that_was_kept_changes_nothing(loaded, options, monkeypatch):
    read = []
    original = generation.prefill
    monkeypatch.setattr(generation, "prefill", lambda *words: (read.append(words[3].sum()), original(*words))[1])
    chat, messages = Chat(loaded), as_messages("a question of some length")
    for question in ("and?", "more"):
        answer = "".join(chat.stream(messages, max_new_tokens=8, **options))
        messages = [*messages, {"role": "assistant", "content": answer}, *as_messages(question)]
    before, read[:] = len(chat.tokens(messages[:-2])), []
    pieces = chat.stream(messages, max_new_tokens=8, **options)
    reused = "".join(pieces)
    assert sum(read) == len(chat.tokens(messages)) - before  # without a cache it would be all of them
    assert reused == "".join(Chat(loaded).stream(messages, max_new_tokens=8, **options))
    # Other loops make other keys and values: nothing is reused.
    read.clear()
    other = "".join(chat.stream(messages, max_new_tokens=8, loops=3))
    assert sum(read) == len(chat.tokens(messages))
    assert other == "".join(Chat(loaded).stream(messages, max_new_tokens=8, loops=3))


def test_the_same_question_again_and_an_answer_that_was_left(loaded):
    chat = Chat(loaded)
    whole = "".join(chat.stream(as_messages("hi"), max_new_tokens=30))
    left = chat.stream(as_messages("hi"), max_new_tokens=30)
    assert whole.startswith(next(left) + next(left))
    del left
    assert "".join(chat.stream(as_messages("hi"), max_new_tokens=30)) == whole


def test_a_conversation_compiles_nothing_after_the_first_answer(loaded):
    chat, messages = Chat(loaded), []
    compiled = None
    for turn in range(5):
        messages += as_messages(f"turn {turn}" * (turn + 1))
        answer = "".join(chat.stream(messages, max_new_tokens=8, temperature=0.5 * turn))
        messages.append({"role": "assistant", "content": answer})
        compiled = compiled or (generation.prefill._cache_size(), generation.decode._cache_size())
        assert (generation.prefill._cache_size(), generation.decode._cache_size()) == compiled
    assert len(chat.tokens(messages)) > 128


def test_the_oldest_turns_are_cut(loaded):
    chat = Chat(loaded)
    system, turns = {"role": "system", "content": "Be brief."}, []
    for i in range(6):
        turns += [{"role": "user", "content": f"question {i} " * 3}, {"role": "assistant", "content": f"{i}."}]
    messages = [system, *turns[:-1]]
    kept = chat.fitting(messages, None)
    assert kept[0] == system
    assert kept[1:] == messages[-len(kept) + 1 :]
    assert kept[1]["role"] == "user"
    assert len(chat.tokens(kept)) + 64 <= 256 < len(chat.tokens([system, *messages[-len(kept) - 1 :]])) + 64
    assert chat.fitting(messages, 1) != kept
    assert chat.fitting(turns[-1:], None) == turns[-1:]
    long = as_messages("x " * 1000, "Be brief.")
    assert chat.fitting([*long, turns[1], *long[1:]], None) == long


def test_conversations_that_cannot_be_answered(loaded, tmp_path):
    chat = Chat(loaded)
    with pytest.raises(ConfigError, match=r"conversation: got \d{4} tokens, allowed: 1 to 255, below max_seq_len"):
        chat.stream(as_messages("x " * 1000))
    with pytest.raises(ConfigError, match=r"prompt: got .* and 250 new ones, allowed: at most max_seq_len, 256"):
        chat.stream(as_messages("x"), max_new_tokens=250)
    with pytest.raises(ConfigError, match="cannot encode the text"):
        chat.stream(as_messages("\ud800"))
    (tmp_path / "empty.jinja").write_text("{# nothing #}")
    with pytest.raises(ConfigError, match="conversation: got 0 tokens"):
        Chat(loaded, tmp_path / "empty.jinja").stream(as_messages("x"))
    for wrong in (["text"], [{"role": "user"}], [{"content": "a"}], [{"role": 3, "content": "a"}]):
        with pytest.raises(ConfigError, match=r"message: got .*, allowed: a dict with role and content"):
            as_messages(wrong)


def test_a_model_without_a_template(tmp_path):
    lm = load(talker.save(tmp_path / "m", tokenizer_config={"eos_token": END}))
    with pytest.raises(ConfigError, match=r"/m: has no chat template; allowed: .* --chat-template FILE"):
        lm.chat("hi")
    assert lm.chat("hi", chat_template=talker.TEMPLATES / "chatml.jinja", max_new_tokens=3) != ""


def test_messages_and_streams(folder):
    lm = load(folder)
    question = {"role": "user", "content": "hi"}
    answer = lm.chat("hi", system="Be brief.", max_new_tokens=8)
    assert answer == lm.chat([{"role": "system", "content": "Be brief."}, question], max_new_tokens=8)
    assert answer != lm.chat([question], max_new_tokens=8) == lm.chat("hi", max_new_tokens=8)
    pieces = lm.chat("hi", system="Be brief.", max_new_tokens=8, stream=True)
    assert "".join(pieces) == answer
    assert len(pieces.stats.loops) == 8
