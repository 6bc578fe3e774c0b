"""Tasks of EleutherAI's lm-evaluation-harness (the `lm_eval` package, an extra), including local files, offline."""

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

from mythos_jax.errors import ConfigError, one_line
from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.results import Measurement
from mythos_jax.evaluation.scoring import Continuation, generate_until, score
from mythos_jax.runs.load import LoadedModel

NEW_TOKENS = 256  # if a task does not say how many; fewer for a model with a short context


class Adapter(TemplateLM):
    """A model under one setting, with the interface of the harness. Counts the loops spent on scoring and generating.

    Every text is preceded by an end-of-document token, as documents are in training; a context that is too long is
    truncated on the left.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        setting: Setting,
        *,
        seed: int = 0,
        progress: bool = True,
    ):
        super().__init__()
        self.loaded, self.setting, self.seed, self.progress = loaded, setting, seed, progress
        # Not `self.tokenizer`: the harness expects that to be one of transformers.
        self._text_tokenizer = loaded.require_tokenizer()
        self.max_length = loaded.model.config.max_seq_len
        self.reset_counts()

    def reset_counts(self) -> None:
        self._tokens = self._loops = 0

    @property
    def mean_loops(self) -> float:
        """Per token scored or generated since the last reset."""
        return self._loops / max(self._tokens, 1)

    @property
    def eot_token_id(self) -> int:
        return self._text_tokenizer.end_of_document

    @property
    def tokenizer_name(self) -> str:
        return self._text_tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._text_tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        end, sequences = [self.eot_token_id], []
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                allowed = f"1 to {self.max_length}, the model's context"
                raise ConfigError(f"--tasks: got an answer of {len(continuation)} tokens to score, allowed: {allowed}")
            tokens = (context if context[:1] == end else end + context) + continuation
            sequences.append((tokens[-(self.max_length + 1) :], len(continuation)))
        return self._score(sequences)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Each token is scored once, in windows of the model's context."""
        sequences, request_of = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1)
            for context, predicted in map(make_disjoint_window, windows):
                sequences.append((context + predicted, len(predicted)))
                request_of.append(i)
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(request_of, self._score(sequences), strict=True):
            totals[i] += log_likelihood
        return totals

    def _score(self, sequences: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        likelihoods = score(self.loaded, sequences, self.setting, progress=self.progress)
        self._tokens += sum(likelihood.tokens for likelihood in likelihoods)
        self._loops += sum(likelihood.loops for likelihood in likelihoods)
        return [(likelihood.log_likelihood, likelihood.greedy) for likelihood in likelihoods]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        # Only requests with equal generation arguments can be one batch.
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        answers: list[str] = [""] * len(requests)
        for indices in groups.values():
            arguments = dict(requests[indices[0]].args[1])
            until = arguments.pop("until", None) or []
            stop_texts = [until] if isinstance(until, str) else list(until)
            prompts = [[self.eot_token_id, *self.tok_encode(requests[i].args[0])] for i in indices]
            for i, continuation in zip(indices, self._generate(prompts, arguments, stop_texts), strict=True):
                text = self._text_tokenizer.decode(continuation.tokens)
                for stop in stop_texts:
                    text = text.split(stop)[0] if stop else text
                answers[i] = text
        return answers

    def _generate(
        self, prompts: list[list[int]], arguments: dict[str, Any], stop_texts: list[str]
    ) -> list[Continuation]:
        """arguments: of the harness, which has several names for the number of new tokens."""
        limits = [arguments[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in arguments]
        sampled = arguments.get("do_sample", arguments.get("temperature", 0) > 0)
        # A stop text that is a single token ends the row at once; any other is cut off afterwards.
        encoded_stops = [self.tok_encode(stop) for stop in stop_texts]
        stop_tokens = [self.eot_token_id, *(tokens[0] for tokens in encoded_stops if len(tokens) == 1)]
        continuations = generate_until(
            self.loaded,
            prompts,
            self.setting,
            max_new_tokens=int(limits[0]) if limits and limits[0] else min(NEW_TOKENS, self.max_length // 2),
            stop_tokens=tuple(dict.fromkeys(stop_tokens)),
            temperature=float(arguments.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(arguments.get("top_k", 0)) if sampled else 0,
            top_p=float(arguments.get("top_p", 1.0)) if sampled else 1.0,
            seed=self.seed,
            progress=self.progress,
        )
        self._tokens += sum(continuation.generated for continuation in continuations)
        self._loops += sum(continuation.loops for continuation in continuations)
        return continuations


def run_harness(
    loaded: LoadedModel,
    tasks: Sequence[str],
    settings: Sequence[Setting],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Measurement]:
    """Runs every task under every setting; one measurement per metric that the task reports.

    tasks: names known to the harness, or paths of task files. include_path: a folder with more task files.
    limit: documents per task (default: all). Raises ConfigError for an unknown task.
    """
    with _stdout_to_stderr():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        # Standard errors are bootstrapped, in other processes unless this is set; forking one that runs jax may hang.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        manager, specs = _find_tasks(tasks, include_path)
        measurements = []
        for setting in settings:
            model = Adapter(loaded, setting, seed=seed, progress=progress)
            for spec in specs:
                model.reset_counts()
                report = simple_evaluate(
                    model,
                    tasks=[spec],
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=1000,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
                measurements += _measurements(report, setting, model.mean_loops)
    return measurements


def _find_tasks(tasks: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[str | dict[str, Any]]]:
    """Each task as the harness takes it: a name it knows, or the content of a task file."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path: {include_path}: no such folder")
    names = [task for task in tasks if not _is_file(task)]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not all(map(_is_known(manager), names)):  # reading the tasks bundled with the harness takes half a minute
        manager = TaskManager(include_path=include_path)
    for name in names:
        if not _is_known(manager)(name):
            allowed = "a .yaml file, a task of --include-path, or one listed by `lm_eval ls tasks`"
            raise ConfigError(f"--tasks: got {name!r}, allowed: {allowed}")
    return manager, [_read_task(task) if _is_file(task) else task for task in tasks]


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _is_known(manager: TaskManager) -> Callable[[str], bool]:
    return lambda name: bool(manager.match_tasks([name]))


def _read_task(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f"--tasks: {path}: no such file")
    try:
        return load_yaml(path, resolve_func=True)
    except Exception as error:  # the loader raises errors of many kinds
        raise ConfigError(f"--tasks: {path}: not a task file ({one_line(error)})") from None


def _measurements(report: dict[str, Any], setting: Setting, mean_loops: float) -> list[Measurement]:
    """The numbers of a harness report, which holds {task: {"acc,none": …, "acc_stderr,none": …, "alias": …}}; behind
    the comma is the filter that the answers went through."""
    measurements = []
    for task, numbers in report["results"].items():
        higher_is_better = report["higher_is_better"].get(task, {})
        for name, value in numbers.items():
            metric, _, filter_name = name.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{filter_name}")
            measurements.append(
                Measurement(
                    setting=setting,
                    metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                    value=float(value),
                    higher_is_better=bool(higher_is_better.get(metric, True)),
                    mean_loops=mean_loops,
                    n=report["n-samples"].get(task, {}).get("effective", 0),
                    group=task,
                    error=float(error) if isinstance(error, int | float) else None,
                )
            )
    return measurements


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """The harness and its imports print messages; our standard output is for results only."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
