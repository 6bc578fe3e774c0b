"""How configs are read: YAML files and words of the command line, by the types of their fields; paths; names."""

import tomllib
from pathlib import Path

import pytest
import yaml

from mythos_jax.config import DepthConfig, load_config, load_run_config
from mythos_jax.config.named import FOLDER, config_names
from mythos_jax.config.yaml_tree import read_yaml
from mythos_jax.errors import ConfigError
from mythos_jax.version import __version__

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path):
    """Writes the text of a config, returns its path."""

    def to(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to


def message(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


DUPLICATES = {
    "a: {x: 1}\nname: b\na: 2\n": "a: given twice, on lines 1 and 3",
    "training:\n  steps: 1\nname: x\ntraining: {steps: 2}\n": "training: given twice, on lines 1 and 4",
    "model: {dim: 8, dim: 8}\n": "model.dim: given twice, on line 1",
    "training:\n  depth:\n    per: batch\n    'per': batch\n": "training.depth.per: given twice, on lines 3 and 4",
    "data:\n  mixture:\n    a: 1\n    b: 2\n    a: 3\n": "data.mixture.a: given twice, on lines 3 and 5",
    "data: {task: {difficulty: [1]}, sources: [{a: 1, a: 2}]}\n": "data.sources.a: given twice, on line 1",
}


@pytest.mark.parametrize(("text", "line"), DUPLICATES.items(), ids=DUPLICATES.values())
def test_a_key_given_twice_is_refused_with_its_lines(write, text, line):
    path = write(text)
    assert message(load_config, path) == f"{path}: {line}"
    assert message(load_run_config, path) == f"{path}: {line}"
    assert message(read_yaml, path) == f"{path}: {line}"


@pytest.mark.parametrize(
    "text", ["training: &a {steps: *a}", "&a {training: *a}", "data: {sources: &a [*a]}", "data: {mixture: &a {x: *a}}"]
)
def test_a_yaml_alias_of_what_is_around_it_is_refused(write, text):
    assert len(message(load_config, write(text))) < 2000


def test_yaml_merge_keys_and_aliases_are_no_duplicates(write):
    text = "training: &t {steps: 60, warmup_steps: 1}\nname: &n x\ndata: {path: *n}\n"
    config = load_config(write(text.replace("&t {", "&t {<<: {steps: 5, batch_size: 4}, ")))
    assert (config.training.steps, config.training.batch_size, config.data.path) == (60, 4, "x")


@pytest.mark.parametrize(
    "word", ["exp #1", "2024-11-01", "no", "on", "1e3", "3", "null", "[a", "a: b", "{}", "&x", "*x", "!t", " a "]
)
def test_text_is_taken_as_it_is(write, word):
    path = write("{}")
    assert load_config(path, ["--name", word, f"--data.tokenizer={word}"]).name == word
    assert load_config(path, [f"--data.path={word}"]).data.path == word
    quoted = write(yaml.safe_dump({"name": word, "data": {"path": word}}))
    assert load_config(quoted).name == load_config(quoted).data.path == word


def test_plain_yaml_words_are_text_where_the_field_is(write):
    config = load_config(
        write("name: 2024-11-01\ndata: {path: no, sources: [1e3, off], mixture: {}}\nmodel: {remat: none}")
    )
    assert (config.name, config.data.path, config.data.sources) == ("2024-11-01", "no", ("1e3", "off"))
    assert "got ['no'], allowed: a list of tensorboard, wandb" in message(
        load_config, write("training: {loggers: [no]}")
    )
    mixture = load_config(write("data: {mixture: {1: 1, no: 2e0}}")).data.mixture
    assert mixture == {"1": 1.0, "no": 2.0}
    assert load_config(write("{}"), ["--data.mixture", '{a: 1, "b #2": 0.5}']).data.mixture == {"a": 1.0, "b #2": 0.5}


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("1_000", 1000), ("010", 10), ("2.0", 2), ("+7", 7)])
def test_integers(write, text, value):
    for config in (
        load_config(write(f"training: {{warmup_steps: 0, steps: {text}}}\nevaluation: {{loops: [{text}]}}")),
        load_config(
            write("training: {warmup_steps: 0}"), ["--training.steps", text, "--evaluation.loops", f"[{text}]"]
        ),
    ):
        assert (config.training.steps, config.evaluation.loops) == (value, (value,))
        assert type(config.training.steps) is type(config.evaluation.loops[0]) is int


def test_paths_are_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/$me")
    monkeypatch.setenv("ROWS", "/rows")
    text = "data: {path: ~/a, sources: [$ROWS/b, '${ROWS}c', plain], tokenizer: '~'}"
    data = load_config(write(text)).data
    assert (data.path, data.sources, data.tokenizer) == ("/home/$me/a", ("/rows/b", "/rowsc", "plain"), "/home/$me")
    words = ["--data.mixture", "{~/a: 1, $ROWS: 2, gs://$ROWS/x: 3}"]
    assert list(load_config(write("{}"), words).data.mixture) == ["/home/$me/a", "/rows", "gs:///rows/x"]
    assert load_config(write("{}"), ["--name", "$ROWS"]).name == "$ROWS"  # a name is no path
    monkeypatch.setenv("ROWS", "")
    assert message(load_config, write(text)).startswith(
        "data.sources: $ROWS/b: the environment variable ROWS is not set"
    )
    assert "no user 'nobody-here'" in message(load_config, write("data: {path: ~nobody-here/x}"))
    monkeypatch.setenv("ROWS", "/home/$me")
    assert message(load_config, write("{}"), ["--data.mixture", "{~: 1, $ROWS: 2}"]).endswith(
        "in which two paths are the same"
    )
    # A run's own paths were expanded when it was made.
    assert load_run_config(write("data: {path: $ROWS/x}")).data.path == "$ROWS/x"


def test_a_mapping_on_the_command_line_adds_to_a_section(write):
    path = write("training: {steps: 60, batch_size: 4, depth: {mean_loops: 3}}\nmodel:\n")
    words = ["--training", "{steps: 70, depth: {curriculum_steps: 1}}", "--model.dim", "64"]
    config = load_config(path, words)
    assert (config.training.steps, config.training.batch_size, config.model.dim) == (70, 4, 64)
    assert config.training.depth == DepthConfig(mean_loops=3, curriculum_steps=1)


def test_a_warm_up_longer_than_the_run_is_refused_where_it_was_asked_for(write):
    line = "training.warmup_steps: got {}, allowed: at most {}"
    asked = write("training: {steps: 10, warmup_steps: 11}")
    assert message(load_config, asked).startswith(line.format(11, "training.steps, 10, or"))
    assert load_config(asked, ["--training.warmup_steps", "10"]).training.warmup_steps == 10
    assert load_config(asked, ["--training.steps", "11"]).training.steps == 11
    words = ["--training", "{steps: 2, warmup_steps: 3}"]
    assert message(load_config, asked, words).startswith(line.format(3, "training.steps, 2, or"))
    # Not asked for: the default, and a run that is cut short. `train` says what that does.
    assert load_config(write("training: {steps: 10}")).training.schedule_problem()
    assert load_config(asked, ["--training.steps", "2"]).training.schedule_problem()
    wsd = write("training: {steps: 10, schedule: wsd, decay_fraction: 0.5, warmup_steps: 6}")
    assert message(load_config, wsd).startswith(
        line.format(6, "5, which training.decay_fraction 0.5 of 10 steps leaves")
    )
    assert not load_config(wsd, ["--training.warmup_steps", "5"]).training.schedule_problem()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--training.depth.curriculum_steps 2000",
            "training.depth.curriculum_steps: got 2000, allowed: at most training",
        ),
        ("--training.depth.max_loops 3 --model.loops 4", "training.depth.max_loops: got 3, allowed: at least the mean"),
        ("--training.depth.mean_loops 9 --training.depth.max_loops=8", "training.depth.max_loops: got 8, allowed: at "),
        ("--data.sources ['',a]", "data.sources: got '', allowed: files and folders"),
    ],
)
def test_what_cannot_be_meant_is_refused(write, words, line):
    assert message(load_config, write("{}"), words.split()).startswith(line)


def test_configs_of_the_package_have_names(tmp_path, monkeypatch):
    files = (ROOT / "configs").rglob("*.yaml")
    assert config_names() == sorted(str(path.relative_to(ROOT / "configs").with_suffix("")) for path in files)
    monkeypatch.chdir(tmp_path)
    assert load_config("tasks/p_hop") == load_config(ROOT / "configs" / "tasks" / "p_hop.yaml")
    assert load_config("quickstart", ["--name", "x"]).name == "x"
    assert message(load_config, "quikstart") == "quikstart: no such config; did you mean quickstart?"
    assert message(load_config, "p_hop") == "p_hop: no such config; did you mean tasks/p_hop?"
    names = ", ".join(config_names())
    assert message(load_config, "zzz") == f"zzz: no such config; allowed: a YAML file, or {names}"
    expected = "configs/quickstart.yaml: cannot be read (No such file or directory); did you mean the package's config "
    assert message(load_config, "configs/quickstart.yaml") == f"{expected}quickstart?"
    Path("quickstart").write_text("name: mine\n", encoding="utf-8")
    assert load_config("quickstart").name == "mine"


def test_an_old_run_with_a_seed_of_more_than_32_bits_can_be_evaluated(write):
    assert load_run_config(write(f"training: {{seed: {2**40 + 5}}}")).training.seed == 5
    stored = write(f"mythos_jax_version: {__version__}\ntraining: {{seed: {2**40 + 5}}}\n")
    assert "training.seed: got" in message(load_run_config, stored)


def test_the_wheel_contains_the_configs():
    """`mythos_jax/configs` is a link to the folder, and what setuptools packs is named in pyproject.toml."""
    assert FOLDER.resolve() == ROOT / "configs"
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = setuptools["package-data"]["mythos_jax"]
    packed = {path.resolve() for pattern in patterns for path in FOLDER.parent.glob(pattern)}
    assert packed >= {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
