"""`mythos serve`."""

import argparse
import contextlib
import ipaddress
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from mythos_jax.bounds import Between, NonNegativeFloat, NonNegativeInt, PositiveInt
from mythos_jax.commands.arguments import (
    add_base,
    add_compilation_cache,
    add_loop_cache,
    add_step,
    add_storage,
    add_tokenizer,
    byte_count,
    halting_policy,
    load_named,
    of_type,
    path,
)
from mythos_jax.errors import DONE, ConfigError
from mythos_jax.interrupts import handled
from mythos_jax.streams import log, say

if TYPE_CHECKING:
    from mythos_jax.runs.load import LoadedModel
    from mythos_jax.server.service import Service
    from mythos_jax.serving.engine import Engine

SUMMARY = "Serve a model to many at once, with OpenAI's API and a page for a browser."

_EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="RUN|MODEL")
    _add_network(parser)
    _add_engine(parser)
    _add_defaults(parser)
    add_tokenizer(parser)
    add_base(parser)
    add_storage(parser)
    add_step(parser)
    add_compilation_cache(parser)
    parser.set_defaults(takes_overrides=("mesh",))


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    group.add_argument(
        "--port",
        type=of_type(Annotated[int, Between(0, 65535)]),
        default=8000,
        metavar="N",
        help="port (default 8000); 0: a free one, which is printed",
    )
    group.add_argument(
        "--api-key-file", type=path, metavar="FILE", help="clients must send the key in this file (or MYTHOS_API_KEY)"
    )
    group.add_argument(
        "--allow-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages from there, such as https://example.org, may ask from a browser; may be given several times",
    )
    group.add_argument(
        "--served-name",
        type=_model_name,
        metavar="NAME",
        help="what clients call the model (default: the last part of its path)",
    )
    group.add_argument(
        "--drain-seconds",
        type=of_type(NonNegativeFloat),
        default=30.0,
        metavar="S",
        help="on SIGTERM or Ctrl-C, how long requests that are under way may take (default 30)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group, positive = parser.add_argument_group("engine"), of_type(PositiveInt)
    group.add_argument(
        "--places",
        type=positive,
        default=32,
        metavar="N",
        help="tokens that are computed at the same time (default 32)",
    )
    group.add_argument(
        "--cache-bytes",
        type=byte_count,
        metavar="SIZE",
        help="memory for keys and values, such as 2GiB (default: for all places at full length, at most 2GiB)",
    )
    group.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens of prompt and reply (default: the model's context)"
    )
    group.add_argument(
        "--max-loops", type=positive, metavar="N", help="that a request may ask for (default: the model's loops)"
    )
    add_loop_cache(group)
    group.add_argument(
        "--queue",
        type=of_type(NonNegativeInt),
        default=256,
        metavar="N",
        help="requests that may wait (default 256); more are refused with 429",
    )


def _add_defaults(parser: argparse.ArgumentParser) -> None:
    group, positive = parser.add_argument_group("defaults", "of requests that do not say"), of_type(PositiveInt)
    group.add_argument("--loops", type=positive, metavar="N", help="depth (default: the config's)")
    group.add_argument(
        "--halting", type=halting_policy, metavar="CRITERION[:T]", help="let tokens stop early: act, latent:0.03, kl, …"
    )
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="tokens of a reply (default: as many as fit in the model's context, at most 128, in a chat 512)",
    )
    group.add_argument("--chat-template", type=path, metavar="FILE", help="a Jinja template (default: the model's own)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    _require_extra()
    from mythos_jax import cluster
    from mythos_jax.runs.orbax_threads import quiet_background_errors
    from mythos_jax.server.auth import read_key
    from mythos_jax.server.run import bind, serve

    if not arguments.debug:
        quiet_background_errors()
    cluster.cache_compilations(arguments.compilation_cache)
    key = read_key(arguments.api_key_file)
    listener = bind(arguments.host, arguments.port)  # an error of the address comes before the work
    log(f"{arguments.model}: loading; the port is taken, and answers when the weights are there")
    with _ends_on_signals():
        loaded = load_named(arguments, overrides).loaded
        engine, service = _prepare(arguments, loaded, key)

    def start() -> None:
        engine.warm_up(lambda note: log(f"{arguments.model}: compiling, {note}"))
        parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in engine.memory.items())
        log(f"{arguments.model}: memory of a device: {parts}")
        engine.start()

    try:
        return serve(service, listener, start, arguments.drain_seconds)
    finally:
        engine.close(drain=False)


@contextlib.contextmanager
def _ends_on_signals() -> Iterator[None]:
    """While nothing is served yet, SIGTERM and Ctrl-C end at once, with 0 as later on."""

    def end(number: int, _: object) -> None:
        say(f"mythos: {signal.Signals(number).name}: ended while it was loading")
        os._exit(DONE)  # what is being read cannot be stopped

    with handled([signal.SIGTERM, signal.SIGINT], end):
        yield


def _prepare(arguments: argparse.Namespace, loaded: "LoadedModel", key: str | None) -> tuple["Engine", "Service"]:
    """Raises ConfigError for what the model cannot do."""
    from mythos_jax.server.model import Defaults, served_model
    from mythos_jax.server.service import Service
    from mythos_jax.serving.engine import Engine
    from mythos_jax.serving.options import EngineOptions
    from mythos_jax.serving.request import Request

    options = EngineOptions(
        places=arguments.places,
        cache_bytes=arguments.cache_bytes,
        max_length=arguments.max_length,
        max_loops=arguments.max_loops,
        loop_cache=arguments.loop_cache,
        queue=arguments.queue,
    )
    engine = Engine(loaded, options)
    layout = engine.layout
    engine.check(Request([0], 1, loops=arguments.loops, halting=arguments.halting))
    names = dict.fromkeys(filter(None, [arguments.served_name, _name(arguments.model)]))
    model = served_model(loaded, list(names), arguments.chat_template, layout.max_loops, layout.max_length)
    service = Service(
        engine,
        model,
        defaults=Defaults(arguments.max_new_tokens, arguments.loops, arguments.halting),
        key=key,
        origins=arguments.allow_origin,
        state="starting",
        local=_is_local(arguments.host),
        debug=arguments.debug,
    )
    return engine, service


def _require_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve: needs {', '.join(missing)}; allowed: pip install '.[serve]' in the checkout")


def _name(model: str) -> str:
    """What clients call a model: a hub id or a word as it is, the last part of a path."""
    where = Path(model)
    return where.resolve().name if where.exists() else model


def _model_name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: a name of printable characters")
    return text


def _origin(text: str) -> str:
    """For argparse: what a browser says where a page is from."""
    parts = urlsplit(text)
    if (text != "*" and text != f"{parts.scheme}://{parts.netloc}") or not (parts.netloc or text == "*"):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: SCHEME://HOST[:PORT], or * for all pages")
    return text


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
