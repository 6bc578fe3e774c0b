"""Problems that need depth: products in a group that is not commutative, and nested arithmetic with a remainder."""

import itertools
import string
from functools import cache

import numpy as np

from mythos_jax.config import TaskConfig
from mythos_jax.data.problem import PADDING, ProblemRows, RowRandom, select_answers

ELEMENTS = string.ascii_letters + string.digits  # the names of a group's elements
# The first two elements of each group, which generate it, as what the places 0, 1, … are sent to.
GENERATORS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "S3": ((1, 0, 2), (1, 2, 0)),
    "S4": ((1, 2, 3, 0), (1, 2, 0, 3)),
    "A5": ((1, 2, 3, 4, 0), (1, 2, 0, 3, 4)),
}


@cache
def group_elements(name: str) -> tuple[tuple[int, ...], ...]:
    """The elements of a group as permutations: the two generators, then the others in lexicographic order."""
    things = len(GENERATORS[name][0])
    pairs = list(itertools.combinations(range(things), 2))
    everything = itertools.permutations(range(things))
    members = [p for p in everything if name[0] == "S" or sum(p[i] > p[j] for i, j in pairs) % 2 == 0]
    return (*GENERATORS[name], *(p for p in members if p not in GENERATORS[name]))


@cache
def multiplication_table(name: str) -> np.ndarray:
    """The number of the product a b, int [elements, elements]: b acts first, that is (a b)(i) = a(b(i))."""
    elements = group_elements(name)
    numbers = {element: number for number, element in enumerate(elements)}
    return np.array([[numbers[tuple(a[place] for place in b)] for b in elements] for a in elements])


class Group:
    """Difficulty n: the product of n elements of a group (arXiv 2404.08819, 2607.20594). Row: `>acbb`,
    with the answer at the last factor.

    The factors are drawn from the first `alphabet` elements, of which the first two generate the group. The products
    are any of its elements, which are named a, b, c, … With answers "every", each factor has an answer: the product up
    to there. In a group that cannot be solved (A5) no fixed number of layers computes products of any length.
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.table = multiplication_table(config.group)
        self.symbols = ("", ">", *ELEMENTS[: len(self.table)])

    def width(self, difficulty: int) -> int:
        return 1 + difficulty

    def make(self, random: RowRandom, difficulty: int) -> ProblemRows:
        factors = random.integers(self.config.alphabet, difficulty)
        products = factors.copy()
        for i in range(1, difficulty):
            products[:, i] = self.table[products[:, i - 1], factors[:, i]]
        start = np.ones((len(factors), 1), int)  # without it, the product of two factors is the hardest to learn
        tokens = np.concatenate([start, 2 + factors], axis=1)
        targets = np.concatenate([start * PADDING, 2 + products], axis=1)
        return select_answers(self.config, tokens, targets, targets != PADDING, np.ones(len(factors), bool))


class Arithmetic:
    """Difficulty n: the value of n nested operations modulo `alphabet` (Mano, arXiv 2510.25741). Row: `+*3-752=`,
    in prefix notation, with the answer at the `=`.

    The operations are +, - and *, each of two expressions; all shapes of n operations are equally likely. An answer is
    0 more often than another number, because products with 0 are 0. With answers "every", each number that ends an
    operation has an answer: the value of the largest expression that ends there.
    """

    def __init__(self, config: TaskConfig):
        self.config = config
        self.symbols = ("", "=", "+", "-", "*", *map(str, range(config.alphabet)))

    def width(self, difficulty: int) -> int:
        return 2 * difficulty + 2

    def make(self, random: RowRandom, difficulty: int) -> ProblemRows:
        n, modulus = len(random.keys), self.config.alphabet
        is_operation = _prefix_shapes(random, n, difficulty)
        shape = is_operation.shape[1]
        operations, numbers = random.integers(3, shape), random.integers(modulus, shape)
        values, ends = _evaluate(is_operation, operations, numbers, modulus)
        tokens = np.where(is_operation, 2 + operations, 5 + numbers)
        # From the right, so that of the expressions that end at a place, the largest is written last.
        targets, answered = np.zeros((n, shape + 1), int), np.zeros((n, shape + 1), bool)
        rows = np.arange(n)
        for i in reversed(range(shape)):
            there = is_operation[:, i]
            targets[rows[there], ends[there, i]] = 5 + values[there, i]
            answered[rows[there], ends[there, i]] = True
        targets[:, -1], answered[:, -1] = 5 + values[:, 0], True
        tokens = np.concatenate([tokens, np.ones((n, 1), int)], axis=1)
        return select_answers(self.config, tokens, np.where(answered, targets, PADDING), answered, np.ones(n, bool))


def _prefix_shapes(random: RowRandom, n: int, operations: int) -> np.ndarray:
    """Which tokens of an expression in prefix notation are operations, bool [n, 2 operations + 1], uniformly drawn.

    There are w(s, o) = s (2 o + s - 1)! / o! (o + s)! ways to write s more expressions with o operations in them. In
    w(s + 1, o - 1) of them an operation is next, which is a fraction o (s + 1) / s (2 o + s - 1).
    """
    draws = random.integers(2**16, 2 * operations + 1)
    s, o = np.ones(n, int), np.full(n, operations)
    shapes = np.zeros(draws.shape, bool)
    for i in range(2 * operations + 1):
        shapes[:, i] = draws[:, i] * s * (2 * o + s - 1) < 2**16 * o * (s + 1)
        s, o = s + np.where(shapes[:, i], 1, -1), o - shapes[:, i]
    return shapes


def _evaluate(
    is_operation: np.ndarray, operations: np.ndarray, numbers: np.ndarray, modulus: int
) -> tuple[np.ndarray, np.ndarray]:
    """The value of the expression that begins at each token, and the place of its last token, both int [n, tokens]."""
    n, shape = is_operation.shape
    rows, values, ends = np.arange(n), numbers.copy(), np.broadcast_to(np.arange(shape), (n, shape)).copy()
    for i in reversed(range(shape - 1)):
        left = np.full(n, i + 1)
        right = np.minimum(ends[:, i + 1] + 1, shape - 1)  # outside the row only where i is a number
        a, b = values[rows, left], values[rows, right]
        value = np.choose(operations[:, i], [a + b, a - b, a * b]) % modulus
        values[:, i] = np.where(is_operation[:, i], value, values[:, i])
        ends[:, i] = np.where(is_operation[:, i], ends[rows, right], ends[:, i])
    return values, ends
