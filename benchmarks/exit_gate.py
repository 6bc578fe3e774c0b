"""Decoding with an exit gate compared with all loops: one process, measured in turn.

    .venv/bin/python -m benchmarks.exit_gate [--dim 512] [--layers 2] [--batch 1,8] [--threads 2]

The model has the shape of Ouro and random weights; its gate exits after each of the 16 loops with a probability near
0.16, and the thresholds are those at which a token runs about half of the loops and a quarter. A step of a batch ends
with its last token, so what bounds the time of a batch is the largest number of loops in each step. Prints both means,
tokens per second (median over the repeats, and their range), and how many times those of all loops (ratio within each).
"""

import argparse
from functools import partial

from benchmarks.timing import median_and_range, print_header, print_row, ratios, time_in_turns, use_cores

NEW_TOKENS, PROMPT = 64, 16
THRESHOLDS = {"all": 1.0, "half": 0.73, "a quarter": 0.45}  # below 1 - (1 - 0.16)^n for n = 8 and 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    use_cores(args.threads)

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mythos_jax.config import ModelConfig
    from mythos_jax.inference.generate import generate
    from mythos_jax.model.halting import Halting
    from mythos_jax.model.mythos import Mythos

    config = ModelConfig(
        vocab_size=8192, dim=args.dim, max_seq_len=128, prelude_layers=0, loop_layers=args.layers, coda_layers=0,
        loops=16, n_heads=args.dim // 64, n_kv_heads=args.dim // 64, hidden_dim=args.dim * 11 // 4,
        norm="pre_post", injection="none", state_norm=True, final_norm=False, tied_embedding=False, exit_gate=True,
    )  # fmt: skip
    model = Mythos(config)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    cell = variables["params"]["recurrence"]["cell"]
    cell["halt_bias"] += float(np.log(0.16 / 0.84))
    cell["halt_kernel"] *= 0.3
    print_header(
        "batch", "loops", "threshold", "mean loops", "largest of a step", "tokens per second", "times all loops"
    )
    for batch in map(int, args.batch.split(",")):
        prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, PROMPT)).astype(np.int32)
        decode = partial(generate, model, variables, prompts, max_new_tokens=NEW_TOKENS)
        calls = {name: partial(decode, halting=Halting("gate", q)) for name, q in THRESHOLDS.items()}
        loops = {name: np.asarray(call().loops) for name, call in calls.items()}
        waits = {name: lambda call=call: call().tokens.block_until_ready() for name, call in calls.items()}
        times, _ = time_in_turns(waits, args.repeats)
        for name, seconds in times.items():
            speed = median_and_range([batch * NEW_TOKENS / s for s in seconds])
            gain = median_and_range(ratios(times["all"], seconds), digits=2)
            mean, largest = f"{loops[name].mean():.2f}", f"{loops[name].max(0).mean():.2f}"
            print_row(batch, name, THRESHOLDS[name], mean, largest, speed, gain)


if __name__ == "__main__":
    main()
