"""Models that cannot be used, as a user meets them: each command answers with one line and exit code 2, and writes
nothing."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from mythos_jax.cli import main
from mythos_jax.runs.load import load_model
from tests.porting import golden

TINY = golden.FOLDER / "gguf_tiny" / "model.gguf"
CONFIG = "data: {task: {name: parity, difficulty: [8]}, seq_len: 16}"
COMMANDS = [
    ["generate", "MODEL", "the rain"],
    ["eval", "MODEL", "--data", "rows"],
    ["convert", "MODEL", "out", "--to", "mythos_jax"],
    ["train", "tiny.yaml", "--workdir", "run", "--init-from", "MODEL"],
]


def copy(name):
    return Path(shutil.copytree(golden.FOLDER / name, "model"))


def truncated_gguf():
    content = TINY.read_bytes()
    Path("model.gguf").write_bytes(content[: len(content) * 2 // 3])
    return "model.gguf", "model.gguf: damaged or truncated GGUF file ("


def gguf_of_type(number):
    """The tiny file, where one tensor says that it is of another type; which stands after its name and its shape."""
    content = bytearray(TINY.read_bytes())
    at = content.index(b"blk.0.ffn_gate.weight") + len("blk.0.ffn_gate.weight") + 4 + 2 * 8
    assert content[at : at + 4] == (1).to_bytes(4, "little")  # F16
    content[at : at + 4] = number.to_bytes(4, "little")
    Path("model.gguf").write_bytes(content)


def undefined_quantisation():
    """Q8_1, which the library knows and cannot dequantise."""
    gguf_of_type(9)
    return "model.gguf", "model.gguf: blk.0.ffn_gate.weight: type Q8_1 cannot be dequantised"


def unknown_quantisation():
    """A type newer than the library."""
    gguf_of_type(99)
    return "model.gguf", "model.gguf: has a tensor of a type that the gguf library here does not know (np.uint32(99)"


def sliding_window():
    shutil.copy(golden.FOLDER / "mistral" / "config_window.json", copy("mistral") / "config.json")
    return "model", "model/config.json: sliding_window: got 5, allowed: None"


def missing_shard():
    (copy("qwen3") / "model-00002-of-00002.safetensors").unlink()
    return "model", "model/model.safetensors.index.json: names shard model-00002-of-00002.safetensors, which is missing"


def two_formats():
    """Weights of several names, none of them the usual one; where a name is, a line says what else was left."""
    shutil.copy(TINY, copy("llama") / "other.gguf")
    Path("model/model.safetensors").rename("model/weights.safetensors")
    return (
        "model",
        "model: got weight files: other.gguf, weights.safetensors, allowed: one of them (name it), or an index",
    )


CASES = [two_formats, truncated_gguf, undefined_quantisation, unknown_quantisation, sliding_window, missing_shard]


def assert_one_line(words, message, capfd):
    before = contents()
    assert main(words) == 2, words
    out, err = capfd.readouterr()
    assert not out, words
    assert err.startswith(f"mythos: {message}"), words
    assert err.count("\n") == 1
    assert len(err) < 300
    assert contents() == before, words


def contents():
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_command_says_it_in_one_line_and_writes_nothing(case, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    model, message = case()
    for command in COMMANDS:
        assert_one_line([model if word == "MODEL" else word for word in command], message, capfd)


@pytest.mark.parametrize(
    ("words", "special", "fits"), [(128, 0, True), (100, 0, True), (127, 9, True), (129, 0, False)]
)
def test_the_vocabulary_of_the_tokenizer(words, special, fits, tmp_path, monkeypatch, capfd):
    """A model of 128 tokens may have fewer words than that; special tokens that only its tokenizer has harm nobody."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({f"word{i}" if i else "<|endoftext|>": i for i in range(words)}))
    tokenizer.add_special_tokens(["<|endoftext|>", *(f"<extra_{i}>" for i in range(special))])
    tokenizer.save(str(copy("llama") / "tokenizer.json"))
    if fits:
        assert load_model("model").require_tokenizer().vocab_size == words + special
    else:
        message = "tokenizer model/tokenizer.json: got 129 tokens, allowed: at most 128, the model's vocabulary"
        assert_one_line(["generate", "model", "word1"], message, capfd)
