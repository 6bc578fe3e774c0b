"""Fine-tuning on conversations: packed rows are their conversations' losses, and training on them teaches answers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mythos_jax.config import Config, DataConfig, EvaluationConfig, TrainingConfig
from mythos_jax.data.rows import TokenRows
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.model.likelihood import token_loss
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import load_model
from mythos_jax.runs.records import read_log
from mythos_jax.training.train import train
from tests.chats import dialogue, prepare, run, samples, write_chats, write_model
from tests.tiny import GQA_LAST

MODEL = dataclasses.replace(GQA_LAST, max_seq_len=128, loops=2, coda_layers=0, lora_rank=0, loop_embedding=False)
ANSWERS = ("left", "right", "up", "down")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tokenizer and a chat template."""
    return write_model(tmp_path_factory.mktemp("model"))


def questions(n):
    """The answer follows from the question, which is new in each."""
    rng = np.random.default_rng(0)
    return [dialogue(f"{ANSWERS[k]} {rng.integers(10**6)}?", ANSWERS[k]) for k in rng.integers(0, 4, n)]


def test_a_packed_row_is_the_sum_of_its_conversations(model, tmp_path):
    """Whatever stands before a conversation in its row."""
    folder = prepare(tmp_path, questions(9), model=model, seq_len=120)
    config = dataclasses.replace(MODEL, vocab_size=load_tokenizer(model).vocab_size)
    made = Mythos(config)
    variables = jax.jit(made.init)({"params": jax.random.key(0), "state": jax.random.key(0)}, np.zeros((1, 1), int))
    loss_of = jax.jit(lambda batch: token_loss(made, variables, batch)[0] * batch["mask"])
    rows = TokenRows(folder, "train")
    packed = rows.read(range(len(rows)))
    assert packed["segment_ids"].max() > 1
    alone = {name: np.zeros_like(array[:1]) for name, array in packed.items()}
    total = 0.0
    for ids, weights in samples(folder):
        n = len(ids) - 1
        batch = {name: array.copy() for name, array in alone.items()}
        batch["tokens"][0, :n], batch["targets"][0, :n] = ids[:-1], ids[1:]
        batch["mask"][0, :n], batch["segment_ids"][0, :n] = weights[1:], 1
        total += float(loss_of(batch).sum())
    np.testing.assert_allclose(float(loss_of(packed).sum()), total, rtol=1e-5)


def test_fifty_steps_lower_the_loss_of_held_out_answers(model, tmp_path, capsys):
    """From the sources of a config; the run then answers in the same way, and says how with its own files."""
    source = write_chats(tmp_path / "chats.jsonl", questions(120))
    config = Config(
        model=dataclasses.replace(MODEL, vocab_size=load_tokenizer(model).vocab_size),
        training=TrainingConfig(
            batch_size=16, steps=50, learning_rate=1e-2, warmup_steps=5, evaluate_every=25, checkpoint_every=50
        ),
        data=DataConfig(
            chat=True,
            sources=(str(source),),
            path=str(tmp_path / "rows"),
            tokenizer=str(model),
            seq_len=64,
            held_out_fraction=0.2,
        ),
        evaluation=EvaluationConfig(batch_size=16, loops=(2,)),
    )
    train(config, tmp_path / "run", progress=False)
    log = [record for record, _ in read_log(tmp_path / "run" / "metrics.jsonl")[0]]
    losses = [record["held_out_loss"] for record in log if "held_out_loss" in record]
    assert losses[1] < losses[0] < log[0]["loss"] / 4
    # The command counts the same tokens, and the bytes of what they say.
    assert run("eval", tmp_path / "run", "--json") == 0
    measured = json.loads(capsys.readouterr().out)["results"][0]
    assert measured["loss"] == pytest.approx(losses[1], rel=1e-4)
    loaded = load_model(tmp_path / "run")
    assert loaded.conventions.chat_template is not None
    assert loaded.tokenizer.token_id("<|im_end|>") in loaded.conventions.stop_tokens
    assert run("generate", tmp_path / "run", "up 7?", "--chat", "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out.strip() in ANSWERS
