"""Run directories and prepared data with deleted, truncated, changed and forbidden files, under every command.

A command on a damaged directory may do its work with the right result, or refuse in one line. It may not show a
traceback, hang, give a wrong result without a word, or destroy what is still whole.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.budget import FULL, SECONDS, budget
from tests.fuzz.victim import Outcome, Victim
from tests.training.conftest import write_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, again and again, under the old oak. "
CONFIG = """\
name: run
model: {vocab_size: 264, dim: 16, max_seq_len: 32, loops: 2, n_heads: 2, n_kv_heads: 2, hidden_dim: 16}
training: {steps: 4, batch_size: 4, warmup_steps: 1, checkpoint_every: 2, keep_checkpoints: 9, log_every: 1}
data: {sources: [text], path: data, tokenizer: tokenizer.json, seq_len: 16, held_out_fraction: 0.3}
evaluation: {batch_size: 4, max_rows: 8}
"""
ALL_COMMANDS = {
    "train": ["train", "run.yaml", "--workdir", "run", "--training.steps", "6"],
    "eval": ["eval", "run", "--loops", "2", "--json"],
    "generate": ["generate", "run", "The quick", "--max-new-tokens", "4"],
    "info": ["info", "run"],
    "train-predictor": ["train-predictor", "run", "--rows", "8"],
    "convert": ["convert", "run", "out", "--to", "mythos_jax", "--json"],
}
QUICK = ("train", "generate", "info")
COMMANDS = ALL_COMMANDS if FULL else {name: ALL_COMMANDS[name] for name in QUICK}


@pytest.fixture(scope="module")
def victim():
    victim = Victim()
    yield victim
    victim.close()


@pytest.fixture(scope="module")
def whole(victim, tmp_path_factory):
    """A folder with a run of four steps and its data, and what each command prints when nothing is damaged."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(f"{TEXT * 2} Number {i}.")
    (folder / "run.yaml").write_text(CONFIG)
    write_tokenizer(folder / "tokenizer.json", 264, [TEXT])
    trained = victim.run(["train", "run.yaml"], folder, 120)
    assert trained.code == 0, trained.stderr
    (folder / "runs" / "run").rename(folder / "run")
    for name in {"eval", "train-predictor"} & COMMANDS.keys():  # so that there are more kinds of files to damage
        assert victim.run(COMMANDS[name], folder, 120).code == 0
    expected = {name: {results(victim, folder, name)} for name in COMMANDS}
    with copied(folder) as older:
        shutil.rmtree(older / "run" / "checkpoints" / "4")
        for name in COMMANDS:
            expected[name].add(results(victim, older, name))
    return folder, expected


@contextlib.contextmanager
def copied(folder: Path):
    """A copy of a folder, which is deleted whatever its permissions have become."""
    parent = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        yield shutil.copytree(folder, parent / "copy")
    finally:
        for path, _, _ in os.walk(parent):
            os.chmod(path, stat.S_IRWXU)
        shutil.rmtree(parent)


def results(victim: Victim, folder: Path, name: str) -> tuple[str, str]:
    """What a command prints about an undamaged folder: its result, and what it says on standard error."""
    with copied(folder) as copy:
        outcome = victim.run(COMMANDS[name], copy, 120)
    assert outcome.code == 0, outcome
    return result(outcome, name), remarks(outcome)


def result(outcome: Outcome, name: str) -> str:
    """Standard output without what depends on paths and on the speed of the machine."""
    if name == "eval":
        return json.dumps([entry["loss"] for entry in json.loads(outcome.stdout)["results"]])
    return re.sub(r"/\S+", "", outcome.stdout)


def remarks(outcome: Outcome) -> str:
    """Standard error without progress."""
    return "\n".join(line for line in re.split(r"[\r\n]", outcome.stderr) if not re.search(r"\d+ ?%|it/s", line))


def saved(folder: Path) -> set[str]:
    """Digests of the files of all checkpoints that can be read, wherever they were moved to."""
    digests = set()
    for parent, _, names in os.walk(folder / "run" / "checkpoints"):
        for name in names:
            with contextlib.suppress(PermissionError):
                digests.add(hashlib.sha256(Path(parent, name).read_bytes()).hexdigest())
    return digests


DAMAGES = ["delete", "empty", "truncate", "flip", "append", "directory", "forbid", "read_only", "delete_folder"]


def damage(folder: Path, which: float, kind: str, where: float, byte: int) -> str:
    """Damages one file or folder of the run or of its data; returns what was done."""
    wanted = Path.is_dir if kind in ("read_only", "delete_folder") else Path.is_file
    roots = folder / "run", folder / "data"
    paths = [path for root in roots for path in [root, *sorted(root.rglob("*"))] if wanted(path)]
    if not paths:
        return "nothing left to damage"
    path = paths[int(which * len(paths))]
    if kind == "read_only":
        path.chmod(0o500)
    elif kind == "delete_folder":
        shutil.rmtree(path)
    elif kind == "forbid":
        path.chmod(0)
    elif kind in ("delete", "directory"):
        path.unlink()
        if kind == "directory":
            path.mkdir()
    else:
        content = bytearray(path.read_bytes())
        at = int(where * len(content))
        if kind == "flip" and content:
            content[at] ^= byte or 1
        path.write_bytes({"empty": b"", "truncate": content[:at], "append": content + bytes([byte])}.get(kind, content))
    return f"{kind} {path.relative_to(folder)} at {where:.3f}, {byte}"


fraction = st.floats(0, 1, exclude_max=True)
damages = st.lists(st.tuples(fraction, st.sampled_from(DAMAGES), fraction, st.integers(0, 255)), min_size=1, max_size=3)


@pytest.mark.slow
@given(damages, st.sampled_from(sorted(COMMANDS)))
@budget(short=10, full=500)
def test_damaged(whole, victim, damages, name):
    folder, expected = whole
    with copied(folder) as copy:
        done = []
        for args in damages:
            with contextlib.suppress(PermissionError):  # a damage before this one may forbid it
                done.append(damage(copy, *args))
        before = saved(copy)
        outcome = victim.run(COMMANDS[name], copy, SECONDS)
        story = f"{name}: {done}\ncode {outcome.code}\n{outcome.stdout}\n{outcome.stderr}"
        assert outcome.code in (0, 1, 2), story
        assert "Traceback" not in outcome.stdout + outcome.stderr, story
        if outcome.code:
            assert outcome.stderr.strip().splitlines()[-1].startswith("mythos: "), story
        elif name in ("generate", "convert") or not any("config.yaml" in text or "manifest" in text for text in done):
            right, usual = zip(*expected[name], strict=True)
            assert result(outcome, name) in right or remarks(outcome) not in usual, story
        assert saved(copy) >= before, story
        if all(kind in ("forbid", "read_only") for _, kind, _, _ in damages):
            assert not list((copy / "run").glob("**/*.damaged")), story  # what cannot be read may be whole
