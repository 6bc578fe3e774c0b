"""Files of a folder on a disk or in an object store, which are written and read as a whole."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mythos_jax.data.remote import asking, relative
from mythos_jax.data.storage import open_file_system
from mythos_jax.paths import is_remote, new_file, write_whole

Result = TypeVar("Result")


class WorkFiles:
    """A folder, which need not exist. What fails in a store is tried again.

    Methods raise OSError and, for a store that does not answer, StorageError.
    """

    def __init__(self, folder: str | Path):
        self.folder = str(folder).rstrip("/")
        self.remote = is_remote(folder)
        self._files: Any = None
        if self.remote:
            self._files, self._root = open_file_system(self.folder)

    def below(self, name: str) -> "WorkFiles":
        return WorkFiles(f"{self.folder}/{name}")

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            if not self.remote:
                return Path(self.folder, name).read_bytes()
            content: bytes = self._ask(lambda: self._files.cat_file(f"{self._root}/{name}"))
            return content
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        """The bytes of a file; None if there is none."""
        try:
            if not self.remote:
                return Path(self.folder, name).stat().st_size
            self._files.invalidate_cache()
            return int(self._ask(lambda: self._files.info(f"{self._root}/{name}"))["size"])
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """A file that exists under its own name is complete."""
        if self.remote:
            self._ask(lambda: self._files.pipe_file(f"{self._root}/{name}", content), "written")
            return
        write_whole(self._place(name), content)

    def put(self, path: Path, name: str) -> None:
        """Moves a file from the disk into the folder."""
        if self.remote:
            self._ask(lambda: self._files.put_file(str(path), f"{self._root}/{name}"), "written")
            path.unlink()
            return
        with new_file(self._place(name)) as partial:
            shutil.move(path, partial)

    def put_all(self, folder: Path) -> None:
        """Moves all files from a folder on the disk into the folder."""
        for path in sorted(folder.iterdir()):
            self.put(path, path.name)

    def names(self) -> list[str]:
        """The names of its files, sorted; of those in subfolders with the path."""
        if self.remote:
            self._files.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                found = self._ask(lambda: self._files.find(self._root))
                root = self._ask(lambda: self._files.info(self._root))["name"].rstrip("/") if found else ""
                return sorted(relative(path, root) for path in found)
            return []
        files = (path for path in Path(self.folder).rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self.remote:
                self._ask(lambda: self._files.rm_file(f"{self._root}/{name}"), "deleted")
            else:
                Path(self.folder, name).unlink()

    def delete_all(self) -> None:
        """Deletes the folder, as far as that is possible."""
        if self.remote:
            with contextlib.suppress(FileNotFoundError):
                self._ask(lambda: self._files.rm(self._root, recursive=True), "deleted")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, call: Callable[[], Result], verb: str = "read") -> Result:
        return asking(self.folder, call, verb, kind="")

    def _place(self, name: str) -> Path:
        """Where a file is on the disk; its folder is made."""
        path = Path(self.folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
