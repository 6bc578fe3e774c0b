"""Reasoning tasks as training data: examples made on the fly, each a pure function of (seed, index).

Global batch s of a run holds the examples s B … s B + B - 1 of its seed, so the order is a pure function of
(seed, step) and a process makes its own rows only. Which problems are held out is a property of the problem (a hash
of its tokens, `data.held_out_fraction` of all), so no example of training is ever one of evaluation; with a fraction of
0 the two are drawn apart, but may meet.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from mythos_jax.config import Config, DataConfig
from mythos_jax.data.manifest import SPLITS
from mythos_jax.data.problems import PADDING, PROBLEMS, Draw, Problem, Rows, content_hash, fold, share_of
from mythos_jax.errors import ConfigError
from mythos_jax.typed import check_field, to_dict

Batch = dict[str, np.ndarray]
VERSION = 1  # of the examples: raised when the same seed and index begin to mean another problem
EVALUATION_ROWS = 1024  # per difficulty, where the config does not say
ATTEMPTS = 10_000  # draws that may be refused in a row


class TaskData:
    """What a run on a task trains and is evaluated on.

    identity: plain containers that name the data, for checkpoints. difficulties: to evaluate at.

    Raises ConfigError: rows that do not fit data.seq_len, tokens that do not fit model.vocab_size, no such problems.
    """

    def __init__(self, config: Config):
        self.data = config.data
        self.problem = open_problem(config.data)
        self.difficulties = config.evaluation.difficulties or tuple(sorted(set(config.data.task.difficulty)))
        needed = len(self.problem.symbols)
        allowed = f"at least {needed}, the vocabulary of task {config.data.task.name}"
        check_field(config.model.vocab_size >= needed, "model.vocab_size", config.model.vocab_size, allowed)
        for difficulty in (*config.data.task.difficulty, *self.difficulties):
            check_width(self.data, self.problem, difficulty)
        for difficulty in self.difficulties:  # now, rather than after the training: are there any?
            examples(self.data, self.problem, "held_out", 0, np.zeros(1, int), (difficulty,))
        self.identity = {
            "task": to_dict(config.data.task),
            "seq_len": config.data.seq_len,
            "held_out": config.data.held_out_fraction,
            "version": VERSION,
        }

    def train_batches(
        self, *, batch_size: int, seed: int, start_step: int = 0, rows: slice | Sequence[int] | np.ndarray | None = None
    ) -> Iterator[Batch]:
        """The endless batches of a run from `start_step` on; arguments as in `data.pipeline.train_batches`."""
        from mythos_jax.data.pipeline import prefetched, row_numbers

        source = _TrainBatches(self.data, self.problem, seed, batch_size, row_numbers(rows, batch_size))
        return prefetched(source, start_step)

    def held_out_batches(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """Held-out examples of every difficulty, `max_rows` of each."""
        for difficulty in self.difficulties:
            yield from self.eval_batches(difficulty, batch_size=batch_size, max_rows=max_rows)

    def eval_batches(self, difficulty: int, *, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """Held-out examples of one difficulty, the same for every run; the mask is on the answers that must match.

        max_rows: examples (0: EVALUATION_ROWS). The last batch is filled up with rows of mask False.
        """
        check_width(self.data, self.problem, difficulty)
        count = max_rows or EVALUATION_ROWS
        for start in range(0, count, batch_size):
            real = min(batch_size, count - start)
            batch = examples(self.data, self.problem, "held_out", 0, np.arange(start, start + real), (difficulty,))
            yield {name: np.pad(array, ((0, batch_size - real), (0, 0))) for name, array in batch.items()}


def open_problem(data: DataConfig) -> Problem:
    """The problem that a config names."""
    return PROBLEMS[data.task.name](data.task)


def check_width(data: DataConfig, problem: Problem, difficulty: int) -> None:
    """Raises ConfigError where rows of this difficulty are longer than data.seq_len."""
    width = problem.width(difficulty)
    check_field(
        width <= data.seq_len,
        "data.seq_len",
        data.seq_len,
        f"at least {width}, the tokens of {data.task.name} at difficulty {difficulty}",
    )


def examples(
    data: DataConfig, problem: Problem, split: str, seed: int, indices: np.ndarray, difficulties: Sequence[int]
) -> Batch:
    """Examples by number: tokens, targets int32 [n, T] and mask bool [n, T], T being data.seq_len.

    split: "train" has the mask on all answers, "held_out" on those of the exact match. Each example's difficulty is
    drawn from `difficulties`. Raises ConfigError where there seem to be no such problems.
    """
    n, T = len(indices), data.seq_len
    batch = {name: np.full((n, T), PADDING, np.int32) for name in ("tokens", "targets")} | {
        "mask": np.zeros((n, T), bool)
    }
    keys = fold(fold(fold(VERSION, seed), SPLITS.index(split)), indices)
    chosen = np.asarray(difficulties)[Draw(keys).integers(len(difficulties), 1)[:, 0]]
    for difficulty in np.unique(chosen):
        (places,) = np.nonzero(chosen == difficulty)
        width = problem.width(int(difficulty))
        waiting = fold(keys[places], difficulty)
        for attempt in range(ATTEMPTS):
            rows = problem.make(Draw(fold(waiting, attempt)), int(difficulty))
            good = _wanted(data, split, rows)
            now = places[good]
            batch["tokens"][now, :width] = rows.tokens[good]
            batch["targets"][now, :width] = rows.targets[good]
            batch["mask"][now, :width] = (rows.answers if split == "train" else rows.final)[good]
            places, waiting = places[~good], waiting[~good]
            if not len(places):
                break
        else:
            raise ConfigError(
                f"data.task: {ATTEMPTS} draws in a row were no {split} example of {data.task.name} at difficulty "
                f"{difficulty}; allowed: a lower difficulty, for p_hop a larger data.task.length, or "
                "data.held_out_fraction 0"
            )
    batch["targets"][~batch["mask"]] = PADDING
    return batch


class _TrainBatches:
    """Element s: this process's rows of global batch s."""

    def __init__(self, data: DataConfig, problem: Problem, seed: int, batch_size: int, rows: np.ndarray):
        self._data, self._problem, self._seed, self._batch_size, self._rows = data, problem, seed, batch_size, rows

    def __len__(self) -> int:
        return 2**62 // self._batch_size

    def __getitem__(self, step: int) -> Batch:
        indices = step * self._batch_size + self._rows
        return examples(self._data, self._problem, "train", self._seed, indices, self._data.task.difficulty)


def _wanted(data: DataConfig, split: str, rows: Rows) -> np.ndarray:
    if not data.held_out_fraction:
        return rows.valid
    return rows.valid & ((share_of(content_hash(rows.tokens)) < data.held_out_fraction) == (split == "held_out"))
