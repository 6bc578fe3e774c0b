"""Where a folder is prepared: a path, where it appears when it is complete, or the URL of a folder in an object store,
which is complete when it has its manifest."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mythos_jax.data.fetch import SMALL_FILES
from mythos_jax.data.manifest import MANIFEST_FILE, Manifest, load_manifest, parse_manifest
from mythos_jax.data.work_files import WorkFiles
from mythos_jax.data.work_folder import work_folder
from mythos_jax.errors import ConfigError, StorageError, one_line
from mythos_jax.streams import log


class Destination:
    """request: a hash of what the work depends on, besides the text."""

    def __init__(self, out: str | Path, request: str):
        self.files = WorkFiles(out)
        self.out = Path(out)
        self._url = self.files.folder if self.files.remote else ""
        self._request = request

    def __str__(self) -> str:
        return self._url or str(self.out)

    def existing(self) -> Manifest | None:
        """The manifest that is there; None for a new or empty folder, and for a store where this work was stopped.

        Raises ConfigError: it holds something else.
        """
        if not self._url:
            if (self.out / MANIFEST_FILE).exists():
                return load_manifest(self.out)
            is_new = not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir()))
        else:
            content = self.files.read(MANIFEST_FILE)
            if content is not None:
                return parse_manifest(lambda: content, f"{self}/{MANIFEST_FILE}")
            is_new = not self.files.names() or bool(WorkFiles(self._work).names())
        if not is_new:
            raise ConfigError(f"{self}: already exists and holds something else; allowed: a new folder")
        return None

    @contextlib.contextmanager
    def working(self) -> Iterator[tuple[str, str]]:
        """The work folder, and the folder for the rows. Raises ConfigError if they cannot be made."""
        if self._url:
            yield self._work, self._url
            try:
                WorkFiles(self._work).delete_all()
            except (OSError, StorageError, ConfigError) as error:
                log(f"{self._work}: no longer needed, but cannot be deleted ({one_line(error)})")
            return
        absolute = Path(os.path.abspath(self.out))  # "." has no name for the work folder to derive its own from
        if absolute.is_mount():
            raise ConfigError(f"{self}: cannot be replaced, a disk is mounted there; allowed: a folder below it")
        with work_folder(absolute, self._request) as folder:
            yield str(folder), str(folder / "rows")

    def publish(self, rows: str, manifest: Manifest) -> Manifest:
        """Makes the folder of rows complete, and gives it its name, unless the same data is there already.

        It may be there from before (only the times of the inputs have changed), or from another process that was
        faster.
        """
        existing = self.existing() if self._url or (self.out / MANIFEST_FILE).exists() else None
        if existing is None:
            files = WorkFiles(rows)
            _delete_leftovers(files, manifest)
            files.write(MANIFEST_FILE, manifest.to_json())
            if self._url:
                return manifest
            try:
                Path(rows).rename(os.path.abspath(self.out))
                return manifest
            except OSError:
                if not (self.out / MANIFEST_FILE).exists():
                    raise
            existing = load_manifest(self.out)
        if existing.fingerprint != manifest.fingerprint:
            raise self.holds_other_data()
        if self._url:
            _delete_leftovers(self.files, existing)
        current = replace(existing, inputs=manifest.inputs, files=manifest.files, times=manifest.times)
        if current != existing:
            with contextlib.suppress(OSError, StorageError):  # only so that the text need not be compared again
                self.files.write(MANIFEST_FILE, current.to_json())
        return current

    def holds_other_data(self) -> ConfigError:
        return ConfigError(f"{self}: holds different data (the sources have changed); delete it, or choose another")

    @property
    def remote(self) -> bool:
        return bool(self._url)

    @property
    def _work(self) -> str:
        return f"{self._url}.partial-{self._request}"


def _delete_leftovers(rows: WorkFiles, manifest: Manifest) -> None:
    """Deletes what other tries have left: other shards, or half a file."""
    keep = {name for split in manifest.splits for name in manifest.row_files(split)} | set(SMALL_FILES)
    for name in rows.names():
        # The folder on a disk is a work folder of its own; in a store others may have put something beside the rows.
        if name not in keep and (not rows.remote or name.endswith(".array_record")):
            rows.delete(name)
