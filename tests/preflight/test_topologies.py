"""The names of what can be compiled for."""

import importlib.util

import pytest

from mythos_jax import cli
from mythos_jax.chips import CHIPS
from mythos_jax.errors import ConfigError
from mythos_jax.preflight.topology import parse_topology


def test_topologies():
    topology = parse_topology("v5p:4x4x8", slices=2)
    assert (topology.chip, topology.name) == (CHIPS["v5p"], "v5p:4x4x8 x 2")
    for name in ["v5e:3x3", "v5p:4x4", "v5e", "v100:8"]:
        with pytest.raises(ConfigError, match=r"allowed: .*v5[ep]:"):
            parse_topology(name)
    with pytest.raises(ConfigError, match="--slices: got 0"):
        parse_topology("v5e:4x4", slices=0)


def test_topologies_of_gpus(monkeypatch):
    """Nodes come before the GPUs of each. A program gets the part of the memory that jax reserves."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    topologies = [parse_topology(name) for name in ("h100:1", "h200:8", "a100:12x8")]
    assert [t.nodes for t in topologies] == [(1, 1), (1, 8), (12, 8)]
    assert topologies[0].chip.hbm_bytes == 0.75 * CHIPS["h100"].hbm_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert parse_topology("h100:1").chip.hbm_bytes == 0.9 * CHIPS["h100"].hbm_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ConfigError, match="XLA_PYTHON_CLIENT_MEM_FRACTION: got 'most', allowed: a number"):
        parse_topology("h100:1")
    monkeypatch.undo()
    for name in ["h100:3", "h100:2x4", "h100:0x8", "h100:"]:
        with pytest.raises(ConfigError, match=rf"--topology: got '{name}', allowed: h100:1, .* h100:Nx8 for N nodes"):
            parse_topology(name)
    with pytest.raises(
        ConfigError, match=r"--slices: got 2, allowed: 1 for GPUs, whose nodes are in the name: h100:2x8"
    ):
        parse_topology("h100:8", slices=2)


def test_the_command_rejects_wrong_input_with_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("name: c\n")
    assert cli.main(["compile", str(path), "--topology", "v9:1x1"]) == 2
    error = capsys.readouterr().err
    assert "v9:1x1" in error
    assert "v5e:16x16" in error
    assert error.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for topology, extra in [("v5e:2x2", "tpu"), ("h100:8", "cuda")]:
        assert cli.main(["compile", str(path), "--topology", topology]) == 2
        error = capsys.readouterr().err
        assert f"pip install '.[{extra}]'" in error
        assert error.count("\n") == 1
