"""`mythos chat` and `mythos generate --chat` as a user sees them: answers, commands, Ctrl-C, one-line errors."""

import io
import signal

import pytest

from mythos_jax.cli import main
from mythos_jax.commands.chat import HELP
from mythos_jax.inference.chat import Chat
from mythos_jax.inference.text import GenerationStats, TextStream
from mythos_jax.runs.load import load_model
from tests import talker
from tests.tokenizer_kinds import END


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talker.save(tmp_path_factory.mktemp("talkers") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture
def echoes(monkeypatch, loaded):
    """Answers are the roles and contents of the messages, as far as `Chat.stream` gets them; returns the keywords."""
    seen = []
    original = Chat.stream

    def stream(self, messages, **options):
        original(self, messages, **options)  # whose errors are real
        seen.append(options)
        text = " | ".join(f"{message['role']} {message['content']}" for message in messages)
        return TextStream(iter([text[:5], text[5:]]), GenerationStats(1, loops=[2, 2]))

    monkeypatch.setattr(Chat, "stream", stream)
    monkeypatch.setattr("mythos_jax.language_model.load_model", lambda *words, **keywords: loaded)
    return seen


class Terminal(io.StringIO):
    def isatty(self):
        return True


def chat(capsys, monkeypatch, folder, lines, *flags, code=0):
    """Standard output and standard error of a conversation that is read from a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert main(["chat", str(folder), *flags]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out.removesuffix("\n").split("\n"), err.splitlines()


def test_answers_are_the_model_s(capsys, monkeypatch, folder, loaded):
    """Each with all that was said before. Nothing but the answers is printed if no terminal asks."""
    first = "".join(Chat(loaded).stream([{"role": "user", "content": "hi"}], max_new_tokens=6))
    messages = [("user", "hi"), ("assistant", first), ("user", "and?")]
    messages = [{"role": role, "content": content} for role, content in messages]
    second = "".join(Chat(loaded).stream(messages, max_new_tokens=6))
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n   \nand?"))
    assert main(["chat", str(folder), "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr() == (f"{first}\n{second}\n", "")
    assert main(["generate", str(folder), "--chat", "hi", "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{first}\n"
    assert err.startswith("mythos: 6 tokens, 2.00 loops per token")


def test_history(capsys, monkeypatch, folder, echoes):
    lines = ["a", "/undo", "b", "/reset", "/system Be kind.", "//c", "/system", "/system off", "/undo", "/undo", "d"]
    out, err = chat(capsys, monkeypatch, folder, lines, "--system", "Be brief.")
    assert out == [
        "system Be brief. | user a",
        "system Be brief. | user b",
        "system Be kind. | user /c",
        "user d",
    ]
    system, undone = ["system Be kind.", "system Be kind.", "system off"], ["forgotten: /c", "nothing to undo"]
    assert err == [f"mythos: {line}" for line in ["forgotten: a", *system, *undone]]


def test_settings(capsys, monkeypatch, folder, echoes):
    lines = ["/loops", "/loops 3", "/halting latent:0.4", "/temperature 0.5", "/max-new-tokens 4", "a"]
    lines += ["/halting off", "/temperature off", "/loops off", "b", "/quit", "c"]
    out, err = chat(capsys, monkeypatch, folder, lines, "--top-k", "3")
    assert len(out) == 2
    assert [(o["loops"], str(o["halting"])[:18], o["temperature"], o["top_k"]) for o in echoes] == [
        (3, "Halting(criterion="[:18], 0.5, 3),
        (None, "None", 0.0, 3),
    ]
    assert [o["max_new_tokens"] for o in echoes] == [4, 4]
    assert err[:2] == ["mythos: loops off", "mythos: loops 3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/lops 3", "/lops: no such command; did you mean /loops?"),
        ("/", "/: no such command; allowed: /help, /undo, /reset, /loops, "),
        ("/loops 0", "/loops: got 0, allowed: an integer >= 1"),
        ("/loops x y", "/loops: got 'x y', allowed: an integer"),
        ("/halting nonsense", "/halting: "),
        ("/halting act", "halting criterion: got 'act', allowed with readout last"),
        ("/halting predicted:2", "predict"),
        ("/temperature nan", "/temperature: got 'nan', allowed: a number >= 0"),
        ("/top-k 1000", "top_k: got 1000, allowed: 0 (all) to the vocabulary size, 402"),
        ("/max-new-tokens -1", "/max-new-tokens: got -1, allowed: an integer >= 1"),
        ("x" * 5000, "conversation: got "),
        ("\ud800", "cannot encode the text"),
        ("a\x00\x1b[31m\u2028b", ""),
        ("{{ 1 / 0 }} {% raw", ""),  # a question is data
        ("/help", "/loops 8 "),
    ],
)
def test_odd_lines(capsys, monkeypatch, folder, echoes, line, message):
    """One line that says what is wrong, and the conversation goes on as if it had not been there."""
    out, err = chat(capsys, monkeypatch, folder, ["before", line, "after"])
    assert message in "".join(err)
    assert len(err) == (0 if not message else len(HELP.splitlines()) if line == "/help" else 1)
    assert out[-1] == echo("before", *([] if message else [line]), "after")


def echo(*questions):
    """What `echoes` answers to the last of them."""
    said, answer = [], ""
    for question in questions:
        said.append(f"user {question}")
        answer = " | ".join(said)
        said.append(f"assistant {answer}")
    return answer


def test_the_oldest_turns_are_forgotten(capsys, monkeypatch, folder, loaded):
    """Whole turns, with one line that says so; the system message stays."""
    lengths = []
    monkeypatch.setattr("mythos_jax.language_model.load_model", lambda *words, **keywords: loaded)

    def stream(self, messages, **options):
        lengths.append(len(messages))
        assert (messages[0]["role"], messages[1]["role"]) == ("system", "user")
        return TextStream(iter(["an answer of some words"]), GenerationStats(1))

    monkeypatch.setattr(Chat, "stream", stream)
    lines = [f"question {i} of some length" for i in range(6)]
    _, err = chat(capsys, monkeypatch, folder, lines, "--system", "Be brief.")
    assert lengths[:3] == [2, 4, 6]
    assert lengths[-2:] == [6, 6]
    assert err[-1] == "mythos: the context is full; the 2 oldest messages are forgotten"


def test_ctrl_c_stops_an_answer_and_not_the_program(capsys, monkeypatch, folder, echoes):
    """What came before it stays in the conversation; an answer without a word leaves nothing."""
    stream = Chat.stream

    def interrupted(self, messages, **options):
        pieces = stream(self, messages, **options)
        question = messages[-1]["content"]

        def some():
            if question == "early":
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)  # impatience
            yield next(pieces)
            if question == "late":
                signal.raise_signal(signal.SIGINT)
            yield next(pieces)

        return TextStream(some(), pieces.stats)

    monkeypatch.setattr(Chat, "stream", interrupted)
    monkeypatch.setattr("sys.stdin", Terminal())
    lines = iter(["late", "early", "after"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or _raise(EOFError))
    assert main(["chat", str(folder)]) == 0
    answer = echo("late")
    cut = f"user late | assistant {answer} | user after"
    assert capsys.readouterr().out.splitlines() == [answer, "", cut, ""]
    # Where no terminal asks, impatience ends the program.
    assert chat(capsys, monkeypatch, folder, ["early", "after"], code=130) == ([""], ["mythos: interrupted"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _raise(error):
    raise error


def test_at_a_terminal(capsys, monkeypatch, folder, echoes):
    """A prompt, a hint after Ctrl-C, and a dim line after an answer; Ctrl-C twice leaves."""
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr", errors := Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    later, twice = (KeyboardInterrupt, 60), (KeyboardInterrupt, 0)
    typed = iter([later, ("a", 0), later, later, ("b", 0), later, twice, ("not read", 0)])
    monkeypatch.setattr("mythos_jax.commands.chat.time.monotonic", lambda: now)
    now = 0

    def ask(prompt):
        nonlocal now
        assert prompt == "> "
        word, seconds = next(typed)
        now += seconds
        return word if isinstance(word, str) else _raise(word)

    monkeypatch.setattr("builtins.input", ask)
    assert main(["chat", str(folder)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [echo("a"), echo("a", "b")]
    dim = "\x1b[2m2 tokens, 2.00 loops per token\x1b[0m"
    hint = "mythos: Ctrl-C twice, or Ctrl-D, leaves"
    assert errors.getvalue().splitlines()[1:] == [hint, dim, hint, hint, dim, hint]
    assert next(typed) == ("not read", 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "{plain}", "--chat", "hi"], "{plain}: has no chat template; allowed: "),
        (["chat", "{plain}"], "{plain}: has no chat template; allowed: "),
        (["generate", "{model}", "hi", "--system", "x"], "--system: got 'x', allowed only with --chat"),
        (["generate", "{model}", "hi", "--chat-template", "x"], "--chat-template: got 'x', allowed only with --chat"),
        (["chat", "{model}", "--chat-template", "{model}/no.jinja"], "no.jinja: cannot be read (No such file"),
        (["chat", "{model}", "--chat-template", "{model}/wrong.jinja"], "wrong.jinja: line 1: "),
        (["chat", "{model}", "--halting", "act"], "halting criterion: got 'act', allowed with readout last"),
        (["chat", "{model}", "--top-k", "1000"], "top_k: got 1000, allowed: 0 (all)"),
        (["chat", "{model}", "--draft-loops", "5"], "draft_loops: got 5, allowed: 1 to loops, 2"),
        (["chat", "{model}", "--draft-loops", "1", "--temperature", "1"], "allowed: 0 (greedy) with draft_loops"),
    ],
)
def test_wrong_input_is_one_line(capsys, folder, words, message):
    plain = folder.parent / "plain"
    if not plain.exists():
        talker.save(plain, tokenizer_config={"eos_token": END})
        (folder / "wrong.jinja").write_text("{% for")
    assert main([word.format(plain=plain, model=folder) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message.format(plain=plain) in err
    assert len(err.splitlines()) == 1
