"""Text with each token coloured by the loops spent on it, as HTML."""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from mythos_jax.evaluation.results import LoopUsage

END_OF_DOCUMENT = "∎"  # shown for tokens that decode to nothing
MAX_BYTES = 4  # of a character in UTF-8, so at most this many byte tokens are decoded together

Decode = Callable[[Sequence[int]], str]


def text_map(usage: LoopUsage, decode: Decode) -> str:
    """The sampled rows as running text, each token coloured by the loops spent on predicting it."""
    lowest, highest = _range(usage.loops_N)
    spans = []
    for sample in usage.samples:
        for text, indices in _characters(sample.tokens_T.tolist(), decode):
            loops = sample.loops_T[indices].mean()
            note = _loop_count(loops)
            if sample.nats_T is not None:
                note += f", {sample.nats_T[indices].sum():.2f} nats"
            spans.append(_span(text, _heat(loops, lowest, highest), note))
    alt = f"Text coloured by loops, {usage.loops_N.mean():.2f} on average, {lowest} to {highest}"
    return _figure("".join(spans), alt, lowest, highest)


def problem_map(usage: LoopUsage, decode: Decode) -> str:
    """One problem per line and difficulty, each symbol coloured by the loops of its token."""
    lowest, highest = _range(np.concatenate([sample.loops_T for sample in usage.samples]))
    width = max(len(str(sample.difficulty)) for sample in usage.samples)
    lines = []
    for sample in usage.samples:
        spans = [
            _span(f" {decode([token])} ", _heat(loops, lowest, highest), _loop_count(loops))
            for token, loops in zip(sample.tokens_T.tolist(), sample.loops_T.tolist(), strict=True)
        ]
        lines.append(f'<span class="end">{sample.difficulty:>{width}}  </span>{"".join(spans)}\n')
    return _figure("".join(lines), "One problem per line, symbols coloured by loops", lowest, highest, "text lines")


def widest_per_criterion(usages: Sequence[LoopUsage]) -> list[LoopUsage]:
    """For each criterion, the policy with the largest standard deviation of loops: where a map shows most."""
    widest: dict[str | None, LoopUsage] = {}
    for usage in usages:
        current = widest.get(usage.setting.criterion)
        if current is None or np.std(usage.loops_N) > np.std(current.loops_N):
            widest[usage.setting.criterion] = usage
    return list(widest.values())


def _characters(tokens: list[int], decode: Decode) -> list[tuple[str, list[int]]]:
    """The text of the tokens in pieces, with the indices of the tokens that make up each.

    A piece is a token, or as many byte tokens as it takes to complete a character. It is decoded after the piece before
    it, so that the space between the two is there.
    """
    pieces: list[tuple[str, list[int]]] = []
    before: list[int] = []
    pending: list[int] = []
    for index in range(len(tokens)):
        pending.append(index)
        ids = [tokens[i] for i in pending]
        text = decode(before + ids)[len(decode(before)) :]
        if "�" in text and len(pending) < MAX_BYTES and index + 1 < len(tokens):
            continue  # an incomplete character
        pieces.append((text or END_OF_DOCUMENT, pending))
        before, pending = ([] if "�" in text else ids), []
    return pieces


def _span(text: str, heat: float, note: str) -> str:
    text = escape(text).replace("\n", "↵\n")
    return f'<span style="--h:{heat:.2f}" title="{note}">{text}</span>'


def _loop_count(loops: float) -> str:
    return "1 loop" if loops == 1 else f"{loops:g} loops"


def _range(loops: np.ndarray) -> tuple[int, int]:
    """The fewest and the most loops, between which the colours run."""
    return int(loops.min()), int(loops.max())


def _heat(loops: float, lowest: int, highest: int) -> float:
    """Opacity of the colour; the floor keeps even the fewest loops visible."""
    return 0.03 + 0.77 * (loops - lowest) / max(highest - lowest, 1)


def _figure(spans: str, alt: str, lowest: int, highest: int, css_class: str = "text") -> str:
    """A colour key and the text below it."""
    steps = sorted({round(n) for n in np.linspace(lowest, highest, 9)})
    key = "".join(f'<span class="swatch" style="--h:{_heat(n, lowest, highest):.2f}">{n}</span>' for n in steps)
    return (
        f'<div class="key" aria-hidden="true">loops {key}</div>'
        f'<pre class="{css_class}" tabindex="0" role="figure" aria-label="{escape(alt)}">{spans.rstrip()}</pre>'
    )
