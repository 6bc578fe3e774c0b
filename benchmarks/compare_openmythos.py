"""Speed beside the PyTorch original, open-mythos 0.5.0: the same config, the same converted weights, one process.

    .venv-torch/bin/python -m benchmarks.compare_openmythos [--config readme] [--device cpu] [--threads 2] [--json FILE]

Forward, prefill, decoding at batch 1 and 8, and train step (forward, backward, clipping, AdamW), by turns; medians,
least and most, as a table of docs/speed.md. Compile time and first calls stand apart. `make test-torch` makes the
environment; `--device gpu` needs a CUDA build of torch and jax[cuda13] in it.

Loops. Without `--halting` both run all of them: the original's halting bias is set to -20, its ACT never ends. With it
the bias is as initialised, and each side does what it can:
  forward     the same on both: every token goes on until all have halted, logits are equal
  decoding    the original runs all loops, as it always does with a cache; ours freezes a token that has halted, with
              its keys and values (`freeze_halted`, not the original's semantics: other tokens may come out), and stops
  train step  the original ends its loops when every token has halted; ours always runs all, by design

Numbers. On a CPU both compute in float32. On a GPU ours computes in bfloat16 from float32 weights, and so does the
original under torch.autocast: converted by `.to(bfloat16)` it would lose the imaginary half of its RoPE table.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.timing import by_turns, head, milliseconds, ratios, refuse, row, spread, use_cores, use_device

# The original's own README example, that with more experts, the 118 M model of its issue 28, and its mythos_1b.
README = dict(
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
ROWS, LENGTH, PROMPT, NEW = 8, 128, 16, 64


def compared(sides: dict[str, dict[str, Callable[[], Any]]], repeats: int) -> dict[str, Any]:
    """Times each pair by turns and prints its row, the ratio of the medians and its spread over turns; returns the
    seconds."""
    found: dict[str, Any] = {}
    for name, pair in sides.items():
        times, first = by_turns(pair, repeats)
        theirs, ours = times["original"], times["ours"]
        ratio = statistics.median(theirs) / statistics.median(ours)
        turns = spread(ratios(theirs, ours), digits=2).partition(" ")[2]
        row(name, milliseconds(theirs), milliseconds(ours), f"{ratio:.2f} {turns}")
        found[name] = {**times, "first": first}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="readme")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", type=int, default=ROWS, help="of the forward pass and the train step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--halting", action="store_true", help="halt as configured, instead of running all loops")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    on_gpu, rows = arguments.device == "gpu", arguments.rows
    use_cores(arguments.threads)  # before either starts its threads
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the other side its share of a GPU
    use_device(arguments.device)

    import jax
    import numpy as np
    import torch
    import torch.nn.functional as F
    from open_mythos.main import MythosConfig, OpenMythos

    from benchmarks.steps import Shape, batch_of, run_of
    from mythos_jax.inference.generate import generate
    from mythos_jax.model.halting import Halting
    from mythos_jax.model.mythos import Mythos
    from mythos_jax.porting.pretrained import load_pretrained
    from mythos_jax.sharding import make_mesh
    from mythos_jax.training.step import init_state, make_train_step

    if on_gpu and not torch.cuda.is_available():
        refuse("--device: got gpu, but torch finds none here (it needs a CUDA build of torch)")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    original = OpenMythos(MythosConfig(**CONFIGS[arguments.config])).eval()
    if not arguments.halting:
        torch.nn.init.constant_(original.recurrent.act.halt.bias, -20.0)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": original.state_dict(), "cfg": original.cfg}, Path(folder) / "model.pt")
        model_config, variables = load_pretrained(Path(folder) / "model.pt")
    variables = jax.device_put(variables, jax.devices()[0])
    model, loops = Mythos(model_config), model_config.loops
    halting = Halting("act") if arguments.halting else None
    # To stop with a cache a halted token must be frozen.
    decoder = Mythos(replace(model_config, freeze_halted=True)) if arguments.halting else model
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (max(rows, 8), LENGTH + 1)).astype(np.int32)
    place = "cuda" if on_gpu else "cpu"
    original, torch_tokens = original.to(place), torch.from_numpy(tokens).long().to(place)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def autocast() -> torch.autocast:
        return torch.autocast(place, torch.bfloat16, enabled=on_gpu)

    forward = jax.jit(lambda variables, tokens: model.apply(variables, tokens, loops=loops, halting=halting).logits)

    @torch.no_grad()
    def forward_theirs():
        with autocast():
            logits = original(torch_tokens[:rows, :-1], n_loops=loops)
        wait()
        return logits

    def forward_ours():
        return jax.block_until_ready(forward(variables, tokens[:rows, :-1]))

    run_config = run_of(model_config, Shape(rows, LENGTH))
    training = run_config.training
    mesh = make_mesh(run_config.mesh, jax.devices()[:1])
    step = make_train_step(run_config, mesh)
    batch = jax.device_put(batch_of(run_config))  # its tokens are the first rows of those here: the same seed
    state = optimizer = None  # made by the first step: they are as large as the model, and decoding needs none

    def train_theirs():
        nonlocal optimizer
        if optimizer is None:
            optimizer = torch.optim.AdamW(
                original.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
            )
        original.train()
        with autocast():
            logits = original(torch_tokens[:rows, :-1], n_loops=loops)
            loss = F.cross_entropy(logits.flatten(0, 1), torch_tokens[:rows, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(original.parameters(), training.gradient_clip)
        optimizer.step()
        original.eval()
        wait()

    def train_ours():
        nonlocal state
        if state is None:
            state = init_state(run_config, mesh)  # its arrays are given away with each step, so it gets copies
            copies = jax.tree.map(lambda x, fresh: jax.device_put(np.array(x), fresh.sharding), variables,
                                  state.variables)  # fmt: skip
            state = replace(state, variables=copies)
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    @torch.no_grad()
    def decode_theirs(rows, new):
        with autocast():
            original.generate(torch_tokens[:rows, :PROMPT], max_new_tokens=new, n_loops=loops, top_k=1)
        wait()

    def decode_ours(rows, new):
        result = generate(decoder, variables, tokens[:rows, :PROMPT], max_new_tokens=new, loops=loops, halting=halting)
        return jax.block_until_ready(result)

    theirs, ours = forward_theirs().float().cpu().numpy(), np.asarray(forward_ours())
    parameters = sum(p.numel() for p in original.parameters())
    where = jax.devices()[0].device_kind if on_gpu else f"CPU, {arguments.threads} threads"
    dtype = "bfloat16, the original by autocast" if on_gpu else "float32"
    print(f"torch {torch.__version__}, jax {jax.__version__}; {where}; {dtype}; {arguments.repeats} turns, ms; "
          f"max |logits - logits| {np.abs(theirs - ours).max():.1e}", end="")  # fmt: skip
    if arguments.halting:
        used = float(np.asarray(decode_ours(1, NEW).loops).mean())
        print(f"; of {loops} loops ours ran {used:.1f} for a decoded token, the original all", end="")
    print("\n", flush=True)

    def pair(theirs: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        return {"original": theirs, "ours": ours}

    def decoding(rows: int, new: int) -> dict[str, Callable[[], Any]]:
        return pair(lambda: decode_theirs(rows, new), lambda: decode_ours(rows, new))

    policy = "halting" if arguments.halting else f"{loops} loops"
    head(
        f"{parameters / 1e6:,.1f} M parameters, {model_config.n_experts} experts, {policy}", "original", "ours", "ratio"
    )
    pairs = {
        f"forward, {rows} x {LENGTH} tokens": pair(forward_theirs, forward_ours),
        f"prefill of {PROMPT}, one new token": decoding(1, 1),
        f"prefill of {PROMPT} and {NEW} new tokens, batch 1": decoding(1, NEW),
        "the same, batch 8": decoding(8, NEW),
        f"train step, {rows} x {LENGTH} tokens": pair(train_theirs, train_ours),
    }
    found = compared(pairs, arguments.repeats)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"config": arguments.config, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
