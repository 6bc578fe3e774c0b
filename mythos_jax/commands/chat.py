"""`mythos chat`: a conversation, line by line."""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, cast

from mythos_jax import interrupts
from mythos_jax.bounds import Between, NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from mythos_jax.commands.arguments import (
    add_base,
    add_chat,
    add_generation,
    add_step,
    add_storage,
    add_tokenizer,
    generation_options,
    halting_policy,
    load_named,
    of_type,
    path,
)
from mythos_jax.errors import DONE, ConfigError, one_line
from mythos_jax.streams import say
from mythos_jax.typed import nearest_name

if TYPE_CHECKING:
    from mythos_jax.inference.chat import Chat
    from mythos_jax.inference.text import RowOptions

SUMMARY = "Talk with a model."

PROMPT = "> "
TWICE = 2  # seconds between two presses of Ctrl-C that leave
OFF = "off"
# What each of these reads; their values are keywords of generation, `off` is the default.
SETTINGS: dict[str, Callable[[str], Any]] = {
    "loops": of_type(PositiveInt),
    "halting": halting_policy,
    "temperature": of_type(NonNegativeFloat),
    "top-k": of_type(NonNegativeInt),
    "top-p": of_type(Annotated[float, Between(0, 1, "(]")]),
    "seed": of_type(Seed),
    "max-new-tokens": of_type(PositiveInt),
}
DEFAULTS: dict[str, Any] = {"temperature": 0.0, "top-k": 0, "top-p": 1.0, "seed": 0}  # of the others None
HELP = """\
/loops 8               the depth of answers; without a value these show the one in use, and `off` restores the default
/halting latent:0.03   let tokens stop early
/temperature 0.7       also /top-k, /top-p, /seed, /max-new-tokens
/system TEXT           the system message; `off` takes it away
/undo                  forget the last question and its answer
/reset                 forget all but the system message
/quit                  leave, as does Ctrl-D
Ctrl-C stops an answer. A line that starts with // is a question that starts with /."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="RUN|MODEL")
    add_chat(parser)
    add_tokenizer(parser)
    add_base(parser)
    add_storage(parser)
    add_step(parser)
    add_generation(parser)
    parser.set_defaults(takes_overrides=("mesh",))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.inference.chat import Chat
    from mythos_jax.runs.orbax_threads import quiet_background_errors

    if not arguments.debug:
        quiet_background_errors()
    loaded = load_named(arguments, overrides).loaded
    chat, options = Chat(loaded, arguments.chat_template), generation_options(arguments)
    chat.check(options)
    return Talk(chat, options, arguments.system).run()


class Talk:
    """What is said and set in a conversation. A terminal is asked for questions; any other input is read line by line.

    Answers go to standard output, all else to standard error.
    """

    def __init__(self, chat: "Chat", options: "RowOptions", system: str | None):
        self._chat, self._options, self._system = chat, options, system
        self._turns: list[Any] = []  # messages but for the system's
        self._asks = sys.stdin.isatty()

    def run(self) -> int:
        """Answers every line. Returns the exit code."""
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are the tokenizer's to judge
        if self._asks:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  `input` then edits lines and remembers them
            say("mythos: ask a question; /help lists the commands, Ctrl-D leaves")
        while (line := self._read()) is not None:
            with interrupts.noted() as pressed:  # Ctrl-C stops an answer, and not the program
                try:
                    if line.startswith("/") and not line.startswith("//"):
                        if self._command(*line[1:].split(maxsplit=1)):
                            break
                    elif line.strip():
                        self._ask(line[1:] if line.startswith("//") else line, pressed)
                except ConfigError as error:
                    say(f"mythos: {one_line(error)}")
        return DONE

    def _read(self) -> str | None:
        """The next line; None at the end of the input, or if Ctrl-C is pressed twice at the prompt."""
        if not self._asks:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        pressed = -math.inf
        while True:
            try:
                with interrupts.heard():
                    return input(PROMPT)
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                before, pressed = pressed, time.monotonic()
                if pressed - before < TWICE:
                    return None
                say("mythos: Ctrl-C twice, or Ctrl-D, leaves")

    def _ask(self, question: str, pressed: list[int]) -> None:
        """Prints the answer to a question as it comes, and remembers both, also of an answer that Ctrl-C stopped the
        part before that. Raises ConfigError, and remembers nothing then."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        asked = [*system, *self._turns, {"role": "user", "content": question}]
        answer, pieces = "", None
        try:
            messages = self._chat.fitting(asked, self._options.get("max_new_tokens"))
            pieces = self._chat.stream(messages, **self._options)
            if forgotten := len(asked) - len(messages):
                say(f"mythos: the context is full; the {forgotten} oldest messages are forgotten")
            for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
                if pressed:
                    break
        except KeyboardInterrupt:  # the second, if the next piece is not there yet
            if not self._asks:
                raise
        finally:
            if pieces is not None:
                print(flush=True)
        if answer:
            role = self._chat.template.answer_role
            self._turns = [*messages[len(system) :], {"role": role, "content": answer}]
        if pieces is not None and pieces.stats.loops and sys.stderr.isatty():
            say(_dim(pieces.stats.brief))

    def _command(self, name: str = "", value: str | None = None) -> bool:
        """Does what a line with a slash says; true if it says to leave."""
        actions = {"help": lambda: say(HELP), "undo": self._undo, "reset": self._turns.clear}
        if name in ("quit", "exit"):
            return True
        if name == "system":
            self._set_system(value)
        elif name in SETTINGS:
            self._set(name, value)
        elif name in actions:
            actions[name]()
        else:
            known = [*actions, *SETTINGS, "system", "quit"]
            near = nearest_name(name, known, cutoff=0.5)
            hint = f"did you mean /{near}?" if near else f"allowed: {', '.join(f'/{word}' for word in known)}"
            raise ConfigError(f"/{name}: no such command; {hint}")
        return False

    def _set(self, name: str, value: str | None) -> None:
        """Changes a keyword of generation, or says what it is. Raises ConfigError for a value that it cannot have."""
        key, options = name.replace("-", "_"), dict(self._options)
        if value is not None:
            try:
                options[key] = DEFAULTS.get(name) if value == OFF else SETTINGS[name](value)
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"/{name}: {error}") from None
            self._chat.check(cast("RowOptions", options))
            self._options = cast("RowOptions", options)
        say(f"mythos: {name} {OFF if options[key] is None else options[key]}")

    def _set_system(self, text: str | None) -> None:
        if text is not None:
            self._system = None if text == OFF else text
        say(f"mythos: system {OFF if self._system is None else self._system}")

    def _undo(self) -> None:
        """Forgets the last question and what followed it."""
        question = None
        while self._turns and question is None:
            turn = self._turns.pop()
            question = turn["content"] if turn["role"] == "user" else None
        say("mythos: nothing to undo" if question is None else f"mythos: forgotten: {one_line(question, 60)}")


def _dim(text: str) -> str:
    return text if "NO_COLOR" in os.environ else f"\x1b[2m{text}\x1b[0m"
