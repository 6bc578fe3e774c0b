"""Likelihoods and continuations of many token sequences of different lengths, batched over the mesh into few compiled
shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mythos_jax.data.placement import place_batch
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.policies import Setting
from mythos_jax.inference.generate import generate
from mythos_jax.model.halting import Halting
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos, output_table
from mythos_jax.ops.chunked_argmax import chunked_argmax
from mythos_jax.progress import Progress
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import replicate, use_mesh

MIN_WIDTH = 32  # batch widths are powers of two from here up to max_seq_len


@dataclass(frozen=True)
class Likelihood:
    """How the model predicts the last `tokens` tokens of a sequence.

    log_likelihood: their sum, in nats. greedy: whether each of them is the most likely one. loops: spent on
    predicting them, summed.
    """

    log_likelihood: float
    greedy: bool
    tokens: int
    loops: int


@partial(jax.jit, static_argnames="model")
def _score_batch(
    model: Mythos, variables: Any, batch: dict[str, jax.Array], loops: jax.Array, halting: Halting | None
) -> tuple[jax.Array, ...]:
    """The fields of `Likelihood`, each [B]."""
    rngs = {"state": jax.random.key(0)}
    nats_BT, out = token_loss(model, variables, batch, loops=loops, halting=halting, rngs=rngs)
    table_VD = output_table(variables)
    correct_BT = (chunked_argmax(out.features, table_VD) == batch["targets"]) | ~batch["mask"]
    fields = -nats_BT.sum(-1), correct_BT.all(-1), batch["mask"].sum(-1), (out.loops * batch["mask"]).sum(-1)
    return replicate(fields)


def score(
    loaded: LoadedModel, sequences: Sequence[tuple[Sequence[int], int]], setting: Setting, *, progress: bool = True
) -> list[Likelihood]:
    """The likelihood of the last n tokens of each sequence, given those before them.

    sequences: (tokens, n) with 1 <= n < len(tokens) <= max_seq_len + 1. Raises ValueError for others.
    """
    max_len, batch_size = loaded.model.config.max_seq_len, loaded.evaluation_batch
    for tokens, n in sequences:
        if not 1 <= n < len(tokens) <= max_len + 1:
            raise ValueError(
                f"sequence: got {len(tokens)} tokens, {n} to score; allowed: 1 <= n < tokens <= {max_len + 1}"
            )
    likelihoods: dict[int, Likelihood] = {}
    lengths = [len(tokens) - 1 for tokens, _ in sequences]
    with use_mesh(loaded.mesh), Progress(len(sequences), "score", "sequence", show=progress) as bar:
        for indices, width in batches_by_length(lengths, batch_size, max_len):
            batch = _pad([sequences[i] for i in indices], batch_size, width)
            placed = place_batch(loaded.mesh, batch)
            fields = jax.device_get(
                _score_batch(loaded.model, loaded.variables, placed, jnp.int32(setting.loops), setting.halting)
            )
            for i, nats, greedy, n, loops in zip(indices, *fields, strict=False):  # the last rows are padding
                likelihoods[i] = Likelihood(float(nats), bool(greedy), int(n), int(loops))
            bar.update(len(indices))
    return [likelihoods[i] for i in range(len(sequences))]


def batches_by_length(lengths: Sequence[int], batch_size: int, max_width: int) -> Iterator[tuple[list[int], int]]:
    """Indices of sequences that form a batch, at most `batch_size` of them, and the batch's width; longest first.

    Widths are powers of two, or `max_width`: there are few shapes to compile, and at most half of a row longer than
    `MIN_WIDTH` is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        width = padded_width(lengths[order[0]], max_width)
        indices = [i for i in order[:batch_size] if padded_width(lengths[i], max_width) == width]
        yield indices, width
        order = order[len(indices) :]


def padded_width(length: int, max_width: int) -> int:
    """The width of the batch for a sequence of this length."""
    return min(max_width, max(MIN_WIDTH, 1 << (length - 1).bit_length()))


def _pad(sequences: Sequence[tuple[Sequence[int], int]], batch_size: int, width: int) -> dict[str, np.ndarray]:
    """A batch of tokens, targets, mask and segment_ids [batch_size, width], as the loss takes it.

    Padding is segment 0, which no real token attends to and which never loops under halting.
    """
    tokens, targets, segments = np.zeros((3, batch_size, width), np.int32)
    mask = np.zeros((batch_size, width), bool)
    for row, (sequence, n) in enumerate(sequences):
        length = len(sequence) - 1
        tokens[row, :length], targets[row, :length] = sequence[:-1], sequence[1:]
        mask[row, length - n : length] = True
        segments[row, :length] = 1
    return {"tokens": tokens, "targets": targets, "mask": mask, "segment_ids": segments}


@dataclass(frozen=True)
class Continuation:
    """New tokens without the stop token that may have ended them.

    generated: how many were sampled, with the stop token. loops: spent on those, summed. stop: that token.
    """

    tokens: list[int]
    generated: int
    loops: int
    stop: int | None = None


def generate_until(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    setting: Setting,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> list[Continuation]:
    """A continuation of each prompt, up to a stop token. Prompts too long for `max_new_tokens` more tokens are
    truncated on the left.

    Prompt i has seed `seed` + i, whatever batch it is in. Raises ConfigError if no prompt fits at all.
    """
    max_len, batch_size = loaded.model.config.max_seq_len, loaded.evaluation_batch
    max_prompt = max_len - max_new_tokens
    if max_prompt < 1:
        raise ConfigError(f"generation: got {max_new_tokens} new tokens, allowed: below max_seq_len, {max_len}")
    prompts = [list(prompt)[-max_prompt:] for prompt in prompts]
    continuations: dict[int, Continuation] = {}
    with use_mesh(loaded.mesh), Progress(len(prompts), "generate", "prompt", show=progress) as bar:
        for indices, width in batches_by_length([len(prompt) for prompt in prompts], batch_size, max_prompt):
            # Missing rows are filled with copies of the last one: they stop when it does, so they add no steps.
            rows = indices + indices[-1:] * (batch_size - len(indices))
            tokens, lengths = _pad_prompts([prompts[i] for i in rows], width)
            result = generate(
                loaded.model,
                loaded.variables,
                tokens,
                lengths,
                max_new_tokens=max_new_tokens,
                loops=setting.loops,
                halting=setting.halting,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_tokens=stop_tokens,
                seed=[seed + i for i in rows],
            )
            result = jax.device_get(jax.jit(replicate)(result))
            for row, i in enumerate(indices):
                generated = result.tokens[row, : result.lengths[row]].tolist()
                stopped = bool(generated) and generated[-1] in stop_tokens
                continuations[i] = Continuation(
                    generated[:-1] if stopped else generated,
                    len(generated),
                    int(result.loops[row].sum()),
                    generated[-1] if stopped else None,
                )
            bar.update(len(indices))
    return [continuations[i] for i in range(len(prompts))]


def _pad_prompts(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 tokens [B, width], zeros at the end, and lengths [B]."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)
