"""Checkpoints that cannot be read: set aside if their files are at fault, left alone if something else is."""

import contextlib
import errno
import os
import shutil

import jax
import numpy as np
import pytest

from mythos_jax.config import Config, DataConfig, MeshConfig
from mythos_jax.errors import DamagedError, UnreadableError
from mythos_jax.runs.checkpoints import Checkpoints
from mythos_jax.sharding import make_mesh
from mythos_jax.training.step import init_state
from tests.tiny import DENSE

NOT_DAMAGE = [
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
    ValueError('PERMISSION_DENIED: Error opening "zarr" driver: [OS error EACCES: Permission denied]'),
    ValueError("UNAVAILABLE: storage.googleapis.com: connection refused"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes"),
    RuntimeError("process 1: [Errno 13] Permission denied: 'checkpoints/4/meta'"),
    MemoryError(),
]
DAMAGE = [
    ValueError("DATA_LOSS: checksum mismatch"),
    ValueError("Unterminated string starting at: line 1 column 11228 (char 11227)"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    DamagedError("meta is damaged: its digest is not the one that was saved"),
]


@pytest.fixture(scope="module")
def state():
    config = Config(model=DENSE, data=DataConfig(seq_len=8))
    return init_state(config, make_mesh(MeshConfig(fsdp=1, data=-1)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state.replace(step=state.step + step), {})
        checkpoints.wait()
    return folder


@pytest.fixture
def checkpoints(tmp_path, saved):
    with contextlib.closing(Checkpoints(shutil.copytree(saved, tmp_path / "checkpoints"))) as checkpoints:
        yield checkpoints


def failing(checkpoints, monkeypatch, error):
    """Reading the newest checkpoint fails with this error."""
    read = checkpoints._meta

    def meta(step):
        if step == 2:
            raise error
        return read(step)

    monkeypatch.setattr(checkpoints, "_meta", meta)


@pytest.mark.parametrize("error", NOT_DAMAGE, ids=lambda error: f"{type(error).__name__}_{str(error)[:17]}")
def test_what_may_be_whole_is_left_alone(checkpoints, state, monkeypatch, error):
    failing(checkpoints, monkeypatch, error)
    for read in (
        lambda: checkpoints.restore_newest(state, lambda _: None),
        lambda: checkpoints.restore_variables(2, state.variables, lambda _: None),
    ):
        with pytest.raises(UnreadableError, match=r"checkpoints/2: cannot be read, nothing was changed"):
            read()
    assert checkpoints.steps() == [1, 2]
    assert not list(checkpoints.directory.glob("*.damaged"))


@pytest.mark.parametrize("error", DAMAGE, ids=lambda error: f"{type(error).__name__}_{str(error)[:17]}")
def test_a_damaged_one_is_set_aside(checkpoints, state, monkeypatch, error):
    failing(checkpoints, monkeypatch, error)
    restored, _ = checkpoints.restore_newest(state, lambda _: None)
    assert int(restored.step) == 1
    jax.tree.map(np.testing.assert_array_equal, restored.variables, state.variables)
    assert (checkpoints.directory / "2.damaged").is_dir()
