"""Mixtures: turns by weight, epochs of each part, order, processes, errors, and a training run."""

import dataclasses
import itertools
import json
from collections import Counter
from unittest.mock import ANY

import numpy as np
import pytest

from mythos_jax.config import Config, DataConfig, load_config, save_config
from mythos_jax.data.open import open_data
from mythos_jax.data.pipeline import MixtureOrder, open_rows, train_batches
from mythos_jax.data.prepare import prepare
from mythos_jax.errors import ConfigError
from tests.data.test_prepare import words_tokenizer

T = 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Three prepared folders, each with its own letters, so that a row shows which folder it is from."""
    root = tmp_path_factory.mktemp("parts")
    random = np.random.default_rng(0)
    for name, first, documents in [("a", 97, 30), ("b", 105, 12), ("c", 113, 15)]:
        with open(root / f"{name}.jsonl", "w") as file:
            for _ in range(documents):
                letters = random.integers(first, first + 8, 14)
                file.write(json.dumps({"text": bytes(letters.tolist()).decode()}) + "\n")
        prepare([str(root / f"{name}.jsonl")], root / name, seq_len=T, held_out_fraction=0.2)
    return [str(root / name) for name in "abc"]


def source_of(row):
    letters = [token for token in row if token < 256]
    return "abc"[(letters[0] - 97) // 8] if letters else None


def take(folders, weights, count, **options):
    """The first batches of a mixture, of 8 rows."""
    mixture = dict(zip(folders, weights, strict=True))
    return list(itertools.islice(train_batches(mixture, batch_size=8, **options), count))


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [3.0, 1.0], [0.5, 0.3, 0.2], [1.0, 2.0**0.5, 3.14159, 1e-3]])
def test_turns_follow_the_weights_and_no_entry_is_skipped(weights):
    order = MixtureOrder(weights)
    turns = [order[i] for i in range(25_000)]
    for part, weight in enumerate(weights):
        assert [entry for p, entry in turns if p == part] == list(range(sum(p == part for p, _ in turns)))
        fraction = weight / sum(weights)
        for n in [10, 100, 1000, 20_000]:  # nearly even turns at any scale
            assert abs(sum(p == part for p, _ in turns[:n]) - fraction * n) <= len(weights) + n / 10_000
    far = 10**15
    assert [order[far + i][0] for i in range(50)] == [order[far % len(order._part) + i][0] for i in range(50)]
    assert order[far][1] > order[far - 10 * len(order._part)][1] > far / 10**6


def test_tiny_weights_are_rejected():
    with pytest.raises(
        ConfigError, match=r"data\.mixture: got weights \[1\.0, 1e-06\], allowed: each at least 1/10000"
    ):
        MixtureOrder([1.0, 1e-6])


def test_rows_come_from_the_parts_by_weight(parts):
    batches = take(parts, [2.0, 1.0, 1.0], 60, seed=5)
    counts = Counter(source_of(row) for batch in batches for row in batch["tokens"])
    assert counts["a"] == pytest.approx(240, abs=6)
    assert counts["b"] == pytest.approx(120, abs=4)
    for batch in batches[:5]:
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            "tokens": ((8, T), "int32"),
            "targets": ((8, T), "int32"),
            "mask": ((8, T), "bool"),
        }
        assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()


def test_each_part_has_epochs_of_its_own(parts):
    """An epoch has every row of the part once, and the order differs between epochs."""
    rows = [tuple(row) for batch in take(parts, [2.0, 1.0, 1.0], 60, seed=5) for row in batch["tokens"]]
    parts_checked = 0
    for name, folder in zip("abc", parts, strict=True):
        source = open_rows(folder, "train")
        part_rows = [row for row in rows if source_of(row) == name]
        expected = sorted(tuple(row) for row in source.read(range(len(source)))["tokens"] if source_of(row))
        n = len(expected)
        epochs = [part_rows[i : i + n] for i in range(0, len(part_rows) - n + 1, n)]
        if n == len(source):  # (a row of end-of-document tokens alone does not show which part it is from)
            assert all(sorted(epoch) == expected for epoch in epochs)
            assert len(set(map(tuple, epochs))) == len(epochs) > 1
            parts_checked += 1
    assert parts_checked


def test_the_order_depends_on_seed_and_step_alone(parts):
    weights = [2.0, 1.0, 1.0]
    batches = take(parts, weights, 60, seed=5)
    assert_equal(take(parts, weights, 19, seed=5, start_step=41), batches[41:])
    for rows in [slice(0, 3), [3, 5], np.array([1, 4, 6, 7])]:
        local = take(parts, weights, 60, seed=5, rows=rows)
        assert_equal(local, [{name: array[rows] for name, array in batch.items()} for batch in batches])
    other_seed = take(parts, weights, 60, seed=6)
    assert not any(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(batches, other_seed, strict=True))


def test_a_config_with_a_mixture(parts, tmp_path):
    a, b, c = parts
    config = Config(data=DataConfig(mixture={a: 2, b: 1.5}, seq_len=T))
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    data = open_data(config)
    assert [weight for _, weight in data.identity["mixture"]] == [2, 1.5]
    json.dumps(data.identity)
    first = next(data.train_batches(batch_size=8, seed=0))
    assert_equal([first], take([a, b], [2, 1.5], 1, seed=0))
    for other in [{a: 1, b: 1.5}, {b: 1.5, a: 2}, {a: 2, c: 1.5}, {a: 2}]:
        assert open_data(Config(data=DataConfig(mixture=other, seq_len=T))).identity != data.identity


def test_parts_that_do_not_fit_are_rejected(parts, tmp_path):
    a = parts[0]
    (tmp_path / "text.txt").write_text("a b w3 " * 20)
    words = words_tokenizer(tmp_path / "w.json")
    prepare([str(tmp_path / "text.txt")], tmp_path / "words", tokenizer=words, seq_len=T, held_out_fraction=0.0)
    prepare([str(tmp_path / "text.txt")], tmp_path / "longer", seq_len=T + 1, held_out_fraction=0.0)

    for name, message in [
        ("words", r"data\.tokenizer: got bytes .*, allowed: w\.json .*words was prepared"),
        ("longer", r"data\.seq_len: got 6, allowed: 7, with which .*longer was prepared"),
        ("none", r"data\.mixture: nothing prepared at .*none"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_data(Config(data=DataConfig(mixture={a: 1.0, str(tmp_path / name): 1.0}, seq_len=T)))
    for fields, message in [
        ({"mixture": {a: 0.0}}, r"data\.mixture .*a: got 0\.0, allowed: a number > 0"),
        ({"mixture": {a: 1.0}, "path": a}, r"data\.path: got .*, allowed: nothing, with data\.mixture"),
        ({"mixture": {a: 1.0}, "sources": ("stdlib",)}, r"data\.sources: got .*, allowed: nothing, with data\.mixture"),
        ({"mixture": {a: "x"}}, r"data\.mixture: got .*, allowed: a mapping from text to a number"),
    ]:
        with pytest.raises(ConfigError, match=message):
            DataConfig(seq_len=T, **fields)


def test_training_on_a_mixture(parts, tmp_path):
    from mythos_jax.evaluation.evaluate import evaluate_model
    from mythos_jax.runs.load import load_model
    from mythos_jax.training.train import train
    from tests.tiny import TRAINED

    a, b, _ = parts
    config = Config(model=TRAINED, data=DataConfig(mixture={a: 2, b: 1}, seq_len=T, document_mask=True))
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, steps=3, batch_size=8, checkpoint_every=2, evaluate_every=3),
        evaluation=dataclasses.replace(config.evaluation, batch_size=8),
    )
    train(config, tmp_path / "run", progress=False)
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture={a: 1, b: 1}))
    with pytest.raises(ConfigError, match=r"cannot resume.*data\.mixture was \[\["):
        train(changed, tmp_path / "run", progress=False)
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=False))
    with pytest.raises(ConfigError, match=r"cannot resume.*data\.document_mask was True"):
        train(changed, tmp_path / "run", progress=False)
    loaded = load_model(tmp_path / "run")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (trained,) = evaluate_model(loaded, loops=[TRAINED.loops], progress=False).results
    assert logged[-1] == {"step": 3, "time": ANY, "held_out_loss": pytest.approx(trained.loss, abs=1e-5)}
    (mixture,) = evaluate_model(loaded, loops=[1], progress=False).results
    by_part = [evaluate_model(loaded, data=part, loops=[1], progress=False).results[0] for part in (a, b)]
    assert mixture.n == sum(result.n for result in by_part) > by_part[0].n
    mean = sum(result.loss * result.n for result in by_part) / mixture.n
    assert mixture.loss == pytest.approx(mean, abs=1e-5)
