"""Exact match against logits computed one problem at a time, and a complete run on a task from the command line."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.cli import main
from mythos_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    TaskConfig,
    TrainingConfig,
    load_config,
    save_config,
)
from mythos_jax.data.tasks import TaskData
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.evaluate import evaluate_model
from mythos_jax.evaluation.exact_match import evaluate_problems
from mythos_jax.evaluation.policies import fixed
from mythos_jax.evaluation.results import ReasoningTask
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.runs.load import load_model
from mythos_jax.sharding import make_mesh
from mythos_jax.training.train import train
from tests.tiny import run_traced

CONFIG = Config(
    name="tiny",
    model=ModelConfig(
        vocab_size=16, dim=32, max_seq_len=16, prelude_layers=0, coda_layers=0, loops=2, n_heads=2, n_kv_heads=2
    ),
    training=TrainingConfig(
        steps=60, batch_size=32, learning_rate=1e-2, warmup_steps=5, checkpoint_every=30, log_every=5
    ),
    data=DataConfig(task=TaskConfig("addition", (1,), digits=2), seq_len=8, held_out_fraction=0.2),
    evaluation=EvaluationConfig(batch_size=8, max_rows=20, difficulties=(1, 2), loops=(1, 2, 3)),
    mesh=MeshConfig(),
)


def direct(model, variables, batches, loops):
    """The fraction of problems in which every answer token is the most likely one, nats per answer token, and the
    number of problems."""
    solved, nats = [], []
    for batch in batches:
        logits = np.asarray(run_traced(model.config, variables, batch["tokens"], jnp.int32(loops)).logits, np.float64)
        for row in range(len(logits)):
            positions = np.flatnonzero(batch["mask"][row])
            if not len(positions):
                continue
            targets = batch["targets"][row]
            solved.append(all(int(np.argmax(logits[row, i])) == targets[i] for i in positions))
            nats += [np.log(np.exp(logits[row, i]).sum()) - logits[row, i, targets[i]] for i in positions]
    return np.mean(solved), np.mean(nats), len(solved)


@pytest.mark.parametrize(
    "task", [TaskConfig("addition", (1,), digits=1), TaskConfig("p_hop", (1,), length=6, alphabet=3)]
)
def test_exact_match_equals_that_of_the_logits(task):
    config = Config(model=CONFIG.model, data=DataConfig(task=task, seq_len=8, held_out_fraction=0.5))
    data, model = TaskData(config), Mythos(config.model)
    batches = {d: list(data.eval_batches(d, batch_size=8, max_rows=20)) for d in (1, 2)}
    assert batches[2][-1]["mask"].any(1).sum() == 4  # padded with rows that do not count
    variables = jax.jit(model.init)(jax.random.key(0), batches[1][0]["tokens"])
    for batch in batches[1] + batches[2]:
        # An untrained model answers nothing correctly, so its predictions at one loop become the answers of some rows.
        predicted = np.asarray(run_traced(config.model, variables, batch["tokens"], jnp.int32(1)).logits).argmax(-1)
        batch["targets"][:5] = np.where(batch["mask"], predicted, batch["targets"])[:5]
        for row, which in (2, 0), (3, -1):  # rows with all but the first or the last answer correct
            position = np.flatnonzero(batch["mask"][row])[which]
            batch["targets"][row, position] = (predicted[row, position] + 1) % 16
    mesh = make_mesh(MeshConfig())
    results, _ = evaluate_problems(model, variables, batches, fixed([1, 3]), mesh=mesh, progress=False)
    assert [(r.group, r.setting.loops) for r in results] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for r in results:
        exact, loss, count = direct(model, variables, batches[r.group], r.setting.loops)
        assert r.value == pytest.approx(exact, abs=1e-9)
        assert r.loss == pytest.approx(loss, abs=1e-4)
        assert r.n == count == 20
        assert r.mean_loops == r.setting.loops
        assert r.setting.loops == 3 or 8 / 20 <= r.value < 0.8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("task") / "run"
    train(CONFIG, workdir, progress=False)
    return workdir


def test_a_run_learns_and_its_exact_match_equals_that_of_its_logits(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    loaded = load_model(run)
    evaluation = evaluate_model(loaded, halting=[Halting("latent", 0.4)], progress=False)
    assert evaluation.data == ReasoningTask("addition", [1])
    results = [r for r in evaluation.results if r.setting.halting is None]
    assert len(results) == 6
    data = TaskData(loaded.config)
    variables = jax.device_get(loaded.variables)
    for r in results:
        batches = list(data.eval_batches(r.group, batch_size=8, max_rows=20))
        exact, loss, count = direct(loaded.model, variables, batches, r.setting.loops)
        assert (r.value, r.n) == (pytest.approx(exact, abs=1e-9), count)
        assert r.loss == pytest.approx(loss, abs=1e-4)
    assert len({r.value for r in results}) > 2  # some solved, some not
    (usage,) = evaluation.loop_usage
    halted = [r for r in evaluation.results if r.setting.halting]
    loops = []
    for r in halted:
        for batch in data.eval_batches(r.group, batch_size=8, max_rows=20):
            out = run_traced(CONFIG.model, variables, batch["tokens"], jnp.int32(3), halting=Halting("latent", 0.4))
            loops += [np.mean(row[mask]) for row, mask in zip(out.loops, batch["mask"], strict=True) if mask.any()]
        assert r.mean_loops == pytest.approx(np.mean(loops[-20:]), abs=1e-6)  # answers of a difficulty are equally long
    np.testing.assert_allclose(usage.loops_N, loops, atol=1e-6)
    assert usage.hardness_N.tolist() == [1] * 20 + [2] * 20
    assert [sample.difficulty for sample in usage.samples] == [1, 2]


def test_a_run_resumes_but_not_with_a_changed_task(run, tmp_path):
    import shutil

    from mythos_jax.typed import from_dict, to_dict

    def changed(**task):
        tree = to_dict(CONFIG)
        tree["data"]["task"] |= task
        return from_dict(Config, tree)

    uninterrupted = jax.device_get(load_model(run).variables)
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
    train(CONFIG, tmp_path / "run", progress=False)
    jax.tree.map(np.testing.assert_array_equal, uninterrupted, jax.device_get(load_model(tmp_path / "run").variables))
    for change, message in [
        ({"difficulty": [1, 2]}, r"cannot resume.*data\.task\.difficulty was \[1\], is \[1, 2\]"),
        ({"answers": "last"}, r"cannot resume.*data\.task\.answers was 'every', is 'last'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            train(changed(**change), tmp_path / "run", progress=False)


def test_the_command_line(run, tmp_path, capsys):
    assert main(["eval", str(run), "--loops", "1,2", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [(r["difficulty"], r["loops"]) for r in out["results"]] == [(d, n) for d in (1, 2) for n in (1, 2)]
    assert json.loads((run / "report" / "evaluation.json").read_text()) == out
    assert main(["eval", str(run), "--loops", "1-2", "--halting", "latent:0.4,latent:0.6"]) == 0
    assert "exact match" in capsys.readouterr().out.splitlines()[0]
    page = (run / "report" / "index.html").read_text()
    assert all(text in page for text in ["trained on difficulty 1", "Where the loops go", "rank correlation"])
    assert main(["generate", str(run), "0101"]) == 2
    assert capsys.readouterr().err == (
        f"mythos: {run}: was trained on task addition, not on text; allowed: `mythos eval`\n"
    )
    save_config(CONFIG, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == CONFIG
    assert main(["train", str(tmp_path / "c.yaml"), "--data.task.name", "x", "--workdir", str(tmp_path / "w")]) == 2
    assert "data.task.name: got 'x', allowed: p_hop, addition, parity, boolean" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_run_on_a_task_in_the_tokens_of_a_tokenizer(tmp_path, capsys):
    """Its model reads and writes text, and an answer is right if it is the likeliest of the whole vocabulary."""
    task = TaskConfig("chain", (1,), length=4, alphabet=3, tokens="tokenizer")
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, vocab_size=300),
        training=replace(CONFIG.training, steps=2),
        data=DataConfig(task=task, seq_len=12),
        evaluation=EvaluationConfig(batch_size=8, max_rows=8, loops=(2,)),
    )
    train(config, tmp_path / "run", progress=False)
    loaded = load_model(tmp_path / "run")
    batches = list(TaskData(config).eval_batches(1, batch_size=8, max_rows=8))
    (result,) = evaluate_model(loaded, progress=False).results
    exact, loss, count = direct(loaded.model, jax.device_get(loaded.variables), batches, 2)
    assert (result.value, result.n, result.loss) == (exact, count, pytest.approx(loss, abs=1e-4))
    prompt = bytes(batches[0]["tokens"][0].astype(np.uint8)).decode()
    assert main(["generate", str(tmp_path / "run"), prompt, "--max-new-tokens", "1"]) == 0
    assert prompt in capsys.readouterr().out
