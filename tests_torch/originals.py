"""What `convert` writes opens with the originals' own loaders, which then compute what they compute from the source.

    tests_torch/originals.sh            # makes the environments, fetches the originals' code, runs this in each

A golden Llama and a golden OLMo-2 that `retrofit` has cut open with the code of the published retrofitted models, and
give the logits of the dense models at every depth.

For every original whose code is in CLONES or in the installed transformers: a directory as it is published (golden
weights, the authors' modelling files, a tokenizer) goes to our format and back, and to its own format directly. Each
result is opened with the original's loader. Prints a line per model and loader; exits with 1 if a difference is not 0.
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from mythos_jax.porting.convert import convert
from mythos_jax.porting.reading import FileSource
from mythos_jax.retrofit.cut import dense_layers, make_cut
from mythos_jax.retrofit.surgery import Plan, retrofit

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
DENSE = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "olmo2")
MAJOR = int(transformers.__version__.split(".")[0])
# The golden model, the folder of its code in CLONES, that code's files, and the versions of transformers it runs with.
REMOTE = {
    "huginn": ("recurrent-pretraining/recpre", {"raven_config_minimal", "raven_modeling_minimal"}),
    "raven_llama": (
        "retrofitting-recurrence/convert_pretrained_model",
        {"raven_config_minimal", "raven_modeling_minimal_llama"},
    ),
    "raven_olmo": (
        "retrofitting-recurrence/convert_pretrained_model",
        {"raven_config_minimal", "raven_modeling_minimal_olmo"},
    ),
    "ouro": ("ouro_rl/ouro_rl/modeling", {"configuration_ouro", "modeling_ouro"}),
    "nanbeige": ("Nanbeige4.2-3B-mps-fix/patch", {"configuration_nanbeige", "modeling_nanbeige"}),
}
NAMES = (*DENSE, *REMOTE, "parcae")
FAMILY = {"llama_tied": "llama", "mistral": "llama", "raven_llama": "raven"}
# Golden dense models, and the published retrofitted models of their kind.
RETROFITTED = {"llama": "raven_llama", "olmo2": "raven_olmo"}
ROUNDING = 1e-4  # of logits, between two programs for the same sums
Logits = Callable[[Path, np.ndarray], np.ndarray]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="folder with clones of the originals' repositories")
    parser.add_argument("--only", nargs="*", help="golden models; default: all")
    arguments = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, loader, source, logits in cases(arguments.clones, Path(folder), arguments.only or NAMES):
            worst = max(worst, compare(name, loader, source, logits, Path(folder)))
        for dense, raven in RETROFITTED.items():
            if raven in (arguments.only or NAMES) and (arguments.clones / REMOTE[raven][0]).is_dir():
                worst = max(worst, compare_retrofitted(dense, raven, arguments.clones, Path(folder)))
    return int(worst > 0)


def cases(clones: Path, folder: Path, only: Sequence[str]) -> Iterator[tuple[str, str, Path, Logits]]:
    """Golden model, name of the loader, a directory as published, and what computes logits from such a directory."""
    version = f"transformers {transformers.__version__}"
    for name in (name for name in DENSE if name in only):
        yield name, version, dense_source(name, folder), auto_logits
    for name, (code, modules) in REMOTE.items():
        if name in only and (clones / code).is_dir():
            yield name, version, remote_source(name, clones / code, modules, folder), auto_logits
    if "parcae" in only and (clones / "parcae").is_dir():
        sys.path.insert(0, str(clones / "parcae"))
        for loader, logits in (("ModelingParcae", modeling_parcae), ("parcae_lm", parcae_lm)):
            yield "parcae", loader, parcae_source(folder), logits


def compare(name: str, loader: str, source: Path, logits: Logits, folder: Path) -> float:
    family = FAMILY.get(name, name)
    work = Path(tempfile.mkdtemp(dir=folder))
    convert(source, work / "ours", "mythos_jax", progress=False)
    convert(work / "ours", work / "back", family, progress=False)
    convert(source, work / "direct", family, progress=False)
    with np.load(GOLDEN / name / "golden.npz") as file:
        tokens = file["input_ids"]
    expected = logits(source, tokens)
    differences = [np.abs(logits(work / out, tokens) - expected).max() for out in ("back", "direct")]
    tokenizer = "" if name == "parcae" else f", tokenizer {tokenizer_agrees(source, work / 'back')}"
    print(f"{name:12} {loader:22} max |Δlogits| {max(differences):.1e}{tokenizer}", flush=True)
    return float(max(differences))


def compare_retrofitted(dense: str, raven: str, clones: Path, folder: Path) -> float:
    """The largest difference of logits from those of the dense model that is more than rounding, else 0."""
    source, out = FileSource(GOLDEN / dense), folder / f"{dense}-retrofitted"
    layers = len(dense_layers(source.config))
    retrofit(source, out, Plan(make_cut(layers, prelude=(0,), coda=(layers - 1,))), progress=False)
    code, modules = REMOTE[raven]
    add_code(out, clones / code, modules)
    model = auto_model(out)
    with np.load(GOLDEN / dense / "golden.npz") as file:
        tokens, expected = torch.from_numpy(file["input_ids"]).long(), file["logits"]
    differences = []
    for loops in (1, 2, 4, 8):
        with torch.no_grad():
            found = model(tokens, num_steps=torch.tensor([loops, 0])).logits.numpy()
        differences.append(np.abs(found - expected).max())
    print(f"{dense:12} retrofitted, {raven:9} max |Δlogits| {max(differences):.1e} at 1, 2, 4, 8 loops", flush=True)
    return 0.0 if max(differences) <= ROUNDING else float(max(differences))


def dense_source(name: str, folder: Path) -> Path:
    """The golden directory with a tokenizer, its config in the spelling of the installed transformers."""
    source = folder / f"{name}-source"
    if not source.is_dir():
        shutil.copytree(GOLDEN / name, source)
        if MAJOR < 5:
            shutil.copy(source / "config_transformers4.json", source / "config.json")
        write_tokenizer(source)
    return source


def remote_source(name: str, code: Path, modules: set[str], folder: Path) -> Path:
    """A directory with the authors' code, as on the hub, where the modules have no suffix."""
    source = folder / f"{name}-source"
    if source.is_dir():
        return source
    shutil.copytree(GOLDEN / name, source)
    config = json.loads((source / "config.json").read_text())
    tied = config.pop("tied")
    del config["family"]
    if name in ("huginn", "raven_llama", "raven_olmo"):
        config["architectures"] = ["RavenForCausalLM"]
        config["init_values"]["std"] = 0.0  # starts from zeros, so that two calls agree
    (source / "config.json").write_text(json.dumps(config))
    add_code(source, code, modules)
    if tied:  # as `save_pretrained` of a tied model leaves it: with the buffers
        model = auto_model(source)
        tensors = load_file(source / "model.safetensors") | {"freqs_cis": model.freqs_cis}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(source)
    return source


def add_code(directory: Path, code: Path, modules: set[str]) -> None:
    """Puts the authors' modules beside a model, and names them in its config."""
    short = {module: module.removesuffix("_llama").removesuffix("_olmo") for module in modules}
    for module, name_on_hub in short.items():
        text = (code / f"{module}.py").read_text()
        for package in ("convert_pretrained_model.", "ouro_rl.modeling."):
            text = text.replace(f"from {package}", "from .")
        (directory / f"{name_on_hub}.py").write_text(text)
    if "raven_config_minimal" in modules:
        config = json.loads((directory / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
        }
        (directory / "config.json").write_text(json.dumps(config))


def parcae_source(folder: Path) -> Path:
    """A directory as Parcae's own `save_pretrained` writes it."""
    source = folder / "parcae-source"
    if not source.is_dir():
        source.mkdir()
        config = json.loads((GOLDEN / "parcae" / "config.json").read_text())
        del config["family"], config["tied"]
        config["state_init"] = "zero"
        (source / "config.json").write_text(json.dumps(config))
        tensors = load_file(GOLDEN / "parcae" / "model.safetensors")
        torch.save(tensors, source / "pytorch_model.bin")
        from receval.models.parcae import ModelingParcae

        torch.save(ModelingParcae.from_pretrained(source).state_dict(), source / "pytorch_model.bin")
    return source


def auto_model(directory: Path) -> Any:
    # For a class of the same name in another directory, transformers would use the first one's module.
    transformers.dynamic_module_utils._HF_REMOTE_CODE_HASH = None
    keyword = "dtype" if MAJOR >= 5 else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, **{keyword: torch.float32}
    )
    return model.eval()


def auto_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return auto_model(directory)(torch.from_numpy(tokens).long()).logits.numpy()


def modeling_parcae(directory: Path, tokens: np.ndarray) -> np.ndarray:
    module = importlib.import_module("receval.models.parcae")
    return parcae_logits(module.ModelingParcae.from_pretrained(directory), tokens)


def parcae_lm(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """It only knows the hub, so what it asks the hub for is looked up in the directory."""

    def from_directory(repository: str, file: str, **_: Any) -> str:
        if not (directory / file).is_file():
            raise FileNotFoundError(file)
        return str(directory / file)

    with mock.patch("huggingface_hub.hf_hub_download", from_directory):
        model = importlib.import_module("parcae_lm").from_pretrained("any/model")
    return parcae_logits(model, tokens)


def parcae_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        steps = torch.tensor([model.config.mean_recurrence])
        return model.eval()(torch.from_numpy(tokens).long(), return_logits=True, num_steps_pair=steps)["logits"].numpy()


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of single characters with special tokens and a chat template, in transformers' own files."""
    from tokenizers import Tokenizer, models

    tokens = ["<s>", "</s>", "<pad>", *map(chr, range(32, 127))]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token + m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(directory)


def tokenizer_agrees(source: Path, written: Path) -> str:
    messages = [{"role": "user", "content": "Hello, world"}]
    texts = []
    for directory in (source, written):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
        ids = tokenizer.apply_chat_template(messages, tokenize=True)
        texts.append((ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("some text").input_ids))
    return "equal" if str(texts[0]) == str(texts[1]) else "DIFFERS"


if __name__ == "__main__":
    sys.exit(main())
