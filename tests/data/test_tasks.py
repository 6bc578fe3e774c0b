"""Tasks, compared with slow Python that solves the problem as text; and the order of the generated examples."""

import itertools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mythos_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, TaskConfig, load_config
from mythos_jax.config.data import GROUP_SIZES
from mythos_jax.data.open import open_data
from mythos_jax.data.tasks import TaskData, examples, open_problem
from mythos_jax.errors import ConfigError

DATA = {
    "p_hop": DataConfig(task=TaskConfig("p_hop", (1, 2, 5), length=30, alphabet=5), seq_len=40),
    "addition": DataConfig(task=TaskConfig("addition", (1, 2, 7), digits=4), seq_len=40),
    "parity": DataConfig(task=TaskConfig("parity", (14, 21, 40)), seq_len=40),
    "boolean": DataConfig(task=TaskConfig("boolean", (4, 5, 7)), seq_len=40),
    "chain": DataConfig(task=TaskConfig("chain", (1, 2, 4), length=13, alphabet=3), seq_len=40),
    "group": DataConfig(task=TaskConfig("group", (16, 20, 39), group="S4", alphabet=24), seq_len=40),
    "arithmetic": DataConfig(task=TaskConfig("arithmetic", (3, 5, 19), alphabet=7), seq_len=40),
}
IN_BYTES = replace(DATA["chain"].task, tokens="tokenizer")


def make(name, split="train", seed=0, indices=range(200), difficulties=None, **changes):
    data = replace(DATA[name], **changes)
    difficulties = difficulties or data.task.difficulty
    problem = open_problem(data)
    return problem, examples(data, problem, split, seed, np.asarray(indices), difficulties)


def as_text(problem, tokens):
    return "".join(problem.symbols[token] for token in tokens)


def hops_by_definition(text, p):
    """The symbol that p hops from the last symbol of `text` reach, or None."""
    position = len(text) - 1
    for _ in range(p):
        earlier = [i for i in range(position) if text[i] == text[position]]
        if not earlier:
            return None
        position = earlier[-1] + 1
    return text[position]


def slow_p_hop(text, every):
    marks, symbols = re.fullmatch(r"(>+)([a-z]+)", text).groups()
    assert all(a != b for a, b in itertools.pairwise(symbols))
    ends = range(1, len(symbols) + 1) if every else [len(symbols)]
    answers = {len(marks) + end - 1: hops_by_definition(symbols[:end], len(marks)) for end in ends}
    assert answers[len(text) - 1] is not None
    return {position: answer for position, answer in answers.items() if answer is not None}


def slow_parity(text, every):
    answers = {i: ["even", "odd"][text[: i + 1].count("1") % 2] for i in range(len(text))}
    return answers if every else {len(text) - 1: answers[len(text) - 1]}


def slow_addition(text, every, order=slice(None)):
    question, given = re.fullmatch(r"([\d+]+=)(\d*)", text).groups()
    total = str(sum(int(number[order]) for number in question[:-1].split("+")))
    answer = total.zfill(len(given) + 1)[order]  # the last digit is not an input
    assert len(answer) == len(given) + 1
    assert answer.startswith(given)
    return {len(question) - 1 + i: digit for i, digit in enumerate(answer)}


def slow_boolean(text, every):
    def value(expression):
        # As true and false, -1 and 0 work with all bitwise operators, including the complement.
        return "T" if eval(expression.replace("T", "(-1)").replace("F", "0")) else "F"

    answers, openings = {len(text) - 1: value(text[:-1])}, []
    for i, character in enumerate(text) if every else []:
        if character == "(":
            openings.append(i)
        elif character == ")":
            answers[i] = value(text[openings.pop() : i + 1])
    return answers


def slow_chain(text, every):
    numbers = {}
    for name, meaning in (statement for statement in text.split(",")):
        assert name.isalpha()
        assert name not in numbers
        numbers[name] = meaning if meaning.isdigit() else numbers[meaning]
    answers = {3 * i + 1: number for i, number in enumerate(numbers.values())}
    return answers if every else {len(text) - 1: answers[len(text) - 1]}


@cache
def matrices(group):
    """The permutation matrix of each element by its name."""
    symbols = open_problem(DataConfig(task=TaskConfig("group", (1,), group=group))).symbols[2:]
    generators = {
        "S3": ["102", "120"],
        "S4": ["1230", "1203"],
        "A5": ["12340", "12034"],
    }[group]
    things = len(generators[0])
    images = [[int(i) for i in word] for word in generators]
    everything = [list(image) for image in itertools.permutations(range(things))]
    if group == "A5":
        everything = [image for image in everything if np.linalg.det(np.eye(things)[image]) > 0]
    images += [image for image in everything if image not in images]
    # Column i of the matrix of p is the unit vector of p(i).
    return dict(zip(symbols, (np.eye(things, dtype=int)[:, image] for image in images), strict=True))


def slow_group(text, every, group="S4", alphabet=24):
    matrix_of = matrices(group)
    product, answers = np.eye(len(matrix_of["a"]), dtype=int), {}
    assert text[0] == ">"
    for i, name in enumerate(text[1:], 1):
        assert name in list(matrix_of)[:alphabet]
        product = product @ matrix_of[name]
        (answers[i],) = [other for other, matrix in matrix_of.items() if np.array_equal(matrix, product)]
    return answers if every else {len(text) - 1: answers[len(text) - 1]}


def slow_arithmetic(text, every):
    """By Python's own evaluation of the same expression in the usual notation."""
    assert text[-1] == "="
    answers = {len(text) - 1: eval(infix(text, 0)[0]) % 7}
    for start in reversed(range(len(text))) if every else []:
        if text[start] in "+-*":
            written, end = infix(text, start)
            answers[end - 1] = eval(written) % 7  # the largest comes last
    return {position: str(answer) for position, answer in answers.items()}


def infix(text, start):
    """The expression that begins at a place, with parentheses, and the place behind it."""
    if text[start] not in "+-*":
        return text[start], start + 1
    left, middle = infix(text, start + 1)
    right, end = infix(text, middle)
    return f"({left} {text[start]} {right})", end


SLOW = {
    "p_hop": slow_p_hop,
    "addition": slow_addition,
    "parity": slow_parity,
    "boolean": slow_boolean,
    "chain": slow_chain,
    "group": slow_group,
    "arithmetic": slow_arithmetic,
}


@pytest.mark.parametrize("answers", ["every", "last"])
@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("name", DATA)
def test_answers_agree_with_slow_python(name, split, answers):
    problem, batch = make(name, split, task=replace(DATA[name].task, answers=answers))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "tokens": ((200, 40), "int32"),
        "targets": ((200, 40), "int32"),
        "mask": ((200, 40), "bool"),
    }
    lengths, texts = set(), []
    for tokens, targets, mask in zip(*batch.values(), strict=True):
        text = as_text(problem, tokens)
        texts.append(text)
        length = np.count_nonzero(tokens)
        assert not tokens[length:].any()  # padding is at the end only
        lengths.add(length)
        expected = SLOW[name](text, every=answers == "every" and split == "train")
        assert {int(i): problem.symbols[targets[i]] for i in np.flatnonzero(mask)} == expected
        assert not targets[~mask].any()
    assert len(lengths) > 2 or name == "chain"  # the difficulties are mixed
    assert len(set(texts)) > 185


def test_sums_with_the_lowest_digit_first():
    task = replace(DATA["addition"].task, first_digit="low")
    problem, batch = make("addition", task=task)
    for tokens, targets, mask in zip(*batch.values(), strict=True):
        expected = slow_addition(as_text(problem, tokens), True, slice(None, None, -1))
        assert {int(i): problem.symbols[targets[i]] for i in np.flatnonzero(mask)} == expected


@pytest.mark.parametrize("name", DATA)
def test_answers_are_balanced(name):
    """Guessing does not help: the most common answer is little more common than chance."""
    kinds = {"p_hop": 5, "addition": 10, "parity": 2, "boolean": 2, "chain": 3, "group": 24, "arithmetic": 7}[name]
    rows = 400 * kinds
    for difficulty in DATA[name].task.difficulty[1:]:
        _, batch = make(name, "held_out", indices=range(rows), difficulties=(difficulty,))
        last = batch["mask"].shape[1] - 1 - batch["mask"][:, ::-1].argmax(1)
        counts = np.bincount(batch["targets"][np.arange(rows), last])
        zero = open_problem(DATA[name]).symbols.index("0") if name == "arithmetic" else None
        if zero:  # products with a 0 are 0
            assert 400 * 1.2 < counts[zero] < 400 * 1.6
            counts[zero] = 400
        assert counts.max() < 400 * 1.15
        assert np.count_nonzero(counts) == kinds


@pytest.mark.parametrize("name", DATA)
def test_examples_are_a_function_of_seed_and_index(name):
    _, batch = make(name, indices=range(50))
    _, selected = make(name, indices=[41, 3, 17])
    for key in batch:
        np.testing.assert_array_equal(selected[key], batch[key][[41, 3, 17]])
    for other in [make(name, seed=1, indices=range(50))[1], make(name, indices=range(1000, 1050))[1]]:
        assert (other["tokens"] == batch["tokens"]).all(1).mean() < 0.1


def test_examples_are_pinned():
    """Runs are resumed under later versions, which must not change the examples (or must raise tasks.VERSION)."""
    texts = {}
    for name in DATA:
        problem, batch = make(name, indices=[0, 7])
        texts[name] = as_text(problem, batch["tokens"][1])
    assert texts == PINNED


PINNED = {
    "p_hop": ">>cacecdabdedebedabcacbdeadcdbdc",
    "addition": "3643+6020=0966",
    "parity": "011001110101001011011",
    "boolean": "(T^((T&~((T^T)^F))|T))=",
    "chain": "b2,q1,rb,d0,ed,nq,sd,cb,in,tq,ud,hb,lc",
    "group": ">opjuxpkldrcjhrtdxtnl",
    "arithmetic": "+6-6--26*60=",
}


@pytest.mark.parametrize(("group", "alphabet"), [("S3", 3), ("S4", 3), ("A5", 5)])
def test_products_of_few_factors(group, alphabet):
    """The first factors generate the group: long products are all of its elements, equally often."""
    task, size = TaskConfig("group", (32,), group=group, alphabet=alphabet), GROUP_SIZES[group]
    problem, batch = make("group", indices=range(40 * size), task=task)
    assert len(problem.symbols) == 2 + size == 2 + len({matrix.tobytes() for matrix in matrices(group).values()})
    for row in range(20):
        text, answers = as_text(problem, batch["tokens"][row]), batch["targets"][row]
        expected = slow_group(text, True, group, alphabet)
        assert {i: problem.symbols[answer] for i, answer in enumerate(answers[:33]) if i} == expected
    counts = np.bincount(batch["targets"][:, 32], minlength=2 + size)[2:]
    assert counts.min() > 40 * 0.5
    assert counts.max() < 40 * 1.6


def test_every_shape_of_an_expression_is_as_likely():
    problem, batch = make("arithmetic", indices=range(7000), difficulties=(4,))
    shapes = Counter(re.sub(r"\d", "x", re.sub(r"[-+*]", "o", as_text(problem, row))) for row in batch["tokens"])
    assert len(shapes) == 14  # Catalan's number of 4
    assert 500 * 0.85 < min(shapes.values()) <= max(shapes.values()) < 500 * 1.15


@pytest.mark.parametrize("difficulty", [1, 3, 4])
def test_nothing_but_its_references_tells_the_answer_of_a_chain(difficulty):
    problem, batch = make("chain", indices=range(400), difficulties=(difficulty,))
    guesses = {name: 0 for name in ("value before", "first number", "most direct references", "deepest")}
    for tokens in batch["tokens"]:
        meanings = dict(as_text(problem, tokens).split(","))
        *names, last = meanings
        depths, numbers, direct = {}, {}, {}
        for name, meaning in meanings.items():
            depths[name] = 0 if meaning.isdigit() else depths[meaning] + 1
            numbers[name] = meaning if meaning.isdigit() else numbers[meaning]
            if name != last and not meaning.isdigit():
                direct[meaning] = direct.get(meaning, 0) + 1
        assert len(meanings) == 13
        assert depths[last] == max(depths.values()) == difficulty  # also with answers at every position, none is deeper
        assert sorted(filter(str.isdigit, meanings.values())) == ["0", "1", "2"]
        assert sorted(numbers[name] for name in names) == [*"0" * 4, *"1" * 4, *"2" * 4]
        firsts = [name for name in names if meanings[name].isdigit()]
        guesses["value before"] += numbers[names[-1]] == numbers[last]
        guesses["first number"] += numbers[names[0]] == numbers[last]
        guesses["most direct references"] += numbers[max(firsts, key=direct.get)] == numbers[last]
        guesses["deepest"] += numbers[max(names, key=depths.get)] == numbers[last]
    for name, right in guesses.items():
        assert 400 / 3 * 0.75 < right < 400 / 3 * 1.25, name


@pytest.mark.parametrize("name", ["p_hop", "chain"])
@pytest.mark.parametrize("answers", ["every", "last"])
def test_a_task_in_the_tokens_of_a_tokenizer(name, answers):
    """The same problems, as the text that they are; here in bytes."""
    task = replace(DATA[name].task, answers=answers)
    own = TaskData(Config(data=replace(DATA[name], task=task)))
    bytes_ = TaskData(Config(data=replace(DATA[name], task=replace(task, tokens="tokenizer"))))
    assert (own.tokenizer, bytes_.tokenizer.name) == (None, "bytes")
    pairs = zip(own.train_batches(batch_size=8, seed=3), bytes_.train_batches(batch_size=8, seed=3), strict=True)
    pairs = [*itertools.islice(pairs, 2), *zip(*(d.held_out_batches(8, 12) for d in (own, bytes_)), strict=True)]
    assert len(pairs) > 4
    for expected, batch in pairs:
        np.testing.assert_array_equal(batch["mask"], expected["mask"])
        assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
        for row, mask in enumerate(batch["mask"]):
            text = as_text(own.problem, expected["tokens"][row])
            assert bytes(batch["tokens"][row, : len(text)].astype(np.uint8)).decode() == text
            assert (batch["tokens"][row, len(text) :] == bytes_.tokenizer.end_of_document).all()
            wanted = [own.problem.symbols[target] for target in expected["targets"][row][mask]]
            assert [chr(target) for target in batch["targets"][row][mask]] == wanted
            assert (batch["targets"][row][~mask] == bytes_.tokenizer.end_of_document).all()
            assert bytes_.text(batch["tokens"][row]) == own.text(expected["tokens"][row])
    assert own.identity != bytes_.identity


@pytest.mark.parametrize("name", [name for name in DATA if name != "chain"])
def test_training_never_contains_a_held_out_example(name):
    """With so few problems that it otherwise would."""
    small = {
        "p_hop": TaskConfig("p_hop", (1,), length=6, alphabet=3),
        "addition": TaskConfig("addition", (1,), digits=2),
        "parity": TaskConfig("parity", (6,)),
        "boolean": TaskConfig("boolean", (1,)),
        "group": TaskConfig("group", (3,), alphabet=4),
        "arithmetic": TaskConfig("arithmetic", (1,), alphabet=5),
    }[name]
    seen = {}
    for split, seed in [("train", 0), ("train", 1), ("held_out", 0)]:
        problem, batch = make(name, split, seed, range(2000), small.difficulty, task=small, held_out_fraction=0.3)
        seen[split, seed] = {as_text(problem, tokens) for tokens in batch["tokens"]}
    assert seen["train", 0] == seen["train", 1]  # each has all problems of the split
    assert len(seen["train", 0]) > 10
    assert len(seen["held_out", 0]) > 2
    assert not seen["train", 0] & seen["held_out", 0]
    fraction = len(seen["held_out", 0]) / len(seen["held_out", 0] | seen["train", 0])
    assert 0.15 < fraction < 0.45


def test_training_never_contains_a_held_out_chain():
    """Of some 10^6, so that two draws of 10,000 share some."""
    task = TaskConfig("chain", (1,), length=4, alphabet=3)
    train, again, held_out = (
        {as_text(problem, tokens) for tokens in batch["tokens"]}
        for problem, batch in [
            make("chain", split, seed, range(10_000), task=task, held_out_fraction=0.3)
            for split, seed in [("train", 0), ("train", 1), ("held_out", 0)]
        ]
    )
    assert len(train & again) > 10
    assert not (train | again) & held_out


@pytest.mark.parametrize("name", DATA)
def test_the_batches_of_a_run(name):
    data = TaskData(Config(model=ModelConfig(), data=DATA[name]))
    batches = list(itertools.islice(data.train_batches(batch_size=8, seed=3), 6))
    _, expected = make(name, seed=3, indices=range(48))
    later = list(itertools.islice(data.train_batches(batch_size=8, seed=3, start_step=4), 2))
    by_process = [
        list(itertools.islice(data.train_batches(batch_size=8, seed=3, rows=rows), 6))
        for rows in [slice(0, 3), [3, 5], np.array([4, 6, 7])]
    ]
    for key in expected:
        stacked = np.stack([batch[key] for batch in batches])
        np.testing.assert_array_equal(np.concatenate(stacked), expected[key])
        np.testing.assert_array_equal(np.stack([batch[key] for batch in later]), stacked[4:])
        joined = np.stack([np.concatenate([part[key] for part in step]) for step in zip(*by_process, strict=True)])
        np.testing.assert_array_equal(joined, stacked[:, [0, 1, 2, 3, 5, 4, 6, 7]])


def test_evaluation_batches():
    data = TaskData(Config(data=DATA["parity"], evaluation=EvaluationConfig(difficulties=(5, 30))))
    assert data.difficulties == (5, 30)
    batches = list(data.eval_batches(30, batch_size=8, max_rows=19))
    assert [b["mask"].any(1).sum() for b in batches] == [8, 8, 3]
    assert {b[key].shape for b in batches for key in b} == {(8, 40)}
    _, expected = make("parity", "held_out", indices=range(19), difficulties=(30,))
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in batches])[:19], expected["tokens"])
    assert sum(b["mask"].any(1).sum() for b in data.eval_batches(5, batch_size=64)) == 1024


def test_invalid_arguments_are_named(tmp_path):
    def config(**fields):
        file = tmp_path / "c.yaml"
        lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
        file.write_text("data:\n" + lines)
        return load_config(file)

    for task, message in [
        (
            "{name: p_hopp}",
            r"data\.task\.name: got 'p_hopp', allowed: p_hop, addition, parity, boolean, chain, group, arithmetic",
        ),
        ("p_hop", r"data\.task: got 'p_hop', allowed: a mapping with name"),
        ("{name: p_hop}", r"data\.task\.difficulty: got \[\], allowed: a list"),
        ("{name: p_hop, difficulty: 4}", r"data\.task\.difficulty: got 4, allowed: a list of integers"),
        ("{name: p_hop, difficulty: [0]}", r"data\.task\.difficulty: got 0, allowed: integers from 1 to 1000"),
        ("{name: p_hop, hops: 3}", r"data\.task\.hops: unknown key"),
        ("{name: p_hop, difficulty: [1], alphabet: 2}", r"data\.task\.alphabet: got 2"),
        ("{name: p_hop, difficulty: [1], length: 1}", r"data\.task\.length: got 1"),
        ("{name: addition, difficulty: [1], digits: 16}", r"data\.task\.digits: got 16, allowed: an integer from 1"),
        ("{name: addition, difficulty: [1], first_digit: 0}", r"data\.task\.first_digit: got '0', allowed: high, low"),
        ("{name: p_hop, difficulty: [1], answers: all}", r"data\.task\.answers: got 'all', allowed: every, last"),
        ("{name: chain, difficulty: [1], length: 27}", r"data\.task\.length: got 27, allowed: an integer from 2 to 26"),
        (
            "{name: chain, difficulty: [1], length: 8, alphabet: 11}",
            r"data\.task\.alphabet: got 11, allowed: an integer",
        ),
        (
            "{name: group, difficulty: [1], group: S3, alphabet: 7}",
            r"data\.task\.alphabet: got 7, allowed: an integer from 3 to 6 with group S3",
        ),
        ("{name: group, difficulty: [1], group: S5}", r"data\.task\.group: got 'S5', allowed: S3, S4, A5"),
        ("{name: p_hop, difficulty: [1], tokens: text}", r"data\.task\.tokens: got 'text', allowed: own, tokenizer"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config(task=task)
    with pytest.raises(ConfigError, match=r"data\.sources: got .*, allowed: nothing, with data\.task\.name parity"):
        config(task="{name: parity, difficulty: [3]}", sources="[stdlib]")
    with pytest.raises(ConfigError, match=r"evaluation\.difficulties: got 0"):
        EvaluationConfig(difficulties=(0,))
    task = TaskConfig("addition", (2,))
    for wrong, message in [
        (Config(data=DataConfig(task=task, seq_len=10)), r"data\.seq_len: got 10, allowed: at least 11, the tokens of"),
        (
            Config(data=DataConfig(task=task, seq_len=16), evaluation=EvaluationConfig(difficulties=(9,))),
            r"data\.seq_len: got 16, allowed: at least 39, the tokens of addition at difficulty 9",
        ),
        (
            Config(model=ModelConfig(vocab_size=12), data=DataConfig(task=task)),
            r"model\.vocab_size: got 12, allowed: at least 13, the vocabulary of task addition",
        ),
        (
            Config(data=DataConfig(task=TaskConfig("parity", (2,), tokens="tokenizer"))),
            r"data\.tokenizer: got 'bytes', allowed: a tokenizer in which 'even' of task parity is one token, not 4",
        ),
        (
            Config(data=DATA["chain"], evaluation=EvaluationConfig(difficulties=(6,))),
            r"data\.task\.length: got 13, allowed: 1 more than a multiple of 3 numbers, and at least 19 for",
        ),
        (
            Config(model=ModelConfig(vocab_size=257), data=replace(DATA["chain"], task=IN_BYTES)),
            r"model\.vocab_size: got 257, allowed: at least 258, the vocabulary of tokenizer bytes",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_data(wrong)
    with pytest.raises(ConfigError, match=r"data\.task: .* no train example of p_hop at difficulty 9"):
        make("p_hop", task=TaskConfig("p_hop", (9,), length=9), difficulties=(9,), indices=[0])


@pytest.mark.parametrize("name", ["p_hop", "addition", "parity", "boolean", "group", "arithmetic"])
def test_the_bundled_configs(name):
    config = load_config(Path(__file__).parents[2] / "configs" / "tasks" / f"{name}.yaml")
    assert config.data.task.name == name
    data = open_data(config)
    assert max(config.data.task.difficulty) in data.difficulties
    batch = next(data.train_batches(batch_size=config.training.batch_size, seed=0))
    assert batch["mask"].any(1).all()


def test_heavy_libraries_are_imported_late():
    code = "import sys, mythos_jax.data.tasks; print({'grain', 'jax', 'array_record'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
