"""`mythos generate`."""

import argparse
import sys
from typing import Annotated

from mythos_jax.commands.arguments import add_seed, add_step, add_tokenizer, halting_policy, of_type, path
from mythos_jax.errors import DONE
from mythos_jax.typed import Between, NonNegativeFloat, NonNegativeInt, PositiveInt

SUMMARY = "Continue a prompt."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    positive = of_type(PositiveInt)
    parser.add_argument("model", type=path, metavar="RUN|MODEL")
    parser.add_argument("prompt")
    add_tokenizer(parser)
    add_step(parser)
    parser.add_argument("--loops", type=positive, metavar="N", help="depth (default: the config's)")
    parser.add_argument(
        "--halting", type=halting_policy, metavar="CRITERION[:T]", help="let tokens stop early: act, latent:0.03, kl, …"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="tokens to generate (default: as many as fit in the model's context, at most 128)",
    )
    parser.add_argument(
        "--temperature", type=of_type(NonNegativeFloat), default=0.0, metavar="T", help="0 (the default) is greedy"
    )
    parser.add_argument(
        "--top-k",
        type=of_type(NonNegativeInt),
        default=0,
        metavar="K",
        help="sample from the K most likely tokens; 0 (the default): all",
    )
    parser.add_argument(
        "--top-p",
        type=of_type(Annotated[float, Between(0, 1, "(]")]),
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens of total mass P",
    )
    add_seed(parser, "random seed")
    parser.add_argument(
        "--draft-loops",
        type=positive,
        metavar="D",
        help="draft tokens with D loops and verify them at full depth: the same text, faster",
    )
    parser.add_argument("--draft-tokens", type=positive, default=3, metavar="N", help="tokens per draft (default 3)")
    parser.add_argument(
        "--loop-cache-slots", type=positive, metavar="N", help="bound the cache: loop t uses slot t mod N (approximate)"
    )
    parser.add_argument(
        "--prefill-chunk",
        type=positive,
        default=512,
        metavar="N",
        help="prompt tokens processed at a time (default 512)",
    )
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        help="names of special tokens in the prompt, such as <|im_start|>, stand for those tokens",
    )
    parser.set_defaults(takes_overrides=("mesh",))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mythos_jax.language_model import load
    from mythos_jax.runs.checkpoints import quiet_background_errors

    if not arguments.debug:
        quiet_background_errors()
    pieces = load(arguments.model, step=arguments.step, tokenizer=arguments.tokenizer, overrides=overrides).generate(
        arguments.prompt,
        stream=True,
        loops=arguments.loops,
        halting=arguments.halting,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        draft_loops=arguments.draft_loops,
        draft_tokens=arguments.draft_tokens,
        loop_cache_slots=arguments.loop_cache_slots,
        prefill_chunk=arguments.prefill_chunk,
        special_tokens=arguments.special_tokens,
    )
    print(arguments.prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:  # ends the line after a Ctrl-C, too
        print(flush=True)
    print(f"mythos: {pieces.stats}", file=sys.stderr)
    return DONE
