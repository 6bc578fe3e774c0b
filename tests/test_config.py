"""All configs in configs/ load, survive a round trip and have their published size; bad ones give one clear line."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mythos_jax.config import (
    Config,
    DataConfig,
    DepthConfig,
    MeshConfig,
    ModelConfig,
    TrainingConfig,
    load_config,
    load_run_config,
    save_config,
)
from mythos_jax.config.model import EXECUTION_FIELDS, INITIALIZATION_FIELDS, SPEED_FIELDS
from mythos_jax.errors import ConfigError
from mythos_jax.flops import count_parameters, forward_flops
from mythos_jax.model.abstract import abstract_variables
from mythos_jax.model.mythos import Mythos
from mythos_jax.version import __version__

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))

# sum(p.numel() for p in OpenMythos(mythos_1b()).parameters()) and so on, PyTorch, open-mythos 0.5.0 on the meta device.
OPENMYTHOS_PARAMETERS = {
    "mythos_1b": 1_064_028_034,
    "mythos_3b": 3_041_725_186,
    "mythos_10b": 9_981_316_994,
    "mythos_50b": 50_374_247_426,
    "mythos_100b": 99_545_072_130,
    "mythos_500b": 497_849_137_154,
    "mythos_1t": 999_326_352_386,
}

GQA = {"dim": 8, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16}
MLA = {
    "attention": "mla",
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
MOE = {"feed_forward": "moe", "n_experts": 4, "experts_per_token": 2, "expert_dim": 8}


def named(name):
    return next(path for path in CONFIGS if path.stem == name)


@pytest.fixture
def write(tmp_path):
    """Writes the text of a config, returns its path."""

    def to(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return to


def message(call, *arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_in_the_repository_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    assert config.name == path.stem
    save_config(config, tmp_path / "resolved.yaml")
    again = load_config(tmp_path / "resolved.yaml")
    assert again == config
    assert hash(again) == hash(config)
    assert re.search(r"^name: ", (tmp_path / "resolved.yaml").read_text(), re.M)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_in_the_repository_builds_and_runs(path):
    """With abstract shapes, so that this also works for the largest."""
    config = load_config(path).model
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)

    def run(variables, tokens):
        return Mythos(config).apply(variables, tokens, loops=2, rngs={"state": jax.random.key(0)}).logits

    logits = jax.eval_shape(run, abstract_variables(config), tokens)
    assert logits.shape == (2, 4, config.vocab_size)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(("name", "parameters"), OPENMYTHOS_PARAMETERS.items(), ids=OPENMYTHOS_PARAMETERS)
def test_a_published_size_has_as_many_parameters_as_the_original(name, parameters):
    assert count_parameters(load_config(named(name)).model) == parameters


def test_the_baselines_match_what_they_are_compared_with():
    """The small baseline in compute per token, the large one in parameters."""
    small, large = load_config(named("baseline_quickstart")), load_config(named("baseline_1b"))
    quickstart = load_config(named("quickstart"))
    flops = [forward_flops(c.model, 64).at(c.model.loops) for c in (small, quickstart)]
    assert flops[0] == pytest.approx(flops[1], rel=0.03)
    assert count_parameters(large.model) == pytest.approx(OPENMYTHOS_PARAMETERS["mythos_1b"], rel=0.01)
    assert small.data_path == quickstart.data_path
    assert dataclasses.replace(small.data, path="") == dataclasses.replace(quickstart.data, path="")
    assert dataclasses.replace(small.training, depth=quickstart.training.depth) == quickstart.training


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(named("quickstart")).model.dim = 7


def test_an_empty_section_means_its_defaults(write):
    assert load_config(write("name: run\nmodel:\n")) == Config()


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1E-3", 1e-3), ("+1.5e2", 150.0), (".5e1", 5.0), ("1", 1.0)]
)
def test_yaml_numbers(write, text, value):
    read = load_config(write(f"training:\n  learning_rate: {text}\n")).training.learning_rate
    assert read == value
    assert type(read) is float
    assert load_config(write("{}"), ["--training.learning_rate", text]).training.learning_rate == value


def test_overrides_take_precedence_over_the_file(write):
    path = write("model: {dim: 64}\ntraining: {steps: 5}\n")
    words = "--model.dim 32 --model.head_dim=8 --model.remat dots --mesh.fsdp -1 --mesh.data=1 --name it"
    config = load_config(path, [*words.split(), "--data.sources", "[a, b]"])
    assert (config.model.dim, config.model.head_dim, config.model.remat) == (32, 8, "dots")
    assert (config.training.steps, config.name, config.data.sources) == (5, "it", ("a", "b"))
    assert config.mesh == MeshConfig()
    assert load_config(path, ["--model.dim", "32", "--model.dim", "16"]).model.dim == 16  # the last word counts
    assert load_config(path, ["--model.head_dim", "null"]).model.head_dim is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model.lops 3", "model.lops: unknown key; did you mean model.loops?"),
        ("--modle.loops 3", "modle: unknown key; did you mean model?"),
        ("--qqq 3", "qqq: unknown key; allowed: name, model, training, data, evaluation, mesh"),
        ("--mesh.zz 3", "mesh.zz: unknown key; allowed: data, fsdp, tensor, expert, sequence, slices, gather"),
        ("steps 3", "steps: got a stray word, allowed: --section.field value"),
        ("--training.steps 3 4", "4: got a stray word, allowed: --section.field value"),
        ("--training.steps", "--training.steps: got no value, allowed: --training.steps value"),
        ("--training.steps --name it", "--training.steps: got no value, allowed: --training.steps value"),
        ("--data.sources [a", "--data.sources: got '[a', allowed: a list of texts"),
        ("--name.x 3", "name.x: got a field inside 'name', which is not a section"),
        ("--model 3", "model: got 3, allowed: a mapping with " + ", ".join(ModelConfig.__dataclass_fields__)),
        ("--training.steps many", "training.steps: got 'many', allowed: an integer >= 1"),
        ("--training.steps 2.5", "training.steps: got 2.5, allowed: an integer >= 1"),
        ("--training.steps true", "training.steps: got True, allowed: an integer >= 1"),
        ("--training.learning_rate fast", "training.learning_rate: got 'fast', allowed: a number > 0"),
        ("--training.learning_rate .nan", "training.learning_rate: got nan, allowed: a number > 0"),
        ("--training.learning_rate .inf", "training.learning_rate: got inf, allowed: a number > 0"),
        ("--model.qk_norm 1", "model.qk_norm: got 1, allowed: true or false"),
        ("--model.head_dim wide", "model.head_dim: got 'wide', allowed: an integer >= 1, or null"),
        ("--data.sources=", "data.sources: got None, allowed: a list of texts"),
        ("--evaluation.loops many", "evaluation.loops: got ['many'], allowed: a list of integers >= 1"),
        ("--evaluation.loops [1,a]", "evaluation.loops: got [1, 'a'], allowed: a list of integers >= 1"),
        ("--model.attention MLA", "model.attention: got 'MLA', allowed: gqa, mla"),
        ("--model.feed_forward gated", "model.feed_forward: got 'gated', allowed: dense, moe"),
        ("--model.injection lti", "model.injection: got 'lti', allowed: openmythos, parcae, concat, none"),
        ("--model.readout ACT", "model.readout: got 'ACT', allowed: last, act"),
        (
            "--model.remat true",
            "model.remat: got 'true', allowed: none, full, attention, offload, sublayers, half_hidden, hidden, dots",
        ),
        ("--training.steps 0", "training.steps: got 0, allowed: an integer >= 1"),
        ("--training.seed -1", "training.seed: got -1, allowed: an integer from 0 to 4294967295"),
        ("--training.seed 4294967296", "training.seed: got 4294967296, allowed: an integer from 0 to 4294967295"),
        ("--training.steps 2147483648", "training.steps: got 2147483648, allowed: at most 2147483647"),
        ("--training.steps 1e400", "training.steps: got inf, allowed: an integer >= 1"),
        ("--training.learning_rate 1" + "0" * 400, "training.learning_rate: got inf, allowed: a number > 0"),
        ("--training.steps 1:30", "training.steps: got '1:30', allowed: an integer >= 1"),
        ("--training.steps 0x10", "training.steps: got '0x10', allowed: an integer >= 1"),
        ('--training {"steps":1,"steps":2}', "--training: steps: given twice, on line 1"),
        ("--model null", "model: got None, allowed: a mapping with " + ", ".join(ModelConfig.__dataclass_fields__)),
        ("--name ../x", "name: got '../x', allowed: a name for a directory inside runs/"),
        ("--name=", "name: got '', allowed: a name for a directory inside runs/"),
        ("--data.path $NOWHERE/x", "data.path: $NOWHERE/x: the environment variable NOWHERE is not set"),
        (
            "--training.warmup_steps 2000",
            "training.warmup_steps: got 2000, allowed: at most training.steps, 1000, or the learning "
            "rate never reaches its peak",
        ),
        ("--training.learning_rate 0", "training.learning_rate: got 0.0, allowed: a number > 0"),
        ("--training.weight_decay -0.1", "training.weight_decay: got -0.1, allowed: a number >= 0"),
        ("--training.b2 1", "training.b2: got 1.0, allowed: a number in [0, 1)"),
        (
            "--training.final_learning_rate_fraction 2",
            "training.final_learning_rate_fraction: got 2.0, allowed: a fraction in [0, 1]",
        ),
        ("--training.spike_factor 0.5", "training.spike_factor: got 0.5, allowed: a number > 1, or 0 for none"),
        (
            "--training.objectives.ponder_prior_rate 1",
            "training.objectives.ponder_prior_rate: got 1.0, allowed: a number in [0, 1)",
        ),
        (
            "--training.objectives.exit_loss gain",
            "training.objectives.exit_loss: got 'gain', allowed: none without an exit_gate",
        ),
        (
            "--model.exit_gate true --training.objectives.exit_loss gain --training.objectives.contraction 0.1",
            "training.objectives.contraction: got 0.1, allowed: 0 with exit_loss gain, which trains the gate alone",
        ),
        ("--data.task.digits 16", "data.task.digits: got 16, allowed: an integer from 1 to 15"),
        ("--data.task.difficulty [3,0]", "data.task.difficulty: got 0, allowed: integers from 1 to 1000"),
        ('--data.mixture {"a":1,"b":0}', "data.mixture b: got 0.0, allowed: a number > 0"),
        ("--data.held_out_fraction 1", "data.held_out_fraction: got 1.0, allowed: a fraction in [0, 1)"),
        ("--data.max_bytes -1", "data.max_bytes: got -1, allowed: an integer >= 0"),
        ("--data.seq_len 257", "data.seq_len: got 257, allowed: at most model.max_seq_len, 256"),
        ("--evaluation.loops [4,0]", "evaluation.loops: got 0, allowed: integers >= 1"),
        ("--evaluation.batch_size 0", "evaluation.batch_size: got 0, allowed: an integer >= 1"),
        ("--mesh.data 0", "mesh.data: got 0, allowed: an integer >= 1, or -1 for the rest"),
        ("--mesh.data -1", "mesh.fsdp: got -1, allowed: -1 on one axis only"),
        ("--mesh.tensor -1 --mesh.fsdp -1", "mesh.tensor: got -1, allowed: -1 on one axis only"),
    ],
)
def test_a_bad_override_gives_one_clear_line(write, words, expected):
    assert message(load_config, write("{}"), words.split()) == expected


RENAMED = {
    "training.accumulation 2": "training.accumulation: renamed to training.grad_accumulation_steps",
    "training.final_learning_rate 0.1": "training.final_learning_rate: renamed to "
    "training.final_learning_rate_fraction (a fraction of the peak, e.g. 0.1)",
    "training.decay_share 0.1": "training.decay_share: renamed to training.decay_fraction",
    "training.writers []": "training.writers: renamed to training.loggers",
    "training.depth.per batch": "training.depth.per: renamed to training.depth.sample_per",
    "data.held_out 0.1": "data.held_out: renamed to data.held_out_fraction",
}


@pytest.mark.parametrize(("word", "expected"), RENAMED.items(), ids=[word.split()[0] for word in RENAMED])
def test_a_renamed_field_is_refused_with_its_new_name(write, word, expected):
    name, value = word.split()
    assert message(load_config, write("{}"), [f"--{name}", value]) == expected
    *sections, key = name.split(".")
    text = f"{{{key}: {value}}}"
    for section in reversed(sections):
        text = f"{{{section}: {text}}}"
    assert message(load_config, write(text)) == expected
    kind = {"training": TrainingConfig, "depth": DepthConfig, "data": DataConfig}[sections[-1]]
    assert message(kind, **{key: value}) == expected
    assert message(dataclasses.replace, kind(), **{key: value}) == expected


def test_the_config_of_a_run_of_version_0_1_0_is_upgraded(write):
    """The file was written by that version; a field it did not have takes its default."""
    stored = Path(__file__).parent / "golden" / "config_0_1_0.yaml"
    config = load_run_config(stored)
    t = config.training
    assert (t.grad_accumulation_steps, t.decay_fraction, t.final_learning_rate_fraction) == (2, 0.25, 0.05)
    assert (t.loggers, t.depth.sample_per, config.data.held_out_fraction) == (("tensorboard",), "batch", 0.2)
    assert (config.name, t.depth.distribution, config.data.path) == ("old", "poisson", "rows")
    assert config.model == dataclasses.replace(load_config(named("quickstart")).model, loops=8)  # as it was then
    without = stored.read_text().replace("  eps: 1.0e-08\n", "")
    assert load_run_config(write(without)) == config
    assert message(load_config, stored).startswith("training.accumulation: renamed")  # as if written by hand


def test_a_stored_config_says_which_version_wrote_it(write, tmp_path):
    save_config(Config(), tmp_path / "resolved.yaml")
    text = (tmp_path / "resolved.yaml").read_text()
    assert text.startswith(f"mythos_jax_version: {__version__}\n")
    later = write(text.replace(__version__, "9.9.9").replace("model:", "model:\n  wormholes: 2"))
    suffix = f" (written by mythos_jax 9.9.9, this is {__version__})"
    for load in (load_config, load_run_config):
        assert message(load, later).startswith("model.wormholes: unknown key; ")
        assert message(load, later).endswith(suffix)
    earlier = text.replace(__version__, "0.1.5").replace("grad_accumulation_steps: 1", "accumulation: 4")
    assert load_config(write(earlier), ["--name", "it"]) == dataclasses.replace(
        Config(), name="it", training=TrainingConfig(grad_accumulation_steps=4)
    )


def test_execution_fields_are_separate_from_the_definition_of_a_model():
    """A resume that changes any field outside SPEED_FIELDS is refused, so the lists are spelled out here."""
    assert EXECUTION_FIELDS == ("dtype", "products", "remat", "expert_exchange")
    assert SPEED_FIELDS == ("remat", "expert_exchange")
    assert INITIALIZATION_FIELDS == ("init_std", "output_init")
    config = ModelConfig(
        dim=32, dtype="bfloat16", products="int8", remat="full", expert_exchange="all_to_all", init_std=0.5
    )
    assert config.definition == ModelConfig(dim=32, init_std=0.5)
    assert abstract_variables(config) == abstract_variables(config.definition)
    assert [ModelConfig().compute_dtype(on) for on in ("cpu", "gpu", "tpu")] == ["float32", "bfloat16", "bfloat16"]
    assert config.compute_dtype("cpu") == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"loops": 0}, "model.loops: got 0, allowed: an integer >= 1"),
        ({"dim": 0}, "model.dim: got 0, allowed: an integer >= 1"),
        ({"loop_layers": 0}, "model.loop_layers: got 0, allowed: an integer from 1 to 1000"),
        ({"coda_layers": -1}, "model.coda_layers: got -1, allowed: an integer from 0 to 1000"),
        ({"rope_theta": 0.0}, "model.rope_theta: got 0.0, allowed: a number > 0"),
        ({"init_std": -1.0}, "model.init_std: got -1.0, allowed: a number > 0, or null"),
        ({"head_dim": 0}, "model.head_dim: got 0, allowed: an integer >= 1, or null"),
        (
            {"n_heads": 3},
            "model.n_heads: got 3, allowed: a divisor of dim 8 that leaves an even head width (1, 2, 4)",
        ),
        (
            {"n_heads": 8},
            "model.n_heads: got 8, allowed: a divisor of dim 8 that leaves an even head width (1, 2, 4)",
        ),
        (
            {"dim": 5040, "n_heads": 11},
            "model.n_heads: got 11, allowed: a divisor of dim 5040 that leaves an even head width "
            "(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, …)",
        ),
        ({"n_kv_heads": 3}, "model.n_kv_heads: got 3, allowed: a divisor of n_heads 4"),
        ({"n_kv_heads": 0}, "model.n_kv_heads: got 0, allowed: a divisor of n_heads 4"),
        ({"head_dim": 3}, "model.head_dim: got 3, allowed: an even width (RoPE rotates pairs of channels)"),
        (
            {**MLA, "qk_rope_head_dim": 3},
            "model.qk_rope_head_dim: got 3, allowed: an even width (RoPE rotates pairs of channels)",
        ),
        ({**MLA, "kv_lora_rank": 0}, "model.kv_lora_rank: got 0, allowed: an integer >= 1 with mla"),
        ({**MLA, "qk_norm": True}, "model.qk_norm: got True, allowed: false with attention mla"),
        (
            {**MLA, "value_gate_layers": (0,)},
            "model.value_gate_layers: got [0], allowed: [] with attention mla (value embeddings need attention gqa)",
        ),
        ({**MOE, "n_experts": 0}, "model.n_experts: got 0, allowed: an integer >= 1 with feed_forward moe"),
        ({**MOE, "expert_dim": 0}, "model.expert_dim: got 0, allowed: an integer >= 1 with feed_forward moe"),
        ({**MOE, "experts_per_token": 5}, "model.experts_per_token: got 5, allowed: 1 to n_experts, 4"),
        ({**MOE, "experts_per_token": 0}, "model.experts_per_token: got 0, allowed: 1 to n_experts, 4"),
        ({**MOE, "activation": "relu2"}, "model.activation: got 'relu2', allowed: swiglu with feed_forward moe"),
        ({"act_threshold": 0.0}, "model.act_threshold: got 0.0, allowed: a number in (0, 1]"),
        ({"loop_embedding_scale": -1.0}, "model.loop_embedding_scale: got -1.0, allowed: a number >= 0"),
        ({"value_table_layers": (3,)}, "model.value_table_layers: got 3, allowed: layer indices from 0 to 2"),
    ],
)
def test_a_bad_model_gives_one_clear_line(fields, expected):
    assert message(ModelConfig, **{**GQA, **fields}) == expected


@pytest.mark.parametrize("good", [{}, MLA, MOE, {"head_dim": 6}, {"n_heads": 3, "n_kv_heads": 1, "head_dim": 4}])
def test_the_models_that_the_bad_ones_start_from_are_valid(good):
    ModelConfig(**{**GQA, **good})


def test_a_file_that_is_not_a_config(tmp_path, write):
    missing = tmp_path / "missing.yaml"
    assert message(load_config, missing) == f"{missing}: cannot be read (No such file or directory)"
    assert message(load_config, tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"
    for text, kind in [("- a\n- b\n", "list"), ("hello\n", "str"), ("", "NoneType"), ("3\n", "int")]:
        path = write(text)
        assert message(load_config, path) == f"{path}: got {kind}, allowed: a mapping of sections"
    path = write("model: [1, 2\n")
    assert re.fullmatch(re.escape(f"{path}: not a YAML file (") + ".*line 2, column 1.*\\)", message(load_config, path))
    path.write_bytes(b"\xff\xfe\x00")
    assert re.fullmatch(re.escape(f"{path}: not a YAML file (") + ".*\\)", message(load_config, path))


def test_a_section_that_is_not_a_mapping(write):
    expected = "mesh: got 3, allowed: a mapping with data, fsdp, tensor, expert, sequence, slices, gather"
    assert message(load_config, write("mesh: 3\n")) == expected
    assert message(load_config, write("data: {3: x}\n")).startswith("data.3: unknown key; allowed: path, sources, ")
