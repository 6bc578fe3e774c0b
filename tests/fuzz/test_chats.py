"""Random records: `mythos data prepare --chat` ends with one line, or trains on exactly the answers.

300 files under `make fuzz`. What is trained on is known from the records; the tokens are put into words again.
"""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_jax.data.manifest import load_manifest
from mythos_jax.data.tokenizer import load_tokenizer
from tests.chats import prepare, run, samples, write_chats, write_model
from tests.fuzz.budget import budget, no_hang

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORD = st.text("ab é漢🎉\n", min_size=1, max_size=20).filter(str.strip)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda value: st.lists(value, max_size=2) | st.dictionaries(TEXT, value, max_size=2),
    max_leaves=4,
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool"])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE, "content": WORD}, optional={"weight": st.sampled_from([0, 1]), "name": TEXT, "note": VALUE}
)
ODD = st.dictionaries(st.sampled_from(["role", "content", "weight", "tool_calls", "x"]), VALUE | ROLE, max_size=4)
GOOD = st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=5)})
BAD = (
    st.fixed_dictionaries({"messages": st.lists(MESSAGE | ODD | VALUE, max_size=3) | VALUE}, optional={"tools": VALUE})
    | st.fixed_dictionaries({"prompt": TEXT | VALUE, "completion": TEXT | VALUE})
    | VALUE
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def answers(record):
    """The texts that are trained on; None for a record that is refused."""
    messages = record["messages"]
    if any(m.get("weight") and m["role"] != "assistant" for m in messages):
        return None
    found = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    return found or None


@budget(10, 300)
@given(st.lists(GOOD | BAD, min_size=1, max_size=4))
def test_random_records(model, records):
    folder, errors = Path(tempfile.mkdtemp()), io.StringIO()
    try:
        source = write_chats(folder / "chats.jsonl", records)
        words = ["data", "prepare", source, "--chat", "--tokenizer", model, "--seq-len", 300]
        words += ["--held-out-fraction", 0, "--out", folder / "out"]
        with no_hang(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            stopped = run(*words)
            lines, left = errors.getvalue().splitlines(), sorted(path.name for path in folder.iterdir())
            code = run(*words, "--on-error", "skip")
        if stopped == 2:
            assert [line.startswith("mythos: ") for line in lines] == [True]
            assert left == ["chats.jsonl"]
        assert code == 0 or not (folder / "out").exists()
        if code == 0:
            manifest = load_manifest(folder / "out")
            assert (manifest.left_out_count == 0) == (stopped == 0)
            assert manifest.splits["train"].documents + manifest.left_out_count == len(records)
    finally:
        shutil.rmtree(folder)


@budget(10, 300)
@given(GOOD)
def test_exactly_the_answers_are_trained_on(model, record):
    expected = answers(record)
    folder = Path(tempfile.mkdtemp())
    try:
        if expected is None:
            source = write_chats(folder / "chats.jsonl", [record])
            with contextlib.redirect_stderr(io.StringIO()):
                words = ["--tokenizer", model, "--out", folder / "out"]
                assert run("data", "prepare", source, "--chat", *words) == 2
            return
        with contextlib.redirect_stdout(io.StringIO()):
            out = prepare(folder, [record], model=model, seq_len=1000)
        ((ids, weights),) = samples(out)
        tokenizer = load_tokenizer(model)
        trained = tokenizer.spell(i for i, weight in zip(ids, weights, strict=True) if weight)
        # A token may hold the end of the line before the answer, too.
        assert [part.strip() for part in trained.split("<|im_end|>")[:-1]] == [
            text.removesuffix("<|im_end|>").strip() for text in expected
        ]
    finally:
        shutil.rmtree(folder)
