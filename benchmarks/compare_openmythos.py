"""Speed beside the PyTorch original, open-mythos 0.5.0: the same config, the same converted weights, one process.

    .venv-torch/bin/python -m benchmarks.compare_openmythos [--config readme] [--threads 2] [--json FILE]

Train step (forward, backward, clipping, AdamW), forward, prefill, and decoding at batch 1 and 8, float32, by turns;
medians, least and most. All loops run in both (the original's halting bias is set to -20) unless `--halting`. Compile
time and first calls stand apart. `make test-torch` makes the environment.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# The original's own README example, that with more experts, and the 118 M model of its issue 28.
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
}  # fmt: skip
ROWS, LENGTH, PROMPT, NEW = 8, 128, 16, 64


def by_turns(pairs: dict[str, dict[str, Callable[[], Any]]], repeats: int) -> dict[str, Any]:
    """Seconds of each call: first call, and a list over repeats, the two sides taking turns."""
    found: dict[str, Any] = {}
    for name, sides in pairs.items():
        took: dict[str, Any] = {side: [] for side in sides}
        for repeat in range(repeats + 1):
            for side, call in sides.items():
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
                if repeat:
                    took[side].append(seconds)
                else:
                    took[f"first {side}"] = seconds
        found[name] = took
        theirs, ours = (statistics.median(took[side]) for side in ("original", "ours"))
        ranges = ", ".join(f"{1e3 * min(took[s]):.1f} to {1e3 * max(took[s]):.1f}" for s in ("original", "ours"))
        print(f"| {name} | {1e3 * theirs:.1f} | {1e3 * ours:.1f} | {theirs / ours:.2f} | {ranges} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="readme")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--halting", action="store_true", help="halt as configured, instead of running all loops")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # before either starts its threads

    import jax
    import numpy as np
    import torch
    import torch.nn.functional as F
    from open_mythos.main import MythosConfig, OpenMythos

    from mythos_jax.config import Config, DataConfig, TrainingConfig
    from mythos_jax.inference.generate import generate
    from mythos_jax.model.mythos import Mythos
    from mythos_jax.porting.pretrained import load_pretrained
    from mythos_jax.sharding import make_mesh
    from mythos_jax.training.step import init_state, make_train_step

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    original = OpenMythos(MythosConfig(**CONFIGS[arguments.config])).eval()
    if not arguments.halting:
        torch.nn.init.constant_(original.recurrent.act.halt.bias, -20.0)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": original.state_dict(), "cfg": original.cfg}, Path(folder) / "model.pt")
        model_config, variables = load_pretrained(Path(folder) / "model.pt")
    model, loops = Mythos(model_config), model_config.loops
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    torch_tokens = torch.from_numpy(tokens).long()

    forward = jax.jit(lambda variables, tokens: model.apply(variables, tokens).logits)
    with torch.no_grad():
        theirs = original(torch_tokens[:, :-1], n_loops=loops).numpy()
    difference = np.abs(theirs - np.asarray(forward(variables, tokens[:, :-1]))).max()
    parameters = sum(p.numel() for p in original.parameters())
    print(f"{arguments.config}: {parameters:,} parameters, {loops} loops, {arguments.threads} threads, torch "
          f"{torch.__version__}, jax {jax.__version__}; max |logits - logits| {difference:.1e}")  # fmt: skip
    print("| | original, ms | ours, ms | ratio | ranges |\n|---|---|---|---|---|")

    training = TrainingConfig(batch_size=ROWS, learning_rate=1e-5, warmup_steps=1)
    mesh_config = Config(model=model_config, training=training, data=DataConfig(seq_len=LENGTH))
    mesh = make_mesh(mesh_config.mesh, jax.devices()[:1])
    state = init_state(mesh_config, mesh)  # its arrays are given away with each step, so it gets copies
    copies = jax.tree.map(
        lambda ours, fresh: jax.device_put(np.array(ours), fresh.sharding), variables, state.variables
    )
    state = replace(state, variables=copies)
    step = make_train_step(mesh_config, mesh)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((ROWS, LENGTH), bool)}
    optimizer = torch.optim.AdamW(original.parameters(), lr=1e-5, weight_decay=training.weight_decay)

    def train_theirs():
        original.train()
        logits = original(torch_tokens[:, :-1], n_loops=loops)
        loss = F.cross_entropy(logits.flatten(0, 1), torch_tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(original.parameters(), training.gradient_clip)
        optimizer.step()
        original.eval()

    def train_ours():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    @torch.no_grad()
    def forward_theirs(rows=ROWS, length=LENGTH):
        original(torch_tokens[:rows, :length], n_loops=loops)

    def decode_theirs(rows, new):
        with torch.no_grad():
            original.generate(torch_tokens[:rows, :PROMPT], max_new_tokens=new, n_loops=loops, top_k=1)

    def decode_ours(rows, new):
        result = generate(model, variables, tokens[:rows, :PROMPT], max_new_tokens=new, loops=loops)
        jax.block_until_ready(result.tokens)

    def pair(theirs: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        return {"original": theirs, "ours": ours}

    pairs = {
        f"forward, {ROWS} x {LENGTH}": pair(
            forward_theirs, lambda: forward(variables, tokens[:, :-1]).block_until_ready()
        ),
        f"prefill of {PROMPT}, one new token": pair(lambda: decode_theirs(1, 1), lambda: decode_ours(1, 1)),
        f"{PROMPT} + {NEW} tokens, batch 1": pair(lambda: decode_theirs(1, NEW), lambda: decode_ours(1, NEW)),
        f"{PROMPT} + {NEW} tokens, batch 8": pair(lambda: decode_theirs(8, NEW), lambda: decode_ours(8, NEW)),
        f"train step, {ROWS} x {LENGTH}": pair(train_theirs, train_ours),
    }
    found = by_turns(pairs, arguments.repeats)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"config": arguments.config, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
