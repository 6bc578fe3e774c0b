"""What we write opens with transformers' own loader, and computes the same bits as the original files."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mythos_jax.data.conventions import read_conventions
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.porting.convert import convert
from mythos_jax.porting.torch_writer import TorchWriter
from tests.porting import golden
from tests.porting.test_gguf import TINY


def logits(directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("name", golden.DENSE)
def test_round_trip_through_transformers(name, tmp_path):
    """To our format and back. Other versions of transformers, and other loaders, are in originals.py."""
    convert(golden.FOLDER / name, tmp_path / "ours", "mythos_jax", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", golden.FAMILY[name], progress=False)
    tokens = golden.arrays(name)["input_ids"]
    np.testing.assert_array_equal(logits(tmp_path / "back", tokens), logits(golden.FOLDER / name, tokens))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_we_write(mmap, tmp_path):
    """Every dtype, also what has no or no more than one element."""
    rng = np.random.default_rng(0)
    tensors = {str(shape): torch.from_numpy(rng.normal(size=shape)) for shape in [(3, 5), (2, 3, 4), (), (0, 4), (7,)]}
    tensors |= {f"{name} {dtype}": x.to(dtype) for name, x in tensors.items() for dtype in (torch.half, torch.float)}
    with TorchWriter(tmp_path / "x.bin") as file:
        for name, x in tensors.items():
            file.add(name, x.numpy())
    read = torch.load(tmp_path / "x.bin", weights_only=True, mmap=mmap)
    assert list(read) == list(tensors)
    for name, x in tensors.items():
        assert read[name].dtype == x.dtype
        assert torch.equal(read[name], x)


def test_tokenizer_of_a_gguf_file(tmp_path):
    convert(TINY, tmp_path / "out", "llama", progress=False)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(TINY)
    conventions = read_conventions(TINY, ours, None, ours.vocab_size)
    text = "the rain, 2 times\n"
    assert theirs(text).input_ids == conventions.begin(ours.encode(text).tolist())
    assert {name: theirs.special_tokens_map[name] for name in conventions.special_tokens} == conventions.special_tokens
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.bos_token_id, config.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
