"""Chat templates: the text that a model was trained to see for a conversation, as transformers renders it.

A template is a Jinja program that comes with a model, so it is untrusted: it runs in Jinja's sandbox, sees plain data
only, and every error in it becomes one line.
"""

import contextlib
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.paths import to_path

Message = Mapping[str, Any]

# What stands around the model's own words while a text is made, in place of `{% generation %}` and its end. No
# conversation contains it: it is drawn anew in every process.
_MARK = f"<{uuid.uuid4().hex}>"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_PROBE = "What is that?", "An answer, 1."  # a question, and an answer that no template changes


class ChatTemplate:
    """A Jinja template with the names of the special tokens that it may write.

    name: what errors call it. tokens: such as {"bos_token": "<s>"}. clock: what it takes for the present time.
    marks_answers: whether it says itself which passages are the model's own words.
    Raises ConfigError if it is not a template.
    """

    def __init__(self, source: str, name: str, tokens: Mapping[str, str], clock: Callable[[], datetime] = datetime.now):
        self.source, self.name, self._tokens = source, name, dict(tokens)
        self.marks_answers = bool(_GENERATION.search(source))
        self._template = self._run(lambda: _environment(clock).from_string(source))

    @classmethod
    def from_file(
        cls, path: str | Path, tokens: Mapping[str, str], clock: Callable[[], datetime] = datetime.now
    ) -> "ChatTemplate":
        try:
            source = to_path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"chat template {path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ConfigError(f"chat template {path}: not text in UTF-8; allowed: a Jinja template") from None
        return cls(source, str(path), tokens, clock)

    def render(self, messages: Sequence[Message], *, prompt: bool = True, tools: Sequence[Message] = ()) -> str:
        """The text of a conversation. prompt: end with what stands before an answer. tools: those that the model may
        call, as JSON has them.

        Raises ConfigError for a conversation that the template refuses, such as two questions in a row.
        """
        return self.render_marked(messages, prompt=prompt, tools=tools)[0]

    def render_marked(
        self, messages: Sequence[Message], *, prompt: bool = False, tools: Sequence[Message] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the start and end of each passage that the template marks as the model's own
        words; none if it has no such marks."""
        # As transformers does: a missing name instead of None, and nothing but plain data.
        marked = self._run(
            lambda: self._template.render(
                messages=[
                    {key: _plain(value) for key, value in message.items() if value is not None} for message in messages
                ],
                tools=_plain(list(tools)) or None,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokens,
            )
        )
        parts = marked.split(_MARK)
        ends = [0, *itertools.accumulate(map(len, parts))]
        # Every second part stands between two marks.
        passages = [(ends[i], ends[i + 1]) for i in range(1, len(parts) - 1, 2)]
        return "".join(parts), [(start, end) for start, end in passages if start < end]

    @cached_property
    def answer_role(self) -> str:
        """The role of the model's own messages: "assistant", unless the text before an answer has another name.

        Huginn's does: its headers have the role as it is, and that of an answer is `Huginn`.
        """
        question, answer = ({"role": "user", "content": text} for text in _PROBE)
        with contextlib.suppress(ConfigError):
            before = self.render([question])
            header = before.removeprefix(self.render([question], prompt=False))
            for role in ["assistant", *re.findall(r"\w+", header)]:
                text = self.render([question, {**answer, "role": role}])
                if text.startswith(before) and answer["content"] in text.removeprefix(before):
                    return role
        return "assistant"

    @cached_property
    def answer_end(self) -> str:
        """What the template writes after an answer; empty if that is unknown."""
        question, answer = _PROBE
        messages = [{"role": "user", "content": question}, {"role": self.answer_role, "content": answer}]
        with contextlib.suppress(ConfigError):
            text = self.render(messages, prompt=False)
            return text.rpartition(answer)[2] if answer in text else ""
        return ""

    def _run(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RecursionError:
            raise ConfigError(f"chat template {self.name}: its parts are nested too deeply") from None
        except jinja2.TemplateSyntaxError as error:
            reason = one_line(error.message, limit=200)
            raise ConfigError(f"chat template {self.name}: line {error.lineno}: {reason}") from None
        except Exception as error:  # a template can make Python raise whatever it likes
            raise ConfigError(
                f"chat template {self.name}: {one_line(error, limit=300) or type(error).__name__}"
            ) from None


def _environment(clock: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """What transformers' templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: clock().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what training learns."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = nodes.Output([nodes.TemplateData(_MARK)], lineno=line)
        return [mark, nodes.Scope(body, lineno=line), mark]


class _Dict:
    """What templates need of `dict`, without the attributes of the class."""

    def __call__(self, *arguments: Any, **items: Any) -> dict[Any, Any]:
        return dict(*arguments, **items)

    def fromkeys(self, names: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(names, value)


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, through which Python's internals are reached."""

    def __init__(*arguments: Any, **attributes: Any):
        self, *positional = arguments  # so that `namespace(self=…)` works
        attributes = dict(*positional, **attributes)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace: got attribute {name!r}, allowed: names without leading _")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML gives a meaning to."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any) -> Any:
    """The value as JSON has it; an object of another class is replaced by its type's name, so that no template can
    call its methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    return f"<{type(value).__name__}>"
