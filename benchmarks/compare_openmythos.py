"""Speed compared with the PyTorch original, open-mythos 0.5.0: same config, same converted weights, one process.

    .venv-torch/bin/python -m benchmarks.compare_openmythos [--config readme] [--device cpu] [--threads 2] [--json FILE]

Prints a table of docs/speed.md: forward pass, prefill, decoding at batch sizes 1 and 8, and the train step (forward,
backward, clipping, AdamW), ours also as a loop of a user's own (`own_loop.py`). All are measured in turn; median,
minimum and maximum. Compilation and first calls are not included.
`make test-torch` creates the environment; `--device gpu` needs a CUDA build of torch and jax[cuda13] in it.

Loops. Without `--halting`, both run all loops: the original's halting bias is set to -20, so that its ACT never halts.
With `--halting`, the bias keeps its initial value, and each side does what it can:
  forward     the same on both: every token continues until all have halted; the logits are equal
  decoding    the original runs all loops, as it always does with a cache; ours freezes a halted token with its keys and
              values (`freeze_halted`, which differs from the original and may produce other tokens), and stops
  train step  the original stops looping when every token has halted; ours always runs all loops, by design

Precision. On a CPU both compute in float32. On a GPU ours computes in bfloat16 from float32 weights, and so does the
original under torch.autocast: `.to(bfloat16)` would discard the imaginary part of its RoPE table.
"""

import argparse
import json
import os
import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing import (
    Call,
    median_and_range,
    milliseconds,
    print_header,
    print_row,
    ratios,
    time_in_turns,
    use_cores,
    use_device,
)

if TYPE_CHECKING:
    from benchmarks.sides import Original, Ours

# The original's README example, the same with more experts, the 118 M model of its issue 28, and its mythos_1b.
README: dict[str, Any] = dict(
    vocab_size=1000, dim=256, n_heads=8, n_kv_heads=2, max_seq_len=128, max_loop_iters=4, prelude_layers=1,
    coda_layers=1, attn_type="gqa", n_experts=8, n_shared_experts=1, n_experts_per_tok=2, expert_dim=64, lora_rank=8,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "readme": README,
    "64_experts": README | dict(n_experts=64),
    "118m": dict(
        vocab_size=50257, dim=768, n_heads=12, n_kv_heads=4, max_seq_len=1024, max_loop_iters=8, prelude_layers=2,
        coda_layers=2, attn_type="mla", kv_lora_rank=192, q_lora_rank=384, qk_rope_head_dim=32, qk_nope_head_dim=32,
        v_head_dim=32, n_experts=16, n_shared_experts=1, n_experts_per_tok=2, expert_dim=1536, lora_rank=16,
    ),
    "1b": dict(
        vocab_size=32000, dim=2048, n_heads=16, n_kv_heads=4, max_seq_len=4096, max_loop_iters=16, prelude_layers=2,
        coda_layers=2, attn_type="mla", kv_lora_rank=256, q_lora_rank=512, qk_rope_head_dim=32, qk_nope_head_dim=64,
        v_head_dim=64, n_experts=64, n_shared_experts=2, n_experts_per_tok=4, expert_dim=2048, lora_rank=8,
    ),
}  # fmt: skip
ROWS, LENGTH = 8, 128  # of the forward pass and the train step
PROMPT, NEW_TOKENS = 16, 64  # of decoding


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="readme")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", type=int, default=ROWS, help="rows in the forward pass and the train step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--halting", action="store_true", help="halt as configured, instead of running all loops")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def print_conditions(original: "Original", ours: "Ours", arguments: argparse.Namespace) -> None:
    """Prints what was measured where, and how far the logits of the two sides differ."""
    import jax
    import torch

    on_gpu = arguments.device == "gpu"
    difference = abs(original.logits() - ours.logits()).max()
    hardware = jax.devices()[0].device_kind if on_gpu else f"CPU, {arguments.threads} threads"
    dtype = "bfloat16, the original by autocast" if on_gpu else "float32"
    print(f"torch {torch.__version__}, jax {jax.__version__}; {hardware}; {dtype}; {arguments.repeats} repeats, ms; "
          f"max |difference of logits| {difference:.1e}", end="")  # fmt: skip
    if arguments.halting:
        used = ours.mean_loops(NEW_TOKENS)
        print(f"; of {ours.loops} loops ours ran {used:.1f} per decoded token, the original all", end="")
    print("\n", flush=True)


def workloads(original: "Original", ours: "Ours", rows: int) -> dict[str, dict[str, Call]]:
    """The calls to compare, by the name of their row in the table."""

    sides: dict[str, Original | Ours] = {"original": original, "ours": ours}

    def decoding(batch_size: int, new_tokens: int) -> dict[str, Call]:
        return {name: partial(side.decode, batch_size, new_tokens) for name, side in sides.items()}

    return {
        f"forward, {rows} x {LENGTH} tokens": {name: side.forward for name, side in sides.items()},
        f"prefill of {PROMPT}, one new token": decoding(1, 1),
        f"prefill of {PROMPT} and {NEW_TOKENS} new tokens, batch 1": decoding(1, NEW_TOKENS),
        "the same, batch 8": decoding(8, NEW_TOKENS),
        f"train step, {rows} x {LENGTH} tokens": {name: side.train_step for name, side in sides.items()},
        "the same, ours in a loop of one's own": {"original": original.train_step, "ours": ours.own_train_step},
    }


def compare(calls: dict[str, dict[str, Call]], repeats: int) -> dict[str, Any]:
    """Times each pair in turn and prints its row: both sides, the ratio of the medians, and the range of the ratio over
    the repeats. Returns the seconds."""
    seconds: dict[str, Any] = {}
    for name, pair in calls.items():
        times, first = time_in_turns(pair, repeats)
        theirs, ours = times["original"], times["ours"]
        ratio = statistics.median(theirs) / statistics.median(ours)
        ratio_range = median_and_range(ratios(theirs, ours), digits=2).partition(" ")[2]
        print_row(name, milliseconds(theirs), milliseconds(ours), f"{ratio:.2f} {ratio_range}")
        seconds[name] = {**times, "first": first}
    return seconds


def main() -> None:
    arguments = parse_arguments()
    use_cores(arguments.threads)  # before torch and jax start their threads
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory for torch
    use_device(arguments.device)
    from benchmarks.sides import make_sides  # starts torch

    original, ours = make_sides(
        CONFIGS[arguments.config],
        rows=arguments.rows,
        length=LENGTH,
        prompt=PROMPT,
        device=arguments.device,
        threads=arguments.threads,
        halting=arguments.halting,
    )
    print_conditions(original, ours, arguments)
    policy = "halting" if arguments.halting else f"{ours.loops} loops"
    title = f"{original.parameters() / 1e6:,.1f} M parameters, {ours.config.n_experts} experts, {policy}"
    print_header(title, "original", "ours", "ratio")
    seconds = compare(workloads(original, ours, arguments.rows), arguments.repeats)
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"config": arguments.config, "seconds": seconds}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
