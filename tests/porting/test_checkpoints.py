"""Checkpoints of PyTorch and its trainers: files that torch wrote (tests/golden/checkpoints), and pickles that want
something to be run."""

import os
import pickle
import shutil
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mythos_jax.cli import main
from mythos_jax.errors import ConfigError
from mythos_jax.porting import trainer_files
from mythos_jax.porting.dcp import DcpDirectory
from mythos_jax.porting.embedded import embedded_fields
from mythos_jax.porting.pickles import Inert, Name
from mythos_jax.porting.reading import FileSource
from mythos_jax.porting.tensor_info import TensorInfo
from mythos_jax.porting.torch_files import TorchFile
from mythos_jax.porting.trainer_files import find_configs, find_weights
from tests.fuzz.budget import no_hang
from tests.porting import golden

SAVED = golden.FOLDER / "checkpoints"
WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def assert_weights(file):
    assert sorted(file.tensors) == ["w.bias", "w.weight"]
    np.testing.assert_array_equal(file.read("w.weight"), WEIGHT)
    np.testing.assert_array_equal(file.read("w.bias"), np.ones(2, ml_dtypes.bfloat16))
    assert file.read("w.bias").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("name", ["beside_2.pt", "beside_5.pt", "old.pt", "no_checksums.pt"])
def test_files_that_torch_wrote(name):
    before = set(sys.modules)
    assert_weights(TorchFile(SAVED / name))
    assert not {name for name in set(sys.modules) - before if name.startswith(("torch", "__main__"))}


def test_a_tensor_of_each_dtype():
    file = TorchFile(SAVED / "dtypes.pt")
    expected = (1 + np.arange(24).reshape(4, 6) % 2)[1:, ::2].T
    for name, info in file.tensors.items():
        if name == "complex32":
            assert info.kind == "a tensor of complex32"
            with pytest.raises(ConfigError, match="complex32: is a tensor of complex32, allowed: a dense tensor"):
                file.read(name)
            continue
        got = file.read(name)
        assert got.dtype.name == info.dtype.name == name
        np.testing.assert_array_equal(got.astype(np.float32 if got.dtype.kind != "c" else got.dtype), expected)
    assert len(file.tensors) == 21


def test_a_whole_module():
    """Its parameters and the buffers that a state dict has."""
    file = TorchFile(SAVED / "module.pt")
    assert sorted(file.tensors) == ["inner.0.weight", "kept"]
    np.testing.assert_array_equal(file.read("inner.0.weight"), WEIGHT)


def test_what_stands_beside_the_weights_is_described():
    (place, fields), (other, found) = TorchFile(SAVED / "beside_2.pt").configs
    assert (place, fields) == ("args", {"lr": 0.1, "out": "out"})
    assert (other, found) == ("cfg", {"dim": 24, "kind": 1, "where": "b"})


def test_a_distributed_checkpoint(tmp_path):
    directory = DcpDirectory(SAVED / "dcp")
    assert_weights(directory)
    assert directory.configs == [("cfg", {"dim": 24})]
    shutil.copytree(SAVED / "dcp", tmp_path / "dcp")
    pieces = tmp_path / "dcp" / "__0_0.distcp"
    pieces.write_bytes(pieces.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"__0_0\.distcp: damaged checkpoint \(truncated\)"):
        DcpDirectory(tmp_path / "dcp")
    pieces.write_bytes(bytes(100 + pieces.stat().st_size))
    with pytest.raises(ConfigError, match=r"__0_0\.distcp: damaged checkpoint"):
        DcpDirectory(tmp_path / "dcp")
    for path in (pieces, pieces.parent / ".metadata"):
        with pytest.raises(ConfigError, match=rf"is a part of a distributed checkpoint, allowed: .*, {path.parent}"):
            FileSource(path)
    pieces.unlink()
    with pytest.raises(ConfigError, match=r"\.metadata: names file __0_0\.distcp, which is missing"):
        DcpDirectory(tmp_path / "dcp")
    metadata = tmp_path / "dcp" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"\x8c\x0c__0_0.distcp", b"\x8c\x0c../../etc/ab"))
    with pytest.raises(ConfigError, match=r"names file '\.\./\.\./etc/ab', allowed: files in the same directory"):
        DcpDirectory(tmp_path / "dcp")


def test_an_old_file_that_is_cut_off(tmp_path):
    content = (SAVED / "old.pt").read_bytes()
    for size in range(0, len(content), 7):
        (tmp_path / "old.pt").write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"old\.pt: (damaged|not a PyTorch|a pickle, but|its pickle cannot)"):
            TorchFile(tmp_path / "old.pt")


def test_a_big_endian_file(tmp_path):
    content = (SAVED / "old.pt").read_bytes()
    assert content.count(b"little_endianq\x02\x88") == 1
    (tmp_path / "old.pt").write_bytes(content.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    with pytest.raises(ConfigError, match=r"old\.pt: stored big-endian"):
        TorchFile(tmp_path / "old.pt")


# Where the weights and the config are.


def tensors(model="openmythos_gqa", value=4):
    """Tensors with a golden model's names. value: makes them unequal to others."""
    return dict.fromkeys(FileSource(golden.FOLDER / model).tensors, TensorInfo((value,), np.dtype(np.float32)))


def module(state):
    return Inert(Name("__main__", "Model"), state={"_parameters": state, "_buffers": {}, "_modules": {}})


M, OTHER = tensors(), tensors(value=5)
FOUND = {
    "bare": (M, None),
    "net": ({"net": M, "step": 1}, None),
    "a trainer's": ({"trainer": {"generator": M}}, None),
    "wrapped": ({"state_dict": {f"model._orig_mod.{name}": info for name, info in M.items()}}, None),
    "an object": ({"it": Inert(Name("a", "B"), state={"weights": M})}, None),
    "a module": ({"it": module(M)}, None),
    "a compiled module": (Inert(Name("torch._dynamo.eval_frame", "OptimizedModule"), (module(M), None)), None),
    "the same twice": ({"model": M, "state_dict": dict(M)}, None),
    "model and ema": (
        {"ema": OTHER, "model": M},
        "under 'model'; left: those under 'ema'; `mythos convert --weights-key ema` reads",
    ),
    "net and ema": ({"net_ema": OTHER, "net": M}, "read: the weights under 'net'; left: those under 'net_ema'"),
    "net and optimizer": ({"net": M, "optimizer": {"master": OTHER}}, "left: those under 'optimizer.master'"),
    "model and student": (
        {"student": OTHER, "model": M},
        "read: the weights under 'model'; left: those under 'student'",
    ),
    "model and one tensor": ({"model": M, "loss": TensorInfo((), np.dtype(np.float32))}, None),
    "unknown names": ({"net": {"a": M["norm.weight"]}, "lr": {}}, None),
}


@pytest.mark.parametrize("case", FOUND)
def test_where_the_weights_are(case, tmp_path):
    saved, note = FOUND[case]
    notes = []
    found = find_weights(tmp_path, saved, notes)
    assert set(found.values()) == {TensorInfo((4,), np.dtype(np.float32))}
    assert len(found) == (1 if case == "unknown names" else len(M))
    assert len(notes) == (note is not None)
    assert not note or note in notes[0]


REFUSED = {
    "two": (
        {"student": M, "teacher": OTHER},
        r"models under 'student' and 'teacher', allowed: one of them \(--weights-key student\)",
    ),
    "a list": ([3, M], r"got a list, allowed: a state dict, or a dict that holds one; --weights-key 1 reads one of it"),
    "nothing": ({"step": 1}, "holds no tensors; allowed: a state dict, or a dict with one under 'model'"),
    "a number": (3, "holds no tensors"),
    "an object": (Inert(Name("keras", "Model")), r"what it names \(keras\.Model\); .*torch\.save\(x\.state_dict\(\), "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_are_not_clear(case, tmp_path):
    saved, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as error:
        find_weights(tmp_path / "x.pt", saved, [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["ema", "trainer.ema"])
def test_weights_are_chosen_by_their_key(key, tmp_path):
    saved = {"model": M, "trainer": {"ema": OTHER, "step": 1}, "optimizer": {"m": M["norm.weight"]}}
    assert find_weights(tmp_path, saved, [], key) == OTHER
    with pytest.raises(ConfigError, match=r"weights_key: got 'em', allowed: model, trainer\.ema, optimizer$"):
        find_weights(tmp_path, saved, [], "em")
    with pytest.raises(ConfigError, match="weights_key: got 'a', allowed: none, it is the whole file"):
        find_weights(tmp_path, M, [], "a")
    assert find_weights(tmp_path, [0, OTHER], [], "1") == OTHER
    with pytest.raises(ConfigError, match="weights_key: got 'ema', allowed only with a checkpoint of PyTorch"):
        FileSource(golden.FOLDER / "huginn", weights_key="ema")


def test_the_key_on_the_command_line(tmp_path, capsys):
    file = str(golden.FOLDER / "openmythos_trainer" / "checkpoint.pt")
    arguments = ["convert", file, str(tmp_path / "out"), "--to", "mythos_jax", "--weights-key"]
    assert main([*arguments, "ema"]) == 2
    assert "weights_key: got 'ema', allowed: model" in capsys.readouterr().err
    assert main([*arguments, "model"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_modules_that_contain_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_files, "MOST_ENTRIES", 100_000)
    loop = module(M)
    loop.state["_modules"]["again"] = loop
    with pytest.raises(ConfigError, match="contains itself"):
        find_weights(tmp_path, loop, [])
    shared = module(M)
    for _ in range(60):  # 2^60 paths
        shared = Inert(None, state={"_parameters": {}, "_buffers": {}, "_modules": {"a": shared, "b": shared}})
    with pytest.raises(ConfigError, match="hold more than 100,000 others"):
        find_weights(tmp_path, shared, [])
    nested = fields = {}
    for _ in range(60):
        fields["a"] = fields["b"] = {}
        fields = fields["a"]
    assert find_configs({"config": nested})


def test_objects_that_would_take_long_to_look_through(tmp_path, monkeypatch):
    """Each holds few others, but there are many ways through them."""
    monkeypatch.setattr(trainer_files, "MOST_ENTRIES", 100_000)
    chain = Inert(None)
    for _ in range(100_000):
        chain = Inert(chain, (chain,))
    wide = dict.fromkeys(map(str, range(20_000)))
    many = {str(i): Inert(None, state=wide) for i in range(20_000)}
    modules = {str(i): module(wide) for i in range(20_000)}
    for saved in (chain, many, modules, {"a": [chain] * 1000}):
        with no_hang(10), pytest.raises(ConfigError, match=r"holds no tensors|hold more than") as error:
            find_weights(tmp_path, saved, [])
        assert len(str(error.value)) < 1000
    odd = {"cfg": {"dim": 10**5000, "a\nb": "x" * 10**6, "c": chain}}
    (place, fields), *_ = find_configs(odd)
    assert (place, fields["dim"], len(fields["a\nb"])) == ("cfg", "…", 1000)


FIELDS = golden.fields("openmythos_gqa")
TRAINING = {"lr": 1e-3, "batch_size": 8, "vocab_size": 112, "out": "runs", "seed": 0, "steps": 5}
LEAF = Inert(Name("omegaconf", "AnyNode"), state={"_val": 64})
CONFIGS = {
    "model_config": {"config": TRAINING, "model_config": FIELDS},
    "hyper_parameters": {"hyper_parameters": {"model": FIELDS, **TRAINING}},
    "Namespace": {"args": Inert(Name("argparse", "Namespace"), state={**FIELDS, **TRAINING})},
    "dataclass": {"cfg": Inert(Name("__main__", "MythosConfig"), state=FIELDS)},
    "a kind of dict": {"hparams": Inert(Name("easydict", "EasyDict"), entries=FIELDS)},
    "slots": {"cfg": Inert(Name("a", "B"), state=(None, FIELDS))},
    "OmegaConf": {"cfg": Inert(Name("omegaconf", "DictConfig"), state={"_content": {**FIELDS, "dim": LEAF}})},
    "a module's": {"model": Inert(Name("a", "Model"), state={"cfg": Inert(Name("a", "Config"), state=FIELDS)})},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_config_in_a_file(case, tmp_path):
    found = embedded_fields(tmp_path, find_configs(CONFIGS[case]), M)
    assert {name: found[name] for name in FIELDS} == FIELDS


def test_settings_of_the_training_are_no_config(tmp_path):
    assert embedded_fields(tmp_path, find_configs({"config": TRAINING, "args": {}, "cfg": 3}), M) is None
    assert embedded_fields(tmp_path, find_configs({"config": TRAINING}), tensors("parcae")) is None
    with pytest.raises(ConfigError, match=r"cfg: attn_type: got 'linear', allowed: gqa, mla"):
        embedded_fields(tmp_path, find_configs({"cfg": {**FIELDS, "attn_type": "linear"}}), M)


# Pickles that want something to be run.


class Evil:
    """Unpickling it with the standard library creates a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_checkpoint(path, data, wrap=True):
    if not wrap:
        path.write_bytes(data)
        return
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrap", [True, False], ids=["zip", "bare"])
def test_a_malicious_pickle_is_not_run(tmp_path, protocol, wrap):
    target, path = tmp_path / "pwned", tmp_path / "evil.pt"
    data = pickle.dumps({"model": {"embed.weight": Evil(target)}}, protocol)
    write_checkpoint(path, data, wrap)
    message = r"running what it names \((posix|nt)\.mkdir\)" if wrap else "not a PyTorch checkpoint"
    with pytest.raises(ConfigError, match=rf"evil\.pt: .*{message}"):
        TorchFile(path)
    assert not target.exists()
    pickle.loads(data)  # loaded the unsafe way, the same bytes do create it
    assert target.exists()


def test_a_malicious_pickle_beside_the_weights_is_not_run(tmp_path):
    target, path = tmp_path / "pwned", tmp_path / "evil.pt"
    with zipfile.ZipFile(SAVED / "beside_2.pt") as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                evil = pickle.dumps(Evil(target), 2)
                data = data[:2] + evil[2:-1] + b"0" + data[2:]  # made and dropped, before all else
            new.writestr(item.filename, data)
    assert_weights(TorchFile(path))
    assert not target.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "torch.storage._load_from_bytes", "collections.OrderedDict.__class__"]
)
@pytest.mark.parametrize("opcodes", [b")R.", b")\x81.", b"}\x92.", b"(", b"}b."], ids=repr)
def test_no_name_is_imported(tmp_path, name, opcodes):
    module_name, _, attribute = name.partition(".") if name[0] == "b" else name.rpartition(".")
    strings = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module_name, attribute))
    write_checkpoint(tmp_path / "evil.bin", b"\x80\x04" + strings + b"\x93" + opcodes)
    with pytest.raises(ConfigError, match=r"evil\.bin: (holds no tensors|its pickle cannot be read)"):
        TorchFile(tmp_path / "evil.bin")


def test_pickles_that_want_memory_or_time(tmp_path):
    """Each asks for more than the machine has, in a few bytes."""
    bombs = {
        "memo": b"}r\xff\xff\xff\x7f.",
        "bytes": b"B\xff\xff\xff\x7f.",
        "bytearray": b"\x96" + b"\xff" * 7 + b"\x7f.",
        "frame": b"\x95" + b"\xff" * 7 + b"\x7f}.",
        "nested key": b"}(" + b"))" + b"\x86q\x00h\x00h\x00" * 60 + b"\x86Nu.",
        "deep": b"]" * 100_000 + b"a" * 99_999 + b".",
        "digits": b"I" + b"9" * 100_000 + b"\n.",
        "shape": b"ctorch._utils\n_rebuild_tensor_v2\n(((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00(" + b"K\x01" * 40 + b"t)tR.",
        "copies": b"ccollections\nOrderedDict\nq\x00]("
        + b"K\x01" * 5000
        + b"eq\x01"
        + b"h\x00h\x01\x85R0" * 5000
        + b"h\x01.",
        "extension": b"\x82\x01.",
        "no stack": b"00000.",
    }
    for name, data in bombs.items():
        write_checkpoint(tmp_path / f"{name}.pt", b"\x80\x04" + data)
        with pytest.raises(ConfigError, match=rf"{name}\.pt: (holds no tensors|its pickle cannot be read)"):
            TorchFile(tmp_path / f"{name}.pt")


@pytest.mark.parametrize(("offset", "value"), [(10, 8), (10, 1), (8, 1), (8, 32)], ids=["8", "1", "encrypted", "32"])
def test_records_that_zipfile_cannot_read(tmp_path, offset, value):
    """A byte of the directory entry of a storage: its method of compression, or its flags."""
    data = bytearray((SAVED / "beside_2.pt").read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
    data[entry + offset] = value
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.pt: damaged checkpoint \(storage "):
        assert_weights(TorchFile(tmp_path / "x.pt"))


def test_an_old_file_whose_list_of_storages_grows_when_it_is_printed(tmp_path):
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + pickle.dumps({}, 2)
    shared: list = []
    for _ in range(60):
        shared = [shared, shared]
    (tmp_path / "x.pt").write_bytes(head + pickle.dumps([shared], 2))
    with no_hang(), pytest.raises(ConfigError, match=r"x\.pt: damaged checkpoint \(no list of its storages\)"):
        TorchFile(tmp_path / "x.pt")
