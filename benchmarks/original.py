"""The PyTorch original, open-mythos 0.5.0, trained and evaluated on our batches (see depth_extrapolation.py)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_mythos.main import MythosConfig, OpenMythos, RecurrentBlock, loop_index_embedding

from mythos_jax.config import ModelConfig, TrainingConfig
from mythos_jax.data.batch import Batch


class WithoutHalting(RecurrentBlock):
    """The original's loop without ACT: all loops run, and the last state is read out.

    The original has no option for it; users who measured depth removed the gate in this way.
    """

    def forward(
        self,
        h: torch.Tensor,
        e: torch.Tensor,
        freqs_cis: torch.Tensor,
        mask: torch.Tensor | None = None,
        n_loops: int | None = None,
        kv_cache: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        for t in range(n_loops or self.cfg.max_loop_iters):
            x = self.norm(loop_index_embedding(h, t, self.loop_dim) + e)
            y = self.block(x, freqs_cis, mask, kv_cache, f"recurrent_loop_{t}")
            h = self.injection(h, e, y + self.lora(y, t))
        return h


def build(model: ModelConfig, seed: int, *, halting: bool) -> OpenMythos:
    """The original with the sizes of `model` (GQA) and its own initialisation."""
    torch.manual_seed(seed)
    original = OpenMythos(
        MythosConfig(
            vocab_size=model.vocab_size,
            dim=model.dim,
            n_heads=model.n_heads,
            n_kv_heads=model.n_kv_heads,
            max_seq_len=model.max_seq_len,
            max_loop_iters=model.loops,
            prelude_layers=model.prelude_layers,
            coda_layers=model.coda_layers,
            attn_type="gqa",
            n_experts=model.n_experts,
            n_shared_experts=model.n_shared_experts,
            n_experts_per_tok=model.experts_per_token,
            expert_dim=model.expert_dim,
            lora_rank=4,
        )
    )
    if not halting:
        original.recurrent.__class__ = WithoutHalting
    return original


def train(
    model: OpenMythos,
    config: TrainingConfig,
    batches: Iterator[Batch],
    depth: Callable[[int], int],
    report: Callable[[int, float], None],
) -> None:
    """AdamW as in our trainer: same schedule, clipping, and weight decay on matrices only.

    depth: the loops of a step. report: called with each step and its loss.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
    )
    model.train()
    for step, batch in zip(range(config.steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        nats, tokens = summed_loss(model, batch, depth(step))
        loss = nats / tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        report(step, loss.item())


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The cosine schedule of `training/optimizer.schedule`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        first = peak / (warmup + 1)
        return first + (peak - first) * step / warmup
    progress = min((step - warmup) / max(config.steps - warmup, 1), 1)
    final = config.final_learning_rate_fraction
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def evaluate(model: OpenMythos, batches: Sequence[Batch], depths: Iterable[int]) -> dict[int, float]:
    """Nats per token at each depth."""
    model.eval()
    losses = {}
    with torch.no_grad():
        for loops in depths:
            sums = [summed_loss(model, batch, loops) for batch in batches]
            losses[loops] = sum(nats.item() for nats, _ in sums) / sum(tokens for _, tokens in sums)
    return losses


def summed_loss(model: OpenMythos, batch: Batch, loops: int) -> tuple[torch.Tensor, int]:
    """The sum of the cross-entropy (nats) over the tokens where the mask is True, and their number."""
    logits = model(torch.from_numpy(batch["tokens"]).long(), n_loops=loops)
    targets = torch.from_numpy(batch["targets"]).long()
    mask = torch.from_numpy(batch["mask"])
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nats * mask.flatten()).sum(), int(mask.sum())
