"""What a worker does with a part, or with a shard, given as JSON; the result is JSON in a file of the work folder.

The work folder has `units/` (units.py), `tokenizer/` (its file), and the results: `parts/`, `shards/`, `contents/`. A
result that is there is used if what it depends on has not changed, so nothing is done twice. What a user can correct is
a result as well, `{"error": …}`, which is not used again.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from mythos_jax.data.chat_encoder import chat_encoder_of
from mythos_jax.data.chat_units import ChatUnitEncoder
from mythos_jax.data.conventions import TextConventions
from mythos_jax.data.input_file import InputFile
from mythos_jax.data.manifest import Manifest, Shard, load_saved_tokenizer, shards_sha256
from mythos_jax.data.readers import Reading
from mythos_jax.data.shard_plan import (
    Plan,
    ShardPlan,
    UnitCount,
    count_unit,
    make_plan,
    split_content,
    write_shard,
)
from mythos_jax.data.split import Division
from mythos_jax.data.text_parts import TextPart, cut_units
from mythos_jax.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer
from mythos_jax.data.units import TextEncoder, TokenUnit, UnitTokenizer, load_unit
from mythos_jax.data.work_files import WorkFiles
from mythos_jax.data.write_rows import Choice
from mythos_jax.errors import ConfigError, StorageError, one_line


@dataclass(frozen=True)
class Job:
    """What all workers know. work, rows: the work folder, and that for the rows; every worker can write there.
    conventions, now: of conversations, how they are written, and at which time."""

    request: Manifest
    work: str
    rows: str
    shard_bytes: int
    skip_errors: bool
    conventions: TextConventions | None = None
    now: datetime = field(default_factory=datetime.now)

    @property
    def files(self) -> WorkFiles:
        return WorkFiles(self.work)

    @property
    def scratch(self) -> str | None:
        """A folder on this machine, with room, for what is deleted again; None: the system's own."""
        return None if self.files.remote else self.work

    def load(self, part: int, number: int) -> TokenUnit:
        """Raises OSError if there is no such unit."""
        unit = load_unit(self.files.below("units"), part, number)
        if unit is None:
            raise OSError(f"unit {part}-{number} is missing or damaged; start the command again")
        return unit


def part_to_json(part: TextPart) -> str:
    return json.dumps(asdict(part), default=str)


def part_from_json(text: str) -> TextPart:
    tree = json.loads(text)
    inputs = tuple(InputFile(**file | {"path": Path(file["path"])}) for file in tree["inputs"])
    division = tree["division"] and Division(**tree["division"])
    return TextPart(tree["number"], inputs, Reading(**tree["reading"]), tree["max_bytes"], division)


def part_key(part: TextPart, request: Manifest) -> str:
    """A hash of what the counts of a part depend on, besides the tokenizer."""
    return hashlib.sha256(json.dumps([part.state, request.held_out_fraction]).encode()).hexdigest()


def part_file(number: int) -> str:
    return f"parts/{number:06}.json"


def tokenize_part(part_json: str, job: Job) -> str:
    """Tokenizes a part: the counts of its units."""
    part = part_from_json(part_json)
    return _result(
        job, part_file(part.number), part_key(part, job.request), lambda: {"units": list(_count_units(part, job))}
    )


def _count_units(part: TextPart, job: Job) -> Iterator[dict[str, Any]]:
    tokenize = UnitTokenizer(_encoder(job), job.files.below("units"), job.skip_errors)
    choice = Choice(job.request.held_out_fraction)
    number, complete = 0, False
    for number, unit in enumerate(tokenize.stored(part), start=1):
        yield asdict(count_unit(part.number, number - 1, unit, choice))
        complete = bool(unit.last)
    for text_unit in () if complete else cut_units(part):
        if text_unit.number >= number:
            yield asdict(count_unit(part.number, text_unit.number, tokenize(text_unit), choice))


def _encoder(job: Job) -> TextEncoder | ChatUnitEncoder:
    request = job.request
    tokenizer = ByteTokenizer() if request.in_bytes else _tokenizer(job.work, request.end_of_document)
    if tokenizer.fingerprint != request.tokenizer_fingerprint:
        raise ConfigError(f"{job.work}/tokenizer: is not the tokenizer that it was; delete {job.work}, and start again")
    if job.conventions is None:
        return TextEncoder(tokenizer, request.dtype)
    chats = chat_encoder_of(tokenizer, job.conventions, request.seq_len, job.now)
    return ChatUnitEncoder(chats, request.dtype, job.skip_errors)


@lru_cache(maxsize=1)
def _tokenizer(work: str, end_of_document: int) -> Tokenizer:
    """The tokenizer whose file is in the work folder."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER_FILE).write_bytes(WorkFiles(f"{work}/tokenizer").read(TOKENIZER_FILE) or b"")
        return load_saved_tokenizer(folder, end_of_document)


def plan_shards(results: Iterable[str], job: Job) -> list[str]:
    """What workers are to write once all parts are tokenized; nothing if a part has an error, or nothing can be
    written. The rows of conversations depend on all that came before, so they are none of workers'.

    Raises OSError and StorageError: a unit cannot be read now.
    """
    trees = [json.loads(text) for text in results]
    if job.request.chat is not None or any("error" in tree for tree in trees):
        return []
    try:
        return [json.dumps(asdict(shard)) for shard in plan(trees, job).shards]
    except ConfigError:
        return []  # the command itself finds it as well


def plan(trees: Sequence[dict[str, Any]], job: Job) -> Plan:
    return make_plan(unit_counts(trees), job.request, job.shard_bytes, job.load)


def unit_counts(trees: Sequence[dict[str, Any]]) -> list[UnitCount]:
    """Of all units in order, from the results of their parts in any order."""
    counts = [UnitCount(**unit) for tree in trees for unit in tree["units"]]
    return sorted(counts, key=lambda count: (count.part, count.number))


def shard_file(shard: ShardPlan) -> str:
    return f"shards/{shard.name}.json"


def write_planned(plan_json: str, job: Job) -> str:
    """Writes a shard: its split, its number, and what the manifest says of it."""
    shard, rows = ShardPlan(**json.loads(plan_json)), WorkFiles(job.rows)
    key = shard.key(job.request)

    def write() -> dict[str, Any]:
        written = write_shard(shard, job.request, job.load, rows, job.scratch)
        return {"split": shard.split, "number": shard.number, "shard": asdict(written)}

    def is_there(result: dict[str, Any]) -> bool:
        return rows.size(shard.name) == result["shard"]["file_bytes"]

    return _result(job, shard_file(shard), key, write, is_there)


def content_file(split: str) -> str:
    return f"contents/{split}.json"


def hash_split(split: str, results: Iterable[str], job: Job) -> str:
    """Reads the rows of a split in order: the hash of all of them."""
    trees = [json.loads(text) for text in results]
    if any("error" in tree for tree in trees):
        return json.dumps({"error": ""})
    shards = split_shards(split, trees)
    content = lambda: {"content": split_content(split, shards, job.request, job.rows)}  # noqa: E731
    return _result(job, content_file(split), shards_sha256(shards), content)


def split_shards(split: str, trees: Iterable[dict[str, Any]]) -> list[Shard]:
    """The shards of a split in order, from the results of all."""
    own = sorted((tree["number"], tree["shard"]) for tree in trees if tree["split"] == split)
    return [Shard(**shard) for _, shard in own]


def _result(
    job: Job,
    name: str,
    key: str,
    work: Callable[[], dict[str, Any]],
    is_there: Callable[[dict[str, Any]], bool] = lambda _: True,
) -> str:
    """The result of `work`, as it is stored, or stored now. key: of what it depends on. is_there: whether what it says
    still holds."""
    stored = stored_result(job, name, key)
    if stored is not None and "error" not in stored:
        left_out = (item for unit in stored.get("units", ()) for item in unit["left_out"])
        if is_there(stored) and (job.skip_errors or not any(item["is_error"] for item in left_out)):
            return json.dumps(stored)
    try:
        tree = work()
    except ConfigError as error:
        tree = {"error": str(error), "kind": "ConfigError"}
    except StorageError as error:
        tree = {"error": str(error), "kind": "StorageError"}
    except OSError as error:
        tree = {"error": one_line(error.strerror or error), "kind": "OSError"}
    text = json.dumps({"key": key} | tree)
    job.files.write(name, text.encode())
    return text


def stored_result(job: Job, name: str, key: str) -> dict[str, Any] | None:
    """The result in a file; None if there is none, or a damaged one, or one of something else."""
    try:
        tree: dict[str, Any] = json.loads(job.files.read(name) or b"")
        return tree if tree["key"] == key else None
    except (ValueError, KeyError, TypeError):
        return None
