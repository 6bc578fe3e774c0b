"""A run directory under gs:// carries its tokenizer, too."""

from mythos_jax.data.tokenizer import load_tokenizer
from mythos_jax.language_model import load
from mythos_jax.paths import to_path
from mythos_jax.porting.convert import convert
from mythos_jax.porting.reading import VariablesSource
from mythos_jax.runs.load import _tokenizer_of
from mythos_jax.runs.trained_on import TrainedOn, tokenizer_record
from tests.test_paths import store  # noqa: F401  a fixture
from tests.training.conftest import config_of


def test_the_tokenizer_is_written_read_and_converted(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    own, run = load_tokenizer("own.json"), to_path("gs://bucket/run")
    own.save(run)
    spec = _tokenizer_of(run, config_of(), TrainedOn.from_metadata({"data": "x", "tokenizer": tokenizer_record(own)}))
    assert str(spec) == "gs://bucket/run/tokenizer.json"
    assert load_tokenizer(str(spec)).fingerprint == own.fingerprint
    lm = load("run")
    source = VariablesSource(lm.config.model, lm.variables, str(run), str(spec))
    assert convert(source, tmp_path / "out", "mythos_jax", progress=False).ok
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
