"""Names of parameters as users write them."""

from dataclasses import replace

import pytest

from mythos_jax.errors import ConfigError
from mythos_jax.model.names import PARTS, parameter_paths, select
from tests import tiny

UNTIED_MLA_MOE = replace(tiny.MLA_ACT, **tiny.moe_fields(4, 1), tied_embedding=False)


def chosen(config, *names):
    return select(config, names, "training.frozen")


def ending(config, *ends):
    return {path for path in parameter_paths(config) if path.endswith(ends)}


def starting(config, *starts):
    return {path for path in parameter_paths(config) if path.startswith(starts)}


@pytest.mark.parametrize("config", [tiny.GQA, UNTIED_MLA_MOE, tiny.PARCAE, tiny.HUGINN, tiny.OURO, tiny.RAVEN])
def test_parts_hold_every_parameter(config):
    """Embedding, prelude, loop, coda and head are all there is; only a tied table is in two of them."""
    found = []
    for part in ("embedding", "prelude", "loop", "coda", "head"):
        try:
            found += chosen(config, part)
        except ConfigError:
            assert {"prelude": config.prelude_layers, "coda": config.coda_layers}[part] == 0
    tied = ["embedding"] if config.tied_embedding else []
    assert sorted(found) == sorted([*parameter_paths(config), *tied])


def test_parts_of_a_dense_tied_model():
    c = tiny.DENSE
    assert chosen(c, "embedding") == chosen(c, "head") == {"embedding"}
    assert chosen(c, "prelude") == starting(c, "prelude_0.")
    assert chosen(c, "loop") == starting(c, "recurrence.cell.")
    assert chosen(c, "coda") == starting(c, "coda_0.", "final_norm.")
    assert chosen(c, "norms") == ending(c, "norm.scale")
    assert len(chosen(c, "norms")) == 8
    assert chosen(c, "injection") == starting(c, "recurrence.cell.injection.")


def test_parts_of_other_models():
    c = UNTIED_MLA_MOE
    assert chosen(c, "head") == {"unembedding"}
    assert chosen(c, "embedding") == {"embedding"}
    assert chosen(c, "gate") == {"recurrence.cell.halt_kernel", "recurrence.cell.halt_bias"}
    assert "prelude_0.attention.kv_norm.scale" in chosen(c, "norms")
    p = tiny.PARCAE
    assert chosen(p, "embedding") == {"embedding", "value_table_1", "value_table_2"}
    assert chosen(p, "prelude") == starting(p, "prelude_0.", "prelude_norm.")
    assert chosen(p, "coda") == starting(p, "coda_0.", "final_norm.", "readout_projection.")
    injection = "recurrence.cell.injection."
    assert chosen(p, "injection") == {injection + "b", injection + "dt_bias", injection + "log_a"}
    # The scales of the loop's own low-rank maps are no norms.
    assert not any(".lora." in path for path in chosen(tiny.GQA, "norms"))


def test_runs_of_components():
    c = tiny.GQA
    assert chosen(c, "q") == chosen(c, "attention.q") == chosen(c, "q.kernel") == ending(c, "attention.q.kernel")
    assert len(chosen(c, "q")) == 3
    assert chosen(c, "recurrence.cell.layer_0.attention") == starting(c, "recurrence.cell.layer_0.attention.")
    assert chosen(c, "layer_0.moe.gate") == {"recurrence.cell.layer_0.moe.gate"}  # not the shared expert's
    assert chosen(c, "feed_forward.gate") == ending(c, "feed_forward.gate.kernel")
    assert chosen(c, "gate") == starting(c, "recurrence.cell.halt_")  # the word is a part, also if experts have one
    assert chosen(UNTIED_MLA_MOE, "kv_up") == ending(UNTIED_MLA_MOE, "kv_up")


def test_stars_stay_in_a_component():
    c = tiny.OURO
    assert chosen(c, "layer_*.attention.k*") == ending(c, "attention.k.kernel", "k_bias", "k_norm.scale")
    assert chosen(c, "*bias") == ending(c, "q_bias", "k_bias", "v_bias", "halt_bias")
    assert chosen(c, "*") == set(parameter_paths(c))
    with pytest.raises(ConfigError):
        chosen(c, "layer_*kernel")
    assert chosen(c, "q", "v", "unembedding") == ending(c, "q.kernel", "v.kernel", "unembedding")
    assert chosen(c) == frozenset()


@pytest.mark.parametrize("name", ["", ".", "q.", ".q", "Q", "attention.q.", "q?", "[qk]", "params.embedding", "layer"])
def test_no_other_patterns(name):
    with pytest.raises(ConfigError):
        chosen(tiny.DENSE, name)


@pytest.mark.parametrize(
    ("config", "name", "nearest"),
    [
        (tiny.DENSE, "q_prj", "attention.q"),  # as others call it, misspelt
        (tiny.DENSE, "atention.q", "attention.q"),
        (tiny.DENSE, "embeding", "embedding"),
        (tiny.DENSE, "gate_proj", "feed_forward.gate"),
        (tiny.DENSE, "lm_head", "head"),
        (tiny.RAVEN, "adaptor", "adapter"),
        (tiny.PARCAE, "adaptor", "injection"),
        (tiny.GQA, "layer_1", "layer_0"),
    ],
)
def test_nearest_names(config, name, nearest):
    with pytest.raises(ConfigError) as error:
        chosen(config, "norms", name)
    message = str(error.value)
    assert message.startswith(f"training.frozen: got {name!r}, allowed: embedding, prelude, ")
    assert "\n" not in message
    near = message.partition("; nearest: ")[2].split(", ")
    assert nearest in near
    assert all(chosen(config, word) for word in near)


def test_parts_that_a_model_does_not_have():
    with pytest.raises(
        ConfigError, match="got 'gate', allowed: embedding, prelude, loop, coda, head, norms, injection,"
    ):
        chosen(tiny.DENSE, "gate")
    assert set(PARTS) == {"embedding", "prelude", "loop", "coda", "head", "norms", "injection", "gate"}
    with pytest.raises(ConfigError) as error:
        chosen(tiny.DENSE, "qqqqqqqqqq" * 100)
    assert "nearest" not in str(error.value)
    assert len(str(error.value)) < 400
