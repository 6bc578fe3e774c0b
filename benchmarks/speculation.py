"""Self-speculative decoding beside plain decoding at full depth, batch 1, in one process, by turns.

    .venv/bin/python -m benchmarks.speculation RUN|MODEL [--loops 8] [--data DIR] [--drafts 1x2,2x3]

Continues held-out prompts greedily; the tokens must be the same. Prints time a token (median over repeats, and their
range), the gain over plain decoding (median over repeats of the ratio within one), and the share of drafts accepted.
CPU time is that of the process on all cores: it says what was computed where other programs share the machine.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mythos_jax.data.pipeline import eval_batches
from mythos_jax.inference.generate import GenerateResult, generate
from mythos_jax.inference.speculative import speculate
from mythos_jax.runs.load import load_model

PROMPT = 32


def timed(
    call: Callable[[np.ndarray], GenerateResult], prompts: np.ndarray
) -> tuple[list[float], list[GenerateResult]]:
    """Wall and CPU seconds for all prompts, one after the other, and what came."""
    wall, cpu, results = time.perf_counter(), time.process_time(), []
    for prompt in prompts:
        results.append(call(prompt[None]))
        results[-1].tokens.block_until_ready()
    return [time.perf_counter() - wall, time.process_time() - cpu], results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", help="prepared rows (default: the run's own)")
    parser.add_argument("--loops", type=int, help="full depth (default: the config's)")
    parser.add_argument("--drafts", default="1x1,1x2,1x3,2x2,2x3,2x5,3x3,4x4", help="draft loops x draft tokens")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    loaded = load_model(args.model)
    model, variables, config = loaded.model, loaded.variables, loaded.config
    loops = args.loops or config.model.loops
    rows = next(eval_batches(Path(args.data or config.data_path), batch_size=args.prompts, max_rows=args.prompts))
    prompts = rows["tokens"][:, :PROMPT]
    new = min(config.model.max_seq_len - PROMPT, 192)
    drafts = [tuple(map(int, pair.split("x"))) for pair in args.drafts.split(",")]

    def plain(prompt: np.ndarray) -> GenerateResult:
        return generate(model, variables, prompt, max_new_tokens=new, loops=loops)

    def drafted(d: int, n: int) -> Callable[[np.ndarray], GenerateResult]:
        return lambda prompt: speculate(
            model, variables, prompt, max_new_tokens=new, loops=loops, draft_loops=d, draft_tokens=n
        )

    calls = {"plain": plain} | {pair: drafted(*pair) for pair in drafts if pair[0] < loops}
    results = {name: timed(call, prompts)[1] for name, call in calls.items()}  # compiles
    seconds = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call, prompts)[0])
    seconds = {name: 1e3 * np.array(values) / (new * len(prompts)) for name, values in seconds.items()}

    print(
        f"{args.model}: {loops} loops, {len(prompts)} prompts, {new} new tokens each, {args.repeats} repeats by turns"
    )
    print("| draft loops x tokens | accepted | ms a token (range) | gain | CPU ms a token | gain in CPU time |")
    print("|---|---|---|---|---|---|")
    for name, values in seconds.items():
        gain_wall, gain_cpu = np.median(seconds["plain"] / values, axis=0)
        wall, cpu = np.median(values, axis=0)
        label, accepted = "plain", ""
        if name != "plain":
            same = all((a.tokens == b.tokens).all() for a, b in zip(results["plain"], results[name], strict=True))
            counts = np.sum([[int(r.accepted[0]), int(r.drafted[0])] for r in results[name]], axis=0)
            label, accepted = "{} x {}".format(*name), f"{counts[0] / counts[1]:.0%}" + ("" if same else ", DIFFERS")
        spread = f"{values[:, 0].min():.3f} to {values[:, 0].max():.3f}"
        print(f"| {label} | {accepted} | {wall:.3f} ({spread}) | {gain_wall:.2f} | {cpu:.3f} | {gain_cpu:.2f} |")


if __name__ == "__main__":
    main()
