"""Following a run from its directory alone, on a disk or in an object store: each look reads what is new."""

import re
import time
from typing import Any

from mythos_jax.config import Config, load_run_config
from mythos_jax.errors import ConfigError, one_line
from mythos_jax.json_text import parse_json
from mythos_jax.paths import is_remote, read_if_there, to_path
from mythos_jax.runs.owner import LOCK_FILE, Owner, parse_owner
from mythos_jax.runs.records import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, parse_events
from mythos_jax.watch.history import History

_CHUNK = 2**24  # bytes of a log that are read at a time
_OVERLAP = 200  # bytes before the new ones, by which an appended file is told from a rewritten one
# What experts get is shown of the last line alone, and is most of a long log: of lines before these it is not parsed.
_WITH_LOAD, _LOAD = 20, re.compile(rb'(?<="expert_load": )\[\[[^"]*\]\]')


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
        return self.config.name if self.config else self.path.name or str(self.path)

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
        if not any((self.path / name).exists() for name in (CONFIG_FILE, METRICS_FILE, LOCK_FILE)):
            raise ConfigError(f"{self.path}: contains no run (no {CONFIG_FILE}); {allowed}")

    def _look(self) -> None:
        self._read_config()
        self.events = parse_events(read_if_there(self.path / EVENTS_FILE) or b"")
        lock = read_if_there(self.path / LOCK_FILE)
        self.owner = None if lock is None else parse_owner(lock)
        self._log.read()
        self.looked = time.time()

    def _read_config(self) -> None:
        content = read_if_there(self.path / CONFIG_FILE)
        if content == self._config_bytes and not self.problem:
            return
        self._config_bytes, self.problem = content, ""
        if content is None:
            return
        try:
            self.config = load_run_config(self.path / CONFIG_FILE)
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
        with self._path.open("rb") as file:
            file.seek(self._end - len(self._before))
            if file.read(len(self._before)) != self._before:  # the run was resumed: its file is another one
                self._restart()
                file.seek(0)
            rest = b""
            while content := file.read(_CHUNK):
                *lines, rest = (rest + content).split(b"\n")
                self._add(lines)
        self._seen = seen

    def _restart(self) -> None:
        self.history, self._end, self._before, self._seen = History(), 0, b"", None

    def _add(self, lines: list[bytes]) -> None:
        for i, text in enumerate(lines, start=1):
            if i <= len(lines) - _WITH_LOAD:
                text = _LOAD.sub(b"null", text)
            try:
                line = parse_json(text)
            except ValueError:  # damaged, as after a crash of the machine; a resume drops it
                continue
            if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**62:
                self.history.add(line)
        self._end += sum(map(len, lines)) + len(lines)
        self._before = b"".join([self._before, *(line + b"\n" for line in lines[-_OVERLAP:])])[-_OVERLAP:]


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error or type(error).__name__, 200)
