"""Comparison with the original: PyTorch and open-mythos 0.5.0. `make test-torch` sets up the environment."""

from dataclasses import asdict
from functools import partial

import jax
import numpy as np
import pytest
import torch
from open_mythos.main import MythosConfig, OpenMythos
from safetensors.torch import load_file, save_file

from mythos_jax.errors import ConfigError
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.convert import convert, format_report
from mythos_jax.porting.families import FAMILIES
from mythos_jax.porting.pretrained import load_pretrained, save_pretrained

TOLERANCE = 1e-4
BUFFERS = ("freqs_cis", "freqs_cis_mla")
TOKENS = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)


def make_original(attention, seed, perturbed):
    """The original with its initial weights, or perturbed so far from them that every tensor affects the logits."""
    torch.manual_seed(seed)
    config = MythosConfig(
        vocab_size=96,
        dim=48,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=32,
        max_loop_iters=4,
        prelude_layers=2,
        coda_layers=1,
        attn_type=attention,
        kv_lora_rank=12,
        q_lora_rank=20,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=10,
        n_experts=5,
        n_shared_experts=2,
        n_experts_per_tok=2,
        expert_dim=16,
        lora_rank=3,
    )
    model = OpenMythos(config).eval()
    if perturbed:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += (0.5 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter)
                if name.endswith("halt.bias"):
                    parameter.fill_(-1.0)
            model.recurrent.block.ffn.router_bias += 0.1 * torch.randn(5)
    return model


def original_logits(model, loops):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long(), n_loops=loops).numpy()


@partial(jax.jit, static_argnums=0)
def our_logits(config, variables, loops):
    return Mythos(config).apply(variables, TOKENS, loops=loops).logits


def save_checkpoint(model, path):
    """Saves a checkpoint as the original's trainer does."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(torch.from_numpy(TOKENS).long()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    checkpoint = {"step": 7, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "cfg": model.cfg}
    torch.save({**checkpoint, "vocab_size": 96}, path)


def attention_and_weights(test):
    test = pytest.mark.parametrize("perturbed", [False, True], ids=["initial", "perturbed"])(test)
    return pytest.mark.parametrize("attention", ["gqa", "mla"])(test)


@attention_and_weights
def test_round_trip_is_bit_identical(attention, perturbed, tmp_path):
    model = make_original(attention, 0, perturbed)
    state = {name: t for name, t in model.state_dict().items() if name not in (*BUFFERS, "head.weight")}
    torch.save({"model": model.state_dict(), "cfg": model.cfg}, tmp_path / "model.pt")
    config, variables = load_pretrained(tmp_path / "model.pt")
    save_pretrained(tmp_path / "back", config, variables, "openmythos")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == back[name].dtype
        assert torch.equal(tensor.view(torch.int32), back[name].view(torch.int32)), name


@attention_and_weights
def test_logits_agree_in_both_directions(attention, perturbed, tmp_path):
    model = make_original(attention, 1, perturbed)
    torch.save({"model": model.state_dict(), "cfg": model.cfg}, tmp_path / "model.pt")
    config, variables = load_pretrained(tmp_path / "model.pt")
    for loops in (1, 2, 4, 7):
        difference = np.abs(np.asarray(our_logits(config, variables, loops)) - original_logits(model, loops)).max()
        assert difference <= TOLERANCE
    save_pretrained(tmp_path / "back", config, variables, "openmythos")
    fields = FAMILIES["openmythos"].from_model(config)
    unused = ("max_output_tokens", "dropout")
    assert {k: v for k, v in fields.items() if k not in unused} == {
        k: v for k, v in asdict(model.cfg).items() if k not in unused
    }
    again = OpenMythos(MythosConfig(**fields)).eval()
    missing, unexpected = again.load_state_dict(load_file(tmp_path / "back" / "model.safetensors"), strict=False)
    assert not unexpected
    assert set(missing) == {*BUFFERS, "head.weight"}
    np.testing.assert_array_equal(original_logits(again, 4), original_logits(model, 4))


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_our_initial_weights_in_the_original(attention, tmp_path):
    """Weights from our own initialisation, in a config that the original can express."""
    config = FAMILIES["openmythos"].model_config(asdict(make_original(attention, 2, False).cfg), "cfg")
    variables = jax.jit(Mythos(config).init)(jax.random.key(3), TOKENS)
    save_pretrained(tmp_path / "out", config, variables, "openmythos")
    model = OpenMythos(MythosConfig(**FAMILIES["openmythos"].from_model(config))).eval()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    for loops in (1, 4):
        difference = np.abs(np.asarray(our_logits(config, variables, loops)) - original_logits(model, loops)).max()
        assert difference <= TOLERANCE


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_trainer_checkpoint_with_check(attention, tmp_path):
    model = make_original(attention, 4, True)
    save_checkpoint(model, tmp_path / "step_7.pt")
    to_ours = convert(tmp_path / "step_7.pt", tmp_path / "ours", "mythos_jax", check=True)
    assert to_ours.ok, format_report(to_ours)
    assert to_ours.coverage.tied == ["head.weight"]
    assert sorted(to_ours.coverage.buffers) == sorted(BUFFERS)
    back = convert(tmp_path / "ours", tmp_path / "back", "openmythos", check=True)
    assert back.ok, format_report(back)
    assert max(back.check.max_abs_difference.values()) <= TOLERANCE
    assert "greedy tokens agree" in format_report(back)


def test_check_detects_changed_weights(tmp_path, monkeypatch):
    model = make_original("gqa", 5, True)
    save_checkpoint(model, tmp_path / "model.pt")
    from mythos_jax.porting import check

    load_variables = check.load_variables

    def load_changed(source):
        config, variables = load_variables(source)
        return config, jax.tree.map(lambda x: x * 1.001, variables)

    monkeypatch.setattr(check, "load_variables", load_changed)
    report = convert(tmp_path / "model.pt", tmp_path / "ours", "mythos_jax", check=True)
    assert not report.ok


def test_check_without_an_original(tmp_path):
    with pytest.raises(ConfigError, match="no package has the originals of huginn and parcae"):
        convert("tests/golden/huginn", tmp_path / "out", "mythos_jax", check=True)


def test_common_ways_to_save_a_state_dict(tmp_path):
    """Bare, in bfloat16, with the prefixes of torch.compile and DDP, or as safetensors with both names of the head."""
    model = make_original("mla", 6, True)
    expected, variables = None, None
    fields = asdict(model.cfg)
    state = model.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}}, tmp_path / "prefixed.bin")
    save_file(
        {k: v.clone() for k, v in state.items() if k not in BUFFERS}, tmp_path / "both.safetensors", {"format": "pt"}
    )
    for name in ("bare.pt", "prefixed.bin", "both.safetensors"):
        config, variables = load_pretrained(tmp_path / name, config=fields)
        got = np.asarray(our_logits(config, variables, 4))
        expected = got if expected is None else expected
        np.testing.assert_array_equal(got, expected)
    assert np.abs(expected - original_logits(model, 4)).max() <= TOLERANCE

    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(low, tmp_path / "low.pt")
    _, variables = load_pretrained(tmp_path / "low.pt", config=fields)
    np.testing.assert_array_equal(variables["params"]["embedding"], low["embed.weight"].float().numpy())


def test_views_and_shared_storages(tmp_path):
    """Slices and transposes of one storage are read with the values that PyTorch gives them."""
    from mythos_jax.porting.torch_files import TorchFile

    base = torch.arange(60.0).reshape(5, 12)
    views = {"a": base[1:4, ::2], "b": base.T, "c": base[2], "d": torch.tensor(3.0), "e": torch.zeros(0, 4)}
    views["f"] = torch.nn.Parameter(base[:2])
    torch.save(views, tmp_path / "views.pt")
    file = TorchFile(tmp_path / "views.pt")
    for name, tensor in views.items():
        np.testing.assert_array_equal(file.read(name), tensor.detach().numpy())
