"""`mythos generate`."""

import argparse
import sys

from mythos_jax.commands.arguments import (
    add_base,
    add_chat,
    add_generation,
    add_step,
    add_storage,
    add_tokenizer,
    generation_options,
    load_named,
    path,
)
from mythos_jax.errors import DONE, ConfigError

SUMMARY = "Continue a prompt, or answer a question."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="RUN|MODEL")
    parser.add_argument("prompt")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a question; the answer alone is printed (see `mythos chat`)"
    )
    add_chat(parser)
    add_tokenizer(parser)
    add_base(parser)
    add_storage(parser)
    add_step(parser)
    add_generation(parser)
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="names of special tokens in the prompt, such as <|im_start|>, stand for those tokens",
    )
    parser.set_defaults(takes_overrides=("mesh",))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.chat and arguments.special_tokens:
        raise ConfigError("--special-tokens: allowed only without --chat, which always reads them")
    for flag, value in [("--system", arguments.system), ("--chat-template", arguments.chat_template)]:
        if value is not None and not arguments.chat:
            raise ConfigError(f"{flag}: got {value!r}, allowed only with --chat")
    from mythos_jax.runs.orbax_threads import quiet_background_errors

    if not arguments.debug:
        quiet_background_errors()
    lm = load_named(arguments, overrides)
    options = generation_options(arguments)
    if arguments.chat:
        pieces = lm.chat(
            arguments.prompt,
            system=arguments.system,
            chat_template=arguments.chat_template,
            stream=True,
            **options,
        )
    else:
        pieces = lm.generate(arguments.prompt, stream=True, special_tokens=arguments.special_tokens, **options)
        print(arguments.prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:  # ends the line after a Ctrl-C, too
        print(flush=True)
    print(f"mythos: {pieces.stats}", file=sys.stderr)
    return DONE
