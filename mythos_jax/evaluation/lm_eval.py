"""Tasks of EleutherAI's lm-evaluation-harness (the `lm_eval` package, an extra), including local files, offline."""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import datasets
import lm_eval.api.task
import tqdm
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mythos_jax.evaluation.harness_tasks import FoundTask, GenerationOptions, Seeds, describe, find_tasks
from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.results import Measurement
from mythos_jax.evaluation.scoring import Continuation, generate_until, score
from mythos_jax.inference.detokenizer import continuation_text
from mythos_jax.processes import log0, lost_a_process
from mythos_jax.runs.load import LoadedModel


class Adapter(TemplateLM):
    """A model under one setting, with the interface of the harness. Counts the loops spent on scoring and generating.

    A text starts as `LoadedModel.conventions` say, in a run with an end-of-document token, as in training; a context
    that is too long is truncated on the left.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        setting: Setting,
        *,
        seeds: Seeds = Seeds(),  # noqa: B008  # which is frozen
        progress: bool = True,
    ):
        super().__init__()
        self.loaded, self.setting, self.seeds, self.progress = loaded, setting, seeds, progress
        # Not `self.tokenizer`: the harness expects that to be one of transformers.
        self._text_tokenizer = loaded.require_tokenizer()
        self._begin = loaded.conventions.begin
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

    @property
    def prefix_token_id(self) -> int:
        return self.loaded.conventions.prefix_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Without the tokens that a text starts with. Names of special tokens stand for them, as in the harness; in the
        data of a run they are text."""
        return self._text_tokenizer.encode(string, special_tokens=self.loaded.step is None).tolist()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for context, answer in (request.args for request in requests):
            # The harness does not take an empty context, nor one that is only white space.
            encoded = self._encode_pair(context, answer) if context.strip() else self._encode_alone(context + answer)
            pairs.append(((context, answer), *encoded))
        return self._loglikelihood_tokens(pairs)

    def _encode_alone(self, answer: str) -> tuple[list[int], list[int]]:
        """After what a text starts with, which the answer may begin with."""
        context, tokens = self._begin([]), self.tok_encode(answer)
        return context, tokens[len(context) :] if tokens[: len(context)] == context else tokens

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does, and where one token spans the two, which leaves it none to score, the answer alone."""
        context_tokens, answer_tokens = super()._encode_pair(context, continuation)
        if not answer_tokens:
            answer_tokens = self.tok_encode(context[len(context.rstrip()) :] + continuation)
        return context_tokens, answer_tokens

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        parts: list[list[tuple[list[int], int]]] = []
        for _text, context, answer in requests:
            tokens = self._begin(context)
            if len(answer) > self.max_length:
                parts.append(self._windows(answer, before=tokens[-1]))
            else:  # an empty answer is certain
                parts.append([((tokens + answer)[-(self.max_length + 1) :], len(answer))] if answer else [])
        return self._score(parts)

    def _windows(self, tokens: list[int], before: int) -> list[tuple[list[int], int]]:
        """Each token once, in windows of the model's context."""
        windows = get_rolling_token_windows(tokens, before, self.max_length, context_len=1)
        return [(context + predicted, len(predicted)) for context, predicted in map(make_disjoint_window, windows)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Each token is scored once, in windows of the model's context."""
        encoded = [self._encode_alone(request.args[0]) for request in requests]
        parts = [self._windows(tokens, before=context[-1]) for context, tokens in encoded]
        return [log_likelihood for log_likelihood, _ in self._score(parts)]

    def _score(self, parts: Sequence[Sequence[tuple[list[int], int]]]) -> list[tuple[float, bool]]:
        """For each request, the sum of its parts (see `scoring.score`), and whether all of them are greedy."""
        sequences = [sequence for several in parts for sequence in several]
        likelihoods = score(self.loaded, sequences, self.setting, progress=self.progress)
        self._tokens += sum(likelihood.tokens for likelihood in likelihoods)
        self._loops += sum(likelihood.loops for likelihood in likelihoods)
        in_order = iter(likelihoods)
        results = []
        for several in parts:
            own = [next(in_order) for _ in several]
            results.append((math.fsum(part.log_likelihood for part in own), all(part.greedy for part in own)))
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        # Only requests with equal generation arguments can be one batch.
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        answers: list[str] = [""] * len(requests)
        config = self.loaded.model.config
        for indices in groups.values():
            options = GenerationOptions.parse(requests[indices[0]].args[1], self.max_length, config.vocab_size)
            prompts = [self._begin(self.tok_encode(requests[i].args[0])) for i in indices]
            for i, text in zip(indices, self._continue(prompts, options), strict=True):
                answers[i] = text
        return answers

    def _continue(self, prompts: list[list[int]], options: GenerationOptions) -> list[str]:
        """The text that follows each prompt, up to the first stop text."""
        special = set(self.loaded.conventions.stop_tokens)
        early = set()  # a stop text that is a single token ends the row at once; any other is cut off afterwards
        for stop in options.stop_texts:
            tokens = self.tok_encode(stop)
            if (token := self._text_tokenizer.special_token(stop)) is not None:
                special.add(token)
            elif len(tokens) == 1 and stop in self._text_tokenizer.decode(tokens):
                early.add(tokens[0])
        answers = []
        for prompt, continuation in zip(prompts, self._generate(prompts, options, special | early), strict=True):
            tokens = continuation.tokens
            if continuation.stop in early:  # its text may begin before the stop text, with a space
                tokens = [*tokens, continuation.stop]
            text = continuation_text(self._text_tokenizer, prompt, tokens)
            for stop in options.stop_texts:
                text = text.split(stop)[0]
            answers.append(text)
        return answers

    def _generate(
        self, prompts: list[list[int]], options: GenerationOptions, stop_tokens: set[int]
    ) -> list[Continuation]:
        continuations = generate_until(
            self.loaded,
            prompts,
            self.setting,
            max_new_tokens=options.max_new_tokens,
            stop_tokens=tuple(sorted(stop_tokens)),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=self.seeds.torch,
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
    seed: int | None = None,
    progress: bool = True,
) -> tuple[list[Measurement], list[str]]:
    """Runs every task under every setting; one measurement per metric that the task reports, and a line for each task
    that failed, which does not end the others.

    tasks: names known to the harness, or paths of task files. include_path: a folder with more task files.
    limit: documents per task (default: all). seed: see `Seeds.of`.
    Raises ConfigError for a task that is unknown or wrong.
    """
    measurements: list[Measurement] = []
    failures: list[str] = []
    with _quiet():
        config, seeds = loaded.model.config, Seeds.of(seed)
        loaded.require_tokenizer()
        manager, found = find_tasks(
            tasks, include_path, limit=limit, seeds=seeds, max_length=config.max_seq_len, vocab_size=config.vocab_size
        )
        for setting in settings:
            model = Adapter(loaded, setting, seeds=seeds, progress=progress)
            for task in found:
                model.reset_counts()
                try:
                    report = _evaluate(model, task, manager, limit, seeds)
                    measurements += _measurements(report, setting, model.mean_loops)
                except Exception as error:
                    if lost_a_process(error):
                        raise
                    failures.append(f"--tasks: {task.name} at {setting.loops} loops: {describe(error)}")
                    log0(failures[-1], logging.ERROR)
    return measurements, failures


def _evaluate(model: Adapter, task: FoundTask, manager: TaskManager, limit: int | None, seeds: Seeds) -> dict[str, Any]:
    report: dict[str, Any] = simple_evaluate(
        model,
        tasks=task.specs,
        task_manager=manager,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        random_seed=seeds.random,
        numpy_random_seed=seeds.numpy,
        torch_random_seed=seeds.torch,
        fewshot_random_seed=seeds.fewshot,
    )
    return report


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
def _quiet() -> Iterator[None]:
    """The harness and its imports print messages; our standard output is for results only."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Standard errors are bootstrapped, in other processes unless this is set; forking one that runs jax may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    datasets.disable_progress_bars()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        # git complains in any folder that is not its own.
        stack.enter_context(_replaced(evaluator, "get_git_commit_hash", lambda: None))
        # Bars for work that takes no time; `scoring` shows the progress of the rest.
        for module in (lm_eval.api.task, tqdm):
            stack.enter_context(_replaced(module, "tqdm", _NoBar))
        yield


class _NoBar(tqdm.tqdm):
    """A progress bar that is never shown."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords | {"disable": True})


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
