"""Random `adapter_config.json` and names of tensors: an adapter is read, or refused in one line, and never hangs.

What is read is compared with the rule by which PEFT merges, W + alpha / rank B A, in numpy.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mythos_jax.errors import ConfigError
from mythos_jax.porting.adapted import open_pretrained
from mythos_jax.porting.peft_config import HANDLED, OFF, UNUSED
from tests.fuzz.budget import budget, no_hang
from tests.porting.test_peft import LLAMA, random_adapter, shapes_of, their_tensors, write

ENDS = ("q_proj", "v_proj", "o_proj", "down_proj")
PIECES = st.sampled_from(
    ["q_proj", "model", "layers", ".", r"\.", "*", "+", "(", ")", "|", "[", "]", "{9}", "^", "\\", "1"]
)
TEXT = st.one_of(st.sampled_from([*ENDS, "all-linear", "layers", ""]), st.lists(PIECES, max_size=9).map("".join))
NUMBER = st.one_of(st.integers(-2, 9), st.floats(allow_nan=True), st.integers(2**40, 2**70))
LEAF = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
VALUE = st.one_of(LEAF, st.lists(LEAF, max_size=3), st.dictionaries(TEXT, LEAF, max_size=3))
NAMES = st.one_of(st.sampled_from([*HANDLED, *HANDLED, *UNUSED, *OFF]), st.text(max_size=8))


def opened(path):
    try:
        return open_pretrained(path), ""
    except ConfigError as error:
        return None, str(error)


@budget(60, 3000)
@given(
    ends=st.sets(st.sampled_from(ENDS), min_size=1),
    changes=st.dictionaries(NAMES, VALUE, max_size=3),
    dropped=st.integers(0, 30),
    prefix=st.sampled_from(["", "base_model.model.", "x."]),
)
def test_adapters(ends, changes, dropped, prefix):
    tensors = random_adapter(shapes_of(their_tensors("llama"), ends))
    renamed = {prefix + name.removeprefix("base_model.model."): array for name, array in tensors.items()}
    kept = {name: array for i, (name, array) in enumerate(sorted(renamed.items())) if i != dropped}
    good = len(kept) == len(tensors) and prefix != "x." and not changes
    with tempfile.TemporaryDirectory() as folder, no_hang():
        path = write(Path(folder) / "peft", kept, LLAMA, target_modules=sorted(ends))
        fields = json.loads((path / "adapter_config.json").read_text()) | changes
        (path / "adapter_config.json").write_text(json.dumps(fields))
        source, message = opened(path)
        if source is None:
            assert not good, message
            assert "\n" not in message
            return
        assert len(kept) == len(tensors)
        assert prefix != "x."
        if good:
            values = source.parameter("params.recurrence.cell.layer_0.feed_forward.down.kernel")
            base = their_tensors("llama")["model.layers.0.mlp.down_proj.weight"]
            name = "base_model.model.model.layers.0.mlp.down_proj.lora_"
            added = tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"] * 2 if "down_proj" in ends else 0
            np.testing.assert_allclose(values, (base + added).T, rtol=0, atol=1e-5)
