"""Checkpoints as PyTorch and its trainers write them: what is read is what torch itself has, bit by bit."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import json
import pathlib
import pickle
import random
import subprocess
import sys
import types
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from open_mythos.main import MythosConfig, OpenMythos
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mythos_jax.errors import ConfigError
from mythos_jax.porting.coverage import require_tensors
from mythos_jax.porting.reading import FileSource
from mythos_jax.porting.torch_files import TorchFile
from mythos_jax.porting.torch_objects import DTYPES

CONFIG = MythosConfig(
    vocab_size=48,
    dim=24,
    n_heads=2,
    n_kv_heads=1,
    max_seq_len=16,
    max_loop_iters=2,
    prelude_layers=1,
    coda_layers=1,
    attn_type="gqa",
    n_experts=2,
    n_shared_experts=1,
    n_experts_per_tok=1,
    expert_dim=8,
    lora_rank=2,
)
FIELDS = asdict(CONFIG)


class Kind(enum.Enum):
    A = 1


@dataclass
class Settings:
    lr: float = 0.1
    where: pathlib.Path = pathlib.Path("/tmp")


class Stateful:
    """An object with `__reduce__`, as tokenizers are."""

    def __reduce__(self):
        return Stateful, (), {"vocab": {"a": 1}, ("b", "c"): 2}


class Attributes(dict):
    """As Lightning's and EasyDict."""

    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return OpenMythos(CONFIG).eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def assert_same(source, state):
    """Every tensor that the model needs is read with torch's bits."""
    require_tensors(source)
    assert len(source.table.their_shapes) > 20
    for name in source.table.their_shapes:
        expected = state[name].detach().contiguous()
        got = np.ascontiguousarray(source.read(name))
        assert got.shape == tuple(expected.shape), name
        assert got.tobytes() == expected.view(torch.uint8 if expected.ndim else expected.dtype).numpy().tobytes(), name


def optimizer_state(model):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model.zero_grad()
    return optimizer


BESIDE = {
    "dtype, device, size": lambda: [torch.float32, torch.bfloat16, torch.device("cpu"), torch.Size([1, 2])],
    "layouts": lambda: [torch.strided, torch.sparse_coo],
    "set, bytes, bytearray, complex": lambda: [{1, 2}, {"a"}, b"\x00\xff", bytearray(b"x"), 1 + 2j, frozenset({3})],
    "Counter, OrderedDict": lambda: [collections.Counter("abca"), collections.OrderedDict(a=1)],
    "Parameter, Buffer": lambda: [torch.nn.Parameter(torch.ones(2)), torch.nn.Buffer(torch.ones(2))],
    "uint16, uint32, uint64": lambda: [torch.ones(2).to(getattr(torch, f"uint{n}")) for n in (16, 32, 64)],
    "float8": lambda: [torch.ones(2).to(t) for t in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)],
    "complex": lambda: [torch.ones(2, dtype=t) for t in (torch.complex32, torch.complex64, torch.complex128)],
    "conj": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": lambda: [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(), torch.eye(4).to_sparse_bsr((2, 2))],
    "quantized": lambda: [torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)],
    "meta": lambda: torch.empty(2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "storage": lambda: [torch.ones(2).untyped_storage(), torch.ones(2).storage()],
    "random states": lambda: [torch.get_rng_state(), random.getstate(), np.random.get_state()],
    "numpy": lambda: [np.float64(1), np.arange(3), np.array(["a"]), np.dtype("int8"), np.random.default_rng(0)],
    "Namespace": lambda: argparse.Namespace(lr=1, out=pathlib.Path("x")),
    "paths and dates": lambda: [
        pathlib.Path("/a/b"),
        datetime.datetime.now(),
        datetime.timedelta(3),
        decimal.Decimal(2),
    ],
    "enum, dataclass": lambda: [Kind.A, Settings()],
    "collections": lambda: [collections.defaultdict(list, a=[1]), collections.deque([1]), range(3), slice(1, 2)],
    "functions": lambda: [functools.partial(print, 1), len, torch.nn.functional.gelu, torch.relu],
    "namespaces": lambda: [types.SimpleNamespace(a=1), Attributes(a=1), Stateful()],
    "module": lambda: torch.nn.Linear(2, 2),
    "scaler": lambda: torch.amp.GradScaler("cpu"),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("what", BESIDE)
def test_beside_the_weights(model, path, what, protocol):
    state = {"model": model.state_dict(), "extra": BESIDE[what](), "more": {"deep": [BESIDE[what]()]}, "cfg": CONFIG}
    torch.save(state, path, pickle_protocol=protocol)
    assert_same(FileSource(path), model.state_dict())


def test_optimizers_and_schedulers(model, path):
    """Objects that hold each other and the weights again."""
    optimizer = optimizer_state(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, float)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "state": optimizer.state_dict(),
    }
    torch.save(state | {"config": {"lr": 1e-3, "batch_size": 8, "vocab_size": 48}}, path)
    assert_same(FileSource(path, FIELDS), model.state_dict())
    with pytest.raises(ConfigError, match="holds only tensors"):
        FileSource(path)


WAYS = {
    "bare": lambda model: model.state_dict(),
    "plain dict": lambda model: dict(model.state_dict()),
    "parameters": lambda model: dict(model.named_parameters()) | dict(model.named_buffers()),
    "bfloat16": lambda model: {k: v.bfloat16() if v.is_floating_point() else v for k, v in model.state_dict().items()},
    "float64": lambda model: {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()},
    "module": lambda model: model,
    "compiled module": lambda model: torch.compile(model),
    "in a module": lambda model: torch.nn.ModuleDict({"module": model}),
    **{
        key: lambda model, key=key: {
            key: model.state_dict(),
            "step": 3,
            "optimizer": {"state": {0: {"m": torch.ones(2)}}},
        }
        for key in ("model", "model_state_dict", "state_dict", "net", "module", "generator", "params", "weights")
    },
    **{key: lambda model, key=key: {key: model.state_dict()} for key in ("ema", "student", "ema_model", "anything")},
    "model and ema": lambda model: {
        "ema": {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()},
        "model": model.state_dict(),
    },
    "twice the same": lambda model: {"model": model.state_dict(), "state_dict": model.state_dict()},
    "deep": lambda model: {"state": {"trainer": {"net": model.state_dict()}}},
    "Lightning": lambda model: {"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}, "loops": {}},
    "one storage": lambda model: flat(model.state_dict()),
    "not contiguous": lambda model: {
        k: v.T.contiguous().T if v.ndim == 2 else v for k, v in model.state_dict().items()
    },
}


def flat(state):
    whole = torch.cat([value.flatten() for value in state.values() if not value.is_complex()])
    sizes = [value.numel() for value in state.values() if not value.is_complex()]
    pieces = iter(whole.split(sizes))
    return {k: v if v.is_complex() else next(pieces).view(v.shape) for k, v in state.items()}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_save_weights(model, path, way, old):
    saved = WAYS[way](model)
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    state = model.state_dict()
    if way in ("bfloat16", "float64"):
        state = saved
    assert_same(FileSource(path, FIELDS), state)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_views_of_every_dtype(path, old):
    base = 1 + torch.arange(24).reshape(4, 6) % 2
    dtypes = {
        str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
    }
    tensors = {name: base.to(dtype)[1:, ::2].T for name, dtype in dtypes.items() if name in DTYPES}
    assert len(tensors) == len(DTYPES)
    torch.save(tensors, path, _use_new_zipfile_serialization=not old)
    file = TorchFile(path)
    for name, tensor in tensors.items():
        bits = (
            tensor.contiguous().view(torch.uint8).numpy() if tensor.dtype != torch.bool else tensor.contiguous().numpy()
        )
        assert np.ascontiguousarray(file.read(name)).tobytes() == bits.tobytes(), name
        assert file.tensors[name].dtype.name == name


def test_a_file_without_checksums(model, path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(FileSource(path, FIELDS), model.state_dict())


@pytest.mark.parametrize(
    ("kind", "make"),
    {
        "a sparse tensor": lambda x: x.to_sparse(),
        "a quantized tensor": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "a meta tensor, without data": lambda x: x.to("meta"),
        "a tensor of complex32": lambda x: x.to(torch.complex32),
    }.items(),
)
def test_a_weight_of_another_kind_is_named(model, path, kind, make):
    state = model.state_dict()
    torch.save(state | {"embed.weight": make(state["embed.weight"])}, path)
    with pytest.raises(ConfigError, match=rf"embed\.weight: is {kind}, allowed: a dense tensor of float16"):
        require_tensors(FileSource(path, FIELDS))


@dataclass
class Model:
    """A config of a class that is defined in the training script."""

    vocab_size: int = 48


def in_main(name, fields):
    """An object of a dataclass of the training script, `__main__.NAME`."""
    made = dataclasses.make_dataclass(name, fields)
    made.__module__ = "__main__"
    setattr(sys.modules["__main__"], name, made)
    return made(**fields)


CONFIGS = {
    "model_config": lambda: {"model_config": FIELDS},
    "hyper_parameters": lambda: {"hyper_parameters": FIELDS},
    "in hyper_parameters": lambda: {"hyper_parameters": {"lr": 1.0, "config": FIELDS}},
    "model_args": lambda: {"model_args": FIELDS, "config": {"lr": 1, "batch_size": 3}},
    "args": lambda: {"args": argparse.Namespace(**FIELDS, lr=1.0, where=pathlib.Path("/tmp"), kind=Kind.A)},
    "config": lambda: {"config": CONFIG},
    "cfg": lambda: {"cfg": CONFIG},
    "hparams": lambda: {"hparams": Attributes(FIELDS)},
    "of main": lambda: {"cfg": in_main("MythosConfig", FIELDS)},
    "SimpleNamespace": lambda: {"config": types.SimpleNamespace(**FIELDS)},
}


@pytest.mark.parametrize("where", CONFIGS)
def test_the_config_in_the_file(model, path, where):
    torch.save({"model": model.state_dict(), **CONFIGS[where]()}, path)
    assert_same(FileSource(path), model.state_dict())


def test_the_config_of_a_pickled_module(model, path):
    torch.save(model, path)
    assert_same(FileSource(path), model.state_dict())


def test_lists_and_ties_are_refused(model, path):
    """Unless a key says which weights are meant."""
    torch.save([3, model.state_dict()], path)
    with pytest.raises(ConfigError, match=r"got a list, allowed: .*; --weights-key 1 reads one of it"):
        FileSource(path, FIELDS)
    assert_same(FileSource(path, FIELDS, weights_key="1"), model.state_dict())
    other = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"student": model.state_dict(), "teacher": other}, path)
    with pytest.raises(ConfigError, match=r"models under 'student' and 'teacher', allowed: one of them"):
        FileSource(path, FIELDS)
    for key, state in {"student": model.state_dict(), "teacher": other}.items():
        assert_same(FileSource(path, FIELDS, weights_key=key), state)


def test_torchscript(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(ConfigError, match="a TorchScript archive, allowed: its tensors: python -c"):
        FileSource(path, FIELDS)


# Directories.


def save_config(directory):
    (directory / "config.json").write_text(json.dumps(FIELDS))


def test_distributed_checkpoints(model, tmp_path):
    """Weights of a trainer's state, nested and flat; what torch's own converter makes of it is the same."""
    state = {"model": model.state_dict(), "optim": {"state": {"x": torch.ones(2)}}, "step": 3, "cfg": FIELDS}
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    source = FileSource(tmp_path / "dcp")
    assert source.config.dim == 24
    assert_same(source, model.state_dict())
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "converted.pt")
    assert_same(FileSource(tmp_path / "converted.pt"), model.state_dict())
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "outer" / "pytorch_model_fsdp_0")
    save_config(tmp_path / "outer")
    assert_same(FileSource(tmp_path / "outer"), model.state_dict())
    (tmp_path / "dcp" / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match=r"\.metadata: names file __0_0\.distcp, which is missing"):
        FileSource(tmp_path / "dcp")


def test_distributed_checkpoints_of_several_processes(model, tmp_path):
    """Each tensor divided by rows between two processes, with FSDP2's DTensors."""
    script = tmp_path / "save.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp\n"
        "from torch.distributed.tensor import distribute_tensor, Shard, init_device_mesh\n"
        "rank, folder = int(sys.argv[1]), sys.argv[2]\n"
        "dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)\n"
        "mesh = init_device_mesh('cpu', (2,))\n"
        "state = torch.load(f'{folder}/whole.pt')\n"
        "state = {k: v if v.is_complex() else distribute_tensor(v, mesh, [Shard(0)]) for k, v in state.items()}\n"
        "dcp.save({'model': state}, checkpoint_id=f'{folder}/dcp')\n"
        "torch.save(state, f'{folder}/part{rank}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    programs = [subprocess.Popen([sys.executable, script, str(rank), tmp_path]) for rank in range(2)]
    assert [program.wait(120) for program in programs] == [0, 0]
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    assert_same(FileSource(tmp_path / "dcp", FIELDS), model.state_dict())
    with pytest.raises(ConfigError, match=r"embed\.weight: is a part of a sharded tensor"):
        require_tensors(FileSource(tmp_path / "part0.pt", FIELDS))


def test_deepspeed_directories(model, tmp_path):
    """As its engine writes them, with the states of stage 1 or 2 beside, and those of stage 3."""
    step = tmp_path / "global_step7"
    step.mkdir()
    state = {
        "module": {k: v.bfloat16() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        "buffer_names": ["freqs_cis"],
        "optimizer": None,
        "param_shapes": [collections.OrderedDict((k, v.shape) for k, v in model.named_parameters())],
        "lr_scheduler": None,
        "ds_config": {"zero_optimization": {"stage": 2}},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "args": argparse.Namespace(lr=1),
    }
    torch.save(state, step / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step7")
    (tmp_path / "zero_to_fp32.py").write_text("")
    torch.save(random.getstate(), tmp_path / "rng_state.pth")
    save_config(tmp_path)
    source = FileSource(tmp_path)
    assert_same(source, state["module"])
    assert "zero_to_fp32.py" in source.notes[0]
    assert_same(FileSource(step, FIELDS), state["module"])
    torch.save(state, step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ConfigError, match=r"of divided weights, .*: python \S*/zero_to_fp32\.py \S* OUT"):
        FileSource(tmp_path)


def test_a_trainers_directory(model, tmp_path):
    """One `.pth` among a trainer's other files."""
    save_config(tmp_path)
    torch.save(optimizer_state(model).state_dict(), tmp_path / "optimizer.pt")
    torch.save(random.getstate(), tmp_path / "rng_state.pth")
    torch.save(argparse.Namespace(lr=1), tmp_path / "training_args.bin")
    for name in ("last.ckpt", "weights.pth"):
        torch.save({"state_dict": model.state_dict()}, tmp_path / name)
        assert_same(FileSource(tmp_path), model.state_dict())
        (tmp_path / name).rename(tmp_path / f"{name}.old")


def test_protocol_of_torch_and_pickle_differ(model, path):
    """A plain pickle is not a checkpoint."""
    path.write_bytes(pickle.dumps(model.state_dict()))
    with pytest.raises(ConfigError, match="a pickle, but not a PyTorch checkpoint"):
        FileSource(path, FIELDS)


def test_named_parameters_lack_the_router_bias(model, path):
    torch.save(dict(model.named_parameters()), path)
    source = FileSource(path, FIELDS)
    coverage = require_tensors(source)
    assert coverage.zeros == ["recurrent.block.ffn.router_bias"]
    assert source.read("recurrent.block.ffn.router_bias").tolist() == [0, 0]
