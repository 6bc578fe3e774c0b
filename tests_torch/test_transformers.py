"""What we write opens with transformers' own loader, and computes the same bits as the original files."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mythos_jax.porting.convert import convert
from tests.porting import golden


def logits(directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("name", golden.DENSE)
def test_round_trip_through_transformers(name, tmp_path):
    """To our format and back; Mistral's come back as Llama's, which are the same computation."""
    convert(golden.FOLDER / name, tmp_path / "ours", "mythos_jax", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", golden.FAMILY[name], progress=False)
    tokens = golden.arrays(name)["input_ids"]
    np.testing.assert_array_equal(logits(tmp_path / "back", tokens), logits(golden.FOLDER / name, tokens))
