"""What evaluations return: one row type for every kind of data, the loops of single items, and their JSON form."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.ranks import rank_correlation
from mythos_jax.json_text import without_nan


@dataclass(frozen=True)
class Measurement:
    """Quality under one setting, on one group of the data.

    group: the difficulty of the problems, or the task of lm-evaluation-harness; None for text, which is one group.
    metric: "bits_per_byte", "exact_match" (`value` is a fraction) or a metric of the harness.
    n: how many were measured: scored tokens of text, problems, or documents of a harness task.
    mean_loops: over the scored (harness: also generated) tokens, the loops that contributed to them.
    loss: nats per scored token; NaN for the harness. error: standard error of `value`; only for the harness.
    """

    setting: Setting
    metric: str
    value: float
    higher_is_better: bool
    mean_loops: float
    n: int
    group: int | str | None = None
    loss: float = math.nan
    error: float | None = None


@dataclass(frozen=True)
class Sample:
    """A row of text or a problem, to be shown with the loops of each token.

    tokens_T, loops_T: int [T]. nats_T: float [T], each token's loss at the deepest fixed depth; None for a problem.
    difficulty: of the problem; None for text.
    """

    tokens_T: np.ndarray
    loops_T: np.ndarray
    nats_T: np.ndarray | None = None
    difficulty: int | None = None


@dataclass(frozen=True)
class LoopUsage:
    """The loops that single items took under one halting policy. An item is a token of text or a problem of a task.

    hardness_N: a token's loss in nats at the deepest fixed depth (at the policy itself if no fixed depth was run), or
    a problem's difficulty. loops_N: the loops of the token, or their mean over the problem's answer tokens.
    """

    setting: Setting
    hardness_N: np.ndarray
    loops_N: np.ndarray
    samples: Sequence[Sample]

    @cached_property
    def rank_correlation(self) -> float | None:
        """Spearman's, between hardness and loops; None where one of them is constant."""
        return rank_correlation(self.hardness_N, self.loops_N)


@dataclass(frozen=True)
class LoopTrace:
    """What happens loop by loop in one batch at a fixed depth.

    tokens: how many the batch has. change_L3: quantiles 0.1, 0.5, 0.9 over the tokens of |h_t - h_(t-1)| / |h_t|.
    expert_share_LGE: fraction of the tokens' choices that go to each expert, per loop and layer of the loop; None for
    dense models.
    """

    tokens: int
    change_L3: np.ndarray
    expert_share_LGE: np.ndarray | None


@dataclass(frozen=True)
class ModelInfo:
    """The model that was evaluated. step, seed: None for a pretrained model. loops: the depth it was trained at.
    weights: how they were stored."""

    name: str
    step: int | None
    seed: int | None
    loops: int
    parameters: int
    weights: str = "float32"


@dataclass(frozen=True)
class HeldOutText:
    """Held-out rows of prepared text. data: the folder, or those of a mixture. row_tokens: tokens per row."""

    data: str | list[str]
    row_tokens: int

    def to_json(self) -> dict[str, Any]:
        return {"data": self.data}

    def row_to_json(self, row: Measurement) -> dict[str, Any]:
        return {
            "loops": row.setting.loops,
            "loss": row.loss,
            "bits_per_byte": row.value,
            "mean_loops": row.mean_loops,
            "tokens": row.n,
        }


@dataclass(frozen=True)
class ReasoningTask:
    """Held-out problems of a task. trained_on: the difficulties in the training data."""

    task: str
    trained_on: list[int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def row_to_json(self, row: Measurement) -> dict[str, Any]:
        return {
            "difficulty": row.group,
            "loops": row.setting.loops,
            "exact_match": row.value,
            "loss": row.loss,
            "mean_loops": row.mean_loops,
            "examples": row.n,
        }


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness. limit: documents per task; None: all. task_seed: None: the harness's seeds."""

    tasks: list[str]
    limit: int | None
    task_seed: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def row_to_json(self, row: Measurement) -> dict[str, Any]:
        return {
            "task": row.group,
            "metric": row.metric,
            "value": row.value,
            "error": row.error,
            "higher_is_better": row.higher_is_better,
            "samples": row.n,
            "loops": row.setting.loops,
            "mean_loops": row.mean_loops,
        }


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model on one kind of data, as `results`.

    loop_usage: one per halting policy; empty for the harness. loop_trace: None unless requested.
    decode: turns tokens into text, for display. failures: a line for each task of the harness that could not be run.
    """

    model: ModelInfo
    data: HeldOutText | ReasoningTask | HarnessTasks
    results: Sequence[Measurement]
    loop_usage: Sequence[LoopUsage] = ()
    loop_trace: LoopTrace | None = None
    decode: Callable[[Sequence[int]], str] = str
    failures: Sequence[str] = ()

    @cached_property
    def rank_correlations(self) -> dict[Setting, float | None]:
        """Spearman's correlation of hardness and loops under each halting policy."""
        return {usage.setting: usage.rank_correlation for usage in self.loop_usage}

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints and evaluation.json holds. JSON has no NaN and no infinity: these are None."""
        is_text = isinstance(self.data, HeldOutText)
        out: dict[str, Any] = {**asdict(self.model), **self.data.to_json(), "results": []}
        for row in self.results:
            fields = self.data.row_to_json(row) | _policy_to_json(row.setting)
            fields["approximate"] = row.setting.approximate
            fields["expected_logits"] = row.setting.expected
            if is_text:
                fields["rank_correlation"] = self.rank_correlations.get(row.setting)
            out["results"].append(fields)
        if self.failures:
            out["failures"] = list(self.failures)
        if self.loop_usage and not is_text:
            out["difficulty_and_loops"] = [
                _policy_to_json(setting) | {"rank_correlation": correlation}
                for setting, correlation in self.rank_correlations.items()
            ]
        if self.loop_trace is not None:
            shares_LGE = self.loop_trace.expert_share_LGE
            out["inside"] = {
                "tokens": self.loop_trace.tokens,
                "change_quantiles": self.loop_trace.change_L3.tolist(),
                "expert_share": None if shares_LGE is None else shares_LGE.tolist(),
            }
        finite: dict[str, Any] = without_nan(out)
        return finite


def _policy_to_json(setting: Setting) -> dict[str, Any]:
    return {"halting": setting.halting and setting.halting.criterion, "threshold": setting.threshold}
