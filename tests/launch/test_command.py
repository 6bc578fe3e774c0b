"""`mythos launch`: what it checks before anything is created, and what it becomes."""

import os
import re
import tomllib
from pathlib import Path

import pytest

from mythos_jax.cli import main
from mythos_jax.commands import launch as command
from tests.launch.conftest import LAUNCH

TPU = ("--topology", "v5e:4x4", "--bucket", "gs://b", "--image", "i")


class Became(Exception):
    """What the process would have become."""


@pytest.fixture
def became(monkeypatch):
    """Runs `mythos launch`; returns the words and the environment of what it becomes."""

    def replace(program, words, environment):
        raise Became(words, environment)

    monkeypatch.setattr(os, "execvpe", replace)
    for setting in command.SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # and restored, because the command sets it

    def run(*words):
        with pytest.raises(Became) as raised:
            main(["launch", *words, "--debug"])
        return raised.value.args

    return run


def test_it_becomes_the_script_with_the_settings_as_variables(became, capsys):
    words, environment = became("gke", "mythos_1b", *TPU, "--spot", "1", "--training.steps", "7", "--dry-run")
    assert words == ["bash", str(command.FOLDER / "gke.sh"), "--dry-run", "mythos_1b", "--training.steps", "7"]
    expected = {"TOPOLOGY": "v5e:4x4", "BUCKET": "gs://b", "IMAGE": "i", "SPOT": "1"}
    assert expected.items() <= environment.items()
    assert "PREFLIGHT" not in environment
    line = "runs TOPOLOGY=v5e:4x4 IMAGE=i BUCKET=gs://b SPOT=1 launch/gke.sh --dry-run mythos_1b --training.steps 7"
    assert line in capsys.readouterr().err


def test_variables_of_the_environment_stay_and_flags_win(became, monkeypatch):
    monkeypatch.setenv("TOPOLOGY", "v5e:4x4")
    monkeypatch.setenv("ZONE", "a")
    _, environment = became("tpu-vm", "mythos_1b", "--zone", "b", "--no-preflight")
    assert (environment["TOPOLOGY"], environment["ZONE"], environment["PREFLIGHT"]) == ("v5e:4x4", "b", "0")


@pytest.mark.parametrize("action", ["--status", "--logs"])
def test_status_and_logs_check_no_config(became, action):
    words, _ = became("skypilot", "a config of long ago.yaml", action)
    assert words[1:] == [str(command.FOLDER / "skypilot.sh"), action, "a config of long ago.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gke", "nothing", *TPU), "nothing: no such config; allowed: a YAML file, or "),
        (("gke", "mythos_1b", *TPU, "--model.lops", "4"), "model.lops: unknown key; did you mean model.loops?"),
        (("gke", "mythos_1b", *TPU, "--mesh.fsdp", "3"), "mesh: got data 1 x fsdp 3 x tensor 1 x expert 4"),
        (("gke", "mythos_1b", *TPU, "--slices", "2"), "mesh.slices: got 1, allowed: 2, the number of --slices"),
        (("gke", "mythos_1b", *TPU, "--training.batch_size", "24"), "training.batch_size: got 24, allowed: "),
        (("gke", "mythos_1b", "--topology", "v5e:3x3"), "--topology: got 'v5e:3x3', allowed: v5e:1x1"),
        (("gke", "mythos_1b", "--topology", "h100:8"), "--topology: got h100:8, allowed for gke: a slice of TPUs"),
        (("gke", "mythos_1b"), "--topology: got '', allowed: "),
        (("slurm", "mythos_1b", "--gpus", "3"), "mesh: got data 1 x fsdp -1 x tensor 1 x expert 4"),
        (("skypilot", "mythos_1b", "--gpus", "H100:0"), "--gpus: got 'H100:0', allowed: a kind and a number"),
        (("skypilot", "mythos_1b", "--gpus", "8"), "--gpus: got '8', allowed: a kind and a number, such as H100:8"),
        (("local", "quickstart", "--zone", "a"), "--zone: not a setting of local; allowed: --topology, --shared"),
        (("tpu_vm", "quickstart"), "invalid choice: 'tpu_vm'"),
    ],
)
def test_what_cannot_run_is_not_launched(became, capsys, words, message):
    try:
        code = main(["launch", *words])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_every_setting_is_read_by_the_scripts_of_its_targets():
    common = (LAUNCH / "common.sh").read_text()
    for target in command.TARGETS:
        script = (LAUNCH / f"{target.replace('-', '_')}.sh").read_text()
        read = set(re.findall(r"\$\{?([A-Z_]+)", script + common)) | set(re.findall(r"require (.*)", script))
        for setting in command.SETTINGS:
            if target in setting.targets:
                assert any(setting.variable in words.split() for words in read), (target, setting.flag)


def test_the_wheel_contains_the_launchers():
    """`mythos_jax/launch` is a link to the folder, and what setuptools packs is named in pyproject.toml."""
    assert command.FOLDER.resolve() == LAUNCH
    package = command.FOLDER.parent
    setuptools = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {path.resolve() for pattern in setuptools["package-data"]["mythos_jax"] for path in package.glob(pattern)}
    assert packed >= {path for path in Path(LAUNCH).iterdir() if path.is_file()}
