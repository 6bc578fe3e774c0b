"""A run's config.yaml that was edited, or damaged into something that can still be read, is not used without a word."""

import shutil
from pathlib import Path

import pytest

from mythos_jax.errors import ConfigError
from mythos_jax.language_model import load


def test_a_model_that_is_not_the_trained_one_is_announced(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "home"))
    load("run")
    assert "when the run was trained" not in capsys.readouterr().err
    file = Path("run/config.yaml")
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("rope_theta: 10000.0", "rope_theta: 10001.0"), encoding="utf-8")
    load("run")
    said = "run/config.yaml: model.rope_theta was 10000.0 when the run was trained, is 10001.0\n"
    assert said in capsys.readouterr().err
    file.write_text(text.replace("  dim: 16", "  dim: 20"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run/config\.yaml: is not that of the run's weights \(model\.dim was 16"):
        load("run")
