"""Files of Hugging Face's transformers and of remote code: sizes of published models, both spellings of RoPE, traps."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.config import MeshConfig
from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.depths import evaluate_depths
from mythos_jax.evaluation.policies import make_settings
from mythos_jax.flops import count_parameters
from mythos_jax.inference.generate import generate
from mythos_jax.model.halting import Halting
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.families import detect, get_family
from mythos_jax.porting.pretrained import load_pretrained
from mythos_jax.sharding import make_mesh
from tests.porting import golden
from tests.porting.test_golden import run, run_static

DENSE_CONFIG = {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}


def model_config(family, **fields):
    return get_family(family).model_config({**DENSE_CONFIG, **fields}, "config.json")


def dense(family, L, d, F, H, G, K, V, tied=False, **more):
    return model_config(
        family,
        num_hidden_layers=L,
        hidden_size=d,
        intermediate_size=F,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        vocab_size=V,
        tie_word_embeddings=tied,
        **more,
    )


def raven(family, layers, d, F, H, G, K, V):
    prelude, core, coda = layers
    return get_family(family).model_config(
        {
            "n_embd": d,
            "intermediate_size": F,
            "n_heads": H,
            "num_key_value_heads": G,
            "head_dim": K,
            "vocab_size": V,
            "n_layers_in_prelude": prelude,
            "n_layers_in_recurrent_block": core,
            "n_layers_in_coda": coda,
            "mean_recurrence": 4,
            "block_size": 64,
            "norm_eps": 1e-5,
            "rope_theta": 1e4,
            "init_values": {"std": 0.0087},
            "tie_embeddings": False,
        },
        "config.json",
    )


PUBLISHED = {
    "SmolLM2-135M": (dense("llama", 30, 576, 1536, 9, 3, 64, 49152, True), 134_515_008),
    "TinyLlama-1.1B": (dense("llama", 22, 2048, 5632, 32, 4, 64, 32000), 1_100_048_384),
    "Llama-3.2-1B": (dense("llama", 16, 2048, 8192, 32, 8, 64, 128256, True), 1_235_814_400),
    "Llama-3.1-8B": (dense("llama", 32, 4096, 14336, 32, 8, 128, 128256), 8_030_261_248),
    "Qwen2.5-0.5B": (dense("qwen2", 24, 896, 4864, 14, 2, 64, 151936, True), 494_032_768),
    "Qwen2.5-7B": (dense("qwen2", 28, 3584, 18944, 28, 4, 128, 152064), 7_615_616_512),
    "Qwen3-0.6B": (dense("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True), 596_049_920),
    "Qwen3-8B": (dense("qwen3", 36, 4096, 12288, 32, 8, 128, 151936), 8_190_735_360),
    "OLMo-2-1B": (dense("olmo2", 16, 2048, 8192, 16, 16, 128, 100352), 1_484_916_736),
    "Mistral-7B-v0.3": (dense("llama", 32, 4096, 14336, 32, 8, 128, 32768), 7_248_023_552),
    "Nanbeige4.2-3B": (dense("nanbeige", 22, 3072, 10752, 48, 8, 128, 166144, num_loops=2), 4_169_800_704),
    "Ouro-1.4B": (dense("ouro", 24, 2048, 5632, 16, 16, 128, 49152), 1_434_652_673),
    "Ouro-2.6B": (dense("ouro", 48, 2048, 5632, 16, 16, 128, 49152), 2_667_974_657),
    "Llama-3.2-1B 4,6,4": (raven("raven", (4, 6, 4), 2048, 8192, 32, 8, 64, 128256), 1_385_228_288),
    "TinyLlama 2,4,2": (raven("raven", (2, 4, 2), 2048, 5632, 32, 4, 64, 32000), 491_816_960),
    "OLMo-2-1B 4,6,4": (raven("raven_olmo", (4, 6, 4), 2048, 8192, 16, 16, 128, 100352), 1_359_071_232),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_sizes(name):
    """Layers are alike, so the count is linear in them: two small models tell it. The first one is counted whole."""
    config, count = PUBLISHED[name]
    if name == next(iter(PUBLISHED)):
        assert count_parameters(config) == count
    outside = config.prelude_layers + config.coda_layers
    one, two = (count_parameters(replace(config, prelude_layers=0, coda_layers=0, loop_layers=n)) for n in (1, 2))
    assert one + (outside + config.loop_layers - 1) * (two - one) == count


@pytest.mark.parametrize("name", golden.DENSE)
def test_both_spellings_of_transformers(name):
    """transformers 4 writes rope_theta and rope_scaling, 5 rope_parameters; what we write has both."""
    config, _ = golden.load(name)
    old = json.loads((golden.FOLDER / name / "config_transformers4.json").read_text())
    family = get_family(golden.FAMILY[name])
    assert "rope_parameters" not in old
    assert family.model_config(old, "config.json") == config
    written = family.config_json(config)
    for missing in ("rope_parameters", "rope_theta"):
        fields = {key: value for key, value in written.items() if key != missing}
        assert family.model_config(fields, "config.json") == config
    with pytest.raises(ConfigError, match="rope_parameters: differs from rope_theta and rope_scaling"):
        family.model_config({**written, "rope_theta": 1.0}, "config.json")


REFUSED = {
    "no base": ("llama", {"rope_theta": None}, "rope_theta: missing, and so is rope_parameters"),
    "another scaling": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        "rope_scaling: rope_type: got 'yarn', a",
    ),
    "half a scaling": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor: missing"),
    "a window": ("llama", {"sliding_window": 4096}, "sliding_window: got 4096, allowed: None"),
    "a window in some layers": (
        "qwen2",
        {"layer_types": ["sliding_attention"]},
        "layer_types: got 'sliding_attention'",
    ),
    "biases": ("llama", {"attention_bias": True}, "attention_bias: got True, allowed: False"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act: got 'gelu', allowed: 'silu'"),
    "quantised weights": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: unknown field, got"),
    "hyper-connections": (
        "nanbeige",
        {"enable_hyper_connection": True},
        "enable_hyper_connection: got True, allowed: nul",
    ),
    "depth attention": ("nanbeige", {"enable_depth_attention": True}, "enable_depth_attention: got True"),
    "n-gram embeddings": ("nanbeige", {"emb_neighbor_num": 2}, "emb_neighbor_num: got 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case):
    family, fields, message = REFUSED[case]
    fields = {"rope_theta": 1e4, **fields}
    with pytest.raises(ConfigError, match=f"config.json: .*{message}"):
        dense(family, 1, 16, 16, 2, 2, 8, 32, **fields)


def test_a_window_that_is_off_is_no_window():
    config = dense("qwen2", 1, 16, 16, 2, 2, 8, 32, sliding_window=4096, use_sliding_window=False, max_window_layers=28)
    assert config == dense("qwen2", 1, 16, 16, 2, 2, 8, 32)


def test_families_are_told_by_their_tensors():
    for name in golden.NAMES:
        fields = {key: value for key, value in golden.fields(name).items() if key not in ("family", "model_type")}
        family = detect(fields, load_tensor_names(name), name).name
        # Nanbeige's tensors are Llama's: its config must tell.
        assert family == {"nanbeige": "llama"}.get(name, golden.FAMILY[name])
    assert detect({"model_type": "nanbeige"}, (), "config.json").name == "nanbeige"


def load_tensor_names(name):
    names = []
    for file in (golden.FOLDER / name).glob("*.safetensors"):
        header = file.read_bytes()
        names += json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    return names


def test_loops_of_nanbeige():
    """A list of loss weights decides, then num_loops, which is 1 in a file without it."""
    sizes = (3, 56, 100, 6, 2, 16, 128)
    assert dense("nanbeige", *sizes).loops == 1
    assert dense("nanbeige", *sizes, num_loops=2).loops == 2
    assert dense("nanbeige", *sizes, num_loops=2, loop_loss_weights=[0.2, 0.3]).loops == 3
    config, variables = golden.load("nanbeige")
    g, cell = golden.arrays("nanbeige"), dict(variables["params"]["recurrence"]["cell"])
    once = {**variables["params"], "final_norm": cell.pop("state_norm"), "recurrence": {"cell": cell}}
    for loops in golden.loop_counts("nanbeige"):
        out = run(replace(config, state_norm=False, final_norm=True), {"params": once}, g["input_ids"], loops, None)
        np.testing.assert_allclose(out.logits, g[f"logits_skipnorm_r{loops}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("loops", [4, 6])
def test_exit_distribution_of_ouro(loops):
    config, variables = golden.load("ouro")
    g = golden.arrays("ouro")
    p = np.asarray(run_static(config, variables, g["input_ids"], loops).aux.halt_probability_LBT)
    survival = np.cumprod(1 - p, axis=0)
    pdf = np.concatenate([p[:1], p[1:] * survival[:-1]])
    pdf[-1] = survival[-2]  # the last loop takes what is left
    np.testing.assert_allclose(np.moveaxis(pdf, 0, -1), g[f"exit_pdf_r{loops}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.cumsum(np.moveaxis(pdf, 0, -1), -1), g[f"exit_cdf_r{loops}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9, 1.0])
def test_exits_of_ouro(threshold):
    """The original runs all loops for all tokens and reads each out at its exit. Here tokens really stop, and later
    ones see their last keys and values: the first token of a row is the same in both."""
    config, variables = golden.load("ouro")
    g, name = golden.arrays("ouro"), f"q{round(100 * threshold)}_r4"
    policy = Halting("gate", threshold, 1, 4)
    out = run_static(config, variables, g["input_ids"], 4, halting=policy)
    np.testing.assert_array_equal(out.loops[:, 0], g[f"exit_step_{name}"][:, 0] + 1)
    np.testing.assert_allclose(out.logits[:, 0], g[f"exit_logits_{name}"][:, 0], rtol=0, atol=1e-4)
    alone = run_static(config, variables, g["input_ids"][:, :1], 4, halting=policy)
    np.testing.assert_array_equal(alone.loops[:, 0], out.loops[:, 0])
    if threshold == 1.0:
        np.testing.assert_array_equal(out.loops, 4)
        np.testing.assert_allclose(out.logits, g["logits_r4"], rtol=0, atol=1e-4)


def test_prompts_of_ouro_in_one_batch_are_as_if_alone():
    """Prompts of different lengths, with tokens that exit after different loops, which is not so in the original; at
    threshold 1 its greedy tokens."""
    config, variables = golden.load("ouro")
    g, lengths = golden.arrays("ouro"), np.array([16, 5, 11], np.int32)
    tokens = np.where(np.arange(16) < lengths[:, None], g["input_ids"], 0)

    def decode(rows, threshold):
        return generate(
            Mythos(config),
            variables,
            tokens[rows],
            lengths[rows],
            max_new_tokens=12,
            halting=Halting("gate", threshold),
        )

    for threshold in (0.5, 1.0):
        together = decode(slice(None), threshold)
        for b in range(3):
            alone = decode(slice(b, b + 1), threshold)
            np.testing.assert_array_equal(together.tokens[b], alone.tokens[0])
            np.testing.assert_array_equal(together.loops[b], alone.loops[0])
        assert np.unique(together.loops).tolist() == ([4] if threshold == 1 else [1, 2, 3, 4])
    np.testing.assert_array_equal(together.tokens[0], g["greedy_tokens"][0, :12])


def test_expected_logits_of_ouro():
    """`use_weighted_exit` of the original; rows of different depths, and the loss that an evaluation finds."""
    config, variables = golden.load("ouro")
    g, model = golden.arrays("ouro"), Mythos(config)
    expected = jax.jit(lambda loops: model.apply(variables, g["input_ids"], loops=loops, method="expected"))
    for loops in (4, 6):
        out = expected(jnp.full(3, loops))
        np.testing.assert_allclose(out.logits, g[f"expected_logits_r{loops}"], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(out.loops, loops)
    out = expected(jnp.array([6, 1, 4]))
    for b, truth in enumerate([g["expected_logits_r6"], g["logits_r1"], g["expected_logits_r4"]]):
        np.testing.assert_allclose(out.logits[b], truth[b], rtol=0, atol=1e-4)

    ids, mask = g["input_ids"], np.arange(15) % 4 > 0
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": np.tile(mask, (3, 1))}
    settings = make_settings(config, [4], [Halting("gate", 0.5)], expected=True)
    assert [s.criterion for s in settings] == [None, "expected", "gate"]
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    rows, _ = evaluate_depths(model, variables, [batch], settings, mesh=mesh, bytes_per_token=1, progress=False)
    for row, logits in zip(rows, [g["logits_r4"], g["expected_logits_r4"]], strict=False):
        log_p = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        nats = -np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], -1)[..., 0]
        assert row.loss == pytest.approx(nats[:, mask].mean(), abs=1e-5)
    assert rows[1].mean_loops == 4 > rows[2].mean_loops
    with pytest.raises(ConfigError, match="expected logits: got a model without an exit gate"):
        make_settings(golden.load("llama")[0], [1], expected=True)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"early_exit_threshold": 0.9}, "early_exit_threshold is 0.9; --halting gate:0.9 follows it"),
        ({"early_exit_step": 1, "early_exit_threshold": 1.0}, "early_exit_step is 1; --loops 2 reads out that one"),
        ({"early_exit_threshold": None, "use_weighted_exit": True}, "use_weighted_exit is true"),
        ({"early_exit_threshold": 1.0, "use_weighted_exit": True}, None),
    ],
)
def test_another_read_out_in_the_file_of_ouro_is_announced(fields, says, capsys):
    given = {**golden.fields("ouro"), **fields}
    assert get_family("ouro").model_config(given, "config.json") == golden.load("ouro")[0]
    lines = capsys.readouterr().err
    assert says in lines if says else lines == ""


def test_leftovers_of_huginn_in_a_raven_file():
    """rope_base is in the files and is not read (the golden logits depend on it); what is not supported is refused."""
    fields = golden.fields("raven_olmo")
    assert fields["rope_base"] != fields["rope_theta"] == golden.load("raven_olmo")[0].rope_theta
    family = get_family("raven_olmo")
    assert family.model_config({**fields, "initial_state_mode": "embed-init"}, "x").initial_state == "injected"
    with pytest.raises(ConfigError, match="initial_state_mode: got 'skip-adapter', allowed: random, embed-init"):
        family.model_config({**fields, "initial_state_mode": "skip-adapter"}, "x")


def test_an_untied_head_must_be_there(tmp_path):
    config, _ = golden.load("llama_tied")
    fields = {**get_family("llama").config_json(config), "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes((golden.FOLDER / "llama_tied" / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"missing: lm_head\.weight"):
        load_pretrained(tmp_path)
