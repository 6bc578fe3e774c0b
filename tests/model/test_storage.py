"""Models whose weights are stored in fewer bits compute what float32 models with those very values compute."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import mythos_jax
from mythos_jax.config import MeshConfig
from mythos_jax.errors import ConfigError
from mythos_jax.inference.generate import generate
from mythos_jax.model.gather import SCALES
from mythos_jax.model.mythos import Mythos, output_table
from mythos_jax.model.storage import Storage
from mythos_jax.porting.convert import convert
from mythos_jax.porting.pretrained import load_variables, save_pretrained
from mythos_jax.porting.reading import FileSource
from mythos_jax.runs.load import load_model, placer
from mythos_jax.sharding import make_mesh, use_mesh
from tests import reference
from tests.tiny import GQA, HUGINN, MLA, OURO, PARCAE, moe_fields, run, some_state, some_tokens, variables
from tests.tiny import exact as in_float64

MODELS = {
    "openmythos": GQA,
    "mla_moe": replace(MLA, **moe_fields(4)),
    "huginn": HUGINN,
    "parcae": PARCAE,
    "ouro": OURO,
}


INT8 = Storage(int8=True)


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, atol=3e-4 * np.abs(expected).max())


def exact(stored):
    """The same values in float32, without scales."""
    flat = flatten_dict({name: tree for name, tree in stored.items() if name != SCALES}, sep=".")
    for name, scale in flatten_dict(stored.get(SCALES, {}), sep=".").items():
        flat[f"params.{name}"] = flat[f"params.{name}"].astype(jnp.float32) * scale
    return unflatten_dict({path: x.astype(jnp.float32) for path, x in flat.items()}, sep=".")


@pytest.mark.parametrize("name", MODELS)
def test_int8_logits_are_those_of_the_stored_values(name):
    config = MODELS[name]
    stored = INT8.store_all(config, variables(config))
    tokens = some_tokens()[:1]
    state = {} if config.initial_state != "noise" else {"initial_state": some_state(config)[:1]}
    got = run(config, stored, tokens, loops=2, **state).logits[0]
    state = {name: x[0] for name, x in state.items()}
    assert_close(got, reference.forward(config, in_float64(exact(stored)), tokens[0], 2, **state).logits)


def test_bfloat16_logits_are_those_of_the_stored_values():
    config = MODELS["mla_moe"]
    stored = Storage("bfloat16").store_all(config, variables(config))
    tokens = some_tokens()[:1]
    got = run(config, stored, tokens, loops=2).logits[0]
    assert_close(got, reference.forward(config, in_float64(exact(stored)), tokens[0], 2).logits)


def test_decoding_with_int8_gives_the_tokens_of_the_stored_values():
    config = MODELS["mla_moe"]  # whose cache is of latents, multiplied with the matrices of the heads
    stored = INT8.store_all(config, variables(config))
    got, expected = (
        generate(Mythos(config), x, some_tokens(), loops=2, max_new_tokens=4).tokens for x in (stored, exact(stored))
    )
    np.testing.assert_array_equal(got, expected)


def test_what_is_stored_how():
    config = replace(GQA, tied_embedding=False)
    whole = flatten_dict(variables(config), sep=".")
    int8 = flatten_dict(INT8.store_all(config, variables(config)), sep=".")
    for path, array in int8.items():
        if array.dtype == jnp.int8:
            scale, inputs = int8[path.replace("params", SCALES)], whole[path]
            assert np.abs(array).max() == 127
            largest = np.abs(inputs).max(tuple(i for i, n in enumerate(scale.shape) if n == 1), keepdims=True)
            assert (scale * 127 >= largest).all()
            np.testing.assert_allclose(scale * 127, largest, rtol=2.0**-16)
            assert (np.abs(array * scale - inputs) <= scale * (0.5 + 1e-5)).all()
    left = {path for path, array in int8.items() if array.dtype != jnp.int8 and not path.startswith(SCALES)}
    assert {path.rsplit(".", 1)[-1] for path in left if int8[path].ndim > 1} == {"kernel", "scale", "halt_kernel"}
    assert [path for path in left if path.endswith(".kernel")] == ["params.recurrence.cell.layer_0.moe.router.kernel"]
    half = flatten_dict(Storage("float16").store_all(config, variables(config)), sep=".")
    exact = {path for path in half if half[path].ndim == 1 or "router" in path or "halt_kernel" in path}
    assert {half[path].dtype.name for path in exact} == {"float32"}
    assert {half[path].dtype.name for path in half.keys() - exact} == {"float16"}
    with pytest.raises(ConfigError, match=r"params\.embedding: has numbers beyond float16's largest, 65504"):
        Storage("float16").store("params.embedding", np.full((2, 2), 7e4, np.float32), None)


def test_the_head_of_losses_has_the_stored_values():
    stored = INT8.store_all(GQA, variables(GQA))
    np.testing.assert_array_equal(output_table(stored), output_table(exact(stored)))


def test_int8_on_a_mesh():
    config = MODELS["mla_moe"]
    stored = INT8.store_all(config, variables(config))
    expected = reference.forward(config, in_float64(exact(stored)), some_tokens()[0], 2).logits
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
    put = placer(config, mesh)
    cut = unflatten_dict({path: put(path, x) for path, x in flatten_dict(stored, sep=".").items()}, sep=".")
    up = cut["params"]["prelude_0"]["feed_forward"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size == up.size // 4
    with use_mesh(mesh):
        got = jax.jit(partial(Mythos(config).apply, loops=2))(cut, some_tokens()).logits[0]
    assert_close(got, expected)


def test_an_int8_directory_is_read_as_it_is(tmp_path):
    config = MODELS["mla_moe"]
    save_pretrained(tmp_path / "whole", config, variables(config))
    convert(tmp_path / "whole", tmp_path / "int8", "mythos_jax_int8", progress=False)
    made = load_model(tmp_path / "whole", storage=INT8).variables
    stored = load_model(tmp_path / "int8").variables
    jax.tree.map(np.testing.assert_array_equal, stored, made)
    assert stored["params"]["embedding"].dtype == jnp.int8
    # Written again from memory, and back in float32: nothing is rounded twice.
    save_pretrained(tmp_path / "again", config, stored, "mythos_jax_int8")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "int8" / "model.safetensors"
    ).read_bytes()
    assert load_model(tmp_path / "int8").storage == INT8
    whole = load_model(tmp_path / "int8", keep_int8=False).variables  # as training starts from it
    jax.tree.map(np.testing.assert_array_equal, whole, exact(made))
    convert(tmp_path / "int8", tmp_path / "back", "mythos_jax", progress=False)
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "back").variables, exact(made))


def test_loading_places_each_tensor_before_the_next_is_read(tmp_path):
    save_pretrained(tmp_path / "model", GQA, variables(GQA))
    source, events = FileSource(tmp_path / "model"), []
    read = source.parameter
    source.parameter = lambda path: events.append(("read", path)) or read(path)
    load_variables(source, INT8, lambda path, array: events.append(("put", path, array.dtype.name)))
    paths = list(source.table.our_shapes)
    assert [event[1] for event in events if event[0] == "read"] == paths
    for before, after in pairwise(events):
        assert after[0] == "put" or before[0] == "put"
    assert ("put", "params.embedding", "int8") in events
    assert ("put", "scales.embedding", "float32") in events


@pytest.mark.parametrize("flag", ["dtype", "weights"])
def test_words_that_are_not_allowed(flag):
    with pytest.raises(ConfigError, match=f"{flag}: got 'int4', allowed: "):
        mythos_jax.load("nowhere", **{flag: "int4"})
