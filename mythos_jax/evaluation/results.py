"""Result types of every kind of evaluation, and their JSON form."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mythos_jax.evaluation.loop_trace import LoopTrace
from mythos_jax.evaluation.policies import Setting
from mythos_jax.evaluation.ranks import rank_correlation


@dataclass(frozen=True)
class DepthResult:
    """One row of the table.

    loops: what every token ran or, with a policy (`halting` its criterion, `threshold`), at most. loss: nats per
    token. mean_loops: over the tokens, what was run and contributed. rank_correlation: Spearman's, between a token's
    loss at the deepest fixed depth and its loops; None where all tokens ran the same. approximate: see `Setting`.
    """

    loops: int
    loss: float
    bits_per_byte: float
    mean_loops: float
    tokens: int
    halting: str | None = None
    threshold: float | None = None
    approximate: bool = False
    rank_correlation: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """One row of the table. exact_match: share of examples whose answer tokens are all the likeliest ones, which is
    where greedy decoding is right; loss: nats per answer token; mean_loops: over the answer tokens. The rest is as in
    `DepthResult`."""

    difficulty: int
    loops: int
    exact_match: float
    loss: float
    mean_loops: float
    examples: int
    halting: str | None = None
    threshold: float | None = None
    approximate: bool = False


@dataclass(frozen=True)
class HarnessResult:
    """One number of one task of lm-evaluation-harness. error: its standard error; mean_loops: over the tokens that
    were scored or generated; the rest is as in `DepthResult`."""

    task: str
    metric: str
    value: float
    error: float | None
    higher_is_better: bool
    samples: int
    loops: int
    mean_loops: float
    halting: str | None = None
    threshold: float | None = None
    approximate: bool = False


Result = DepthResult | TaskResult | HarnessResult


@dataclass(frozen=True)
class TokenTrace:
    """What single tokens took, of the rows `rows_NT` (the targets; int32) where `mask_NT`: loops_NT under one setting,
    and nats_NT at the deepest fixed depth."""

    setting: Setting
    rows_NT: np.ndarray
    mask_NT: np.ndarray
    loops_NT: np.ndarray
    nats_NT: np.ndarray


@dataclass(frozen=True)
class ExampleTrace:
    """What single problems took under one setting, a row each: its difficulty, the mean loops of its answer; and of
    the first problem of each difficulty its tokens and each token's loops.

    rank_correlation: Spearman's, between difficulty and loops; None where one of them is constant.
    """

    setting: Setting
    difficulty_N: np.ndarray
    loops_N: np.ndarray
    shown: Mapping[int, tuple[np.ndarray, np.ndarray]]

    @property
    def rank_correlation(self) -> float | None:
        return rank_correlation(self.difficulty_N, self.loops_N)


@dataclass(frozen=True)
class Evaluation:
    """What was found. results: a row a setting (of a task: of each difficulty; of the harness: of each number).
    about: which model, plain values. The rest is for the report: `says` turns tokens into text; `traces` are of each
    policy; `inside` is None where nobody asked."""

    results: Sequence[Result]
    about: dict[str, Any]
    traces: Sequence[TokenTrace | ExampleTrace] = ()
    inside: LoopTrace | None = None
    says: Callable[[Sequence[int]], str] = str


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """What `--json` prints and evaluation.json holds."""
    found = {**evaluation.about, "results": [asdict(result) for result in evaluation.results]}
    correlations = [
        {"halting": t.setting.criterion, "threshold": t.setting.threshold, "rank_correlation": t.rank_correlation}
        for t in evaluation.traces
        if isinstance(t, ExampleTrace)
    ]
    if correlations:
        found["difficulty_and_loops"] = correlations
    if evaluation.inside is not None:
        inside = evaluation.inside
        found["inside"] = {
            "tokens": inside.tokens,
            "change_quantiles": inside.change_L3.tolist(),
            "expert_share": None if inside.expert_share_LGE is None else inside.expert_share_LGE.tolist(),
        }
    return found
