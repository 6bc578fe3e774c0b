"""A text with each token coloured by the loops spent on it, as HTML."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from mythos_jax.evaluation.results import ExampleTrace, TokenTrace

SHOWN = 600  # tokens of a text
END = "∎"  # stands for a token that is no text: the end of a document

Says = Callable[[Sequence[int]], str]


def text_map(trace: TokenTrace, says: Says) -> str:
    """The first tokens of the rows, each in the colour of the loops spent on predicting it."""
    spans, shown = [], 0
    ends = _ends(trace.loops_NT[trace.mask_NT])
    for row in range(len(trace.rows_NT)):
        places = np.flatnonzero(trace.mask_NT[row])[: SHOWN - shown]
        shown += len(places)
        for text, group in _pieces(trace.rows_NT[row][places].tolist(), says):
            at = places[group]
            loops, nats = trace.loops_NT[row, at].mean(), trace.nats_NT[row, at].sum()
            spans.append(_span(text, _heat(loops, ends), f"{loops:g} loops, {nats:.2f} nats"))
        if shown >= SHOWN:
            break
    mean = trace.loops_NT[trace.mask_NT].mean()
    return _framed("".join(spans), f"Text coloured by loops, {mean:.2f} on average, {ends[0]} to {ends[1]}", ends)


def problem_map(trace: ExampleTrace, says: Says) -> str:
    """One problem of each difficulty, each symbol in the colour of the loops that its place took."""
    lines, ends = [], _ends(np.concatenate([loops for _, loops in trace.shown.values()]))
    width = max(len(str(d)) for d in trace.shown)
    for difficulty, (tokens, loops) in sorted(trace.shown.items()):
        spans = [
            _span(f" {says([int(token)])} ", _heat(n, ends), f"{n} loops")
            for token, n in zip(tokens, loops, strict=True)
        ]
        lines.append(f'<span class="end">{difficulty:>{width}}  </span>{"".join(spans)}\n')
    return _framed("".join(lines), "Problems, a line each, symbols coloured by loops", ends, "text lines")


def most_telling(traces: Sequence[TokenTrace | ExampleTrace]) -> Mapping[str, TokenTrace | ExampleTrace]:
    """Of each criterion the threshold at which loops differ most."""

    def spread(trace: TokenTrace | ExampleTrace) -> float:
        return float(np.std(trace.loops_NT[trace.mask_NT] if isinstance(trace, TokenTrace) else trace.loops_N))

    best: dict[str, TokenTrace | ExampleTrace] = {}
    for trace in traces:
        name = trace.setting.criterion
        if name not in best or spread(trace) > spread(best[name]):
            best[name] = trace
    return best


def _pieces(tokens: list[int], says: Says) -> list[tuple[str, list[int]]]:
    """Texts and the places of the tokens that make them: a character may be several byte tokens."""
    pieces, waiting = [], []
    for place in range(len(tokens)):
        waiting.append(place)
        text = says([tokens[i] for i in waiting])
        if "�" in text and len(waiting) < 4:
            continue
        pieces.append((text or END, waiting))
        waiting = []
    return pieces + [(says([tokens[i]]) or END, [i]) for i in waiting]


def _span(text: str, heat: float, note: str) -> str:
    text = escape(text).replace("\n", "↵\n")
    return f'<span style="--h:{heat:.2f}" title="{note}">{text}</span>'


def _ends(loops: np.ndarray) -> tuple[int, int]:
    """The fewest and the most loops; the colours run from one to the other."""
    return int(loops.min()), int(loops.max())


def _heat(loops: float, ends: tuple[int, int]) -> float:
    return 0.03 + 0.77 * (loops - ends[0]) / max(ends[1] - ends[0], 1)


def _framed(spans: str, alt: str, ends: tuple[int, int], kind: str = "text") -> str:
    steps = sorted({round(n) for n in np.linspace(*ends, 9)})
    key = "".join(f'<span class="swatch" style="--h:{_heat(n, ends):.2f}">{n}</span>' for n in steps)
    return (
        f'<div class="key" aria-hidden="true">loops {key}</div>'
        f'<pre class="{kind}" tabindex="0" role="figure" aria-label="{escape(alt)}">{spans.rstrip()}</pre>'
    )
