"""Serving: tokens per second and latency under load, all sides in one process, measured in turn.

    python -m benchmarks.serving RUN|MODEL [--users 2,8,32] [--halting predicted:4.7] [--json FILE] [--plot FILE]
    .venv-torch/bin/python -m benchmarks.serving smollm2 --against transformers --temperatures 0
    python -m benchmarks.serving RUN --url http://127.0.0.1:8000/v1      # any server with OpenAI's API

Requests are pieces of the run's held-out text (or of --text) that are to be continued by mixed numbers of tokens, with
mixed policies and temperatures, drawn from --seed; nothing else ends a reply. The sides answer the same requests:

    engine           our engine, each request with its policy
    all loops        the same engine, no request with a policy
    provisional      the engine with drafts, if --draft-loops says after how many loops
    static           batches of as many rows as users by `inference.generate`, requests with equal settings together; a
                     batch waits for the deepest token of its rows and for its longest reply
    static, sorted   the same, with replies of about the same length together
    transformers     batches by transformers' `generate` (--against transformers)
    server           a server elsewhere (--url), and nothing else

At the end: what a step costs when the engine serves, and of its program alone (--overhead).

Closed loop: so many users, each of whom sends the next request when an answer is there. Open loop (--rates): requests
arrive at random, so many a second, whether or not there are answers. "loops executed / asked": what all places or rows
ran for new tokens, also for nothing, against what these asked for. Latencies are p50 / p99 over all rounds' replies.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing import exit_with, use_cores

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.serving_load import Mix
    from mythos_jax.runs.load import LoadedModel
    from mythos_jax.serving.request import Request


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    use_cores(args.threads)
    from benchmarks.serving_load import draw_requests
    from benchmarks.serving_measure import measure_all, open_sides, overhead
    from benchmarks.serving_report import draw, overhead_line, table
    from benchmarks.serving_sides import EngineSide
    from mythos_jax.runs.load import load_model

    loaded = load_model(args.model)
    mix = mix_of(args, loaded)
    requests = draw_requests(text_of(loaded, args.text), mix, args.requests, args.seed)
    sides, close = open_sides(args, loaded, requests)
    print(heading(args, mix, requests), flush=True)
    results: dict[str, dict[str, Any]] = {}
    steps: tuple[list[float], list[float]] | None = None
    try:
        for load, baseline, mine in measure_all(args, sides, requests):
            results[load] = mine
            print(f"\n{table(load, mine, baseline)}", flush=True)
        if args.overhead and isinstance(side := sides.get("engine"), EngineSide):
            steps = overhead(args, loaded, side.engine, requests)
            print(f"\n{overhead_line(args.overhead, *steps)}")
    finally:
        close()
    if args.json:
        about = {"arguments": {k: str(v) for k, v in vars(args).items()}, "machine": platform.platform()}
        args.json.write_text(
            json.dumps({**about, "results": results, "steps": steps}, indent=1) + "\n", encoding="utf-8"
        )
    if args.plot and results:
        draw(results, args.plot)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN|MODEL")
    parser.add_argument("--users", default="2,8,32", help="numbers of users in the closed loop; 0: none")
    parser.add_argument("--rates", default="", help="requests per second in the open loop, such as 5,20")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, nargs="+", help="files of text (default: the run's held-out rows)")
    parser.add_argument(
        "--prompt", help="tokens of prompts, such as 8-48 (default: to half of the context, at most 128)"
    )
    parser.add_argument("--new", help="new tokens of replies, as --prompt")
    parser.add_argument("--halting", default="", help="policies that requests draw from: latent:0.07,none,kl:0.004")
    parser.add_argument("--temperatures", default="0,0.8", help="that requests draw from")
    parser.add_argument("--loops", type=int, help="the most per token (default: the config's)")
    parser.add_argument("--places", type=int, default=32, help="of the engine, and rows of batches in the open loop")
    parser.add_argument("--draft-loops", type=int, help="also measure drafts after so many loops")
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument(
        "--overhead", type=int, default=8, metavar="USERS", help="compare with the bare step; 0: do not"
    )
    parser.add_argument("--only", default="", help="measure only the sides whose names contain this")
    parser.add_argument("--against", choices=["transformers"], help="also measure this")
    parser.add_argument("--url", help="measure a server there, and nothing else; its key: MYTHOS_API_KEY")
    parser.add_argument("--served", default="", help="the model's name there (default: the first it lists)")
    parser.add_argument(
        "--fields", type=json.loads, default={}, help='more of each request, such as {"ignore_eos": true}'
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")
    return parser.parse_args(words)


def text_of(loaded: "LoadedModel", files: Sequence[Path] | None) -> "np.ndarray":
    """The tokens that prompts are cut from."""
    import numpy as np

    if files:
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        return np.asarray(loaded.require_tokenizer().encode(text), np.int32)
    if loaded.step is None:
        exit_with(f"--text: got nothing, allowed with {loaded.directory}, which has no held-out text: files of text")
    from mythos_jax.data.open import open_data

    rows = loaded.config.evaluation.batch_size
    return next(iter(open_data(loaded.config).held_out_batches(rows, rows)))["tokens"].reshape(-1)


def mix_of(args: argparse.Namespace, loaded: "LoadedModel") -> "Mix":
    from benchmarks.serving_load import Mix, Range
    from mythos_jax.model.halting import Halting

    config, half = loaded.config.model, min(loaded.config.model.max_seq_len // 2, 128)
    default = "predicted" if "predictor" in loaded.variables else "latent" if config.loops > 1 else "none"
    policies = [None if word == "none" else Halting.parse(word) for word in (args.halting or default).split(",")]
    mix = Mix(
        prompt=Range.parse(args.prompt or f"{min(8, half)}-{half}"),
        new=Range.parse(args.new or f"{min(8, half)}-{half}"),
        loops=args.loops or config.loops,
        policies=tuple(policies),
        temperatures=tuple(map(float, args.temperatures.split(","))),
    )
    if mix.prompt.last + mix.new.last > config.max_seq_len:
        exit_with(f"--prompt and --new: got {mix.prompt.last} and {mix.new.last} tokens, allowed together: "
                  f"{config.max_seq_len}")  # fmt: skip
    return mix


def heading(args: argparse.Namespace, mix: "Mix", requests: "Sequence[Request]") -> str:
    policies = ", ".join("none" if p is None else f"{p.criterion}:{p.threshold}" for p in mix.policies)
    return (
        f"{args.model}: {len(requests)} requests, prompts of {sum(len(r.tokens) for r in requests)} tokens, "
        f"{sum(r.max_new_tokens for r in requests)} new ones; at most {mix.loops} loops, policies {policies}, "
        f"temperatures {args.temperatures}; {args.repeats} rounds, {args.threads} threads"
    )


if __name__ == "__main__":
    main()
