"""What happens around every command: words and flags, streams that cannot take the output, Ctrl-C at the start."""

import argparse
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mythos_jax.cli import COMMANDS, build_parser, main
from mythos_jax.commands import words as command_words
from mythos_jax.commands.arguments import path, positive_integers
from mythos_jax.commands.words import find_parser, split_overrides

TINY = """\
model: {vocab_size: 264, dim: 16, max_seq_len: 32, loops: 2, n_heads: 2, n_kv_heads: 2}
training: {steps: 10, warmup_steps: 2}
data: {seq_len: 16}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The name of a config in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return "tiny.yaml"


def fails(capsys, *words):
    """Runs a command that must be refused; returns the one line that it prints."""
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    return err.strip()


def actions() -> Iterator[tuple[str, argparse.Action]]:
    """All flags and positionals, with their command."""
    for name in [*COMMANDS, "data prepare"]:
        for action in find_parser(build_parser(), name.split())._actions:
            yield name, action


PATHS = {"DIR", "FILE", "RUN", "MODEL", "SRC", "DST", "CONFIG"}  # what stands for a path in --help


# Words.


def test_flags_may_stand_before_the_config(tiny, capsys):
    outputs = []
    for words in (
        [tiny, "--model.loops", "3", "--training.seed=7", "--context", "8"],
        ["--model.loops", "3", "--training.seed=7", "--context", "8", tiny],
        ["--model.loops=3", tiny, "--training.seed", "7", "--context=8"],
    ):
        assert main(["info", *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert re.search(r"^ +3 .*\(default\)$", outputs[0], re.M)


def test_overrides_are_told_from_flags_and_their_values():
    parser = find_parser(build_parser(), ["train"])
    words = ["--training.steps", "-1", "a.yaml", "--workdir", "w", "--name=x y", "--mesh.fsdp=-1", "--", "--z"]
    plain, overrides, problem = split_overrides(parser, words)
    assert plain == ["a.yaml", "--workdir", "w", "--", "--z"]
    assert (overrides, problem) == (["--training.steps", "-1", "--name=x y", "--mesh.fsdp=-1"], "")
    assert split_overrides(find_parser(build_parser(), ["generate"]), ["run", "--a prompt"])[0] == ["run", "--a prompt"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train c --workdri x", "unknown argument '--workdri' for `mythos train`; did you mean --workdir?"),
        ("train c --nam x", "unknown argument '--nam' for `mythos train`; did you mean --name?"),
        ("eval r --loop 3", "unknown argument '--loop' for `mythos eval`; did you mean --loops?"),
        ("eval r --qqq", "unknown argument '--qqq' for `mythos eval`; see its --help"),
        ("data prepare t --out o --held-out 0.1", "--held-out is now --held-out-fraction"),
        ("eval r -x", "unknown argument '-x' for `mythos eval`; see its --help"),
        ("eval", "the following arguments are required: RUN|MODEL; see `mythos eval --help`"),
        ("generate r p --seed 4294967296", "argument --seed: got 4294967296, allowed: an integer from 0 to 4294967295"),
        ("eval r --step 0", "argument --step: got 0, allowed: an integer >= 1"),
        ("eval r --limit -1", "argument --limit: got -1, allowed: an integer >= 1"),
        ("eval r --limit 1e400", "argument --limit: got inf, allowed: an integer >= 1"),
        ("eval r --loops 1-99999999999", "argument --loops: got '1-99999999999', allowed: integers >= 1"),
        ("eval r --loops 1-2000", "argument --loops: got '1-2000', allowed: at most 1000 integers"),
        ("generate r p --temperature nan", "argument --temperature: got 'nan', allowed: a number >= 0"),
        ("generate r p --top-p 0", "argument --top-p: got 0.0, allowed: a number in (0, 1]"),
        ("info c --context -5", "argument --context: got -5, allowed: an integer >= 1"),
        ("train-predictor r --rows 0", "argument --rows: got 0, allowed: an integer >= 1"),
        ("data prepare t --out o --workers -1", "argument --workers: got -1, allowed: an integer from 0 to 1024"),
        ("data prepare t --out o --max-bytes -1", "argument --max-bytes: got -1, allowed: an integer >= 0"),
        ("train c --workdir=", "argument --workdir: got '', allowed: a path"),
        ("train c --workdir $NOWHERE/x", "argument --workdir: $NOWHERE/x: the environment variable NOWHERE is not set"),
        ("info pretrained --model.dim 3", "pretrained: is a pretrained model, got --model.dim; allowed only with"),
    ],
)
def test_wrong_words_are_named_in_one_line(capsys, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    assert fails(capsys, *words.split()).startswith(f"mythos: {line}")


def test_every_number_has_bounds_and_every_path_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name, action in actions():
        assert action.type not in (int, float), (name, action.dest)
        if action.metavar and set(str(action.metavar).split("|")) & {
            "DIR",
            "FILE",
            "RUN",
            "MODEL",
            "SRC",
            "DST",
            "CONFIG",
        }:
            assert action.type is path, (name, action.dest)
    assert path("~/x") == "/home/me/x"
    assert build_parser().parse_args(["eval", "r", "--tasks", "~/a.yaml,b"]).tasks == ["/home/me/a.yaml", "b"]
    assert positive_integers("4,1-3") == [4, 1, 2, 3]


def test_renamed_flags_exist():
    flags = {flag for _, action in actions() for flag in action.option_strings}
    assert set(command_words.RENAMED.values()) <= flags
    assert not set(command_words.RENAMED) & flags


# Streams.


def test_output_that_nobody_reads_ends_without_a_word(tiny, monkeypatch, capsys):
    for size in (1, 0):  # line by line, and all at once at the end
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w", encoding="utf-8", buffering=1 if size else -1) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert main(["info", tiny]) == 141
    assert capsys.readouterr().err == ""


def test_output_that_cannot_be_written_is_an_error(tiny, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["info", tiny]) == 1
    assert capsys.readouterr().err == "mythos: standard output: [Errno 28] No space left on device\n"


def test_characters_that_the_locale_lacks_are_escaped(tiny, monkeypatch):
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["info", tiny, "--name", "d\u00e9j\u00e0 \u65e5"]) == 0
        assert written.getvalue().startswith(b"d\\xe9j\\xe0 \\u65e5: 1 + 1 x loops + 1 layers")


def test_a_platform_that_is_not_there_is_named(tiny):
    environment = {**os.environ, "JAX_PLATFORMS": "abacus"}
    command = [sys.executable, "-m", "mythos_jax", "info", tiny]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("mythos: JAX_PLATFORMS: got 'abacus', allowed: a platform that ")
    assert "Traceback" not in done.stderr


def test_a_name_that_cannot_be_spelt_is_named(tiny, capsys):
    with open(tiny, "a", encoding="utf-8") as config:
        config.write('name: "\\ud800"\n')
    expected = "mythos: 'runs/\\ud800': cannot be a name here; allowed: characters of the locale"
    assert fails(capsys, "train", tiny).startswith(expected)


# Ctrl-C.

SCRIPT = """
import os, signal, sys, time
from mythos_jax import interrupts

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)

class Module:
    def find_spec(self, name, path, target=None):
        if name == "slow":
            try:
                press()
            except BaseException:
                raise ImportError("initializing the extension") from None

class Callback:
    def __del__(self):
        press()

where = sys.argv[1]
if where == "sigterm":
    signal.signal(signal.SIGTERM, interrupts.end_at_once)
    os.kill(os.getpid(), signal.SIGTERM)
with interrupts.caught() as pressed:
    try:
        if where == "import":
            sys.meta_path.insert(0, Module())
            import slow
        if where == "callback":
            Callback()
            time.sleep(20)
        if where == "code":
            press()
    except KeyboardInterrupt:
        assert pressed
        print("caught")
        raise SystemExit(130)
"""


@pytest.mark.parametrize(
    ("where", "code", "out", "err"),
    [
        ("import", 130, "", "mythos: interrupted\n"),
        ("callback", 130, "caught\n", ""),
        ("code", 130, "caught\n", ""),
        ("sigterm", 42, "", "mythos: stopped by SIGTERM; run the same command again\n"),
    ],
)
def test_ctrl_c_leaves_no_traceback_wherever_it_comes(where, code, out, err):
    done = subprocess.run([sys.executable, "-c", SCRIPT, where], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
