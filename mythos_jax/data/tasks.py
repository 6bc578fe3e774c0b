"""Reasoning tasks as training data: examples generated on the fly, each a pure function of (seed, index).

Global batch s of a run holds examples s B … s B + B - 1 of its seed: the order is a pure function of (seed, step), and
each process generates only its own rows. A hash of a problem's tokens decides whether it is held out (a fraction
`data.held_out_fraction` of all problems is), so no training example is ever an evaluation example. If the fraction is
0, the two are drawn independently and may coincide.

The problems are the same in whatever tokens they are written: their own, or those of a tokenizer (data.task.tokens).
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mythos_jax.config import Config, DataConfig
from mythos_jax.data.batch import Batch, RowSelection, row_numbers
from mythos_jax.data.manifest import SPLITS
from mythos_jax.data.problem import PADDING, Problem, ProblemRows, RowRandom, content_hash, fold_in, unit_interval
from mythos_jax.data.problems import PROBLEMS
from mythos_jax.data.tokenizer import Tokenizer, load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.typed import check_field, to_dict

VERSION = 1  # of the examples: increased whenever the same seed and index come to mean another problem
_REVISIONS = {"boolean": 1}  # since then has answers in training that it had not
EVALUATION_ROWS = 1024  # default number of examples per difficulty
MAX_ATTEMPTS = 10_000  # consecutive rejected draws before giving up


class TaskData:
    """The data of a run on a task (see `open.Data`).

    difficulties: those evaluated at. tokenizer: whose tokens the rows consist of; None: the problem's own.

    Raises ConfigError: rows longer than data.seq_len, more tokens than model.vocab_size, no problems of a difficulty, a
    symbol that is not one token of the tokenizer.
    """

    def __init__(self, config: Config):
        self.data = config.data
        self.problem = open_problem(config.data)
        self.difficulties = config.evaluation.difficulties or tuple(sorted(set(config.data.task.difficulty)))
        self.tokenizer = None
        vocabulary, owner = len(self.problem.symbols), f"task {config.data.task.name}"
        if config.data.uses_tokenizer:
            self.tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
            vocabulary, owner = self.tokenizer.vocab_size, f"tokenizer {config.data.tokenizer}"
        self._ids = symbol_ids(config.data, self.problem, self.tokenizer)
        allowed = f"at least {vocabulary}, the vocabulary of {owner}"
        check_field(config.model.vocab_size >= vocabulary, "model.vocab_size", config.model.vocab_size, allowed)
        for difficulty in (*config.data.task.difficulty, *self.difficulties):
            check_width(self.data, self.problem, difficulty)
        for difficulty in self.difficulties:  # fail now if there are no such problems, rather than after training
            examples(self.data, self.problem, "held_out", 0, np.zeros(1, int), (difficulty,))
        # Saved in checkpoints: the keys must not change.
        self.identity = {
            "task": to_dict(config.data.task),
            "seq_len": config.data.seq_len,
            "held_out": config.data.held_out_fraction,
            "version": VERSION + _REVISIONS.get(config.data.task.name, 0),
        }

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens of a batch say, as symbols of the problem."""
        symbols = {int(number): symbol for number, symbol in zip(self._ids, self.problem.symbols, strict=True)}
        return " ".join(symbols[int(token)] for token in tokens)

    def save_text(self, directory: str | Path) -> None:
        """Writes the tokenizer whose tokens the problems are written in, if there is one."""
        if self.tokenizer is not None:
            self.tokenizer.save(directory)

    def train_batches(
        self, *, batch_size: int, seed: int, start_step: int = 0, rows: RowSelection = None
    ) -> Iterator[Batch]:
        """The endless batches of a run; arguments as in `pipeline.train_batches`."""
        from mythos_jax.data.pipeline import prefetched  # here, because importing Grain takes long

        batches = _TaskBatches(self.data, self.problem, self._ids, seed, batch_size, row_numbers(rows, batch_size))
        return prefetched(batches, start_step)

    def held_out_batches(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """Held-out examples of every difficulty, `max_rows` of each."""
        for difficulty in self.difficulties:
            yield from self.eval_batches(difficulty, batch_size=batch_size, max_rows=max_rows)

    def eval_batches(self, difficulty: int, *, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
        """Held-out examples of one difficulty, the same for every run. The mask covers the answers of the exact match.

        max_rows: number of examples; 0: EVALUATION_ROWS. The last batch is filled up with rows of mask False.
        """
        check_width(self.data, self.problem, difficulty)
        count = max_rows or EVALUATION_ROWS
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            batch = examples(self.data, self.problem, "held_out", 0, np.arange(start, start + size), (difficulty,))
            padded = {name: np.pad(array, ((0, batch_size - size), (0, 0))) for name, array in batch.items()}
            yield spelled(padded, self._ids)


def open_problem(data: DataConfig) -> Problem:
    """The problem that a config names."""
    return PROBLEMS[data.task.name](data.task)


def symbol_ids(data: DataConfig, problem: Problem, tokenizer: Tokenizer | None) -> np.ndarray:
    """The token of each symbol of a problem, int32: its own number, or what it is in a tokenizer; there, padding is the
    end of a document.

    Raises ConfigError: a symbol that is not one token of the tokenizer, or two that are the same one.
    """
    symbols = problem.symbols
    if tokenizer is None:
        return np.arange(len(symbols), dtype=np.int32)
    spellings = tokenizer.encode_batch(symbols[1:])
    for symbol, ids in zip(symbols[1:], spellings, strict=True):
        allowed = f"a tokenizer in which {symbol!r} of task {data.task.name} is one token, not {len(ids)}"
        check_field(len(ids) == 1, "data.tokenizer", data.tokenizer, allowed)
    numbers = np.array([tokenizer.end_of_document, *(ids[0] for ids in spellings)], np.int32)
    allowed = f"a tokenizer in which the symbols of task {data.task.name} are different tokens"
    check_field(len(np.unique(numbers)) == len(numbers), "data.tokenizer", data.tokenizer, allowed)
    return numbers


def spelled(batch: Batch, ids: np.ndarray) -> Batch:
    """A batch of `examples` with the token `ids[i]` for symbol i."""
    return {**batch, "tokens": ids[batch["tokens"]], "targets": ids[batch["targets"]]}


def check_width(data: DataConfig, problem: Problem, difficulty: int) -> None:
    """Raises ConfigError if rows of this difficulty are longer than data.seq_len."""
    width = problem.width(difficulty)
    allowed = f"at least {width}, the tokens of {data.task.name} at difficulty {difficulty}"
    check_field(width <= data.seq_len, "data.seq_len", data.seq_len, allowed)


def examples(
    data: DataConfig, problem: Problem, split: str, seed: int, indices: np.ndarray, difficulties: Sequence[int]
) -> Batch:
    """n examples by number: tokens and targets int32 [n, T], mask bool [n, T], where T is data.seq_len.

    In the split "train" the mask covers all answers, in "held_out" those of the exact match. The difficulty of each
    example is drawn from `difficulties`. Raises ConfigError if there appear to be no such problems.
    """
    n, T = len(indices), data.seq_len
    batch = {
        "tokens": np.full((n, T), PADDING, np.int32),
        "targets": np.full((n, T), PADDING, np.int32),
        "mask": np.zeros((n, T), bool),
    }
    keys = fold_in(fold_in(fold_in(VERSION, seed), SPLITS.index(split)), indices)
    difficulty_of_row = np.asarray(difficulties)[RowRandom(keys).integers(len(difficulties), 1)[:, 0]]
    for difficulty in np.unique(difficulty_of_row):
        (missing,) = np.nonzero(difficulty_of_row == difficulty)  # numbers of the rows that have no problem yet
        missing_keys = fold_in(keys[missing], difficulty)
        width = problem.width(int(difficulty))
        for attempt in range(MAX_ATTEMPTS):
            drawn = problem.make(RowRandom(fold_in(missing_keys, attempt)), int(difficulty))
            accepted = _accepted(data, split, drawn)
            rows = missing[accepted]
            batch["tokens"][rows, :width] = drawn.tokens[accepted]
            batch["targets"][rows, :width] = drawn.targets[accepted]
            mask = drawn.answer_mask if split == "train" else drawn.final_mask
            batch["mask"][rows, :width] = mask[accepted]
            missing, missing_keys = missing[~accepted], missing_keys[~accepted]
            if not len(missing):
                break
        else:
            raise ConfigError(
                f"data.task: {MAX_ATTEMPTS} consecutive draws gave no {split} example of {data.task.name} at "
                f"difficulty {difficulty}; allowed: a lower difficulty, for p_hop a larger data.task.length, or "
                "data.held_out_fraction 0"
            )
    batch["targets"][~batch["mask"]] = PADDING
    return batch


def _accepted(data: DataConfig, split: str, drawn: ProblemRows) -> np.ndarray:
    """Which of the drawn rows are valid problems of the split, bool [n]."""
    if not data.held_out_fraction:
        return drawn.valid
    is_held_out = unit_interval(content_hash(drawn.tokens)) < data.held_out_fraction
    return drawn.valid & (is_held_out == (split == "held_out"))


class _TaskBatches:
    """A Grain source of batches: element s is this process's rows of global batch s."""

    def __init__(
        self, data: DataConfig, problem: Problem, ids: np.ndarray, seed: int, batch_size: int, rows: np.ndarray
    ):
        self._data, self._problem, self._ids = data, problem, ids
        self._seed, self._batch_size, self._rows = seed, batch_size, rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size  # as endless as Grain can count

    def __getitem__(self, step: int) -> Batch:
        indices = step * self._batch_size + self._rows
        difficulties = self._data.task.difficulty
        return spelled(examples(self._data, self._problem, "train", self._seed, indices, difficulties), self._ids)
