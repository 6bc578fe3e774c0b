"""User-made JSON that Python's parser gives up on is an error of one line wherever it is read."""

import pytest

from mythos_jax.data.manifest import load_manifest
from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.errors import ConfigError
from mythos_jax.json_text import parse_json
from mythos_jax.model.predictor import PREDICTOR
from mythos_jax.porting.pretrained import load_pretrained
from mythos_jax.runs.load import _load_predictor
from mythos_jax.training.loggers import JsonlLogger

DEEP = '{"step": ' + "[" * 100_000 + "]" * 100_000 + "}"


def test_parse_json():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, null]}') == parse_json('{"a": [1, null]}') == {"a": [1, None]}
    for text in [DEEP, DEEP.encode(), "[", b"\xff", '{"a": ' + "1" * 5000 + "}"]:
        with pytest.raises(ValueError, match=r"nested|Expecting|decode|digits"):
            parse_json(text)


def test_deeply_nested_files(tmp_path):
    (tmp_path / PREDICTOR).mkdir()
    for name in ["manifest.json", "tokenizer.json", "config.json", f"{PREDICTOR}/predictor.json"]:
        (tmp_path / name).write_text(DEEP)
    for read in [
        lambda: load_manifest(tmp_path),
        lambda: load_tokenizer(tmp_path / "tokenizer.json"),
        lambda: load_pretrained(tmp_path),
        lambda: _load_predictor(tmp_path, 1),
    ]:
        with pytest.raises(ConfigError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_a_deeply_nested_line_of_the_log_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{DEEP}\n')
    JsonlLogger(tmp_path / "metrics.jsonl", restored_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
