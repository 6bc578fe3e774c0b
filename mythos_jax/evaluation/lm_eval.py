"""Tasks of EleutherAI's lm-evaluation-harness (the `lm_eval` package, an extra), also from local files, offline."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mythos_jax.errors import ConfigError
from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.results import HarnessResult
from mythos_jax.evaluation.scoring import extend, score
from mythos_jax.runs.load import LoadedModel

NEW_TOKENS = 256  # where a task does not say how many; less where the model's context is short


class Adapter(TemplateLM):
    """A model under one setting, as the harness knows models. Counts the loops spent on what it scores and generates.

    Every text follows an end-of-document token, as documents do in training; a context that is too long loses its
    beginning.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        setting: Setting,
        tokenizer: str | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
    ):
        super().__init__()
        self.loaded, self.setting, self.seed, self.progress = loaded, setting, seed, progress
        self.reader = loaded.tokenizer(tokenizer)
        self.max_length = loaded.model.config.max_seq_len
        self.counted_tokens = self.counted_loops = 0

    @property
    def eot_token_id(self) -> int:
        return self.reader.end_of_document

    @property
    def tokenizer_name(self) -> str:
        return self.reader.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.reader.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        end, sequences = [self.eot_token_id], []
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                allowed = f"1 to {self.max_length}, the model's context"
                raise ConfigError(f"--tasks: got an answer of {len(continuation)} tokens to score, allowed: {allowed}")
            tokens = (context if context[:1] == end else end + context) + continuation
            sequences.append((tokens[-(self.max_length + 1) :], len(continuation)))
        return self._count(sequences)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1)
            for context, predicted in map(make_disjoint_window, cut):
                windows.append((context + predicted, len(predicted)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(owners, self._count(windows), strict=True):
            totals[i] += nats
        return totals

    def _count(self, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        found = score(self.loaded, sequences, self.setting, progress=self.progress)
        self.counted_tokens += sum(s.tokens for s in found)
        self.counted_loops += sum(s.loops for s in found)
        return [(s.log_likelihood, s.greedy) for s in found]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests with the same keywords go together."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        for numbers in groups.values():
            keywords = dict(requests[numbers[0]].args[1])
            until = keywords.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            sample = keywords.get("do_sample", keywords.get("temperature", 0) > 0)
            wanted = next(
                (keywords[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in keywords), None
            )
            # A stop text that is one token ends the row at once; any other is cut off afterwards.
            single = [tokens[0] for tokens in map(self.tok_encode, until) if len(tokens) == 1]
            found = extend(
                self.loaded,
                [[self.eot_token_id, *self.tok_encode(requests[i].args[0])] for i in numbers],
                self.setting,
                max_new_tokens=int(wanted) if wanted else min(NEW_TOKENS, self.max_length // 2),
                stop_tokens=tuple(dict.fromkeys([self.eot_token_id, *single])),
                temperature=float(keywords.get("temperature", 1.0)) if sample else 0.0,
                top_k=int(keywords.get("top_k", 0)) if sample else 0,
                top_p=float(keywords.get("top_p", 1.0)) if sample else 1.0,
                seed=self.seed,
                progress=self.progress,
            )
            for i, new in zip(numbers, found, strict=True):
                self.counted_tokens += new.drawn
                self.counted_loops += new.loops
                text = self.reader.decode(new.tokens)
                for stop in until:
                    text = text.split(stop)[0] if stop else text
                answers[i] = text
        return answers


def evaluate_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    settings: Sequence[Setting],
    *,
    include_path: str | None = None,
    tokenizer: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[HarnessResult]:
    """Every task under every setting: a row for each number that the task reports.

    tasks: names that the harness knows, or paths of task files. include_path: a folder with more task files.
    limit: documents per task (default: all). Raises ConfigError for a task that nobody knows.
    """
    with _output_to_stderr():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # standard errors by resampling: no fork of a process with jax
        manager, known = _find(tasks, include_path)
        results = []
        for setting in settings:
            model = Adapter(loaded, setting, tokenizer, seed=seed, progress=progress)
            for task in known:
                model.counted_tokens = model.counted_loops = 0
                found = simple_evaluate(
                    model,
                    tasks=[task],
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=1000,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
                results += _rows(found, setting, model.counted_loops / max(model.counted_tokens, 1))
    return results


def _find(tasks: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[str | dict[str, Any]]]:
    """What the harness calls these tasks: their names, or what their files say."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path: {include_path}: no such folder")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    named = [task for task in tasks if not _is_file(task)]
    if not all(map(_knows(manager), named)):  # reading what the harness brings along takes half a minute
        manager = TaskManager(include_path=include_path)
    for task in named:
        if not _knows(manager)(task):
            allowed = "a .yaml file, a task of --include-path, or one that `lm_eval ls tasks` shows"
            raise ConfigError(f"--tasks: got {task!r}, allowed: {allowed}")
    return manager, [_read(task) if _is_file(task) else task for task in tasks]


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _knows(manager: TaskManager) -> Callable[[str], bool]:
    return lambda task: bool(manager.match_tasks([task]))


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f"--tasks: {path}: no such file")
    try:
        return load_yaml(path, resolve_func=True)
    except Exception as error:  # of many kinds
        raise ConfigError(f"--tasks: {path}: not a task file ({' '.join(str(error).split())})") from None


def _rows(found: dict[str, Any], setting: Setting, mean_loops: float) -> list[HarnessResult]:
    """The numbers in what the harness returns: {task: {"acc,none": …, "acc_stderr,none": …, "alias": …}}."""
    rows = []
    for task, numbers in found["results"].items():
        higher = found["higher_is_better"].get(task, {})
        for name, value in numbers.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{filtered}")
            rows.append(
                HarnessResult(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    error=float(error) if isinstance(error, int | float) else None,
                    higher_is_better=bool(higher.get(metric, True)),
                    samples=found["n-samples"].get(task, {}).get("effective", 0),
                    loops=setting.loops,
                    mean_loops=mean_loops,
                    halting=setting.criterion,
                    threshold=setting.threshold,
                    approximate=setting.approximate,
                )
            )
    return rows


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    """The harness and what it imports print; standard output is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
