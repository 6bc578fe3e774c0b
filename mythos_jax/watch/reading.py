"""Following a run from its directory alone, on a disk or in an object store: each look reads what is new."""

import time
from typing import Any

from mythos_jax.config import Config, load_run_config
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.json_text import parse_json
from mythos_jax.paths import is_remote, to_path
from mythos_jax.runs.owner import LOCK_FILE, Owner, parse_owner
from mythos_jax.runs.records import EVENTS_FILE, METRICS_FILE, parse_events
from mythos_jax.watch.history import History

_CONFIG_FILE = "config.yaml"
_OVERLAP = 200  # bytes before the new ones, by which an appended file is told from a rewritten one


class WatchedRun:
    """A run directory as it was at the last look.

    config: None if there is none yet, or if it cannot be read. owner: of the lock, if a process holds it. looked: when,
    in seconds since 1970. problem: why the last look failed, or what of the directory cannot be read.
    """

    def __init__(self, path: str) -> None:
        """Raises ConfigError if there is no run, or if it cannot be read."""
        self.path = to_path(path)
        self.config: Config | None = None
        self.events: list[dict[str, Any]] = []
        self.owner: Owner | None = None
        self.looked, self.problem = 0.0, ""
        self._log = _Log(self.path / METRICS_FILE)
        self._config_bytes: bytes | None = None
        try:
            self._check()
            self._look()
        except ConfigError:
            raise
        except Exception as error:  # storage has errors of many classes
            raise ConfigError(f"{path}: cannot be read ({_reason(error)})") from None

    @property
    def history(self) -> History:
        return self._log.history

    @property
    def name(self) -> str:
        return self.config.name if self.config else str(self.path.name)

    def look(self) -> None:
        """Reads what is new. What cannot be read stays as it was, with the reason in `problem`."""
        try:
            self._look()
        except Exception as error:  # the view outlives a storage that does not answer for a while
            self.problem = f"cannot be read ({_reason(error)})"

    def _check(self) -> None:
        allowed = "allowed: a run directory, which `mythos train` makes"
        if not self.path.exists():
            raise ConfigError(f"{self.path}: no such directory; {allowed}")
        if not any((self.path / name).exists() for name in (_CONFIG_FILE, METRICS_FILE, LOCK_FILE)):
            raise ConfigError(f"{self.path}: contains no run (no {_CONFIG_FILE}); {allowed}")

    def _look(self) -> None:
        self._read_config()
        self.events = parse_events(_content(self.path / EVENTS_FILE) or b"")
        lock = _content(self.path / LOCK_FILE)
        self.owner = None if lock is None else parse_owner(lock)
        self._log.read()
        self.looked = time.time()

    def _read_config(self) -> None:
        content = _content(self.path / _CONFIG_FILE)
        if content == self._config_bytes and not self.problem:
            return
        self._config_bytes, self.problem = content, ""
        if content is None:
            return
        try:
            self.config = load_run_config(self.path / _CONFIG_FILE)
        except ConfigError as error:  # of another version, or damaged: the log can be watched all the same
            self.problem = str(error)


class _Log:
    """metrics.jsonl, of which only complete lines are read, each once."""

    def __init__(self, path: Any) -> None:
        self.history = History()
        self._path, self._end, self._before = path, 0, b""
        self._seen: tuple[Any, ...] | None = None

    def read(self) -> None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._restart()
            return
        # etils has its own result of stat, for any storage
        seen = (stat.length, stat.mtime) if is_remote(self._path) else (stat.st_size, stat.st_mtime_ns)
        if seen == self._seen:
            return
        start = max(self._end - _OVERLAP, 0)
        with self._path.open("rb") as file:
            file.seek(start)
            content = file.read()
            if not content.startswith(self._before):  # the run was resumed: its file is another one
                file.seek(0)
                content = file.read()
                self._restart()
        new = content[len(self._before) :]
        complete = new[: new.rfind(b"\n") + 1]
        self._add(complete)
        self._end += len(complete)
        self._before = (self._before + complete)[-_OVERLAP:]
        self._seen = seen

    def _restart(self) -> None:
        self.history, self._end, self._before, self._seen = History(), 0, b"", None

    def _add(self, lines: bytes) -> None:
        for text in lines.split(b"\n"):
            try:
                line = parse_json(text)
            except ValueError:  # damaged, as after a crash of the machine; a resume drops it
                continue
            if isinstance(line, dict) and type(line.get("step")) is int:
                self.history.add(line)


def _content(path: Any) -> bytes | None:
    try:
        content: bytes = path.read_bytes()
    except FileNotFoundError:
        return None
    return content


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error or type(error).__name__, 200)
