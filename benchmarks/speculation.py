"""Self-speculative decoding compared with plain decoding at full depth: batch 1, one process, measured in turn.

    .venv/bin/python -m benchmarks.speculation RUN|MODEL [--loops 8] [--data DIR] [--drafts 1x2,2x3]

Continues held-out prompts greedily; both ways must give the same tokens. Prints the time per token (median over the
repeats, and their range), the gain over plain decoding (median over the repeats of the ratio within each), and the
fraction of drafts that are accepted. CPU time is the process's on all cores: it shows the amount of computation even
if other programs use the machine.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mythos_jax.data.pipeline import eval_batches
from mythos_jax.inference.generate import GenerateResult, generate
from mythos_jax.inference.speculative import SpeculativeResult, speculate
from mythos_jax.runs.load import load_model

PROMPT = 32  # tokens
MAX_NEW_TOKENS = 192

Decode = Callable[[np.ndarray], GenerateResult]


def run(decode: Decode, prompts: np.ndarray) -> tuple[list[float], list[GenerateResult]]:
    """Wall-clock and CPU seconds to continue all prompts one after another, and the results."""
    wall, cpu = time.perf_counter(), time.process_time()
    results = []
    for prompt in prompts:
        results.append(decode(prompt[None]))
        results[-1].tokens.block_until_ready()
    return [time.perf_counter() - wall, time.process_time() - cpu], results


def acceptance(plain: list[GenerateResult], drafted: list[GenerateResult]) -> str:
    """A table cell: the fraction of drafts accepted, and a warning if the tokens differ from plain decoding."""
    same = all((a.tokens == b.tokens).all() for a, b in zip(plain, drafted, strict=True))
    results = [result for result in drafted if isinstance(result, SpeculativeResult)]
    accepted = sum(int(result.accepted[0]) for result in results)
    return f"{accepted / sum(int(result.drafted[0]) for result in results):.0%}" + ("" if same else ", DIFFERS")


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
    new_tokens = min(config.model.max_seq_len - PROMPT, MAX_NEW_TOKENS)

    def plain(prompt: np.ndarray) -> GenerateResult:
        return generate(model, variables, prompt, max_new_tokens=new_tokens, loops=loops)

    def drafted(draft_loops: int, draft_tokens: int) -> Decode:
        return lambda prompt: speculate(
            model,
            variables,
            prompt,
            max_new_tokens=new_tokens,
            loops=loops,
            draft_loops=draft_loops,
            draft_tokens=draft_tokens,
        )

    calls: dict[str, Decode] = {"plain": plain}
    for draft in args.drafts.split(","):
        draft_loops, draft_tokens = map(int, draft.split("x"))
        if draft_loops < loops:
            calls[f"{draft_loops} x {draft_tokens}"] = drafted(draft_loops, draft_tokens)
    results = {name: run(call, prompts)[1] for name, call in calls.items()}  # compiles
    seconds: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            seconds[name].append(run(call, prompts)[0])
    milliseconds = {name: 1e3 * np.array(values) / (new_tokens * len(prompts)) for name, values in seconds.items()}

    print(f"{args.model}: {loops} loops, {len(prompts)} prompts, {new_tokens} new tokens each, {args.repeats} repeats")
    print("| draft loops x tokens | accepted | ms per token (range) | gain | CPU ms per token | gain in CPU time |")
    print("|---|---|---|---|---|---|")
    for name, times in milliseconds.items():
        gain_wall, gain_cpu = np.median(milliseconds["plain"] / times, axis=0)
        wall, cpu = np.median(times, axis=0)
        accepted = "" if name == "plain" else acceptance(results["plain"], results[name])
        time_range = f"{times[:, 0].min():.3f} to {times[:, 0].max():.3f}"
        print(f"| {name} | {accepted} | {wall:.3f} ({time_range}) | {gain_wall:.2f} | {cpu:.3f} | {gain_cpu:.2f} |")


if __name__ == "__main__":
    main()
