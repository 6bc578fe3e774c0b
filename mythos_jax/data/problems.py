"""The reasoning problems: from random numbers to tokens and answers, whole arrays at a time.

A problem generates n rows of one difficulty from `RowRandom`. It knows nothing of batches, splits or seeds (tasks.py).
"""

from collections.abc import Callable

import numpy as np

from mythos_jax.config import TaskConfig
from mythos_jax.data.algebra import Arithmetic, Group
from mythos_jax.data.problem import PADDING, Problem, ProblemRows, RowRandom, select_answers
from mythos_jax.typed import check_field

LETTERS = 26


class PHop:
    """Difficulty p: from the last symbol, go p times to what followed its previous occurrence (arXiv 2502.17416).

    One hop goes from position i to j + 1, where j < i is the last position of the symbol at i; the answer is the symbol
    where p hops end. Row: p times `>`, then `length` symbols. No two neighbouring symbols are equal (a hop could
    otherwise stay where it is); a row is invalid if its hops leave the sequence. With answers "every", every position
    with p hops has an answer.
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.symbols = ("", ">", *(_letter(i) for i in range(config.alphabet)))

    def width(self, difficulty: int) -> int:
        return difficulty + self.config.length

    def make(self, random: RowRandom, difficulty: int) -> ProblemRows:
        alphabet, length, n = self.config.alphabet, self.config.length, len(random.keys)
        steps = 1 + random.integers(alphabet - 1, length)  # never 0: neighbours differ
        symbols = np.cumsum(steps, axis=1) % alphabet
        # hop[:, i] is the position that one hop from i leads to; -1: outside. The last column maps -1 to itself.
        hop = np.full((n, length + 1), -1)
        last_position, rows = np.full((n, alphabet), -1), np.arange(n)
        for i in range(length):
            previous = last_position[rows, symbols[:, i]]
            hop[:, i] = np.where(previous < 0, -1, previous + 1)
            last_position[rows, symbols[:, i]] = i
        positions = np.broadcast_to(np.arange(length), (n, length))
        for _ in range(difficulty):
            positions = np.take_along_axis(hop, positions, axis=1)
        answers = np.where(positions < 0, PADDING, 2 + np.take_along_axis(symbols, positions, axis=1))

        marks = np.ones((n, difficulty), int)
        tokens = np.concatenate([marks, 2 + symbols], axis=1)
        targets = np.concatenate([marks * PADDING, answers], axis=1)
        return select_answers(self.config, tokens, targets, targets != PADDING, valid=positions[:, -1] >= 0)


class Parity:
    """Difficulty n: whether the number of ones among n bits is odd. Row: the bits, with the answer at the last one.

    With answers "every", each bit has an answer: the parity up to there.
    """

    symbols: tuple[str, ...] = ("", "0", "1", "even", "odd")

    def __init__(self, config: TaskConfig):
        self.config = config

    def width(self, difficulty: int) -> int:
        return difficulty

    def make(self, random: RowRandom, difficulty: int) -> ProblemRows:
        bits = random.integers(2, difficulty)
        targets = 3 + np.cumsum(bits, axis=1) % 2
        return select_answers(self.config, 1 + bits, targets, np.ones_like(bits, bool), valid=np.ones(len(bits), bool))


class Addition:
    """Difficulty n: the sum of n numbers of `digits` digits (arXiv 2502.17416). Row: `315+120+045=0480`.

    The numbers and the sum are zero-padded, the sum to the length that n such numbers can need, most significant digit
    first, or with `first_digit: low` least significant digit first: `513+021+540=0840`, where a carry goes to what is
    written next. All digits of the sum are answers, each predicted from the correct ones before it: they are all
    correct exactly if greedy decoding is.
    """

    symbols: tuple[str, ...] = ("", *"0123456789", "+", "=")

    def __init__(self, config: TaskConfig):
        self.config = config

    def width(self, difficulty: int) -> int:
        return (self.config.digits + 1) * difficulty + self._sum_digits(difficulty) - 1

    def make(self, random: RowRandom, difficulty: int) -> ProblemRows:
        n, digits = len(random.keys), self.config.digits
        numbers = random.integers(10, difficulty * digits).reshape(n, difficulty, digits)
        total = (numbers @ 10 ** np.arange(digits)[::-1]).sum(axis=1)
        sum_digits = total[:, None] // 10 ** np.arange(self._sum_digits(difficulty))[::-1] % 10
        if self.config.first_digit == "low":
            numbers, sum_digits = numbers[:, :, ::-1], sum_digits[:, ::-1]
        signs = np.full((n, difficulty, 1), 11)
        signs[:, -1] = 12
        question = np.concatenate([1 + numbers, signs], axis=2).reshape(n, -1)
        stream = np.concatenate([question, 1 + sum_digits], axis=1)
        answer_mask = np.zeros((n, stream.shape[1] - 1), bool)
        answer_mask[:, question.shape[1] - 1 :] = True
        return ProblemRows(stream[:, :-1], stream[:, 1:], answer_mask, answer_mask, np.ones(n, bool))

    def _sum_digits(self, difficulty: int) -> int:
        return len(str(difficulty * (10**self.config.digits - 1)))


class Boolean:
    """Difficulty d: the value of an expression nested d deep. Row: `((T&~(F^T))|F)=`, with the answer at the `=`.

    Built from the inside out: each level combines the expression so far, negated or not, with a constant on either
    side, by and (&), or (|), exclusive or (^). An outer constant may decide & and | alone, so at one level in three the
    search can stop. With answers "every", each `)` has an answer too: the value of what it closes.
    """

    symbols: tuple[str, ...] = ("", "F", "T", "(", ")", "~", "&", "|", "^", "=")

    def __init__(self, config: TaskConfig):
        self.config = config

    def width(self, difficulty: int) -> int:
        return 5 * difficulty + 2

    def make(self, random: RowRandom, difficulty: int) -> ProblemRows:
        n = len(random.keys)
        value = random.integers(2, 1)
        text, answers = 1 + value, np.full((n, 1), PADDING)
        for _ in range(difficulty):
            constant, negated, operation, on_left = (random.integers(k, 1) for k in (2, 2, 3, 2))
            operand = value ^ negated
            value = np.choose(operation, [operand & constant, operand | constant, operand ^ constant])
            # The two forms have equal length: where there is no `~`, they contain padding.
            negation, constant, operation = np.where(negated, 5, PADDING), 1 + constant, 6 + operation
            opening, closing = np.full((n, 1), 3), np.full((n, 1), 4)
            constant_first = np.concatenate([opening, constant, operation, negation, text, closing], axis=1)
            constant_last = np.concatenate([opening, negation, text, operation, constant, closing], axis=1)
            text = np.where(on_left, constant_first, constant_last)
            before = np.where(on_left, np.pad(answers, ((0, 0), (4, 0))), np.pad(answers, ((0, 0), (2, 2))))
            answers = np.concatenate([before, 1 + value], axis=1)
        text = np.concatenate([text, np.full((n, 1), 9)], axis=1)
        answers = np.concatenate([answers, 1 + value], axis=1)
        # A stable sort moves the padding to the end.
        order = np.argsort(text == PADDING, axis=1, kind="stable")
        tokens, targets = np.take_along_axis(text, order, axis=1), np.take_along_axis(answers, order, axis=1)
        last = tokens == 9
        mask = targets != PADDING if self.config.answers == "every" else last
        return ProblemRows(tokens, targets, mask, last, np.ones(n, bool))


class Chain:
    """Difficulty d: what a variable stands for that is d references away from a number. Row: `c2,xc,a1,qa,bx`: b is 2.

    Each of `length` assignments gives a variable a number or what an earlier variable stands for; the answer, at the
    last token, is the last variable's number (variable assignments as in LEGO, arXiv 2206.04301). Before the last
    variable, each of the `alphabet` numbers is given to one variable, and stands behind equally many that refer to each
    other in like ways, at random places and at most d deep. Nothing but the references tells the answer, and guessing
    is right once in `alphabet`. With answers "every", each assignment has an answer at its second token.
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.symbols = ("", ",", *"0123456789"[: config.alphabet], *map(_letter, range(LETTERS)))

    def width(self, difficulty: int) -> int:
        length, numbers = self.config.length, self.config.alphabet
        fits = length % numbers == 1 and length > numbers * difficulty
        allowed = f"1 more than a multiple of {numbers} numbers, and at least {numbers * difficulty + 1}"
        check_field(fits, "data.task.length", length, f"{allowed} for difficulty {difficulty}")
        return 3 * length - 1

    def make(self, random: RowRandom, difficulty: int) -> ProblemRows:
        n, length, numbers = len(random.keys), self.config.length, self.config.alphabet
        names, digits = _shuffled(random, LETTERS)[:, :length], _shuffled(random, numbers)
        # The family of a variable has all that stand for the same number. The last variable is in family 0.
        family = np.concatenate([_shuffled(random, length - 1) % numbers, np.zeros((n, 1), int)], axis=1)
        parents = self._parents(random, family, difficulty)
        values = np.take_along_axis(digits, family, axis=1)
        second = np.where(parents < 0, 2 + values, 2 + numbers + np.take_along_axis(names, parents, axis=1))
        tokens = np.stack([2 + numbers + names, second, np.ones_like(names)], axis=2).reshape(n, -1)[:, :-1]
        targets, every = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[:, 1::3], every[:, 1::3] = 2 + values, True
        return select_answers(self.config, tokens, targets, every, valid=np.ones(n, bool))

    def _parents(self, random: RowRandom, family: np.ndarray, difficulty: int) -> np.ndarray:
        """The place of the variable that each refers to, int [n, length]; -1 for the first of a family."""
        n, length = family.shape
        rows, parents, depths = np.arange(n), np.full((n, length), -1), np.zeros((n, length), int)
        # In each family, a path of `difficulty` variables, drawn at random after the first, refer each to the one
        # before; others refer to any. The last variable follows the path of its family.
        same = family[:, :, None] == family[:, None, :]
        earlier = same & np.tri(length, k=-1, dtype=bool)
        order = np.where(earlier.any(2), _shuffled(random, length) + 1, 0)
        order[:, -1] = length + 1
        on_path = (same & (order[:, None, :] < order[:, :, None])).sum(axis=2) < difficulty
        on_path[:, -1] = True
        newest = np.full((n, self.config.alphabet), -1)  # of each path so far
        for i in range(length):
            count = earlier[:, i].sum(axis=1)
            drawn = random.integers(2**16, 1)[:, 0] * count >> 16
            picked = (np.cumsum(earlier[:, i], axis=1) > drawn[:, None]).argmax(axis=1)
            picked = np.where(depths[rows, picked] == difficulty, parents[rows, picked], picked)
            parent = np.where(count == 0, -1, np.where(on_path[:, i], newest[rows, family[:, i]], picked))
            depths[:, i] = np.where(parent < 0, 0, depths[rows, parent] + 1)
            parents[:, i] = parent
            newest[rows, family[:, i]] = np.where(on_path[:, i], i, newest[rows, family[:, i]])
        return parents


PROBLEMS: dict[str, Callable[[TaskConfig], Problem]] = {
    "p_hop": PHop,
    "addition": Addition,
    "parity": Parity,
    "boolean": Boolean,
    "chain": Chain,
    "group": Group,
    "arithmetic": Arithmetic,
}


def _shuffled(random: RowRandom, count: int) -> np.ndarray:
    """A permutation of 0 … count - 1 for each row, int64 [n, count]."""
    return np.argsort(random.integers(2**16, count), axis=1, kind="stable")


def _letter(index: int) -> str:
    """a … z, then a1 … z1, a2 and so on."""
    lap, letter = divmod(index, 26)
    return chr(97 + letter) + (str(lap) if lap else "")
