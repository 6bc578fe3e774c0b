"""Checkpoints on a host's own disk: what is restored from them, and when not."""

import contextlib
import json
import shutil
from dataclasses import asdict

import jax
import numpy as np
import pytest
from jax._src.lib import _jax

from mythos_jax import processes
from mythos_jax.config import Config, DataConfig, MeshConfig
from mythos_jax.errors import ConfigError, DamagedError
from mythos_jax.runs import local_checkpoints, peers
from mythos_jax.runs.local_checkpoints import TOKEN_FILE, LocalCheckpoints, Table, parts_key, sources
from mythos_jax.runs.peers import _files, _read, _write
from mythos_jax.sharding import make_mesh
from mythos_jax.training.start import open_local_checkpoints
from mythos_jax.training.step import abstract_state, init_state
from tests.ports import free_port
from tests.tiny import DENSE

CONFIG = Config(model=DENSE, data=DataConfig(seq_len=8))


def mesh(**sizes):
    return make_mesh(MeshConfig(**sizes))


@pytest.fixture(scope="module")
def state():
    return init_state(CONFIG, mesh(fsdp=2, data=-1))


def at(state, step):
    """A state whose arrays tell its step."""
    return jax.tree.map(lambda x: x + step, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A folder with a run directory and local checkpoints of it, whose steps 1, 2 and 3 were saved."""
    home = tmp_path_factory.mktemp("home")
    (home / "run").mkdir()
    with contextlib.closing(LocalCheckpoints(str(home / "local"), home / "run")) as local:
        local.begin(state)
        for step in (1, 2, 3):
            assert local.save(at(state, step), {"checked": step}, [step])
    return home


@pytest.fixture
def home(saved, tmp_path, monkeypatch):
    """A copy that takes the place of the original, as the path of a run directory names its local checkpoints."""
    kept = shutil.copytree(saved, tmp_path / "kept")
    yield saved
    shutil.rmtree(saved)
    shutil.copytree(kept, saved)


@pytest.fixture
def local(home):
    with contextlib.closing(LocalCheckpoints(str(home / "local"), home / "run")) as local:
        yield local


def steps(home):
    return sorted(int(path.name) for path in (home / "local").glob("*/*/0/*"))


def test_the_newest_is_restored_to_the_bit_and_the_one_before_is_kept(local, home, state):
    assert steps(home) == [2, 3]
    metas = []
    restored, meta = local.restore(state, metas.append, stored=3)
    assert (metas, meta["checked"]) == ([meta], 3)
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, 3))
    assert all(
        a.sharding.is_equivalent_to(b.sharding, a.ndim)
        for a, b in zip(jax.tree.leaves(restored.variables), jax.tree.leaves(state.variables), strict=True)
    )
    local.begin(state)
    assert local.save(at(state, 5), {}, [])
    assert (local._folder / "3").is_dir()  # until the next one is whole


def test_what_is_not_the_newest_state_is_not_restored(local, state, capsys):
    assert local.restore(state, lambda _: None, stored=4) is None
    assert not capsys.readouterr().err


def test_what_would_leave_nothing_to_do_is_not_restored(local, state, capsys):
    """Nothing would be saved in the run directory."""
    assert local.restore(state, lambda _: None, None, end=3)[1]["checked"] == 2
    assert "step 3 is not restored, because training.steps is 3" in capsys.readouterr().err


def test_what_is_no_future_of_the_run_directory_is_not_restored(local, home, state, capsys):
    assert local.restore(state, lambda _: None, stored=2) is None  # step 3 was saved when the run directory had only 3
    assert "step 3 is not restored (the run directory has step 2" in capsys.readouterr().err
    with open_local_checkpoints(CONFIG, home / "run") as off:
        assert off is None
    assert not (home / "run" / TOKEN_FILE).exists()


def test_what_processes_left_that_are_on_other_hosts_now_takes_no_room(local, home, state):
    own = local._folder
    shutil.copytree(own, own.with_name("2"))
    own.rename(own.with_name("1"))
    assert local.restore(state, lambda _: None, None)[1]["checked"] == 3
    local.begin(state)
    assert [path.relative_to(own.parent).as_posix() for path in own.parent.glob("*/*")] == ["0/3"]


def test_all_processes_of_a_host_have_room_or_none_has(local, state, monkeypatch):
    needed = 2 * sum(x.nbytes for x in jax.tree.leaves(local_checkpoints.items_of(state)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, needed))
    local.begin(state)
    local._here = [0, 1]
    monkeypatch.setattr(local_checkpoints, "gathered", lambda text: [text] * 2)
    with pytest.raises(ConfigError, match="two checkpoints of 2 processes"):
        local._check_space(state)


@pytest.fixture
def told(monkeypatch):
    """The errors that one process tells the others, which wait for it otherwise."""
    errors = []

    def raise_together(work):
        try:
            return work()
        except Exception as error:
            errors.append(type(error))
            raise

    monkeypatch.setattr(local_checkpoints, "raise_together", raise_together)
    monkeypatch.setattr(peers, "raise_together", raise_together)
    return errors


def test_what_fails_on_one_process_is_told_to_the_others(local, home, state, told, monkeypatch):
    """This process's copy from another one is not there."""
    mine = Table("h0", parts_key(state), {})
    tables = [mine, Table("h1", "b", {mine.needs: [3], "b": [3]})]
    monkeypatch.setattr(local_checkpoints, "gathered", lambda _: [json.dumps(asdict(table)) for table in tables])
    monkeypatch.setattr(local_checkpoints, "copy_folders", lambda *_: None)
    assert local.restore(state, lambda _: None, None) is None
    assert told == [FileNotFoundError]


def test_a_damaged_meta_of_one_process_is_told_to_the_others(local, home, state, told):
    file = next((home / "local").glob("*/*/0/3/meta/metadata"))
    file.write_bytes(file.read_bytes().replace(b'"checked"', b'"chacked"'))
    assert local.restore(state, lambda _: None, None) is None
    assert told == [DamagedError]


def test_a_folder_that_cannot_be_listed_is_told_to_the_others(tmp_path, told, monkeypatch):
    monkeypatch.setattr(peers, "CHUNK", 8)
    monkeypatch.setattr(peers, "_files", lambda _: (tmp_path / "gone").stat())
    with pytest.raises(FileNotFoundError):
        peers.copy_folders([(0, 0)], lambda _: tmp_path, tmp_path / "to")
    assert told == [FileNotFoundError]


def test_the_token_is_that_of_process_zero(home, monkeypatch):
    """Another process may not see the file of the token yet."""
    monkeypatch.setattr(local_checkpoints, "of_process_zero", lambda work: "of process 0")
    with contextlib.closing(LocalCheckpoints(str(home / "local"), home / "run")) as other:
        assert other._token == "of process 0"


def test_the_store_of_the_processes_does_not_grow(monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    service = _jax.get_distributed_runtime_service(address, 1)
    client = _jax.get_distributed_runtime_client(address, 0)
    client.connect()
    monkeypatch.setattr(processes, "client", lambda: client)
    monkeypatch.setattr(processes, "is_single_process", lambda: False)
    for i in range(4):
        assert processes.of_process_zero(lambda i=i: i) == i
        assert processes.process_zero_first("", lambda i=i: i) == i
        assert processes.gathered(f"text {i}") == [f"text {i}"]
    assert [text for _, text in client.key_value_dir_get("mythos")] == ["text 3"]
    processes._keys.clear()
    client.shutdown()
    service.shutdown()


def test_what_another_mesh_needs_is_not_there(local, capsys):
    """Every process has every part here: the key is what tells."""
    other = abstract_state(CONFIG, mesh(fsdp=1, tensor=2, data=-1))
    assert local.restore(other, lambda _: None, None) is None
    assert "local checkpoints: step 3 is not restored, because no process has what process 0 on" in (
        capsys.readouterr().err
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("item", ["state", "meta"])
def test_a_damaged_one_is_not_restored(local, home, state, capsys, item):
    files = (home / "local").glob(f"*/*/0/3/{item}/**/{'d/*' if item == 'state' else 'metadata'}")
    for file in files:
        content = bytearray(file.read_bytes())
        content[content.index(b'"checked"') + 1 if item == "meta" else len(content) // 2] ^= 1
        file.write_bytes(content)
    assert local.restore(state, lambda _: None, None) is None
    assert "warning: local checkpoints: step 3 is not restored (" in capsys.readouterr().err


def test_a_run_that_goes_on_from_elsewhere_forgets_them(local, home, state):
    """A restore from the run directory, then a kill: what was saved before that is no future of it."""
    before = (home / "run" / TOKEN_FILE).read_text(encoding="utf-8")
    local.begin(state)
    assert (home / "run" / TOKEN_FILE).read_text(encoding="utf-8") != before
    assert steps(home) == []
    assert local.restore(state, lambda _: None, None) is None


def test_a_save_that_fails_is_said_and_stops_no_run(local, home, state, capsys):
    local.begin(state)
    shutil.rmtree(home / "local")
    (home / "local").write_text("")
    for step in (6, 7, 8):
        assert local.save(at(state, step), {}, [])
    errors = capsys.readouterr().err
    assert errors.count("no more of them are saved") == 1
    assert "warning: local checkpoints: process 0 on " in errors
    (home / "local").unlink()


def test_a_state_that_is_nan_is_not_saved(local, home, state):
    local.begin(state)
    assert not local.save(state.replace(loss_mean=state.loss_mean * np.nan), {}, [])
    assert steps(home) == []


@pytest.mark.parametrize(("folder", "message"), [("$NO_SUCH_VARIABLE/a", "NO_SUCH_VARIABLE"), ("/proc/a", "/proc/a")])
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, folder, message):
    with pytest.raises(ConfigError, match=rf"{message.replace('$', '.')}"):
        LocalCheckpoints(folder, tmp_path)


def test_each_process_takes_its_own_copy_or_one_of_an_equal():
    """Four processes, of which 0 and 2, and 1 and 3, hold the same parts. Process 2 is on a new host; processes 1 and 3
    have changed places."""
    tables = [
        Table("h0", "a", {"a": [10, 20]}),
        Table("h1", "b", {"b": [10, 20]}),
        Table("h2", "a", {}),
        Table("h3", "b", {"b": [10]}),
    ]
    assert sources(20, tables) == [0, 1, 0, 1]
    assert sources(10, tables) == [0, 1, 0, 3]
    assert sources(30, tables) == [None] * 4
    swapped = [Table("h0", "a", {"b": [5]}), Table("h1", "b", {"a": [5]})]
    assert sources(5, swapped) == [1, 0]
    lost = [Table("h0", "a", {"a": [5]}), Table("h1", "b", {})]
    assert sources(5, lost) == [0, None]


def test_folders_are_cut_into_equal_chunks_and_put_together_again(tmp_path):
    contents = {"a/1": b"0123456789", "a/2": b"", "b": b"x" * 23, "c/d/e": b"y"}
    for name, content in contents.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(content)
    files = _files(tmp_path / "from")
    for chunk in range(34 // 8 + 1):
        buffer = np.zeros(8, np.uint8)
        _read(tmp_path / "from", files, chunk * 8, buffer)
        _write(tmp_path / "to", files, chunk * 8, buffer)
    assert {name: (tmp_path / "to" / name).read_bytes() for name, _ in _files(tmp_path / "to")} == contents


def test_processes_with_the_same_parts_have_the_same_key(state):
    same = abstract_state(CONFIG, mesh(fsdp=2, data=-1))
    assert parts_key(state) == parts_key(same) != parts_key(abstract_state(CONFIG, mesh(fsdp=4, data=-1)))
