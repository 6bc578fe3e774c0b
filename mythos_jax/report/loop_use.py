"""Sections of the report about loops: which tokens get them, whether harder inputs get more, and what each one does."""

import numpy as np

from mythos_jax.evaluation.ranks import binned_means
from mythos_jax.evaluation.results import Evaluation, HeldOutText, LoopTrace, LoopUsage
from mythos_jax.report.heat_map import problem_map, text_map, widest_per_criterion
from mythos_jax.report.html import pair, section, share_table, table
from mythos_jax.report.svg import Axis, Series, line_chart
from mythos_jax.report.tables import setting_name


def heat_map_section(evaluation: Evaluation) -> str:
    """One heat map per criterion, of which the first is open."""
    if isinstance(evaluation.data, HeldOutText):
        draw = text_map
        words = (
            "Held-out text, each token coloured by the loops spent on predicting it. The context restarts every "
            f"{evaluation.data.row_tokens} tokens."
        )
    else:
        draw = problem_map
        words = "The first problem of each difficulty, each symbol coloured by the loops of its token."
    words += (
        " For each criterion, the threshold with the largest spread of loops is shown. Hover over a token for its "
        "numbers."
    )
    maps = []
    for i, usage in enumerate(widest_per_criterion(evaluation.loop_usage)):
        title = f"{setting_name(usage.setting)}, at most {usage.setting.loops} loops"
        picture = draw(usage, evaluation.decode)
        maps.append(f"<details{' open' if i == 0 else ''}><summary>{title}</summary>{picture}</details>")
    return section("Where the loops go", words, *maps)


def hardness_section(evaluation: Evaluation) -> str:
    """Mean loops against hardness, one line per criterion, and the rank correlation of every policy."""
    is_text = isinstance(evaluation.data, HeldOutText)
    make_series = _loops_by_loss if is_text else _loops_by_difficulty
    series = [make_series(usage, i) for i, usage in enumerate(widest_per_criterion(evaluation.loop_usage))]
    rows = [
        [setting_name(usage.setting), f"{usage.loops_N.mean():.2f}", _signed(usage.rank_correlation)]
        for usage in evaluation.loop_usage
    ]
    x_label = "tenth of the tokens, by loss, easiest first" if is_text else "difficulty"
    ends = "; ".join(f"{s.name} from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
    chart = line_chart(
        series,
        Axis(x_label, ticks=[x for x, _ in series[0].points]),
        Axis("mean loops"),
        alt=f"Mean loops against {x_label}: {ends}.",
    )
    hardness = "a token's loss at the deepest fixed depth" if is_text else "a problem's difficulty"
    words = (
        f"The rank correlation is Spearman's, between {hardness} and its number of loops: 1 if harder inputs always "
        "take more loops, 0 if the two are unrelated."
    )
    numbers = table(["policy", "mean loops", "rank correlation"], rows, "Rank correlation of every policy")
    return section("Harder inputs, more loops?", words, pair(chart, numbers))


def _loops_by_loss(usage: LoopUsage, style: int) -> Series:
    """Mean loops in each tenth of the tokens, in ascending order of loss."""
    nats, loops = binned_means(usage.hardness_N, usage.loops_N)
    points = [(bin_number, float(mean)) for bin_number, mean in enumerate(loops, start=1)]
    notes = [f"{loss:.3g} nats: {mean:.2f} loops" for loss, mean in zip(nats, loops, strict=True)]
    return Series(setting_name(usage.setting), points, style, notes)


def _loops_by_difficulty(usage: LoopUsage, style: int) -> Series:
    difficulties = np.unique(usage.hardness_N).tolist()
    loops = [float(usage.loops_N[usage.hardness_N == difficulty].mean()) for difficulty in difficulties]
    points = list(zip(difficulties, loops, strict=True))
    notes = [f"difficulty {difficulty}: {mean:.2f} loops" for difficulty, mean in points]
    return Series(setting_name(usage.setting), points, style, notes)


def _signed(correlation: float | None) -> str:
    return "–" if correlation is None else f"{correlation:+.3f}"


def convergence_section(trace: LoopTrace) -> str:
    """How far the state still moves, loop by loop."""
    drawn_L3 = np.maximum(trace.change_L3, 1e-9)  # the axis is logarithmic
    medians = [(loop, float(median)) for loop, (_, median, _) in enumerate(drawn_L3, start=1)]
    line = Series(
        "median; shaded: the middle 80 % of the tokens",
        medians,
        style=0,
        notes=[f"loop {loop}: {median:.3g}" for loop, median in medians],
        band=[(loop, float(low), float(high)) for loop, (low, _, high) in enumerate(drawn_L3, start=1)],
    )
    chart = line_chart(
        [line],
        Axis("loop", ticks=[loop for loop, _ in medians]),
        Axis("|h_t − h_(t−1)| / |h_t|", log=True, text=lambda value: f"{value:.2g}"),
        alt=f"Relative change of the state, from {medians[0][1]:.3g} in loop 1 to {medians[-1][1]:.3g} in the last.",
    )
    rows = [
        [str(loop), *(f"{quantile:.4f}" for quantile in quantiles)]
        for loop, quantiles in enumerate(trace.change_L3, start=1)
    ]
    numbers = table(["loop", "10 %", "median", "90 %"], rows, "Change of the state by loop")
    words = f"How far each loop still moves the state, over {trace.tokens:,} tokens at a fixed depth."
    return section("Convergence", words, pair(chart, numbers))


def experts_section(shares_LGE: np.ndarray) -> str:
    """Tables of shares, coloured so that each is its own chart; one per layer of the loop."""
    shares_LGE = np.nan_to_num(shares_LGE)  # NaN in a loop that sent no token anywhere
    highest = max(float(shares_LGE.max()), 1e-9)
    _, n_layers, n_experts = shares_LGE.shape
    tables = []
    for layer in range(n_layers):
        name = f"Layer {layer + 1} of the loop" if n_layers > 1 else "Shares of the tokens' choices"
        rows = [(f"loop {loop}", shares) for loop, shares in enumerate(shares_LGE[:, layer].tolist(), start=1)]
        tables.append(f"<h3>{name}</h3>" + share_table(rows, "loop", highest, f"{name}: expert use by loop"))
    words = f"Which experts each loop chooses; an even spread would be {1 / n_experts:.1%} each."
    return section("Expert use per loop", words, *tables)
