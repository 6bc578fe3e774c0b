"""Scoring and continuing many token sequences of different lengths with few compiled shapes; over the mesh."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mythos_jax.data.placement import place_batch
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.policies import Setting
from mythos_jax.inference.generate import generate
from mythos_jax.model.likelihood import token_loss
from mythos_jax.ops.chunked_argmax import chunked_argmax
from mythos_jax.runs.load import LoadedModel
from mythos_jax.sharding import replicate, use_mesh

SHORTEST = 32  # widths are powers of two from here up to max_seq_len


@dataclass(frozen=True)
class Score:
    """Of the last tokens of a sequence: their summed log-likelihood in nats, whether each was the likeliest one, how
    many they are, and the loops spent on predicting them."""

    log_likelihood: float
    greedy: bool
    tokens: int
    loops: int


@partial(jax.jit, static_argnames="model")
def _scores(model, variables, batch, loops, halting):
    rngs = {"state": jax.random.key(0)}
    nats_BT, out = token_loss(model, variables, batch, loops=loops, halting=halting, rngs=rngs)
    table_VD = nn.unbox(variables["params"]["embedding"])
    right_BT = (chunked_argmax(out.features, table_VD) == batch["targets"]) | ~batch["mask"]
    found = -nats_BT.sum(-1), right_BT.all(-1), batch["mask"].sum(-1), (out.loops * batch["mask"]).sum(-1)
    return replicate(found)


def score(
    loaded: LoadedModel, sequences: Sequence[tuple[Sequence[int], int]], setting: Setting, *, progress: bool = True
) -> list[Score]:
    """The likelihood of the last `n` tokens of each sequence, given those before them.

    sequences: (tokens, n) with 1 <= n < len(tokens) <= max_seq_len + 1. Raises ValueError for others.
    """
    most, size = loaded.model.config.max_seq_len, loaded.config.evaluation.batch_size
    for tokens, n in sequences:
        if not 1 <= n < len(tokens) <= most + 1:
            raise ValueError(
                f"sequence: got {len(tokens)} tokens, {n} to score; allowed: 1 <= n < tokens <= {most + 1}"
            )
    found: dict[int, Score] = {}
    lengths = [len(tokens) - 1 for tokens, _ in sequences]
    with use_mesh(loaded.mesh), tqdm(total=len(sequences), desc="score", disable=not progress) as bar:
        for numbers, width in in_batches(lengths, size, most):
            batch = _padded([sequences[i] for i in numbers], size, width)
            placed = place_batch(loaded.mesh, batch)
            each = jax.device_get(
                _scores(loaded.model, loaded.variables, placed, jnp.int32(setting.loops), setting.halting)
            )
            for i, nats, greedy, tokens, loops in zip(numbers, *each, strict=False):  # the last rows are padding
                found[i] = Score(float(nats), bool(greedy), int(tokens), int(loops))
            bar.update(len(numbers))
    return [found[i] for i in range(len(sequences))]


def in_batches(lengths: Sequence[int], size: int, most: int) -> Iterator[tuple[list[int], int]]:
    """Numbers of sequences that go together, at most `size` at a time, and the width of their batch, longest first.

    Widths are powers of two, or `most`: few shapes to compile, and never more than half of a long row is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        width = bucket(lengths[order[0]], most)
        take = [i for i in order[:size] if bucket(lengths[i], most) == width]
        yield take, width
        order = order[len(take) :]


def bucket(length: int, most: int) -> int:
    """The width of the batch that a sequence of this length stands in."""
    return min(most, max(SHORTEST, 1 << (length - 1).bit_length()))


def _padded(sequences: Sequence[tuple[Sequence[int], int]], size: int, width: int) -> dict[str, np.ndarray]:
    """A batch as `token_loss` takes it; what is padding has segment 0 and never loops under halting."""
    tokens, targets = np.zeros((2, size, width), np.int32)
    mask, segments = np.zeros((size, width), bool), np.zeros((size, width), np.int32)
    for row, (sequence, n) in enumerate(sequences):
        length = len(sequence) - 1
        tokens[row, :length], targets[row, :length] = sequence[:-1], sequence[1:]
        mask[row, length - n : length] = True
        segments[row, :length] = 1
    return {"tokens": tokens, "targets": targets, "mask": mask, "segment_ids": segments}


@dataclass(frozen=True)
class Continuation:
    """New tokens, without the stop token that may have ended them; how many were drawn; the loops spent on those."""

    tokens: list[int]
    drawn: int
    loops: int


def extend(
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
    """What the model continues each prompt with. Prompts that leave no room for `max_new_tokens` lose their beginning.

    Request i has seed `seed` + i, whatever batch it is in. Raises ConfigError where no prompt fits at all.
    """
    most, size = loaded.model.config.max_seq_len, loaded.config.evaluation.batch_size
    room = most - max_new_tokens
    if room < 1:
        raise ConfigError(f"generation: got {max_new_tokens} new tokens, allowed: below max_seq_len, {most}")
    prompts = [list(prompt)[-room:] for prompt in prompts]
    found: dict[int, Continuation] = {}
    with use_mesh(loaded.mesh), tqdm(total=len(prompts), desc="generate", disable=not progress) as bar:
        for numbers, width in in_batches([len(prompt) for prompt in prompts], size, room):
            tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
            filled = [*numbers, *numbers[-1:] * (size - len(numbers))]  # with copies, which end when it does
            for row, i in enumerate(filled):
                tokens[row, : len(prompts[i])], lengths[row] = prompts[i], len(prompts[i])
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
                seed=[seed + i for i in filled],
            )
            result = jax.device_get(jax.jit(replicate)(result))
            for row, i in enumerate(numbers):
                drawn = result.tokens[row, : result.lengths[row]].tolist()
                kept = drawn[:-1] if drawn and drawn[-1] in stop_tokens else drawn
                found[i] = Continuation(kept, len(drawn), int(result.loops[row].sum()))
            bar.update(len(numbers))
    return [found[i] for i in range(len(prompts))]
