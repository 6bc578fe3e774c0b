"""Prepared by workers: the same folder, to the bit, as by the command alone; also after kills, and across the two.

The workers' functions run in a loop here, or, if it is installed (`make test-beam`), as a pipeline of Apache Beam.
"""

import importlib.util
import json
import sys
import types

import fsspec
import numpy as np
import pytest

from mythos_jax.cli import main
from mythos_jax.data import part_worker as part_worker_module
from mythos_jax.data import text_parts as text_parts_module
from mythos_jax.data import units as units_module
from mythos_jax.data.destination import Destination
from mythos_jax.data.manifest import SPLITS, Manifest, parse_manifest
from mythos_jax.data.part_worker import hash_split, part_to_json, plan_shards, tokenize_part, write_planned
from mythos_jax.data.prepare import prepare
from mythos_jax.data.shard_plan import UnitCount, make_plan
from mythos_jax.errors import ConfigError, StorageError, TrainingError
from tests.data.test_chat_rows import many, write_model
from tests.data.test_prepare import words_tokenizer
from tests.data.test_units import Killed, kill_after

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
MEMORY = fsspec.filesystem("memory")
OPTIONS = {"seq_len": 16, "held_out_fraction": 0.2, "shard_bytes": 3000, "progress": False}


def run_here(parts, job, runner, flags, workers):
    """Does what `beam_pipeline.run` does, in an order of its own."""
    results = [tokenize_part(part_to_json(part), job) for part in reversed(parts)]
    shards = [write_planned(plan, job) for plan in reversed(plan_shards(results, job))]
    for split in SPLITS:
        hash_split(split, shards, job)


@pytest.fixture(params=["loop", pytest.param("beam", marks=pytest.mark.skipif(not HAS_BEAM, reason="no apache-beam"))])
def engine(request, monkeypatch):
    if request.param == "loop":
        run_without_beam(monkeypatch)


def run_without_beam(monkeypatch):
    module = types.ModuleType("beam_pipeline")
    module.run, module.check = run_here, lambda runner, flags: None
    monkeypatch.setitem(sys.modules, "mythos_jax.data.beam_pipeline", module)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(text_parts_module, "UNIT_BYTES", 1500)
    random = np.random.default_rng(0)
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(4):
        lines = ["w" + " w".join(map(str, random.integers(0, 6, random.integers(1, 60)))) for _ in range(25)]
        (root / f"{i}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for i in range(9):
        (root / f"small{i}.txt").write_text("w1 w2 " * int(random.integers(0, 50)))
    return root


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored(folder):
    return {path.rpartition("/")[2]: MEMORY.cat_file(path) for path in MEMORY.find(folder)}


def both(sources, tmp_path, **options):
    """The content of a folder that is made by workers, and of one that is not."""
    options = OPTIONS | {"workers": 1} | options
    prepare(sources, tmp_path / "alone", **options)
    prepare(sources, tmp_path / "workers", runner="DirectRunner", **options)
    assert not list(tmp_path.glob("*partial*"))
    return content(tmp_path / "workers"), content(tmp_path / "alone")


@pytest.mark.usefixtures("engine")
class TestTheSameFolder:
    def test_of_many_documents(self, corpus, tmp_path):
        words_tokenizer(tmp_path / "tokenizer.json")
        made, expected = both([str(corpus)], tmp_path, tokenizer=tmp_path / "tokenizer.json")
        assert made == expected
        assert len([name for name in made if name.startswith("train")]) > 3
        assert len([name for name in made if name.startswith("held_out")]) > 1

    @pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.999999])  # a document changes over
    def test_with_a_split_that_would_be_empty(self, corpus, tmp_path, fraction):
        made, expected = both([str(corpus)], tmp_path, held_out_fraction=fraction)
        assert made == expected

    def test_of_a_single_document_in_many_pieces(self, tmp_path, corpus, monkeypatch):
        monkeypatch.setattr("mythos_jax.data.readers.PIECE_CHARACTERS", 100)
        (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(700)))
        made, expected = both([str(tmp_path / "a.txt")], tmp_path, held_out_fraction=0.3)
        assert made == expected

    @pytest.mark.parametrize("limit", [1, 4_321])
    def test_of_the_first_bytes(self, corpus, tmp_path, limit):
        made, expected = both([str(corpus)], tmp_path, max_bytes=limit, held_out_fraction=0.0)
        assert made == expected

    def test_of_conversations(self, corpus, tmp_path):
        model = write_model(tmp_path / "model")
        records = "".join(json.dumps(record) + "\n" for record in many(40))
        (tmp_path / "a.jsonl").write_text(records[:900] + "\n{\n" + records)
        options = {"tokenizer": model, "chat": True, "seq_len": 150, "on_error": "skip"}
        made, expected = both([str(tmp_path / "a.jsonl")], tmp_path, **options)
        assert made == expected
        assert json.loads(made["manifest.json"])["left_out_count"] > 0

    def test_after_errors_that_are_corrected(self, corpus, tmp_path, capsys):
        good = (corpus / "2.jsonl").read_text()
        (corpus / "2.jsonl").write_text(good + "{\n")
        (corpus / "3.jsonl").write_text((corpus / "3.jsonl").read_text() + "{\n")
        errors = {}
        for name in ["alone", "workers"]:
            with pytest.raises(
                ConfigError, match=r"2\.jsonl, line 26: not JSON; `mythos data prepare --on-error"
            ) as caught:
                prepare(
                    [str(corpus)], tmp_path / name, runner="DirectRunner" * (name == "workers"), workers=1, **OPTIONS
                )
            errors[name] = str(caught.value)
        assert errors["alone"] == errors["workers"]
        assert "3.jsonl, line 26: not JSON" in capsys.readouterr().err
        made, expected = both([str(corpus)], tmp_path, on_error="skip")
        assert made == expected
        assert json.loads(made["manifest.json"])["left_out_count"] == 2

    def test_in_a_store(self, corpus, tmp_path):
        words_tokenizer(tmp_path / "tokenizer.json")
        bucket = tmp_path.name
        MEMORY.put(str(corpus), f"/{bucket}/text", recursive=True)
        source, out = f"memory://{bucket}/text", f"memory://{bucket}/out"
        options = OPTIONS | {"tokenizer": tmp_path / "tokenizer.json", "workers": 1}
        prepare([source], tmp_path / "alone", **options)
        made = prepare([source], out, runner="DirectRunner", **options)
        assert prepare([source], out, runner="DirectRunner", **options) == made
        assert stored(f"/{bucket}/out") == content(tmp_path / "alone")
        assert sorted(MEMORY.ls(f"/{bucket}", detail=False)) == [f"/{bucket}/out", f"/{bucket}/text"]
        with pytest.raises(ConfigError, match=rf"memory://{bucket}/text: already exists and holds something else"):
            prepare([source], source, runner="DirectRunner", **options)


def killing(monkeypatch, module, name, after):
    """Raises `Killed` in the call of the function after so many."""
    function, calls = getattr(module, name), []

    def limited(*arguments):
        if len(calls) == after:
            raise Killed
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(module, name, limited)
    return calls


@pytest.mark.parametrize("place", ["disk", "store"])
def test_a_killed_pipeline_goes_on(corpus, tmp_path, monkeypatch, place):
    run_without_beam(monkeypatch)
    prepare([str(corpus)], tmp_path / "alone", **OPTIONS)
    out = tmp_path / "out" if place == "disk" else f"memory://{tmp_path.name}/out"
    for module, name, after in [
        (units_module, "_store_unit", 3),
        (part_worker_module, "count_unit", 2),
        (part_worker_module, "write_shard", 2),
        (part_worker_module, "split_content", 1),
    ]:
        with monkeypatch.context() as patch:
            calls = killing(patch, module, name, after)
            with pytest.raises(Killed):
                prepare([str(corpus)], out, runner="DirectRunner", **OPTIONS)
            assert len(calls) == after, name
    # What is written was made from text that has changed meanwhile, in a letter.
    changed = (corpus / "1.jsonl").read_text().replace("w", "v", 1)
    (corpus / "1.jsonl").write_text(changed)
    prepare([str(corpus)], tmp_path / "changed", **OPTIONS)
    calls = kill_after(monkeypatch, None)
    prepare([str(corpus)], out, runner="DirectRunner", **OPTIONS)
    assert len(calls) == 1  # the unit with that letter
    if place == "disk":
        assert content(out) == content(tmp_path / "changed") != content(tmp_path / "alone")
    else:
        assert stored(f"/{tmp_path.name}/out") == content(tmp_path / "changed")


def test_a_killed_pipeline_goes_on_without_a_runner(corpus, tmp_path, monkeypatch):
    run_without_beam(monkeypatch)
    prepare([str(corpus)], tmp_path / "alone", **OPTIONS)
    with monkeypatch.context() as patch:
        killing(patch, part_worker_module, "write_shard", 2)
        with pytest.raises(Killed):
            prepare([str(corpus)], tmp_path / "out", runner="DirectRunner", **OPTIONS)
    assert killing(monkeypatch, units_module, "_store_unit", 0) == []
    prepare([str(corpus)], tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_what_a_user_can_correct(corpus, tmp_path, monkeypatch, capsys):
    command = ["data", "prepare", str(corpus), "--out", str(tmp_path / "out"), "--runner"]
    if not HAS_BEAM:
        assert main([*command, "DirectRunner"]) == 2
        assert "pip install 'mythos-jax[beam]'" in capsys.readouterr().err
    assert main(command) == 2
    assert "--runner: got nothing, allowed: a runner of Apache Beam" in capsys.readouterr().err
    run_without_beam(monkeypatch)
    assert main([*command, "DataflowRunner", "--project=p"]) == 2
    assert f"{corpus}: workers of Dataflow cannot see it" in capsys.readouterr().err
    assert main(["data", "prepare", str(corpus), "--out", "gs://bucket/out"]) == 2
    assert (
        "rows are prepared on a disk; allowed: a local folder, which you then copy there, or" in capsys.readouterr().err
    )
    monkeypatch.undo()
    if HAS_BEAM:
        for words, message in [
            (
                ["DirectRunner", "--direct_num_worker=2"],
                "has no flag --direct_num_worker; did you mean --direct_num_w",
            ),
            (["DirectRunner", "--seq-len", "8"], "Beam has no flag --seq-len; flags of mythos stand before --runner"),
            (["NoRunner"], "--runner: got NoRunner"),
        ]:
            assert main([*command, *words]) == 2
            assert message in capsys.readouterr().err


class TestWhatIsLeftOfAnEarlierTry:
    """On a disk, after a command that stopped when all shards were written."""

    @pytest.fixture
    def work(self, corpus, tmp_path, monkeypatch):
        """Its work folder."""
        run_without_beam(monkeypatch)
        prepare([str(corpus)], tmp_path / "alone", **OPTIONS)
        with monkeypatch.context() as patch:
            killing(patch, part_worker_module, "split_content", 0)
            with pytest.raises(Killed):
                self.again(corpus, tmp_path)
        (work,) = tmp_path.glob("out.partial-*")
        return work

    def again(self, corpus, tmp_path):
        return prepare([str(corpus)], tmp_path / "out", runner="DirectRunner", **OPTIONS)

    def test_shards_are_kept_after_an_error(self, corpus, tmp_path, monkeypatch, work):
        with monkeypatch.context() as patch:
            patch.setattr(part_worker_module, "split_content", failing(OSError("no answer")))
            with pytest.raises(ConfigError, match=r"out: cannot be written \(no answer\)"):
                self.again(corpus, tmp_path)
        assert list((work / "rows").glob("train-*"))
        calls = killing(monkeypatch, part_worker_module, "write_shard", 0)
        self.again(corpus, tmp_path)
        assert calls == []
        assert content(tmp_path / "out") == content(tmp_path / "alone")

    def test_other_files_are_not_published(self, corpus, tmp_path, work):
        for name in ["train-00000-of-00099.array_record", "train-00000-of-00004.array_record.7-8-abcd.part", "x.part"]:
            (work / "rows" / name).write_text("half")
        self.again(corpus, tmp_path)
        assert content(tmp_path / "out") == content(tmp_path / "alone")

    @pytest.mark.parametrize("damage", [b"", b'{"key": "', b"\xff\0", b"[]", b"{}", b'{"key": "of something else"}'])
    def test_damaged_results_are_made_again(self, corpus, tmp_path, work, damage):
        for path in [*work.glob("parts/*.json"), *work.glob("shards/*.json"), work / "contents" / "train.json"]:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(damage)
        self.again(corpus, tmp_path)
        assert content(tmp_path / "out") == content(tmp_path / "alone")

    def test_results_of_other_text_are_not_published(self, corpus, tmp_path, monkeypatch, work):
        (corpus / "1.jsonl").write_text((corpus / "1.jsonl").read_text().replace("w", "v", 1))
        with monkeypatch.context() as patch:
            patch.setattr("tests.data.test_beam.write_planned", lambda plan, job: '{"error": ""}')  # is lost
            with pytest.raises(ConfigError, match=r"out: cannot be written \(shards/.*\.json: no result\)"):
                self.again(corpus, tmp_path)
            patch.setattr(part_worker_module, "make_plan", failing(StorageError("no answer")))
            with pytest.raises(StorageError, match=r"^no answer$"):
                self.again(corpus, tmp_path)
        prepare([str(corpus)], tmp_path / "changed", **OPTIONS)
        self.again(corpus, tmp_path)
        assert content(tmp_path / "out") == content(tmp_path / "changed")


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("other", [{}, {"shard_bytes": 9000}, {"seq_len": 8}])
def test_two_commands_at_once_in_a_store(corpus, tmp_path, monkeypatch, other):
    run_without_beam(monkeypatch)
    out, publish = f"memory://{tmp_path.name}/out", Destination.publish
    options, folder = OPTIONS | {"runner": "DirectRunner"}, f"/{tmp_path.name}/out"
    made = []

    def be_second(self, rows, manifest):
        monkeypatch.setattr(Destination, "publish", publish)
        made.append(prepare([str(corpus)], out, **options | other))
        return publish(self, rows, manifest)

    monkeypatch.setattr(Destination, "publish", be_second)
    if "seq_len" in other:
        with pytest.raises(ConfigError, match="out: holds different data"):
            prepare([str(corpus)], out, **options)
    else:
        assert prepare([str(corpus)], out, **options) == made[0]
        rows = {name: len(file) for name, file in stored(folder).items() if name.endswith(".array_record")}
        assert rows == made[0].row_files("train") | made[0].row_files("held_out")
    assert parse_manifest(lambda: stored(folder)["manifest.json"], out) == made[0]


def test_a_finished_folder_in_a_store(corpus, tmp_path, monkeypatch, capsys):
    """What others have put there stays, and it is no failure if the work folder does."""
    run_without_beam(monkeypatch)
    prepare([str(corpus)], tmp_path / "alone", **OPTIONS)
    bucket = f"/{tmp_path.name}"
    with monkeypatch.context() as patch:
        killing(patch, part_worker_module, "split_content", 0)
        with pytest.raises(Killed):
            prepare([str(corpus)], f"memory:/{bucket}/out", runner="DirectRunner", **OPTIONS)
    MEMORY.pipe_file(f"{bucket}/out/train-00000-of-00099.array_record", b"of another try")
    MEMORY.pipe_file(f"{bucket}/out/README.md", b"of others")
    monkeypatch.setattr(MEMORY, "rm", failing(PermissionError("not allowed")))
    prepare([str(corpus)], f"memory:/{bucket}/out", runner="DirectRunner", **OPTIONS)
    assert stored(f"{bucket}/out") == content(tmp_path / "alone") | {"README.md": b"of others"}
    assert "no longer needed, but cannot be deleted (not allowed)\n" in capsys.readouterr().err


def test_the_units_of_each_shard():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 60, 400) * random.integers(0, 2, 400)
    counts = [UnitCount(i, 0, "", {"train": [1, 9, int(n)] if n else [0, 0, 0]}, {}, []) for i, n in enumerate(tokens)]
    for count in counts:
        count.splits["held_out"] = [0, 0, 0]
    request = Manifest(16, "<u2", "bytes", "", 258, 257, {}, ("a",), 0.0, 0)
    shards = make_plan(counts, request, 1, None).shards
    places = [place for i, n in enumerate(tokens) for place in [i] * (n + 1 if n else 0)]  # the unit of each token
    assert len(shards) == -(-len(places) // 16)
    for shard in shards:
        assert [unit[0] for unit in shard.units] == sorted(set(places[shard.start : shard.end]))
        assert all(unit[3] == places.index(unit[0]) for unit in shard.units)


@pytest.mark.skipif(not HAS_BEAM, reason="no apache-beam")
def test_a_pipeline_that_fails(monkeypatch):
    from mythos_jax.data import beam_pipeline

    failed = "Traceback (most recent call last):\n  File 'a', line 1\nOSError: disk\ngone [while running 'hash']\n"
    assert beam_pipeline._reason(RuntimeError(failed)) == "OSError: disk gone [while running 'hash']"
    monkeypatch.setattr(beam_pipeline, "build", lambda *_: None)
    for error, kind, message in [
        (
            PermissionError("no\ncredentials"),
            TrainingError,
            r"^DirectRunner: the pipeline failed \(no credentials\); the ",
        ),
        (StorageError("no answer"), StorageError, "^no answer$"),
    ]:
        monkeypatch.setattr(beam_pipeline.FnApiRunner, "run_pipeline", failing(error))
        with pytest.raises(kind, match=message):
            beam_pipeline.run([], None, "DirectRunner", [], 1)
