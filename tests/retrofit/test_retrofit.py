"""`mythos retrofit`: the logits of transformers itself, at every depth, before any training."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from mythos_jax.cli import main
from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.flops import count_parameters
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.pretrained import load_pretrained, load_variables
from mythos_jax.porting.reading import FileSource, VariablesSource, text_of
from mythos_jax.retrofit.comparison import Sample, compare, make_sample
from mythos_jax.retrofit.cut import Cut, dense_layers, make_cut
from mythos_jax.retrofit.surgery import Plan, RetrofitSource, retrofit
from tests.porting import golden

# All layers are kept. The format: whichever of Raven's, Nanbeige's and ours can express the result.
WHOLE = {
    "llama": (Cut((0,), (1, 2), (3,)), "raven"),
    "mistral": (Cut((0,), (1, 2), ()), "raven"),
    "olmo2": (Cut((), (0, 1), (2,)), "raven_olmo"),
    "llama_tied": (Cut((0, 1), (2,), (3,)), "mythos_jax"),
    "qwen2": (Cut((0,), (1,), (2,)), "mythos_jax"),
    "qwen3": (Cut((), (0, 1, 2), ()), "mythos_jax"),
}


@partial(jax.jit, static_argnums=0)
def run(config, variables, tokens, loops):
    return Mythos(config).apply(variables, tokens, loops=loops, rngs={"state": jax.random.key(1)}).logits


def logits(folder, tokens, loops):
    config, variables = load_pretrained(folder)
    return np.asarray(run(config, variables, tokens, jnp.int32(loops)))


@pytest.mark.parametrize(
    ("name", "state"), [*((name, "zeros") for name in WHOLE), ("llama", "noise"), ("llama", "injected")]
)
def test_logits_of_the_dense_model_at_every_depth(name, state, tmp_path):
    cut, written_as = WHOLE[name]
    plan = Plan(cut, initial_state=state)
    result = retrofit(FileSource(golden.FOLDER / name), tmp_path / "out", plan, progress=False)
    assert result.family.name == written_as
    read = FileSource(tmp_path / "out")
    assert read.family.name == written_as
    assert read.config.loops == 4
    config, variables = load_pretrained(tmp_path / "out")
    assert config.initial_state == state
    for loops in (1, 2, 4, 8):
        assert plan.is_exact(golden.load(name)[0], loops)
        found = run(config, variables, golden.arrays(name)["input_ids"], jnp.int32(loops))
        np.testing.assert_allclose(found, golden.arrays(name)["logits"], rtol=0, atol=1e-4)


def test_the_state_enters_as_soon_as_the_adapter_lets_it(tmp_path):
    """The gradient of the rows of h is not zero: what the state adds can be learned."""
    retrofit(FileSource(golden.FOLDER / "llama"), tmp_path / "out", Plan(WHOLE["llama"][0]), progress=False)
    config, variables = load_pretrained(tmp_path / "out")
    tokens = golden.arrays("llama")["input_ids"]

    def loss(params):
        return jnp.square(Mythos(config).apply({"params": params}, tokens, loops=2).logits).mean()

    gradient = jax.jit(jax.grad(loss))(variables["params"])["recurrence"]["cell"]["injection"]["adapter"]["kernel"]
    of_state, of_input = np.split(np.abs(gradient), 2)
    assert of_state.max() > 0.1 * of_input.max() > 0


def test_dropped_layers_are_those_of_the_dense_model_without_them(tmp_path):
    config, variables = golden.load("llama")
    shorter = {**variables["params"], "recurrence": {"cell": dict(variables["params"]["recurrence"]["cell"])}}
    cell = shorter["recurrence"]["cell"]
    cell["layer_1"], _ = cell.pop("layer_3"), cell.pop("layer_2")  # 0 and 3 remain
    tokens = golden.arrays("llama")["input_ids"]
    expected = run(replace(config, loop_layers=2), {"params": shorter}, tokens, jnp.int32(1))
    plan = Plan(Cut((0,), (3,), ()))
    retrofit(FileSource(golden.FOLDER / "llama"), tmp_path / "out", plan, progress=False)
    for loops in (1, 3):
        np.testing.assert_allclose(logits(tmp_path / "out", tokens, loops), expected, rtol=0, atol=1e-5)
        assert not plan.is_exact(config, loops)


@pytest.mark.parametrize(("adapter", "written_as"), [("add", "raven"), ("none", "nanbeige")])
def test_one_loop_is_the_dense_model_where_the_state_starts_from_nothing(adapter, written_as, tmp_path):
    plan = Plan(make_cut(4, (), (0, 1, 2, 3), ()), adapter=adapter)
    result = retrofit(FileSource(golden.FOLDER / "llama"), tmp_path / "out", plan, progress=False)
    assert result.family.name == written_as
    g = golden.arrays("llama")
    for loops, exact in ((1, True), (2, False)):
        difference = np.abs(logits(tmp_path / "out", g["input_ids"], loops) - g["logits"]).max()
        assert plan.is_exact(golden.load("llama")[0], loops) == exact == (difference < 1e-4)


def test_a_random_adapter_is_that_of_the_published_models_and_of_the_seed():
    dense = FileSource(golden.FOLDER / "llama")
    path = "params.recurrence.cell.injection.adapter.kernel"
    one, again, other = (
        RetrofitSource(dense, Plan(WHOLE["llama"][0], adapter="random", seed=seed)).parameter(path)
        for seed in (0, 0, 1)
    )
    assert one.shape == (128, 64)
    assert one.dtype == np.float32
    bound = 1 / np.sqrt(128)  # torch.nn.Linear(128, 64)
    assert 0.99 * bound < np.abs(one).max() <= bound
    assert one.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_a_head_of_its_own_for_raven(tmp_path):
    plan = Plan(WHOLE["llama_tied"][0], format="raven")
    retrofit(FileSource(golden.FOLDER / "llama_tied"), tmp_path / "out", plan, progress=False)
    config, variables = load_pretrained(tmp_path / "out")
    assert not config.tied_embedding
    np.testing.assert_array_equal(variables["params"]["unembedding"], variables["params"]["embedding"])
    g = golden.arrays("llama_tied")
    np.testing.assert_allclose(logits(tmp_path / "out", g["input_ids"], 4), g["logits"], rtol=0, atol=1e-4)


def random_source(config):
    variables = jax.jit(Mythos(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return VariablesSource(config, jax.tree.map(np.asarray, variables), "model")


def test_experts_stay_in_the_loop(tmp_path):
    config = ModelConfig(
        vocab_size=32, dim=16, n_heads=2, n_kv_heads=2, hidden_dim=24, loops=1, injection="none", loop_layers=3,
        feed_forward="moe", n_experts=4, experts_per_token=2, expert_dim=8, max_seq_len=16,
    )  # fmt: skip
    dense = random_source(config)
    assert len(dense_layers(config)) == 5
    retrofit(dense, tmp_path / "out", Plan(make_cut(5, (0,), (1, 2, 3), (4,))), progress=False)
    tokens = np.arange(12)[None] % 32
    comparison = compare(dense, FileSource(tmp_path / "out"), Sample(tokens, True), depths=(3,))
    assert comparison.distances[0].max_abs < 1e-5
    with pytest.raises(
        ConfigError, match="--prelude: got layer 1, allowed: layers that stay on their side of the loop"
    ):
        retrofit(dense, tmp_path / "no", Plan(make_cut(5, (0, 1), (2, 3), (4,))), progress=False)
    assert not (tmp_path / "no").exists()


def test_layers_of_one_width_go_anywhere(tmp_path):
    config = ModelConfig(
        vocab_size=32, dim=16, n_heads=2, n_kv_heads=2, hidden_dim=24, loop_hidden_dim=40, loops=1, injection="none",
        prelude_layers=0, loop_layers=3, coda_layers=0, max_seq_len=16,
    )  # fmt: skip
    dense = random_source(config)
    retrofit(dense, tmp_path / "out", Plan(make_cut(3)), progress=False)
    assert FileSource(tmp_path / "out").config.hidden_dim == 40
    sample = Sample(np.arange(12)[None], True)
    assert compare(dense, FileSource(tmp_path / "out"), sample, depths=(3,)).distances[0].max_abs < 1e-5
    uneven = random_source(replace(config, prelude_layers=1))
    with pytest.raises(ConfigError, match=r"--loop: got layer 0, .* in the loop are 40 wide inside, those outside 24"):
        retrofit(uneven, tmp_path / "no", Plan(make_cut(4, (), (0, 1, 2, 3), ())), progress=False)


def test_what_is_known_about_the_source_is_said_once(tmp_path, caplog):
    dense = FileSource(golden.FOLDER / "llama")
    dense.notes = ["a note"]
    retrofit(dense, tmp_path / "out", Plan(WHOLE["llama"][0]), progress=False)
    assert caplog.messages.count("a note") == 1
    load_variables(dense)  # as `compare` does
    assert caplog.messages.count("a note") == 1


def test_a_comparison_against_its_definition():
    dense, tokens = FileSource(golden.FOLDER / "llama"), golden.arrays("llama")["input_ids"][:1]
    looped = RetrofitSource(dense, Plan(Cut((0,), (1,), (3,))))
    comparison = compare(dense, looped, Sample(tokens, True), depths=(2,))
    p = jax.nn.softmax(golden.arrays("llama")["logits"][0].astype(np.float64))
    config = looped.config
    q = np.asarray(jax.nn.softmax(run(config, load_variables(looped)[1], tokens, jnp.int32(2))[0]))
    (found,) = comparison.distances
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-3)
    targets = np.arange(23), tokens[0, 1:]
    assert found.loss == pytest.approx(-np.log(q[:-1])[targets].mean(), rel=1e-4)
    assert comparison.dense_loss == pytest.approx(-np.log(p[:-1])[targets].mean(), rel=1e-4)


CUTS = [
    ({}, Cut((0, 1), (2, 3, 4, 5), (6, 7))),
    ({"loop": (3, 4)}, Cut((0, 1, 2), (3, 4), (5, 6, 7))),
    ({"prelude": (0,), "loop": (3, 4), "coda": (7,)}, Cut((0,), (3, 4), (7,))),
    ({"prelude": (), "coda": ()}, Cut((), tuple(range(8)), ())),
    ({"prelude": (1, 2)}, Cut((1, 2), (3, 4, 5), (6, 7))),
    ({"coda": (7,)}, Cut((0, 1), (2, 3, 4, 5, 6), (7,))),
]


@pytest.mark.parametrize(("parts", "cut"), CUTS)
def test_cuts(parts, cut):
    assert make_cut(8, **parts) == cut
    assert make_cut(1) == Cut((), (0,), ())


WRONG_CUTS = [
    ({"loop": (7, 8)}, "--loop: got layer 8, allowed: 0 to 7, the layers of the model"),
    ({"prelude": (0, 1), "loop": (1, 2)}, "--loop: got layer 1, which is in the prelude already"),
    ({"prelude": (), "loop": (4, 5), "coda": (2,)}, "--coda: got layer 2, which is before layer 5 in the loop"),
    ({"loop": (4, 3)}, "--loop: got layer 3, which is before layer 4 in the loop"),
    ({"loop": (4, 4)}, "--loop: got layer 4, which is in the loop already"),
    ({"prelude": tuple(range(8))}, "--loop: got no layer, allowed: at least one"),
    ({"loop": ()}, "--loop: got no layer"),
]


@pytest.mark.parametrize(("parts", "message"), WRONG_CUTS)
def test_cuts_that_cannot_be(parts, message):
    with pytest.raises(ConfigError, match=message):
        make_cut(8, **parts)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["retrofit", str(golden.FOLDER / "llama"), str(out), "--prelude", "0", "--loop", "1-2", "--coda", "3"]
    assert main([*arguments, "--loops", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prelude"], report["loop"], report["coda"], report["dropped"]) == ([0], [1, 2], [3], [])
    assert [d["loops"] for d in report["comparison"]["distances"]] == [1, 2, 4, 8]
    assert max(d["max_abs"] for d in report["comparison"]["distances"]) < 1e-4
    assert report["cost"]["parameters"] == count_parameters(load_pretrained(out)[0])
    tree = yaml.safe_load((out / "train.yaml").read_text())
    assert tree["training"]["depth"]["mean_loops"] == 3
    assert tree["training"]["depth"]["backprop_loops"] == 3
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    arguments[2] = str(tmp_path / "shorter")
    assert main([*arguments[:-4], "--loop", "2", "--coda", "3"]) == 0
    text = capsys.readouterr().out
    assert "dropped: layer 1 of the source" in text
    assert "prelude: layer 0 of the source, run once" in text


WRONG = [
    ("llama", ["--loop", "2-9"], "--loop: got layer 4, allowed: 0 to 3"),
    ("llama", ["--loop", "x"], "argument --loop: got 'x', allowed: layers such as 0-9 or 0-3,6, or none"),
    ("llama", ["--loop", "2-1,1"], "argument --loop: got '2-1,1'"),
    ("llama", ["--text", "x"], "llama has no tokenizer to read it with; allowed: without --text"),
    ("llama", ["--to", "mythos_jax_int8"], "format: got mythos_jax_int8, allowed: a format that rounds nothing"),
    ("llama", ["--loop", "0-99999999999"], "--loop: got layer 4"),
    ("llama", ["--whole", "--loop", "1"], "--loop: got with --whole"),
    ("llama", ["--adapter", "none", "--initial-state", "noise"], "--initial-state: got noise, allowed: injected"),
    ("qwen2", ["--to", "raven"], "raven cannot express model.qk_bias: true"),
    ("llama", ["--to", "rave"], "format: got 'rave', allowed: "),
    ("ouro", [], "got model.loops 4, allowed: a dense model, with 1"),
    ("huginn", [], "allowed: a dense model, with"),
    ("nothing", [], "no such file or directory"),
]


@pytest.mark.parametrize(("name", "flags", "message"), WRONG)
def test_wrong_input_is_one_line_and_writes_nothing(name, flags, message, tmp_path, capsys):
    try:
        code = main(["retrofit", str(golden.FOLDER / name), str(tmp_path / "out"), *flags])
    except SystemExit as end:
        code = end.code
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_text_is_read_as_the_model_reads_it(tmp_path):
    """Without a tokenizer, random tokens; with the one of a GGUF file, its first token and the text's."""
    sample = make_sample(FileSource(golden.FOLDER / "llama"), None)
    assert sample.are_random
    assert sample.tokens.shape == (1, 256)
    assert 0 <= sample.tokens.min() < sample.tokens.max() < 128
    source = FileSource(golden.FOLDER / "gguf_tiny" / "model.gguf")
    text, conventions = text_of(source)
    assert make_sample(source, "ab").tokens.tolist() == [conventions.begin(text.encode("ab"))]
    retrofit(source, tmp_path / "out", Plan(make_cut(len(dense_layers(source.config)))), progress=False)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = make_sample(FileSource(tmp_path / "out"), "ab")
    np.testing.assert_array_equal(again.tokens, make_sample(source, "ab").tokens)
    assert not again.are_random


def test_the_directory_here_and_its_config(tmp_path, monkeypatch):
    """`.` is a name like any other, and the config finds the model from wherever it is used."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["retrofit", str(golden.FOLDER / "llama"), ".", "--no-compare"]) == 0
    tree = yaml.safe_load((tmp_path / "here" / "train.yaml").read_text())
    assert (tree["name"], tree["training"]["init_from"]) == ("here", str(tmp_path / "here"))
