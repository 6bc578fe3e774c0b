"""What an evaluation leaves behind: evaluation.json, and index.html with pictures of it."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mythos_jax.evaluation.loop_trace import LoopTrace
from mythos_jax.evaluation.ranks import by_parts
from mythos_jax.evaluation.results import DepthResult, Evaluation, ExampleTrace, TokenTrace, as_json
from mythos_jax.paths import to_path
from mythos_jax.report.heat_map import most_telling, problem_map, text_map
from mythos_jax.report.html import page, pair, section, table
from mythos_jax.report.pareto import Panel, panels, pooled, reference_depth, savings, setting_name
from mythos_jax.report.svg import Axis, Series, line_chart
from mythos_jax.report.tables import columns

ESTIMATE = (
    "A star: this criterion reads the logits. In a full forward pass the coda sees its neighbours' current states, so "
    "the number is an estimate of what decoding does."
)

TICKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # of loops, on a logarithmic axis


def write_report(folder: str | Path, evaluation: Evaluation, command: str) -> tuple[Path, Path]:
    """Writes evaluation.json and index.html (command: what made it, to be shown); returns their paths."""
    folder = to_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers, document = folder / "evaluation.json", folder / "index.html"
    numbers.write_text(json.dumps(as_json(evaluation), indent=2) + "\n")
    document.write_text(as_html(evaluation, command))
    return numbers, document


def as_html(evaluation: Evaluation, command: str) -> str:
    """The page, whole."""
    about, measured = evaluation.about, panels(evaluation.results)
    sections = [_depth(evaluation, measured)]
    if any(r.halting for r in evaluation.results):
        sections += _halting(evaluation, measured)
    if evaluation.traces:
        sections += [_heat_maps(evaluation), _harder(evaluation)]
    if evaluation.inside is not None:
        sections.append(_convergence(evaluation.inside))
        if evaluation.inside.expert_share_LGE is not None:
            sections.append(_experts(evaluation.inside))
    made = f"Made by mythos_jax on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; the same numbers are in evaluation.json."
    return page(
        f"{about['name']}: what depth buys",
        _facts(about, getattr(evaluation.results[0], "tokens", 0)),
        command,
        sections,
        made,
    )


def _facts(about: dict[str, Any], tokens: int) -> list[str]:
    facts = [f"{about['parameters']:,} parameters", f"trained with {about['loops']} loops"]
    if about["step"] is not None:
        facts += [f"step {about['step']:,}", f"seed {about['seed']}"]
    if "task" in about:
        facts.append(f"task {about['task']}, trained on difficulty {', '.join(map(str, about['trained_on']))}")
    if "tasks" in about:
        facts.append(f"tasks {', '.join(about['tasks'])}, seed {about['task_seed']}")
    elif "data" in about:
        parts = [about["data"]] if isinstance(about["data"], str) else about["data"]
        facts.append(f"{tokens:,} tokens of held-out text of {', '.join(parts)}")
    return facts


def _depth(evaluation: Evaluation, measured: Sequence[Panel]) -> str:
    """Quality at each fixed depth; a picture for each measure."""
    about, pictures = evaluation.about, []
    for measure in dict.fromkeys(panel.measure for panel in measured):
        same = [panel for panel in measured if panel.measure == measure]
        lines = [
            Series(
                panel.group or "fixed depth",
                [(p.loops, p.value) for p in panel.fixed],
                i,
                [f"{p.loops} loops: {p.value:.4g}" for p in panel.fixed],
                dashed="task" in about and not _trained_on(about, panel),
            )
            for i, panel in enumerate(same)
        ]
        depths = sorted({p.loops for panel in same for p in panel.fixed})
        pictures.append(
            line_chart(
                lines,
                Axis("loops", log=True, ticks=depths),
                _quality_axis(measure),
                alt=f"{measure} against loops. " + " ".join(_in_words(panel) for panel in same),
                marker=(about["loops"], "trained") if depths[0] <= about["loops"] <= depths[-1] else None,
            )
        )
    numbers = _by_depth(evaluation, measured)
    words = "Every token runs the same number of loops."
    if "task" in about:
        words += " Dotted: difficulties that the model was not trained on."
    return section("Quality against loops", words, pair("".join(pictures), numbers))


def _by_depth(evaluation: Evaluation, measured: Sequence[Panel]) -> str:
    """A row for each fixed depth, a column for each thing measured."""
    if isinstance(evaluation.results[0], DepthResult):
        shown = [c for c in columns(evaluation.results) if c.name in ("loops", "nats/token", "bits/byte")]
        rows = [[c.text(r) for c in shown] for r in evaluation.results if r.halting is None]
        return table([c.name for c in shown], rows, "Loss at each depth")
    several = len({panel.measure for panel in measured}) > 1
    names = [
        f"{panel.group}: {panel.measure}" if several else panel.group.replace("difficulty", "diff.")
        for panel in measured
    ]
    depths = [p.loops for p in measured[0].fixed]
    rows = [[str(depth), *(f"{panel.fixed[i].value:.4g}" for panel in measured)] for i, depth in enumerate(depths)]
    return table(["loops", *names], rows, f"{measured[0].measure} at each depth")


def _halting(evaluation: Evaluation, measured: Sequence[Panel]) -> list[str]:
    """The Pareto pictures, and what the cheapest good settings save."""
    about = evaluation.about
    wanted = list(measured)
    if "task" in about:
        trained = [panel for panel in measured if _trained_on(about, panel)]
        wanted = [pooled(trained, "difficulties trained on, counting alike")] if trained else []
        if len(trained) < len(measured):
            wanted.append(pooled(measured, "all difficulties, counting alike"))
    starred = any(r.approximate for r in evaluation.results)
    parts = [_pareto(panel, about["loops"], named="tasks" in about) for panel in wanted]
    shown = columns(evaluation.results)
    halted = [r for r in evaluation.results if r.halting]
    everything = table([c.name for c in shown], [[c.text(r) for c in shown] for r in halted], "Every halting policy")
    words = (
        "With halting each token stops when its criterion says so; the cost is the mean over tokens of the loops that "
        "they ran. A policy is worth having where its line is on the better side of the fixed depths' line. "
    )
    return [
        section(
            "Quality against mean loops",
            words + (ESTIMATE if starred else ""),
            *parts,
            f"<details><summary>All numbers of all policies</summary>{everything}</details>",
        )
    ]


def _pareto(panel: Panel, trained: int, named: bool) -> str:
    """named: the heading says what is measured."""
    reference = reference_depth(panel, trained)
    series = [
        Series(
            "fixed depth",
            [(p.mean_loops, p.value) for p in panel.fixed],
            "base",
            [f"{setting_name(p)}: {p.value:.4g}" for p in panel.fixed],
        )
    ]
    for i, (name, points) in enumerate(panel.policies.items()):
        star = "*" if points[0].approximate else ""
        notes = [f"{setting_name(p)}: {p.value:.4g} at {p.mean_loops:.2f} loops" for p in points]
        series.append(Series(name + star, [(p.mean_loops, p.value) for p in points], i, notes))
    picture = line_chart(
        series,
        Axis("mean loops a token", log=True, ticks=TICKS),
        _quality_axis(panel.measure),
        alt=f"{panel.measure} against mean loops, a line for fixed depths and one for each policy. {_in_words(panel)}",
        level=reference.value,
    )
    rows = []
    for name, saving in savings(panel, trained).items():
        if saving is None:
            rows.append([name or "fixed depth", "none", "", "", ""])
            continue
        p = saving.point
        over = f"{saving.over_fixed:+.3g}" if name else ""
        rows.append([setting_name(p), f"{p.mean_loops:.2f}", f"{saving.saved:.0%}", f"{p.value:.4g}", over])
    kept = table(["cheapest", "loops", "saved", panel.measure, "over fixed"], rows, "What halting saves")
    better = "higher" if panel.higher_is_better else "lower"
    words = (
        f"The cheapest settings within 0.5 % of {setting_name(reference)} ({reference.value:.4g}, the dashed line; "
        f"{better} is better), and the share of its loops that they save. Over fixed: the value less what fixed depths "
        "give at the same mean loops."
    )
    name = f"{panel.group}: {panel.measure}" if named else panel.group
    heading = f"<h3>{escape(name)}</h3>" if name else ""
    return heading + pair(picture, _against_fixed(panel)) + pair(kept, f'<p class="quiet">{escape(words)}</p>')


def _against_fixed(panel: Panel) -> str:
    """How far each policy is from fixed depths of the same cost: what the whole range is too coarse to show."""
    series = []
    for i, (name, points) in enumerate(panel.policies.items()):
        inside = [p for p in points if panel.fixed[0].loops <= p.mean_loops <= panel.fixed[-1].loops]
        notes = [f"{setting_name(p)}: {p.value - panel.at(p.mean_loops):+.3g}" for p in inside]
        over = [(p.mean_loops, p.value - panel.at(p.mean_loops)) for p in inside]
        series.append(Series(name + ("*" if points[0].approximate else ""), over, i, notes))
    series = [s for s in series if s.points]
    if not series:
        return ""
    best = (max if panel.higher_is_better else min)((y, s.name) for s in series for _, y in s.points)
    picture = line_chart(
        series,
        Axis("mean loops a token", log=True, ticks=TICKS),
        Axis(f"{panel.measure}, over fixed"),
        alt=f"Each policy less fixed depths at the same mean loops; at best {best[0]:+.3g}, by {best[1]}.",
        level=0.0,
    )
    better = "above" if panel.higher_is_better else "below"
    words = f"The same, less what fixed depths give at that cost: {better} 0 is better."
    return f'<figure>{picture}</figure><p class="quiet">{words}</p>'


def _heat_maps(evaluation: Evaluation) -> str:
    """One heat map for each criterion, the first one open."""
    parts = []
    for i, trace in enumerate(most_telling(evaluation.traces).values()):
        draw = text_map if isinstance(trace, TokenTrace) else problem_map
        title = f"{setting_name(trace.setting)}, at most {trace.setting.loops} loops"
        parts.append(
            f"<details{' open' if i == 0 else ''}><summary>{title}</summary>{draw(trace, evaluation.says)}</details>"
        )
    if isinstance(evaluation.traces[0], TokenTrace):
        length = evaluation.traces[0].rows_NT.shape[1]
        words = (
            "Held-out text; each token in the colour of the loops that were spent on predicting it. Every "
            f"{length} tokens the context begins anew."
        )
    else:
        words = "The first problem of each difficulty; each symbol in the colour of the loops that its place took."
    words += " Shown of each criterion is the threshold at which loops differ most. Point at a token for its numbers."
    return section("Where the loops go", words, *parts)


def _harder(evaluation: Evaluation) -> str:
    """Do harder inputs take more loops? One line for each criterion."""
    series, rows, of_text = [], [], isinstance(evaluation.traces[0], TokenTrace)
    for i, trace in enumerate(most_telling(evaluation.traces).values()):
        if isinstance(trace, TokenTrace):
            hard, loops = trace.nats_NT[trace.mask_NT], trace.loops_NT[trace.mask_NT]
            nats, y = by_parts(hard, loops)
            x = np.arange(1, len(y) + 1)
            notes = [f"{a:.3g} nats: {b:.2f} loops" for a, b in zip(nats, y, strict=True)]
        else:
            x = np.unique(trace.difficulty_N)
            y = np.array([trace.loops_N[trace.difficulty_N == d].mean() for d in x])
            notes = [f"difficulty {a}: {b:.2f} loops" for a, b in zip(x, y, strict=True)]
        series.append(Series(setting_name(trace.setting), list(zip(x.tolist(), y.tolist(), strict=True)), i, notes))
    for trace in evaluation.traces:
        if isinstance(trace, ExampleTrace):
            rank, mean = trace.rank_correlation, trace.loops_N.mean()
        else:
            rank = _rank_of(evaluation, trace)
            mean = trace.loops_NT[trace.mask_NT].mean()
        rows.append([setting_name(trace.setting), f"{mean:.2f}", "–" if rank is None else f"{rank:+.3f}"])
    hardness = "tenth of the tokens, by loss, the easiest first" if of_text else "difficulty"
    x_axis = Axis(hardness, ticks=[p[0] for p in series[0].points])
    told = "; ".join(f"{s.name} from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f}" for s in series)
    picture = line_chart(series, x_axis, Axis("mean loops"), alt=f"Mean loops against {hardness}: {told}.")
    words = (
        "Rank correlation is Spearman's, between "
        + ("a token's loss at the deepest fixed depth" if of_text else "a problem's difficulty")
        + " and the loops that it took: 1 where harder always takes more, 0 where the two are unrelated."
    )
    numbers = table(["policy", "mean loops", "rank correlation"], rows, "Rank correlation of every policy")
    return section("Harder inputs, more loops?", words, pair(picture, numbers))


def _rank_of(evaluation: Evaluation, trace: TokenTrace) -> float | None:
    wanted = (trace.setting.criterion, trace.setting.threshold)
    return next(r.rank_correlation for r in evaluation.results if (r.halting, r.threshold) == wanted)


def _convergence(inside: LoopTrace) -> str:
    """How far the state still moves, loop by loop."""
    change = np.maximum(inside.change_L3, 1e-9)
    points = [(i + 1, float(c[1])) for i, c in enumerate(change)]
    line = Series(
        "median; shaded: the middle 80 % of the tokens",
        points,
        0,
        [f"loop {x}: {y:.3g}" for x, y in points],
        [(i + 1, float(c[0]), float(c[2])) for i, c in enumerate(change)],
    )
    picture = line_chart(
        [line],
        Axis("loop", ticks=[x for x, _ in points]),
        Axis("|h_t − h_(t−1)| / |h_t|", log=True, text=lambda v: f"{v:.2g}"),
        alt=f"Relative change of the state, from {points[0][1]:.3g} in loop 1 to {points[-1][1]:.3g} in the last.",
    )
    rows = [[str(i + 1), *(f"{v:.4f}" for v in c)] for i, c in enumerate(inside.change_L3)]
    numbers = table(["loop", "10 %", "median", "90 %"], rows, "Change of the state by loop")
    words = f"How far each loop still moves the state, over {inside.tokens:,} tokens at a fixed depth."
    return section("Convergence", words, pair(picture, numbers))


def _experts(inside: LoopTrace) -> str:
    """A table of shares that is its own picture."""
    parts = []
    L, G, E = inside.expert_share_LGE.shape
    top = max(float(inside.expert_share_LGE.max()), 1e-9)
    for layer in range(G):
        head = "".join(f'<th scope="col">expert {e}</th>' for e in range(E))
        body = "".join(
            f'<tr><th scope="row">loop {t + 1}</th>'
            + "".join(
                f'<td class="cell" style="--h:{0.75 * float(share) / top:.2f}">{share:.1%}</td>'
                for share in inside.expert_share_LGE[t, layer]
            )
            + "</tr>"
            for t in range(L)
        )
        name = f"Layer {layer + 1} of the loop" if G > 1 else "Shares of the tokens' choices"
        parts.append(
            f'<h3>{name}</h3><div class="scroll" tabindex="0" role="region" aria-label="{name}: expert use by loop">'
            f'<table><thead><tr><th scope="col">loop</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
    words = f"Which experts each loop asks; evenly spread would be {1 / E:.1%} each."
    return section("Expert use per loop", words, *parts)


def _trained_on(about: dict[str, Any], panel: Panel) -> bool:
    return panel.group in [f"difficulty {d}" for d in about["trained_on"]]


def _quality_axis(measure: str) -> Axis:
    limits = (0.0, 100.0) if measure.endswith("%") else None
    return Axis(measure, limits=limits, text=lambda v: f"{v:.4g}")


def _in_words(panel: Panel) -> str:
    """The ends of the fixed depths' line, for those who cannot see it."""
    first, last = panel.fixed[0], panel.fixed[-1]
    name = f"{panel.group}: " if panel.group else ""
    return f"{name}{first.value:.4g} at {setting_name(first)}, {last.value:.4g} at {setting_name(last)}."
