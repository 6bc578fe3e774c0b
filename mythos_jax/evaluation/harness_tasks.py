"""Finds tasks of lm-evaluation-harness, and refuses what is wrong with them before anything is computed."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.processes import log0

NEW_TOKENS = 256  # if a task does not say how many; fewer for a model with a short context
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in order of preference
SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Seeds:
    """The seeds of an evaluation; the defaults are the harness's. torch: of sampled answers. fewshot: of the examples
    in front of a question."""

    random: int = DEFAULT_RANDOM_SEED
    numpy: int = DEFAULT_OTHER_SEED
    torch: int = DEFAULT_OTHER_SEED
    fewshot: int = DEFAULT_OTHER_SEED

    @classmethod
    def of(cls, seed: int | None) -> "Seeds":
        """All the same, or the defaults."""
        return cls() if seed is None else cls(seed, seed, seed, seed)


@dataclass(frozen=True)
class FoundTask:
    """A task as it was asked for, and what `simple_evaluate` takes for it: loaded tasks, or the name of a group."""

    name: str
    specs: list[Any]


@dataclass(frozen=True)
class GenerationOptions:
    """The generation arguments of a request. stop_texts: where the answer ends."""

    stop_texts: list[str]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def parse(cls, arguments: Any, max_length: int, vocab_size: int) -> "GenerationOptions":
        """Reads what the harness passes. Raises ConfigError for a value that no model can follow."""
        if not isinstance(arguments, dict):
            raise ConfigError(f"generation_kwargs: got {arguments!r}, allowed: names with values")
        given = {name: value for name, value in arguments.items() if value is not None}
        until = given.get("until", [])
        stop_texts = [until] if isinstance(until, str) else until
        if not isinstance(stop_texts, list) or not all(isinstance(text, str) for text in stop_texts):
            raise ConfigError(f"until: got {until!r}, allowed: a text or a list of texts")
        limits = [given[name] for name in LIMIT_NAMES if name in given]
        new_tokens = _number("max_gen_toks", limits[0] if limits else min(NEW_TOKENS, max_length // 2))
        temperature = _number("temperature", given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
        top_k, top_p = _number("top_k", given.get("top_k", 0)), _number("top_p", given.get("top_p", 1.0))
        for name, ok, value, allowed in [
            ("max_gen_toks", 1 <= new_tokens < max_length, new_tokens, f"1 to {max_length - 1}, below max_seq_len"),
            ("temperature", 0 <= temperature < math.inf, temperature, "a number >= 0"),
            ("top_k", 0 <= top_k <= vocab_size, top_k, f"0 (all) to the vocabulary size, {vocab_size}"),
            ("top_p", 0 < top_p <= 1, top_p, "a number in (0, 1]"),
        ]:
            if not ok:
                raise ConfigError(f"{name}: got {value:g}, allowed: {allowed}")
        if not given.get("do_sample", temperature > 0):
            temperature, top_k, top_p = 0.0, 0, 1.0
        return cls([text for text in stop_texts if text], int(new_tokens), temperature, int(top_k), top_p)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: got {value!r}, allowed: a number") from None


def find_tasks(
    tasks: Sequence[str],
    include_path: str | None,
    *,
    limit: int | None,
    seeds: Seeds,
    max_length: int,
    vocab_size: int,
) -> tuple[TaskManager, list[FoundTask]]:
    """Loads each task and makes its requests once. Raises ConfigError for the first that the harness cannot run."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: got {limit}, allowed: an integer >= 1")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path: {include_path}: no such folder")
    if not tasks:
        raise ConfigError("--tasks: got none, allowed: at least one task")
    names = [task for task in tasks if not _is_file(task)]
    with _described("--include-path" if include_path else "--tasks"):
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if not all(map(_is_known(manager), names)):  # reading the tasks bundled with the harness takes half a minute
            manager = TaskManager(include_path=include_path)
    for name in names:
        if not _is_known(manager)(name):
            allowed = "a .yaml file, a task of --include-path, or one listed by `lm_eval ls tasks`"
            raise ConfigError(f"--tasks: got {name!r}, allowed: {allowed}")
    specs = {task: _read_task(task) if _is_file(task) else task for task in tasks}
    found = []
    for name, spec in specs.items():
        with _described(f"--tasks: {name}"):
            loaded = manager.load([spec])
            for task in loaded["tasks"].values():
                _try_task(task, limit, seeds, max_length, vocab_size)
        # A group is loaded again by its name, because its numbers are averaged.
        found.append(FoundTask(name, [spec] if loaded["groups"] else list(loaded["tasks"].values())))
    return manager, found


def _try_task(task: Task, limit: int | None, seeds: Seeds, max_length: int, vocab_size: int) -> None:
    """Makes the requests of a task, which finds most of what can be wrong with it or its documents."""
    task.set_fewshot_seed(seed=seeds.fewshot)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    ignored: set[str] = set()
    for request in task.instances:
        if request.request_type == "generate_until":
            GenerationOptions.parse(request.args[1], max_length, vocab_size)
            ignored |= {name for name in request.args[1] if name not in ("until", *LIMIT_NAMES, *SAMPLING_NAMES)}
    if ignored:
        log0(f"--tasks: {task.task_name}: ignores generation_kwargs that are not known: {', '.join(sorted(ignored))}")


@contextlib.contextmanager
def _described(name: str) -> Iterator[None]:
    """Turns any error of the harness, which raises many kinds, into one line, with what it logged about it."""
    logged: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lm_eval").addHandler(handler)
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except Exception as error:
        raise ConfigError("; ".join([f"{name}: {describe(error)}", *logged[-1:]])) from error
    finally:
        logging.getLogger("lm_eval").removeHandler(handler)


def describe(error: Exception) -> str:
    """An error of the harness on one line; its type says what the message often leaves out."""
    return f"{type(error).__name__}: {one_line(error, limit=300)}"


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _is_known(manager: TaskManager) -> Callable[[str], bool]:
    return lambda name: bool(manager.match_tasks([name]))


def _read_task(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f"--tasks: {path}: no such file")
    try:
        task = load_yaml(path, resolve_func=True)
    except Exception as error:  # the loader raises errors of many kinds
        raise ConfigError(f"--tasks: {path}: not a task file ({one_line(error)})") from None
    if not isinstance(task, dict):
        raise ConfigError(f"--tasks: {path}: not a task file (no keys)")
    return task
