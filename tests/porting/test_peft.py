"""Adapters in PEFT's format: the tensors of the original's files, merged in numpy by definition, are the truth.

tests_torch/test_peft.py compares with the library itself.
"""

import json
import re
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import mythos_jax
from mythos_jax.cli import main
from mythos_jax.errors import ConfigError
from mythos_jax.model.low_rank import adaptable
from mythos_jax.porting.adapted import open_pretrained
from mythos_jax.porting.convert import convert
from mythos_jax.porting.families import get_family
from mythos_jax.porting.layouts import LINEAR, SAME, TO_HEADS, low_rank_layouts
from mythos_jax.porting.peft import _BLOCK, _fixed_product, family_for, write_adapter
from mythos_jax.porting.peft_config import MOST_REPETITIONS, read_adapter_config, target_names
from mythos_jax.porting.pretrained import load_pretrained, save_pretrained
from mythos_jax.porting.reading import FileSource, text_of
from mythos_jax.retrofit.cut import dense_layers, make_cut
from mythos_jax.retrofit.surgery import Plan, retrofit
from mythos_jax.runs.configs import load_config
from mythos_jax.runs.source import keep_source
from mythos_jax.training.start import load_initial
from tests.porting import golden

LLAMA = golden.FOLDER / "llama"
TINY = golden.FOLDER / "gguf_tiny" / "model.gguf"  # has a tokenizer
FIELDS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "o_proj"],
}
PREFIX = "base_model.model."


def their_tensors(name):
    files = (golden.FOLDER / name).glob("*.safetensors")
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def shapes_of(tensors, ends):
    """[out, in] of the modules whose name ends so."""
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return {name: tensors[f"{name}.weight"].shape for name in names if name.rpartition(".")[2] in ends}


def random_adapter(shapes, rank=3, seed=0, dtype=np.float32):
    random, tensors = np.random.default_rng(seed), {}
    for name, (outputs, inputs) in shapes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = random.normal(size=(rank, inputs)).astype(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = random.normal(size=(outputs, rank)).astype(dtype)
    return tensors


def write(directory, tensors, base, **fields):
    directory.mkdir(parents=True, exist_ok=True)
    given = {**FIELDS, "base_model_name_or_path": None if base is None else str(base), **fields}
    (directory / "adapter_config.json").write_text(json.dumps(given))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def llama_adapter(tmp_path):
    """On queries and outputs of the golden Llama."""
    shapes = shapes_of(their_tensors("llama"), ("q_proj", "o_proj"))
    return write(tmp_path / "peft", random_adapter(shapes), LLAMA)


def merge(tensors, adapter, scale):
    """W + scale B A in the original's own tensors."""
    merged = dict(tensors)
    for key in adapter:
        if ".lora_A." in key:
            name = key.removeprefix(PREFIX).replace(".lora_A", "")
            merged[name] = tensors[name] + np.float32(scale) * (adapter[key.replace("lora_A", "lora_B")] @ adapter[key])
    return merged


def directory_of(path, name, tensors):
    shutil.copytree(golden.FOLDER / name, path, ignore=shutil.ignore_patterns("*safetensors*"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def assert_close(got, wanted):
    got, wanted = (flatten_dict(variables, sep=".") for variables in (got, wanted))
    assert got.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_allclose(np.asarray(got[path]), np.asarray(array), rtol=0, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3", "olmo2", "ouro", "nanbeige"])
def test_read(name, tmp_path):
    """Every linear map; queries and keys among them, whose rows are moved for RoPE."""
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "early_exit_gate")
    tensors = their_tensors(name)
    adapter = random_adapter(shapes_of(tensors, ends))
    path = write(tmp_path / "peft", adapter, golden.FOLDER / name, target_modules="all-linear")
    wanted = load_pretrained(directory_of(tmp_path / "merged", name, merge(tensors, adapter, 2)))
    config, variables = load_pretrained(path)
    assert config == wanted[0]
    assert_close(variables, wanted[1])


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_written(name, tmp_path):
    """W + 2 a b in our layout, written as the original, is W + 2 B A there."""
    (config, variables), random = golden.load(name), np.random.default_rng(0)
    params, low_rank = flatten_dict(variables["params"], sep="."), {}
    for path, box in adaptable(config).items():
        shape, inputs = box.value.shape, len(box.inputs)
        a, b = random.normal(size=(*shape[:inputs], 3)), random.normal(size=(3, *shape[inputs:]))
        low_rank |= {f"{path}.a": a.astype(np.float32), f"{path}.b": b.astype(np.float32)}
        params[path] = np.asarray(params[path]) + 2 * np.tensordot(a, b, 1).astype(np.float32)
    family = get_family(golden.FAMILY[name])
    tree = mythos_tree(low_rank)
    write_adapter(tmp_path / "peft", family, config, tree, rank=3, alpha=6.0, base="somebody/model")
    save_pretrained(tmp_path / "merged", config, {**variables, "params": mythos_tree(params)}, format=family.name)
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    theirs = merge(their_tensors(name), load_file(tmp_path / "peft" / "adapter_model.safetensors"), 2)
    for key, array in theirs.items():
        np.testing.assert_allclose(ours[key], array, rtol=0, atol=1e-5, err_msg=key)
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "somebody/model"
    assert fields["target_modules"] == sorted(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (3, 6, False)


def mythos_tree(flat):
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def test_what_is_added_has_the_same_bits_on_every_machine():
    """Each product and each sum is rounded once, in the order of the rank; here by way of float64."""
    random = np.random.default_rng(0)
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((7, 5), (5, _BLOCK // 3)))
    expected = np.zeros((7, _BLOCK // 3), np.float32)
    for k in range(5):
        term = np.outer(a[:, k].astype(np.float64), b[k].astype(np.float64)).astype(np.float32)
        expected = (expected.astype(np.float64) + term).astype(np.float32)
    np.testing.assert_array_equal(_fixed_product(a, b), expected)


def test_layouts_that_are_no_linear_map():
    assert low_rank_layouts(LINEAR) == ("rank d_in -> d_in rank", "d_out rank -> rank d_out")
    assert low_rank_layouts(TO_HEADS) == ("rank d -> d rank", "(h k) rank -> rank h k")
    assert low_rank_layouts(SAME) is None
    assert low_rank_layouts("(h k) -> h k") is None  # a bias
    assert low_rank_layouts("a b -> a b") is None  # outputs first
    assert low_rank_layouts("e o i -> e i o") is None  # experts


MODULES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up")]
ONE = "model.layers.1.self_attn.q_proj"
ADAPTED = {
    "ends": ({"target_modules": ["q_proj"]}, {m for m in MODULES if m.endswith("q_proj")}),
    "not a part of a name": ({"target_modules": ["proj", "1.self_attn.q_proj"]}, {ONE}),
    "a whole name": ({"target_modules": [ONE]}, {ONE}),
    "an expression": ({"target_modules": r".*layers\.1\..*(q|k)_proj"}, {ONE, ONE.replace("q_proj", "k_proj")}),
    "an expression for the whole name": ({"target_modules": "q_proj"}, set()),
    "excluded": (
        {"target_modules": "all-linear", "exclude_modules": ["up", "k_proj"]},
        {m for m in MODULES if "q_" in m},
    ),
    "excluded by an expression": (
        {"target_modules": ["up", "q_proj"], "exclude_modules": r".*(\.up|[02-9]\..*|11.*)"},
        {ONE},
    ),
    "layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1, 40]}, {ONE}),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]}, {ONE}),
    "layers of another list": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
        set(),
    ),
    "a whole name, whatever the layers": ({"target_modules": [ONE], "layers_to_transform": [2]}, {ONE}),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_which_modules(kind, tmp_path):
    """By PEFT's rules (`check_target_module_exists`), worked out by hand."""
    fields, wanted = ADAPTED[kind]
    config = read_adapter_config(write(tmp_path / "peft", {}, "x", **fields))
    assert {module for module in MODULES if config.adapts(module)} == wanted


def test_ranks_and_scales(tmp_path):
    config = read_adapter_config(
        write(
            tmp_path / "peft",
            {},
            "x",
            r=4,
            lora_alpha=2,
            use_rslora=True,
            rank_pattern={"layers.1.self_attn.q_proj": 9, "k_proj": 1},
            alpha_pattern={r"^model\.layers\.1\.mlp\.up": 8, "_proj": 100},
        )
    )
    assert [config.rank_of(m) for m in MODULES[3:6]] == [9, 1, 4]
    assert [config.scale_of(m) for m in MODULES[3:6]] == [2 / 3, 2.0, 4.0]


def test_names_of_targets():
    """PEFT compares ends, so that a matrix in some layers only needs its whole name."""
    modules = [f"layers.{i}.{x}_proj" for i in (1, 11) for x in "qv"]
    assert target_names(modules, modules) == ["q_proj", "v_proj"]
    assert target_names(["layers.1.q_proj", "layers.1.v_proj", "layers.11.v_proj"], modules) == [
        "v_proj",
        "layers.1.q_proj",
    ]


REFUSED = {
    "another method": ({"peft_type": "IA3"}, "peft_type: got 'IA3', allowed: LORA"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS', allowed: CAUSAL_LM"),
    "DoRA": ({"use_dora": True}, "use_dora: got True, allowed: null or false"),
    "trained biases": ({"bias": "lora_only"}, "bias: got 'lora_only', allowed: 'none'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save: got ['lm_head'], allowed: null or false"),
    "of the future": ({"use_magic": 1}, "use_magic: unknown field, got 1; it may change the model"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', allowed: true, false"),
    "no rank": ({"r": 0}, "r: got 0, allowed: an integer from 1"),
    "a rank of a pattern": ({"rank_pattern": {"q_proj": "a"}}, "rank_pattern: q_proj: got 'a', allowed: an integer"),
    "no number": ({"lora_alpha": "x"}, "lora_alpha: got 'x', allowed: a number"),
    "no target": ({"target_modules": None}, "target_modules: got nothing, allowed: down_proj, gate_proj, k_proj"),
    "a misspelt target": ({"target_modules": ["q_prj"]}, "up_proj, v_proj; did you mean q_proj?"),
    "the embedding": ({"target_modules": ["embed_tokens"]}, "target_modules: got model.embed_tokens; allowed: d"),
    "the head": ({"target_modules": ["lm_head", "q_proj"]}, "got lm_head, but the head has no low-rank weights here"),
    "not an expression": ({"target_modules": "(q_proj"}, "got '(q_proj', allowed: a regular expression (miss"),
    "a slow expression": ({"target_modules": "(.*a)*b"}, "got '(.*a)*b', allowed: a regular expression with "),
    "a slower one": ({"rank_pattern": {"a*" * (MOST_REPETITIONS + 1): 1}}, "regular expression with at most 4"),
    "more targets than weights": ({"target_modules": ["q_proj", "o_proj", "up_proj"]}, "missing: base_model.model"),
    "fewer": ({"target_modules": ["q_proj"]}, "unexpected: base_model.model.model.layers.0.self_attn.o_proj"),
    "another rank": ({"r": 4}, "self_attn.o_proj.lora_A.weight: shape [3, 64], expected [4, 64]"),
    "no base": ({"base_model_name_or_path": None}, "got nothing, allowed: a model; or --base MODEL"),
    "a base that is gone": ({"base_model_name_or_path": "/no/where"}, "no such file or directory, and not a Hugging"),
    "another revision": ({"base_model_name_or_path": "a/b", "revision": "v2"}, "revision: got 'v2', allowed: null"),
    "a list": ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path: got ['a'], allowed: a text, or null"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, llama_adapter):
    fields, message = REFUSED[kind]
    path = llama_adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        open_pretrained(llama_adapter)
    assert "\n" not in str(error.value)


def test_bad_tensors(llama_adapter, tmp_path):
    file = llama_adapter / "adapter_model.safetensors"
    good = load_file(file)
    one = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, message in (
        ({one.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(3, np.float32)}, "unexpected: .*magnitude"),
        ({one: good[one].astype(np.int32)}, "lora_A.weight: is int32, allowed: float16, bfloat16, float32"),
        ({one: good[one].T.copy()}, r"lora_A.weight: shape \[64, 3\], expected \[3, 64\]"),
        (
            {one.replace(".weight", ".other.weight"): good[one]},
            "holds the adapters one without a name, other, allowed: one",
        ),
        ({one.removeprefix(PREFIX): good[one]}, "unexpected: model.layers.0.self_attn.q_proj.lora_A.weight"),
    ):
        save_file({**good, **change}, file)
        with pytest.raises(ConfigError, match=message):
            open_pretrained(llama_adapter)
    file.unlink()
    with pytest.raises(
        ConfigError, match=r"peft: has no adapter_model.safetensors; allowed: what PEFT's save_pretrained"
    ):
        open_pretrained(llama_adapter)


def test_a_base_of_ours_and_base_flag(llama_adapter, tmp_path):
    """Its tensors have our names; the adapter's are those of the format that it came from."""
    convert(LLAMA, tmp_path / "ours", "mythos_jax", progress=False)
    _, wanted = load_pretrained(llama_adapter)
    path = llama_adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "gone/gone"}))
    loaded = mythos_jax.load(llama_adapter, base=str(tmp_path / "ours"))
    assert_close({"params": loaded.variables["params"]}, {"params": wanted["params"]})
    with pytest.raises(ConfigError, match="--base: got x, allowed only with a PEFT directory"):
        mythos_jax.load(LLAMA, base="x")
    with pytest.raises(ConfigError, match="peft, an adapter, allowed: a whole model"):
        mythos_jax.load(llama_adapter, base=str(llama_adapter))


def test_converting_keeps_the_dtype(tmp_path):
    """As PEFT's merge_and_unload does; loading does not round."""
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in their_tensors("llama").items()}
    base = directory_of(tmp_path / "base", "llama", tensors)
    adapter = random_adapter(shapes_of(tensors, ("q_proj", "o_proj")))
    path = write(tmp_path / "peft", adapter, base)
    exact = merge({name: x.astype(np.float32) for name, x in tensors.items()}, adapter, 2)
    convert(path, tmp_path / "merged", "llama", progress=False)
    for name, x in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert x.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(x.astype(np.float32), exact[name], rtol=2**-8, atol=1e-6)
    assert_close(load_pretrained(path)[1], load_pretrained(directory_of(tmp_path / "f", "llama", exact))[1])


def test_commands(tmp_path, capsys):
    """A GGUF file as base, named by a PEFT directory with a tokenizer of its own."""
    base = open_pretrained(TINY)
    modules = {name: base.table.their_shapes[f"{name}.weight"] for name in ("model.layers.0.self_attn.q_proj",)}
    path = write(tmp_path / "peft", random_adapter(modules), TINY, target_modules=list(modules))
    assert main(["info", str(path)]) == 0
    assert "peft: 0 + " in capsys.readouterr().out
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "llama"]) == 0
    out = capsys.readouterr().out
    assert "peft: low-rank weights beside 1 matrices" in out
    assert "tokenizer.json" in out
    words = ["--max-new-tokens", "3"]
    assert main(["generate", str(path), "the rain", *words]) == 0
    ours = capsys.readouterr().out
    assert main(["generate", str(tmp_path / "out"), "the rain", *words]) == 0
    assert capsys.readouterr().out == ours
    # The tokenizer of the adapter counts.
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "out" / file, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "ours"}))
    assert mythos_jax.load(path).loaded.conventions.chat_template == "ours"
    convert(path, tmp_path / "own", "llama", progress=False)
    assert json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())["chat_template"] == "ours"


@pytest.fixture(scope="module")
def with_text(tmp_path_factory):
    """A base with a chat template in a file of its own, and with answers that end in several ways; an adapter of it."""
    folder = tmp_path_factory.mktemp("text")
    convert(TINY, folder / "base", "llama", progress=False)
    (folder / "base" / "chat_template.jinja").write_text("of the base")
    for file, eos in (("generation_config.json", [40, 41]), ("config.json", 42)):
        fields = json.loads((folder / "base" / file).read_text())
        (folder / "base" / file).write_text(json.dumps({**fields, "eos_token_id": eos}))
    modules = shapes_of(load_file(folder / "base" / "model.safetensors"), ("q_proj",))
    write(folder / "peft", random_adapter(modules), folder / "base", target_modules=["q_proj"])
    return folder


# The files that an adapter has of its own -> its chat template, and what its answers end with besides the base's.
OWN_TEXT = {
    "none": ({}, "of the base", {40, 41, 42}),
    "the tokenizer": ({"chat_template": "ours"}, "ours", {40, 41, 42}),
    "all": ({"chat_template": "ours", "eos_token_id": 50}, "ours", {50, 42}),
}


def settings_of(folder):
    return json.loads((folder / "base" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("kind", OWN_TEXT)
def test_text_of_an_adapter(kind, with_text, tmp_path):
    """What its own files do not say is that of the base; converted and retrofitted it is the same."""
    own, template, stops = OWN_TEXT[kind]
    adapter = shutil.copytree(with_text / "peft", tmp_path / "peft")
    if own:
        shutil.copy(with_text / "base" / "tokenizer.json", adapter)
        settings = {**settings_of(with_text), "chat_template": own["chat_template"]}
        (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    if "eos_token_id" in own:
        (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": own["eos_token_id"]}))
    loaded = mythos_jax.load(adapter).loaded
    assert loaded.conventions.chat_template == template
    ends = {loaded.tokenizer.token_id(settings_of(with_text)["eos_token"]), loaded.tokenizer.end_of_document}
    assert {*loaded.conventions.stop_tokens} == stops | ends
    convert(adapter, tmp_path / "merged", "llama", progress=False)
    source = open_pretrained(adapter)
    plan = Plan(make_cut(len(dense_layers(source.config))))
    retrofit(source, tmp_path / "looped", replace(plan, format="mythos_jax"), progress=False)
    for name in ("merged", "looped"):
        tokenizer, conventions = text_of(FileSource(tmp_path / name))
        assert (tokenizer.fingerprint, conventions) == (loaded.tokenizer.fingerprint, loaded.conventions)


def test_models_that_peft_does_not_know(tmp_path):
    """A fused tensor has no module for a part of it, and no original can be what only we can run."""
    config, _ = golden.load("raven_llama")
    low_rank = {"prelude_0": {"attention": {"q": {"kernel": {"a": np.ones((60, 2)), "b": np.ones((2, 6, 10))}}}}}
    with pytest.raises(
        ConfigError, match=r"prelude_0.attention.q.kernel is a part of raven's transformer.prelude.0.*--to raven"
    ):
        write_adapter(tmp_path / "x", family_for(config, None, "x"), config, low_rank, 2, 4.0, "base")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="runs/x: PEFT knows models of transformers only, and "):
        family_for(golden.load("openmythos_mla")[0].__class__(prelude_layers=1, injection="none"), None, "runs/x")


def test_a_run_that_starts_from_an_adapter(llama_adapter, tmp_path):
    """Its model is the base's, its first weights are the merged ones, and it keeps the base's files."""
    file = tmp_path / "c.yaml"
    file.write_text(
        f"training: {{init_from: {llama_adapter}}}\ndata: {{task: {{name: p_hop, difficulty: [2]}}, seq_len: 32}}\n"
    )
    config = load_config(file)
    assert config.model == golden.load("llama")[0]
    (tmp_path / "run").mkdir()
    keep_source(str(llama_adapter), tmp_path / "run", with_text=True)
    assert (tmp_path / "run" / "source" / "generation_config.json").is_file()
    initial = load_initial(config, tmp_path / "run")
    assert_close({"params": initial["params"]}, {"params": load_pretrained(llama_adapter)[1]["params"]})
    fields = json.loads((llama_adapter / "adapter_config.json").read_text())
    (llama_adapter / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "gone"}))
    with pytest.raises(ConfigError, match=r"adapter_config.json: base_model_name_or_path: gone: no such file"):
        load_config(file)
