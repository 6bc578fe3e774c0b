"""What `import mythos_jax` gives, and what it does not import or change."""

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import mythos_jax
from mythos_jax.processes import log0


def test_public_names():
    for name in mythos_jax.__all__:
        value = getattr(mythos_jax, name)
        assert name == "__version__" or value.__name__ == name
    assert set(mythos_jax.__all__) <= set(dir(mythos_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mythos_jax.nothing


def test_type_checkers_see_the_public_names():
    """The imports under TYPE_CHECKING are the names in `__all__`, from the modules where they are found at run time."""
    tree = ast.parse(Path(mythos_jax.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"mythos_jax.{module}" for name, module in mythos_jax._MODULES.items()}
    assert {*seen, "__version__"} == set(mythos_jax.__all__)


def test_model_and_training_step_need_only_jax_flax_and_optax():
    code = """
import sys
for name in "grain orbax orbax.checkpoint torch array_record tokenizers pyarrow matplotlib tqdm".split():
    sys.modules[name] = None  # importing it raises
from mythos_jax import Mythos, ModelConfig, Halting, load_config, generate
import mythos_jax.training.step
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_checkpoints_are_quiet_and_leave_loggers_and_hooks_alone(tmp_path):
    code = """
import logging, sys, threading
import orbax.checkpoint

def settings():
    loggers = [None, "absl", "asyncio", "orbax", "jax"]
    return [logging.getLogger(name).level for name in loggers], sys.excepthook, sys.unraisablehook, threading.excepthook

before = settings()
import mythos_jax.runs.checkpoints
assert settings() == before
from mythos_jax.runs.checkpoints import Checkpoints
Checkpoints(sys.argv[1]).close()
Checkpoints(sys.argv[1], read_only=True).close()
assert settings() == before
"""
    command = [sys.executable, "-c", code, str(tmp_path / "checkpoints")]
    assert "WARNING" not in subprocess.run(command, check=True, capture_output=True, text=True).stderr


def test_what_is_logged_can_be_silenced(capsys):
    logger = logging.getLogger("mythos_jax")
    log0("seen")
    try:
        logger.setLevel(logging.WARNING)
        log0("not seen")
        log0("a warning", logging.WARNING)
    finally:
        logger.setLevel(logging.INFO)
    assert capsys.readouterr() == ("", "seen\na warning\n")


def is_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes text in the encoding of the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name == "open":
        owner = (
            call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) else ""
        )
        modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        return owner != "os" and not any("b" in mode for mode in modes if isinstance(mode, str))
    return name in ("read_text", "write_text", "TextIOWrapper")


def test_text_files_are_utf_8_whatever_the_locale_says():
    root = Path(mythos_jax.__file__).parents[1]
    files = [path for room in ("mythos_jax", "benchmarks", "examples") for path in (root / room).rglob("*.py")]
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and is_text_without_encoding(node)
    ]
    assert len(files) > 100
    assert not found
