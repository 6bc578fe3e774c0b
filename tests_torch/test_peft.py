"""Low-rank weights in PEFT's format, against the library itself on models of transformers."""

import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from mythos_jax.model.gather import LOW_RANK
from mythos_jax.model.low_rank import adaptable, scaled
from mythos_jax.model.mythos import Mythos
from mythos_jax.porting.adapted import open_pretrained
from mythos_jax.porting.convert import convert
from mythos_jax.porting.families import get_family
from mythos_jax.porting.peft import modules_of, read_adapter, write_adapter
from mythos_jax.porting.peft_config import read_adapter_config
from mythos_jax.porting.pretrained import load_pretrained
from mythos_jax.porting.reading import FileSource
from tests.porting import golden

NAMES = ("llama_tied", "mistral", "qwen2", "qwen3", "olmo2")


def tokens(name):
    return golden.arrays(name)["input_ids"]


def model_of(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def their_logits(model, name):
    with torch.no_grad():
        return model(torch.from_numpy(tokens(name)).long()).logits.numpy()


def our_logits(config, variables, name):
    return np.asarray(Mythos(config).apply(variables, jnp.asarray(tokens(name)), loops=1).logits)


def random_low_rank(config, ends, rank, seed=0):
    """Weights beside the kernels whose path ends so, large enough to change every logit."""
    random, tree = np.random.default_rng(seed), {}
    for path, box in adaptable(config).items():
        if path.endswith(ends):
            node, inputs = tree, len(box.inputs)
            for part in path.split("."):
                node = node.setdefault(part, {})
            node["a"] = random.normal(size=(*box.value.shape[:inputs], rank)).astype(np.float32)
            node["b"] = random.normal(size=(rank, *box.value.shape[inputs:])).astype(np.float32) / 8
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_what_we_write(name, tmp_path):
    """Every matrix, and half of them, which have whole names in target_modules."""
    base = golden.FOLDER / name
    config, variables = load_pretrained(base)
    family = get_family(golden.FAMILY[name])
    for ends in (("kernel",), ("layer_1.attention.q.kernel", "down.kernel")):
        low_rank, out = random_low_rank(config, ends, 4), tmp_path / str(len(ends))
        write_adapter(out, family, config, low_rank, rank=4, alpha=6.0, base=str(base))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of unknown fields, of missing and unexpected tensors
            warnings.simplefilter("ignore", FutureWarning)  # transformers', of a name that peft uses
            adapted = PeftModel.from_pretrained(model_of(base), out)
        wanted = their_logits(adapted, name)
        assert np.abs(wanted - their_logits(model_of(base), name)).max() > 0.1
        ours = our_logits(config, {**variables, LOW_RANK: scaled(low_rank, 6 / 4)}, name)
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)
        np.testing.assert_allclose(our_logits(*load_pretrained(out), name), wanted, rtol=0, atol=1e-4)


TRAINED = {
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8},
    "patterns": {
        "target_modules": "all-linear",
        "r": 4,
        "use_rslora": True,
        "exclude_modules": ["k_proj"],
        "rank_pattern": {"o_proj": 2, r"model\.layers\.0\.mlp\.(gate|up)_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3.5},
    },
    "layers": {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "regex": {"target_modules": r".*\.(q|k)_proj", "lora_alpha": 5, "init_lora_weights": "gaussian"},
}


def trained(name, **fields):
    """A model that PEFT has trained for some steps."""
    torch.manual_seed(0)
    model = get_peft_model(model_of(golden.FOLDER / name), LoraConfig(task_type="CAUSAL_LM", **fields))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    ids = torch.from_numpy(tokens(name)).long()
    for _ in range(4):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("name", ["qwen2", "olmo2"])
def test_what_peft_trained(name, kind, tmp_path):
    model = trained(name, **TRAINED[kind])
    wanted = their_logits(model, name)
    model.save_pretrained(tmp_path / "peft")
    assert np.abs(wanted - their_logits(model_of(golden.FOLDER / name), name)).max() > 0.01
    np.testing.assert_allclose(our_logits(*load_pretrained(tmp_path / "peft"), name), wanted, rtol=0, atol=1e-4)
    convert(tmp_path / "peft", tmp_path / "merged", golden.FAMILY[name], progress=False)
    theirs, ours = model.merge_and_unload().state_dict(), model_of(tmp_path / "merged").state_dict()
    for key, tensor in theirs.items():
        np.testing.assert_allclose(ours[key].numpy(), tensor.numpy(), rtol=0, atol=1e-6)


def test_round_trip_is_exact(tmp_path):
    """What PEFT wrote, read, written and read: the same bits."""
    trained("qwen3", **TRAINED["some"]).save_pretrained(tmp_path / "peft")
    base = FileSource(golden.FOLDER / "qwen3")
    config = read_adapter_config(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft", config, base.table, "qwen3")
    write_adapter(tmp_path / "back", base.family, base.config, adapter.tree(), config.rank, config.alpha, config.base)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name].view(np.uint32), array.view(np.uint32))
    assert read_adapter_config(tmp_path / "back").targets == ("down_proj", "q_proj", "v_proj")


def test_pickled_weights_and_names_of_adapters(tmp_path):
    """As older versions and other trainers wrote them."""
    model = trained("llama_tied", **TRAINED["some"])
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    state = torch.load(tmp_path / "adapter_model.bin")
    wanted = their_logits(model, "llama_tied")
    for change in (lambda name: name, lambda name: name.replace(".weight", ".default.weight")):
        torch.save({change(name): tensor for name, tensor in state.items()}, tmp_path / "adapter_model.bin")
        got = our_logits(*load_pretrained(tmp_path), "llama_tied")
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_their_linear_maps(name):
    """A table's modules are exactly what PEFT's all-linear names."""
    source = open_pretrained(golden.FOLDER / name)
    model = model_of(golden.FOLDER / name)
    theirs = {key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert modules_of(source.table).keys() == theirs
    assert Path(source.path) == golden.FOLDER / name
