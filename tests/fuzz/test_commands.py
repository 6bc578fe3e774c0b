"""Damaged configs, and command lines put together at random, under every command.

What a user mistypes is answered with one line and a documented exit code: no traceback, no hang, and nothing that is
there is changed. `make fuzz` tries 2,000 configs and 2,000 command lines.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mythos_jax import cli
from mythos_jax.cli import build_parser, main
from mythos_jax.commands.words import find_parser
from mythos_jax.config import Config
from mythos_jax.typed import annotated_hints, to_dict
from tests.fuzz.budget import SECONDS, budget, no_hang

GOLDEN = Path(__file__).parents[1] / "golden" / "huginn"
EXIT_CODES = (0, 1, 2, 42, 130, 141)
CONFIG: dict[str, Any] = {
    "model": {"vocab_size": 264, "dim": 16, "max_seq_len": 32, "loops": 2, "n_heads": 2, "n_kv_heads": 2},
    "training": {"steps": 10, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 5},
    "data": {"sources": ["nothing"], "seq_len": 16, "held_out_fraction": 0.2},
    "evaluation": {"batch_size": 4, "max_rows": 8},
}
# No data, so that `train` stops where it would begin to prepare some.
WITHOUT_DATA = ["--data.task", '{name: "", difficulty: []}', "--data.mixture={}", "--data.sources=[nothing]"]
WITHOUT_DATA += ["--data.path=none", "--data.document_mask=false"]

COMMANDS = [("data", "prepare") if name == "data" else (name,) for name in cli.COMMANDS]
# Those that make it wait for other processes, or that change this process for the tests after this one.
LEFT_OUT = ("--coordinator", "--compilation-cache", "--debug", "--help", "--check")
PATHS = ["tiny.yaml", "text", "text/1.txt", "model", "run", "empty", "bytes", "nothing", "a/b/c", "", ".", "~", "~/x"]
PATHS += [
    "~nobody/x",
    "$NOTHING",
    "${HOME}/new",
    "new",
    "d\u00e9j\u00e0 #1",
    "\udcff",
    "n" * 300,
    "quickstart",
    "parity",
]
GOOD = {
    "config": ["tiny.yaml"],
    "model": ["model", "run"],
    "source": ["model"],
    "target": ["new"],
    "sources": ["text"],
    "out": ["new"],
    "tokenizer": ["bytes", "nothing"],
    "topology": ["v5e:2x2"],
    "to": ["mythos_jax", "huginn", "openmythos"],
}
NUMBERS = ["0", "1", "2", "3", "-1", "1e0", "1e3", "0.5", "1e400", "nan", "-inf", "x", "", " 1", "0x1", "1_0", "\u0663"]
NUMBERS += ["2147483648", "4294967296", "9" * 5000, "null", "true", "1,2", "1-3", "1-99999999999", "[1]", "latent:1"]
SNIPPETS = [
    ":",
    ": ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    "#",
    "\n",
    "\t",
    "&a ",
    "*a",
    "<<: *a\n",
    "!!int ",
    "!!bool ",
    "|",
    ">",
]
SNIPPETS += [
    "'",
    '"',
    "\0",
    "\ufeff",
    "\u2028",
    "\u00e9",
    "%",
    "---\n",
    "...\n",
    "? ",
    "@",
    "`",
    "!!python/object:os.system ",
]


def fields(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and the type of every field of a config, sections included."""
    for name, hint in annotated_hints(section).items():
        yield f"{prefix}{name}", hint
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def literals(hint: Any) -> list[str]:
    return [*(get_args(hint) if get_origin(hint) is Literal else [])]


FIELDS = dict(fields(Config))
WORDS = sorted({word for hint in FIELDS.values() for word in literals(hint)})
NAMES = st.sampled_from(sorted(FIELDS)) | st.sampled_from(
    ["nam", "model.dmi", "modle.dim", "training.depth.per", "x.y", ""]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 10**400, -(2**63)])
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(WORDS + PATHS[:-4])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(SCALARS, SCALARS, max_size=3)
EDITS = st.lists(st.tuples(st.sampled_from(["set", "set", "set", "delete"]), NAMES, VALUES), max_size=4)
SCRATCHES = st.lists(
    st.tuples(
        st.sampled_from(["insert", "cut", "repeat", "end"]),
        st.floats(0, 1),
        st.sampled_from(SNIPPETS),
        st.integers(1, 9),
    ),
    max_size=3,
)


def edited(tree: dict[str, Any], edits: list[tuple[str, str, Any]]) -> dict[str, Any]:
    """A copy in which fields are set or deleted."""
    tree = {name: dict(section) for name, section in tree.items()}
    for what, dotted, value in edits:
        *sections, name = dotted.split(".")
        node: Any = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(name, None) if what == "delete" else node.update({name: value})
    return tree


def scratched(text: str, scratches: list[tuple[str, float, str, int]]) -> str:
    """The text with parts inserted, cut out, repeated, or cut off."""
    for what, where, snippet, count in scratches:
        at = int(where * len(text))
        lines = text.splitlines(keepends=True)
        if what == "insert":
            text = text[:at] + snippet + text[at:]
        elif what == "cut":
            text = text[:at] + text[at + count :]
        elif what == "end":
            text = text[:at]
        elif lines:
            line = int(where * (len(lines) - 1))
            text = "".join([*lines[: line + 1], *lines[line : line + count], *lines[line + 1 :]])
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of every kind that a command may be pointed at."""
    place = tmp_path_factory.mktemp("commands")
    (place / "text").mkdir()
    for i in range(8):
        (place / "text" / f"{i}.txt").write_text(f"Document {i}. " * 9, encoding="utf-8")
    (place / "tiny.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    (place / "bytes").write_bytes(bytes(range(256)))
    (place / "empty").mkdir()
    shutil.copytree(GOLDEN, place / "model")
    (place / "run" / "checkpoints").mkdir(parents=True)
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())), encoding="utf-8")
    return place


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check(place: Path, words: list[str]) -> int:
    """Runs a command in a copy of the place, and returns its exit code."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace") for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Path(folder) / "place"
        shutil.copytree(place, sandbox)
        environment = mock.patch.dict(os.environ, {"HOME": str(sandbox / "empty")})
        with environment, contextlib.chdir(sandbox), no_hang():
            os.environ.pop("NOTHING", None)
            until_a_signal = mock.patch("mythos_jax.server.run.serve", return_value=0)
            with until_a_signal, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = main(words)
                except SystemExit as stop:  # argparse
                    code = stop.code
        before = contents(place)
        after = contents(sandbox)
    err.seek(0)
    errors = err.read()
    assert code in EXIT_CODES, (code, errors)
    assert "Traceback" not in errors, errors
    assert f"still running after {SECONDS} s" not in errors
    if code:
        said = [line for line in errors.splitlines() if line.startswith("mythos: ")]
        assert len(said) == 1, errors
        assert said[0] == errors.splitlines()[-1], errors
        assert len(said[0]) < 9000, said
    assert {name: after.get(name) for name in before} == before
    return code


@given(edits=EDITS, scratches=SCRATCHES, encoding=st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]))
@budget(20, 2000)
def test_a_damaged_config_is_read_or_refused(place, edits, scratches, encoding):
    text = scratched(yaml.safe_dump(edited(CONFIG, edits), allow_unicode=True, sort_keys=False), scratches)
    (place / "tiny.yaml").write_bytes(text.encode(encoding, "replace"))
    code = check(place, ["info", "tiny.yaml"])
    # What can be read can be trained with, or is refused.
    assert check(place, ["train", "tiny.yaml", *WITHOUT_DATA]) in ([2] if code else [1, 2])
    (place / "tiny.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")


def values(action: argparse.Action) -> st.SearchStrategy[str]:
    """Words for a flag or a positional: some that it takes, many that it does not."""
    good = st.sampled_from(GOOD.get(action.dest, ["1", "2"]))
    words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
    return good | good | good | st.sampled_from(NUMBERS) | st.sampled_from(PATHS) | words


@st.composite
def command_lines(draw) -> list[str]:
    command = draw(st.sampled_from(COMMANDS))
    parser = find_parser(build_parser(), command)
    words: list[list[str]] = []
    for action in parser._actions:
        needed = not action.option_strings or action.required
        if set(action.option_strings) & set(LEFT_OUT) or draw(st.integers(0, 9)) >= (9 if needed else 3):
            continue
        word = [draw(values(action))] if action.nargs != 0 else []
        flag = action.option_strings[-1:]
        if flag and word and draw(st.booleans()):
            words.append([f"{flag[0]}={word[0]}"])
        else:
            words.append([*flag, *word])
    for name in draw(st.lists(NAMES, max_size=2)):
        words.append([f"--{name}", str(draw(VALUES))])
    if draw(st.integers(0, 9)) == 0:
        words.append([draw(st.sampled_from(["--", "-", "--x", "-x", "--helo", "--held-out", "--model", "extra"]))])
    return [*command, *(word for group in draw(st.permutations(words)) for word in group)]


@given(words=command_lines())
@budget(40, 2000)
def test_a_command_line_is_obeyed_or_refused(place, words):
    check(place, [word.replace("\0", "") for word in words])
