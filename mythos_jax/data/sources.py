"""Where text comes from: the files behind the sources of a command or a config.

A source is the path of

- a file of records, with a suffix of `RECORD_SUFFIXES` (readers.py says what each holds);
- any other file: one document, UTF-8;
- a folder: every file below it with one of `SUFFIXES`, in sorted order, then those behind links to folders. Hidden
  files and folders are left out; whatever is left out is counted, and said;

or the URL of such a file or folder, or a pattern of URLs (remote.py); or the word `stdlib`. Text and records, except
Parquet, may be compressed: `.jsonl.gz`, `.txt.zst`.
"""

import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mythos_jax.data.input_file import COMPRESSIONS, SUFFIXES, InputFile, kind_left_out, one_line_path, split_suffix
from mythos_jax.data.remote import find_remote
from mythos_jax.errors import ConfigError
from mythos_jax.paths import is_remote

STDLIB = "stdlib"

# Folders of the standard library that are not read: tests, installed packages, and two packages that consist mostly of
# generated tables (code pages, help texts), which would make the loss look better than it is.
_STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def _is_prepared(names: Sequence[str]) -> bool:
    """Whether these are the files of a folder that `mythos data prepare` has made."""
    return "manifest.json" in names and any(name.endswith(".array_record") for name in names)


@dataclass(frozen=True)
class Found:
    """What is behind the sources: `files` in reading order. left_out: one line per folder in which something is not
    read. skipped: standard library files that are not UTF-8."""

    files: list[InputFile]
    left_out: list[str]
    skipped: int


def find_inputs(sources: Sequence[str], skip_errors: bool = False, suffixes: Collection[str] = SUFFIXES) -> Found:
    """The files behind `sources`. skip_errors: count what cannot be looked at, instead of refusing it. suffixes: of the
    files that are read in folders; without those of text, the standard library is no source.

    Raises ConfigError: a source that does not exist, a folder without readable files, a folder that cannot be read.
    """
    files: list[InputFile] = []
    left_out: list[str] = []
    skipped = 0
    wanted = partial(_is_read, suffixes=suffixes)

    def add_folder(source: str, found: list[InputFile], unread: Counter[str]) -> None:
        if not found:
            raise ConfigError(_nothing_in(source, unread, suffixes))
        files.extend(found)
        if unread:
            left_out.append(f"source {one_line_path(source)}: left out {_counts(unread)}")

    for source in sources:
        path = Path(source)
        if source == STDLIB and ".py" in suffixes:
            library, skipped = _standard_library()
            files += library
        elif is_remote(source):
            found, unread = find_remote(source, wanted, _is_prepared)
            if unread is None:
                files += [_checked(file) for file in found]
            else:
                add_folder(source, found, unread)
        elif path.is_dir():
            walk = _Walk(path, skip_errors, wanted)
            add_folder(source, walk.files, walk.left_out)
        else:
            files.append(_given_file(source))
    return Found(files, left_out, skipped)


def _is_read(path: Path, suffixes: Collection[str]) -> bool:
    """Whether a file in a folder is one of those that are read."""
    suffix, compression = split_suffix(path)
    return suffix in suffixes and not (compression and suffix == ".parquet")


def _given_file(source: str) -> InputFile:
    path = Path(source)
    if not path.is_file():
        problem = "neither a file nor a folder" if path.exists() else "no such file"
        raise ConfigError(f"source {one_line_path(source)}: {problem}; allowed: files, folders, URLs, {STDLIB}")
    info = path.stat()
    return _checked(InputFile(path, path.name, info.st_size, info.st_mtime_ns, given=True))


def _checked(file: InputFile) -> InputFile:
    """A file that is given. Raises ConfigError if its name says that it cannot be read."""
    if file.compression and file.suffix == ".parquet":
        raise ConfigError(f"{file}: compressed Parquet; allowed: the .parquet file itself")
    return file


class _Walk:
    """The files below a folder, and how many of each kind are left out.

    Links to folders are followed after all else, and no folder is read twice, so that links may lead in circles.
    """

    def __init__(
        self,
        folder: Path,
        skip_errors: bool,
        wanted: Callable[[Path], bool],
        excluded: Collection[str] = (),
    ):
        self.files: list[InputFile] = []
        self.left_out: Counter[str] = Counter()
        self._folder, self._skip_errors, self._wanted, self._excluded = folder, skip_errors, wanted, excluded
        self._visited: set[tuple[int, int]] = set()
        links = [folder]
        while links:
            links = [link for start in links for link in self._below(start)]

    def _below(self, start: Path) -> list[Path]:
        """Adds the files below a folder; returns the links to folders that it contains."""
        links: list[Path] = []
        if self._seen(start):
            return links
        for parent, subfolders, names in os.walk(start, onerror=self._unreadable):
            if _is_prepared(names):  # made from such text, perhaps of this very folder
                self.left_out["prepared folder"] += 1
                subfolders.clear()
                continue
            # Assigned in place: os.walk descends into what is left of this list, in its order.
            subfolders[:] = sorted(name for name in subfolders if self._is_visible(name))
            links += [Path(parent, name) for name in subfolders if Path(parent, name).is_symlink()]
            subfolders[:] = [
                name for name in subfolders if Path(parent, name) not in links and not self._seen(Path(parent, name))
            ]
            for name in sorted(names):
                self._add(Path(parent, name))
        return links

    def _is_visible(self, folder_name: str) -> bool:
        if folder_name in self._excluded:
            return False
        if folder_name.startswith((".", "__pycache__")):
            self.left_out["hidden folder"] += 1
            return False
        return True

    def _seen(self, folder: Path) -> bool:
        """Whether the folder has been read already, by this or another name."""
        try:
            info = folder.stat()
        except OSError as error:
            self._unreadable(error)
            return True
        if (info.st_dev, info.st_ino) in self._visited:
            self.left_out["link to a folder that is read already"] += 1
            return True
        self._visited.add((info.st_dev, info.st_ino))
        return False

    def _add(self, path: Path) -> None:
        if path.name.startswith("."):
            self.left_out["hidden file"] += 1
            return
        if not self._wanted(path):
            self.left_out[kind_left_out(path)] += 1
            return
        try:
            info = path.stat()
        except FileNotFoundError:
            self.left_out["broken link"] += 1
        except OSError as error:
            self._unreadable(error)
        else:
            if stat.S_ISREG(info.st_mode):
                name = path.relative_to(self._folder).as_posix()
                self.files.append(InputFile(path, name, info.st_size, info.st_mtime_ns))
            else:
                self.left_out["special file"] += 1

    def _unreadable(self, error: OSError) -> None:
        if not self._skip_errors:
            raise ConfigError(f"source {one_line_path(error.filename)}: cannot be read ({error.strerror})") from None
        self.left_out["unreadable file or folder"] += 1


def _counts(left_out: Counter[str], kinds: int = 20) -> str:
    """Such as: 12 .pdf, 3 .docx, 2 hidden files."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count:,} {_plural(kind, count)}" for kind, count in ordered]
    more = f", and files of {len(words) - kinds} more kinds" if len(words) > kinds else ""
    return ", ".join(words[:kinds]) + more


def _plural(noun: str, count: int) -> str:
    if count == 1 or noun.startswith("."):
        return one_line_path(noun)  # a suffix
    first, *rest = noun.split(" ", 1) if noun.startswith(("file ", "link ")) else [noun]
    return " ".join([f"{first}s", *rest])


def _nothing_in(source: str, left_out: Counter[str], suffixes: Collection[str]) -> str:
    found = f" (it has {_counts(left_out)})" if left_out else ""
    allowed = f"{' '.join(suffixes)}, also with {' '.join(COMPRESSIONS)}"
    return f"source {one_line_path(source)}: nothing to read in this folder{found}; allowed: {allowed}"


def _standard_library() -> tuple[list[InputFile], int]:
    """The source files of the standard library, and the number of them that are not UTF-8."""
    folder = Path(sysconfig.get_path("stdlib"))
    readable: list[InputFile] = []
    skipped = 0
    for file in _Walk(folder, True, lambda path: path.suffix == ".py", _STDLIB_EXCLUDED).files:
        if file.name.startswith("_sysconfigdata"):  # contains paths of the machine that built this Python
            continue
        try:
            file.path.read_bytes().decode()
            readable.append(file)
        except (OSError, UnicodeDecodeError):
            skipped += 1
    if not readable:
        raise ConfigError(f"source {STDLIB}: this Python has no source files in {folder}; allowed: files, folders")
    return readable, skipped
