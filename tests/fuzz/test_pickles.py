"""Damaged and hostile checkpoints: one line, or tensors; nothing is imported, run or written, and nothing hangs.

Under `make fuzz`, 500 files that torch wrote with bytes changed, moved or cut off, and 5000 rows of random opcodes
that name functions which would leave a trace.
"""

import io
import os
import pickle
import pickletools
import shutil
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mythos_jax.errors import ConfigError
from mythos_jax.porting.dcp import DcpDirectory
from mythos_jax.porting.torch_files import TorchFile
from tests.fuzz.budget import budget, no_hang

SAVED = Path(__file__).parents[1] / "golden" / "checkpoints"
NAMES = ["beside_2.pt", "beside_5.pt", "module.pt", "old.pt", "dtypes.pt"]

# What a pickle may name: functions that leave a trace if they are called, and those that the reader knows.
TRACE = os.path.join(tempfile.gettempdir(), f"mythos_jax_fuzz_trace.{os.getpid()}")
FUNCTIONS = ["posix.system", "builtins.exec", "builtins.getattr", "antigravity.x", "this.x", "copyreg.__newobj__"]
KNOWN = ["collections.OrderedDict", "collections.Counter", "collections.defaultdict", "torch.Size", "torch.float32"]
KNOWN += [f"torch._utils.{name}" for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")]
KNOWN += ["torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_qtensor", "torch.FloatStorage"]


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(dotted):
    module, _, attribute = dotted.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


TOUCH = text(f"touch {TRACE}") + b"\x85"
STORAGE = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + b"K\x08tQ"
TENSOR = name("torch._utils._rebuild_tensor_v2") + b"(" + STORAGE + b"K\x00K\x02K\x04\x86K\x04K\x01\x86t"
# Opcodes without an argument, each alone, and pieces with one.
BARE = [opcode.code.encode("latin1") for opcode in pickletools.opcodes if opcode.arg is None and opcode.code != "."]
LONG = [b"\x8d", b"\x8e", b"\x95", b"\x96"]  # followed by a length in 8 bytes
PIECES = st.one_of(
    st.sampled_from([*BARE, b"R", b"\x81", b"b", b"(", b"t", b"}", b"]", b"u", b"e", b"0", TENSOR + b"R", STORAGE]),
    st.sampled_from([name(dotted) for dotted in FUNCTIONS + KNOWN]),
    st.sampled_from([TOUCH, name("posix.system") + TOUCH + b"R", text("model"), text("state_dict"), text("config")]),
    st.builds(lambda number: b"K" + bytes([number]), st.integers(0, 255)),
    st.builds(lambda number: b"J" + struct.pack("<i", number), st.integers(-(2**31), 2**31 - 1)),
    st.builds(lambda code, number: code + bytes([number]), st.sampled_from([b"q", b"h", b"\x82"]), st.integers(0, 5)),
    st.builds(lambda number: b"r" + struct.pack("<I", number), st.integers(0, 2**32 - 1)),
    st.builds(lambda code, size: code + struct.pack("<Q", size), st.sampled_from(LONG), st.integers(0, 2**40)),
)


def read(opener, path):
    """Reads whatever can be read, or is refused in one line. Checks that nothing was imported or run."""
    message = str(path)
    with no_hang():
        try:
            file = opener(path)
            for tensor_name, info in file.tensors.items():
                if not info.kind and np.prod(info.shape, dtype=float) < 1e6:
                    assert file.read(tensor_name).shape == info.shape
        except ConfigError as error:
            message = str(error)
    assert str(path) in message
    assert "\n" not in message
    assert not {"torch", "antigravity", "this"} & set(sys.modules)
    assert not os.path.exists(TRACE)


def as_zip(pickled):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", bytes(32))
    return stream.getvalue()


CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "copy"]), st.floats(0, 0.999), st.integers(0, 255), st.integers(1, 8)),
    min_size=1,
    max_size=5,
)


def changed(content, changes):
    data = bytearray(content)
    for kind, where, value, count in changes:
        at = int(where * len(data))
        if kind == "set":
            data[at : at + 1] = bytes([value])
        elif kind == "cut":
            del data[at : at + count]
        else:
            data[at:at] = data[value % len(data) :][:count]
    return bytes(data)


@given(st.sampled_from(NAMES), CHANGES, st.booleans())
@budget(60, 500)
def test_files_with_changed_bytes(file_name, changes, in_pickle):
    """Anywhere in the file, or in the pickle of an archive that is whole otherwise."""
    content = (SAVED / file_name).read_bytes()
    if in_pickle and file_name != "old.pt":
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
            for item in old.infolist():
                data = old.read(item)
                is_pickle = item.filename.endswith("data.pkl")
                new.writestr(item.filename, changed(data, changes) if is_pickle else data)
        content = stream.getvalue()
    else:
        content = changed(content, changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        path.write_bytes(content)
        read(TorchFile, path)


@given(CHANGES, st.sampled_from([".metadata", "__0_0.distcp"]))
@budget(30, 500)
def test_distributed_checkpoints_with_changed_bytes(changes, file_name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dcp"
        shutil.copytree(SAVED / "dcp", path)
        (path / file_name).write_bytes(changed((path / file_name).read_bytes(), changes))
        read(DcpDirectory, path)


@given(st.lists(PIECES, max_size=40), st.booleans())
@budget(150, 5000)
def test_random_opcodes(pieces, old):
    pickled = b"\x80\x02" + b"".join(pieces) + b"."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        head = (SAVED / "old.pt").read_bytes()[:137]  # the magic number, the version and the machine
        path.write_bytes(head + pickled + b"\x80\x02]." if old else as_zip(pickled))
        read(TorchFile, path)


def test_the_trace_would_be_seen():
    """The same pieces do run with the standard library's reader."""
    pickle.loads(b"\x80\x02" + name("posix.system") + TOUCH + b"R.")
    assert os.path.exists(TRACE)
    os.remove(TRACE)
