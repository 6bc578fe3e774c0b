"""A file to read, and what its name says about its content."""

from dataclasses import dataclass
from pathlib import Path

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".yaml", ".yml", ".toml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
)
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class InputFile:
    """A file to read. `name` is relative to its source, and so the same on every machine. `path` is on a disk, or, with
    `url`, in that file system (remote.py)."""

    path: Path
    name: str
    size: int  # bytes
    modified: int = 0  # nanoseconds; of a URL a hash of what its store says about the content
    given: bool = False  # whether the file itself is a source, not a folder that it is in
    url: str = ""

    @property
    def compression(self) -> str:
        """The suffix that says how the file is compressed; empty if it is not."""
        return split_suffix(self.path)[1]

    @property
    def suffix(self) -> str:
        """The suffix that says what the file contains."""
        return split_suffix(self.path)[0]

    @property
    def location(self) -> str:
        """Its full path or its URL."""
        return self.url or str(self.path.absolute())

    def __str__(self) -> str:
        return f"source {one_line_path(self.url or self.path)}"


def split_suffix(path: Path) -> tuple[str, str]:
    """What a file's name says about its content and its compression: ".jsonl" and ".gz"."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSIONS else (suffix, "")


def kind_left_out(path: Path) -> str:
    """What a file that is not read is counted as."""
    return "".join(split_suffix(path)) or "file without a suffix"


def one_line_path(path: str | Path) -> str:
    """The path as it can be shown: a file's name may contain line breaks and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
