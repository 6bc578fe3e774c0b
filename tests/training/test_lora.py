"""LoRA fine-tuning: what is trained, saved and loaded, and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mythos_jax.cli import main
from mythos_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    ObjectivesConfig,
    TrainingConfig,
    save_config,
)
from mythos_jax.errors import ConfigError
from mythos_jax.flops import forward_flops, low_rank_sizes, training_flops
from mythos_jax.model.gather import LOW_RANK
from mythos_jax.model.low_rank import scaled, target_paths
from mythos_jax.model.storage import Storage
from mythos_jax.porting.peft import read_adapter
from mythos_jax.porting.peft_config import read_adapter_config
from mythos_jax.porting.pretrained import load_pretrained, save_pretrained
from mythos_jax.porting.reading import FileSource
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.runs.load import load_model
from mythos_jax.sharding import make_mesh
from mythos_jax.training.optimizer import decay_mask, optimizer_groups
from mythos_jax.training.step import abstract_state
from mythos_jax.training.train import train
from tests.survival import assert_same, lines, timeless, with_training
from tests.tiny import GQA, MLA, run, some_tokens, variables

LLAMA = ModelConfig(
    vocab_size=264,
    dim=32,
    max_seq_len=32,
    prelude_layers=0,
    coda_layers=0,
    loops=1,
    n_heads=2,
    n_kv_heads=1,
    hidden_dim=48,
    injection="none",
)
MATRICES = 7  # of its layer
LORA = LoraConfig(rank=3, alpha=9.0, base_dtype="bfloat16")
TRAINED = 3 * (5 * 32 + 16 + 16 + 4 * 32 + 3 * 48)  # rank x (inputs + outputs) of q, k, v, out; gate, up, down
CONFIG = Config(
    name="c",
    model=LLAMA,
    training=TrainingConfig(
        steps=4,
        batch_size=8,
        checkpoint_every=2,
        log_every=1,
        warmup_steps=1,
        learning_rate=0.02,
        ema_decay=0.5,
        grad_accumulation_steps=2,
        evaluate_every=4,
        init_from="base",
        lora=LORA,
    ),
    data=DataConfig(path="rows", sources=("text",), seq_len=16, held_out_fraction=0.2),
    evaluation=EvaluationConfig(batch_size=8, max_rows=16, loops=(1,)),
)


@pytest.fixture(scope="module")
def once(tmp_path_factory, text_file):
    """A folder with text, a base, a config, and a run of it."""
    folder = tmp_path_factory.mktemp("lora") / "there"
    shutil.copytree(text_file, folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        save_pretrained("base", LLAMA, variables(LLAMA), "llama")
        save_config(CONFIG, "c.yaml")
        train(CONFIG, "run", progress=False)
    return folder.rename(folder.with_name("kept"))  # nothing is where it was


@pytest.fixture
def home(once, tmp_path, monkeypatch):
    """A copy of it, the working directory."""
    shutil.copytree(once, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")


def with_lora(**fields):
    return replace(CONFIG, training=replace(CONFIG.training, lora=replace(LORA, **fields)))


def logits(loaded):
    return run(LLAMA, loaded.variables, some_tokens(), loops=1).logits


def test_a_run_trains_low_rank_weights_and_saves_nothing_else(home):
    base = load_model("base").variables["params"]
    rounded = jax.tree.map(lambda x: np.asarray(x if x.ndim < 2 else x.astype("bfloat16"), np.float32), base)
    assert_same(load_model("run").variables["params"], rounded)  # of the base, bit for bit
    log = lines(Path("run"))
    assert log[0]["loss"] > log[-2]["loss"] + 1
    meta = Checkpoints("run/checkpoints", read_only=True)._meta(4)
    assert {name: len(sums) for name, sums in meta["checksums"].items()} == {
        "model": 2 * MATRICES,
        "average": 2 * MATRICES,
        "optimizer": 2 * 2 * MATRICES + 4,  # moments; counts, the running loss, skipped steps
    }
    assert sum(low_rank_sizes(CONFIG).values()) == TRAINED
    arrays = jax.tree.leaves(load_model("run").variables[LOW_RANK])
    assert sum(x.size for x in arrays) == TRAINED
    assert meta["base"]["path"] == "base"


def test_a_run_is_used_unmerged_and_merged(home, capsys):
    unmerged, merged = load_model("run"), load_model("run", merge=True)
    assert set(merged.variables) == {"params", "balance"}
    np.testing.assert_allclose(logits(unmerged), logits(merged), atol=1e-4)
    assert np.abs(logits(unmerged) - logits(load_model("base"))).max() > 0.1
    # As a user does.
    assert main(["convert", "run", "llama", "--to", "llama"]) == 0
    assert "low-rank weights of 7 matrices: added to them, in float32" in capsys.readouterr().out
    np.testing.assert_allclose(logits(load_model("llama")), logits(merged), atol=1e-4)
    save_pretrained("saved", LLAMA, unmerged.variables)
    assert_same(load_pretrained("saved")[1]["params"], merged.variables["params"])
    assert main(["generate", "run", "word", "--max-new-tokens", "3"]) == 0
    assert main(["info", "run"]) == 0
    out = capsys.readouterr().out
    assert f"trained: {TRAINED:,} low-rank weights of rank 3 beside 7 matrices" in out


def test_a_run_becomes_an_adapter(home, capsys):
    """Its low-rank weights, bit for bit, in PEFT's format, beside the same base."""
    assert main(["convert", "run", "adapter", "--to", "peft", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["rank"], report["alpha"], len(report["tensors"])) == (
        "llama",
        3,
        9.0,
        2 * MATRICES,
    )
    fields = json.loads(Path("adapter/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(Path("base").absolute())
    trained = load_model("run")
    source = FileSource("base")
    adapter = read_adapter(Path("adapter"), read_adapter_config(Path("adapter")), source.table, "base")
    assert_same(scaled(adapter.tree(), 3.0), trained.variables[LOW_RANK])
    save_pretrained("rounded", LLAMA, {"params": trained.variables["params"]}, "llama")
    np.testing.assert_allclose(logits(load_model("adapter", base="rounded")), logits(trained), rtol=0, atol=1e-4)
    for words, message in {
        ("base", "out", "--to", "peft"): "--to peft: got base, allowed: a LoRA run, which has low-rank weights",
        ("run", "adapter", "--to", "peft"): "adapter: exists already",
        ("run", "out", "--to", "peft", "--check"): "--check: got True, allowed: none with --to peft",
    }.items():
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err
        assert not Path("out").exists()


def test_an_adapter_beside_low_rank_weights(home, capsys):
    """PEFT has no base with low-rank weights of its own; such a run is refused."""
    assert main(["convert", "run", "adapter", "--to", "peft"]) == 0
    for base, what in (("adapter", "an adapter"), ("run", "a LoRA run")):
        shutil.copytree("run", f"on_{base}")
        file = Path(f"on_{base}/config.yaml")
        file.write_text(file.read_text().replace("init_from: base", f"init_from: {base}"))
        capsys.readouterr()
        assert main(["convert", f"on_{base}", "out", "--to", "peft"]) == 2
        assert capsys.readouterr().err == (
            f"mythos: --to peft: got on_{base}, whose base {base} is {what}; allowed: a run on a whole model (mythos "
            f"convert {base} DIR merges it, before a run starts from it); mythos convert on_{base} DIR writes the "
            "merged model\n"
        )
        assert not Path("out").exists()


def test_a_run_resumes_bit_for_bit(home):
    """From the checkpoint of step 2, as if it had been killed before it saved that of step 4."""
    whole, log = load_model("run").variables, lines(Path("run"))
    shutil.rmtree("run/checkpoints/4")
    train(CONFIG, "run", progress=False)
    assert_same(load_model("run").variables, whole)
    assert timeless(lines(Path("run"))) == timeless(log)


def test_a_finished_run_needs_no_base(home, capsys):
    """Nor its data; a run with steps left needs it."""
    shutil.rmtree("base")
    last = train(CONFIG, "run", progress=False)
    assert last["step"] == 4
    assert capsys.readouterr().err == "run: is trained to step 4 already; nothing is left to do\n"
    with pytest.raises(ConfigError, match=r"cannot resume, .*training\.lora\.rank was 3, is 4"):
        train(with_lora(rank=4), "run", progress=False)
    shutil.rmtree("rows")
    assert train(CONFIG, "run", progress=False) == last
    with pytest.raises(
        ConfigError,
        match=r"^training\.init_from \(--init-from\): base: no such file",
    ):
        train(with_training(CONFIG, steps=5), "run", progress=False)


def test_the_base_has_moved_or_is_another_one(home, capsys):
    shutil.move("base", "moved")
    generate = ["generate", "run", "word", "--max-new-tokens", "3"]
    assert main(generate) == 2
    error = capsys.readouterr().err
    assert error.startswith("mythos: run: the weights that its low-rank weights belong to cannot be loaded (base: ")
    assert error.endswith("allowed: to say where they are now, --base MODEL\n")
    assert main([*generate, "--base", "moved"]) == 0
    save_pretrained("other", LLAMA, variables(LLAMA, seed=1))
    expected = (
        "mythos: run: its low-rank weights do not belong to the weights of other; allowed: those of base when the run "
        "began ({} MODEL says where they are now)\n"
    )
    capsys.readouterr()
    assert main([*generate, "--base", "other"]) == 2
    assert capsys.readouterr().err == expected.format("--base")
    assert main(["train", "c.yaml", "--workdir", "run", "--training.steps", "5", "--init-from", "other"]) == 2
    assert capsys.readouterr().err.endswith(expected.format("--init-from"))


def test_from_another_working_directory_a_base_is_found(home, once, capsys):
    there = once.with_name("there") / "base"
    shutil.move("base", there)
    load_model("run")
    shutil.rmtree(there)
    assert f"training.init_from: base is not here; using {there}, which is where it was" in capsys.readouterr().err


def test_a_base_that_trains_on(home, capsys):
    """A run on a run belongs to the step that it started from."""
    training = replace(CONFIG.training, steps=1, evaluate_every=0, init_from="run", lora=LoraConfig(rank=2))
    config = replace(CONFIG, training=training)
    train(config, "second", progress=False)
    assert "run: this run needs its step 4 as long as it is used" in capsys.readouterr().err
    before = load_model("second").variables
    train(with_training(CONFIG, steps=5), "run", progress=False)
    assert load_model("run").step == 5
    assert_same(load_model("second").variables, before)
    assert train(with_training(config, steps=2), "second", progress=False)["step"] == 2
    shutil.move("base", "moved")
    with pytest.raises(
        ConfigError, match=r"^second: its base run is a LoRA run .*mythos convert run OUT --base"
    ) as error:
        load_model("second")
    assert str(error.value).count("--base MODEL") == 2
    shutil.move("moved", "base")
    shutil.rmtree("run/checkpoints/4")
    with pytest.raises(ConfigError, match=r"run: step 4, which second belongs to, is not there any more \(newest 5\)"):
        load_model("second")


def test_other_settings_are_refused_when_a_run_resumes(home):
    for fields in ({"rank": 4}, {"alpha": 3.0}, {"targets": ("q",)}, {"base_dtype": "float32"}):
        with pytest.raises(ConfigError, match=rf"cannot resume, .*training\.lora\.{next(iter(fields))} was"):
            train(with_lora(**fields), "run", progress=False)


def test_runs_start_from_a_lora_run(home, capsys):
    merged = load_model("run", merge=True).variables
    training = replace(CONFIG.training, steps=1, learning_rate=1e-30, evaluate_every=0, ema_decay=0.0)
    whole = replace(CONFIG, training=replace(training, lora=LoraConfig(), init_from="run", weight_decay=0.0))
    train(whole, "whole", progress=False)
    assert_same(load_model("whole").variables["params"], merged["params"])
    again = replace(CONFIG, training=replace(training, lora=LoraConfig(rank=2, base_dtype="int8"), init_from="run"))
    train(again, "again", progress=False)
    base = Storage(int8=True).store_all(LLAMA, merged)
    rest = {name: tree for name, tree in load_model("again").variables.items() if name != LOW_RANK}
    assert_same(rest, base)
    assert load_model("again").storage == Storage(int8=True)
    narrow = load_model("again", storage=Storage("bfloat16"))
    assert (narrow.storage, {x.dtype.name for x in jax.tree.leaves(narrow.variables)}) == (
        Storage(int8=True),
        {"int8", "float32"},
    )
    assert (
        "again: its base stays int8 beside float32, as the run has it; bfloat16 is not used" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.targets", "[q_proj]"], "training.lora.targets: got 'q_proj', allowed: .*; nearest: attention.q"),
        (
            ["lora.targets", "[norms]"],
            "training.lora.targets: got 'norms', allowed: names of matrices, such as attention.k",
        ),
        (["init_from", ""], "training.init_from: got '', allowed: a model, whose weights training.lora leaves as is"),
        (["frozen", "[q]"], r"training.frozen: got \['q'\], allowed: \[\] with training.lora.rank"),
        (["lora.rank", "0"], "training.lora.alpha: got 9.0, allowed: null without training.lora.rank"),
        (["learning_rate_factors", "{embedding: 2}"], "training.learning_rate_factors embedding: got 2"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_written(home, capsys, words, message):
    name, value = words
    assert main(["train", "c.yaml", "--workdir", "new", f"--training.{name}", value]) == 2
    assert not Path("new").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("model", "objective"),
    [({"exit_gate": True}, {"exit_loss": "expected"}), ({"readout": "act"}, {"ponder_cost": 0.1})],
)
def test_objectives_of_what_has_no_low_rank_weights(model, objective):
    """They would change the model, and never the unit that they are there for."""
    training = replace(CONFIG.training, objectives=ObjectivesConfig(**objective))
    message = rf"objectives\.{next(iter(objective))}: got .*, allowed: .* with training\.lora\.rank"
    with pytest.raises(ConfigError, match=message):
        Config(model=replace(LLAMA, **model), training=training, data=CONFIG.data)


def test_default_targets_are_all_matrices_of_attention_and_feed_forward():
    names = {path.rsplit(".", 2)[1] for path in target_paths(LLAMA, LORA)}
    assert names == {"q", "k", "v", "out", "gate", "up", "down"}
    names = {path.split(".", 3)[-1] for path in target_paths(GQA, LORA) if path.startswith("recurrence.cell.layer_0")}
    assert names == {
        *(f"attention.{name}.kernel" for name in ("q", "k", "v", "out")),
        *(f"moe.shared_0.{name}.kernel" for name in ("gate", "up", "down")),
    }
    only = target_paths(MLA, replace(LORA, targets=("kv_up", "coda")))
    assert {path.split(".")[0] for path in only if "kv_up" not in path} == {"coda_0"}


def test_low_rank_weights_are_matrices_to_the_optimizer():
    """Both factors decay, although `b` is also the name of an injection's diagonal, and Muon updates both."""
    low_rank = abstract_state(replace(CONFIG, model=MLA), make_mesh(CONFIG.mesh)).variables[LOW_RANK]
    assert set(flatten_dict(decay_mask(low_rank), sep=".").values()) == {True}
    assert set(flatten_dict(optimizer_groups(low_rank), sep=".").values()) == {"muon"}


def test_flops_without_gradients_of_frozen_matrices():
    """A third of the matrices' FLOPs is left out, none of the attention's."""
    tokens = CONFIG.training.batch_size * CONFIG.data.seq_len
    whole = training_flops(replace(CONFIG, training=replace(CONFIG.training, lora=LoraConfig())))
    matrices = forward_flops(LLAMA, 0).at(1)
    assert whole - training_flops(CONFIG) == tokens * (matrices - 3 * 2 * TRAINED)
