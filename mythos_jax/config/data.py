"""`DataConfig`: what a run trains on, text or a reasoning task; `EvaluationConfig`: how it is evaluated."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mythos_jax.bounds import Between, Formerly, Ge, NonNegativeInt, PathText, PositiveFloat, PositiveInt, Wide
from mythos_jax.typed import Section, check_field

TASKS = ("p_hop", "addition", "parity", "boolean", "chain", "group", "arithmetic")
GROUP_SIZES = {"S3": 6, "S4": 24, "A5": 60}
Bytes = Annotated[int, Ge(0), Wide()]
HeldOutFraction = Annotated[float, Between(0, 1, "[)", "a fraction")]
Difficulty = Annotated[int, Between(1, 1000)]


@dataclass(frozen=True)
class TaskConfig(Section, section="data.task"):
    """A reasoning task, generated on the fly instead of read from text (docs/data.md)."""

    name: str = ""  #: p_hop, addition, parity, boolean, chain, group or arithmetic; empty: train on text
    #: difficulties that examples are drawn from: hops (p_hop), numbers (addition), bits (parity), levels (boolean),
    #: references to follow (chain), factors (group), operations (arithmetic)
    difficulty: tuple[Difficulty, ...] = ()
    #: all but addition: train on the answers at every position that has one, or only at the last
    answers: Literal["every", "last"] = "every"
    length: Annotated[int, Between(2, 10_000)] = 32  #: p_hop: symbols in the sequence; chain: assignments
    #: p_hop: number of different symbols; chain and arithmetic: of different numbers; group: of different factors
    alphabet: Annotated[int, Between(3, 10_000)] = 4
    digits: Annotated[int, Between(1, 15)] = 3  #: addition: digits of each number
    #: addition: which digit of the numbers and of their sum is written first, the `high`est or the `low`est
    first_digit: Literal["high", "low"] = "high"
    #: group: whose elements are multiplied, the symmetric group of 3 or 4 things or the alternating group of 5
    group: Literal["S3", "S4", "A5"] = "A5"
    #: a row consists of the task's `own` tokens, or of those of `data.tokenizer`, for a model that was trained on text
    tokens: Literal["own", "tokenizer"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name:
            self.check(self.name in TASKS, "name", ", ".join(TASKS))
            check_field(len(self.difficulty) > 0, "data.task.difficulty", [], "a list such as [4] or [1, 2, 3]")
        if self.name == "chain":  # one letter per variable, one digit per number
            self.check(self.length <= 26, "length", "an integer from 2 to 26 with chain")
            self.check(self.alphabet <= 10, "alphabet", "an integer from 3 to 10 with chain")
        if self.name == "group":
            size = GROUP_SIZES[self.group]
            self.check(self.alphabet <= size, "alphabet", f"an integer from 3 to {size} with group {self.group}")


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """Where the token rows are and how to prepare them if they are missing; or a task that generates them."""

    path: PathText = ""  #: folder of prepared rows (default: data/NAME)
    #: files and folders to prepare from; `stdlib`: the source code of Python's library
    sources: tuple[PathText, ...] = ()
    #: `bytes`, or a Hugging Face tokenizer.json, or where one is: a model's directory, GGUF file, hub id or word
    tokenizer: PathText = "bytes"
    #: name of the tokenizer's end-of-document token; null: the first of the usual names that it has, such as `</s>`
    end_of_document: str | None = None
    seq_len: PositiveInt = 128  #: target tokens per row, at most model.max_seq_len
    #: fraction of the documents kept for evaluation; a hash of a document's name decides (of a single one, its end)
    held_out_fraction: Annotated[HeldOutFraction, Formerly("held_out")] = 0.05
    #: the field or column of JSON, CSV and Parquet records that holds their text; several with commas are joined
    text_column: str = "text"
    chat: bool = False  #: the sources are conversations (JSON, CSV, Parquet), trained on in what the model says itself
    chat_template: PathText = ""  #: chat: a Jinja file that says how they are written (default: the model's own)
    max_bytes: Bytes = 0  #: stop preparing after this many bytes of text; 0: all of it
    document_mask: bool = False  #: tokens attend only to their own document, not to the others in their row
    #: rows in an object store: copy them to this machine's disk first, instead of reading them where they are
    copy: bool = False
    #: several prepared folders with their sampling weights, instead of path and sources
    mixture: dict[PathText, PositiveFloat] = field(default_factory=dict, hash=False)  # a dict cannot be hashed
    task: TaskConfig = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field("" not in self.sources, "data.sources", "", "files and folders")
        self.check(self.text_column == "text" or not self.chat, "text_column", "nothing with data.chat true")
        self.check(self.chat or not self.chat_template, "chat_template", "nothing without data.chat true")
        if self.task.name:
            for name in ["path", "sources", "mixture", "document_mask", "chat", "copy"]:
                self.check(not getattr(self, name), name, f"nothing, with data.task.name {self.task.name}")
        if self.mixture:
            for name in ["path", "sources", "chat"]:
                self.check(not getattr(self, name), name, "nothing, with data.mixture")

    @property
    def uses_tokenizer(self) -> bool:
        """Whether token ids are those of `tokenizer`: in text, and in a task that is written in its tokens."""
        return not self.task.name or self.task.tokens == "tokenizer"


@dataclass(frozen=True)
class EvaluationConfig(Section, section="evaluation"):
    """What `mythos eval` does unless its flags say otherwise."""

    loops: tuple[PositiveInt, ...] = ()  #: depths to evaluate at (default: 1, 2, 4, … up to twice model.loops)
    batch_size: PositiveInt = 32  #: rows per batch
    max_rows: NonNegativeInt = 0  #: held-out rows to use; 0: all of them, or 1024 per difficulty of a task
    difficulties: tuple[Difficulty, ...] = ()  #: task: difficulties to evaluate at (default: those of training)
