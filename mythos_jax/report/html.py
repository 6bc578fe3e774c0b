"""One self-contained HTML page: sections of a picture, words and a table of numbers. Nothing is loaded."""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c2024; --quiet: #60646c; --line: #e0e3e8; --panel: #f6f7f9;
  --heat: 232 89 12; --c0: #0b62a4; --c1: #c2410c; --c2: #0f7b5f; --c3: #9d3c8f; --c4: #8a6500; --c5: #4b5563;
  --base: #8b8f97 }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --ink: #e8eaed; --quiet: #a3a9b3; --line: #30343c;
  --panel: #1d2026; --heat: 234 110 40; --c0: #6db3f2; --c1: #fb923c; --c2: #4fd1a5; --c3: #e392d6; --c4: #e3b341;
  --c5: #b6bcc6; --base: #868c96 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 0 0 .3rem }
h3 { font-size: 1rem; margin: 1rem 0 .3rem } p { margin: .3rem 0 .8rem; max-width: 46rem }
.quiet, footer, .facts { color: var(--quiet) } code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace }
.facts { margin: 0 0 .6rem; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem }
.command { display: block; background: var(--panel); border-radius: 6px; padding: .5rem .8rem; overflow-wrap: anywhere }
section { margin-top: 2.2rem; padding-top: 1.4rem; border-top: 1px solid var(--line) }
.pair { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem 2rem; align-items: start }
@media (min-width: 60rem) { .pair { grid-template-columns: minmax(0, 11fr) minmax(0, 9fr) } }
figure { margin: 0 } .pair + .pair { margin-top: 1rem }
svg[role] { display: block; width: 100%; max-width: 40rem; height: auto }
svg text { font-size: 13px; fill: var(--quiet); font-variant-numeric: tabular-nums } svg .label { fill: var(--ink) }
svg .grid { stroke: var(--line) } svg .mark { stroke: var(--base); stroke-dasharray: 4 4 }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round } .dashed { stroke-dasharray: 2 5 }
.dot { fill: currentColor; stroke: var(--back); stroke-width: 1 } .band { fill: currentColor; opacity: .16 }
.c0 { color: var(--c0) } .c1 { color: var(--c1) } .c2 { color: var(--c2) } .c3 { color: var(--c3) }
.c4 { color: var(--c4) } .c5 { color: var(--c5) } .base { color: var(--base) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0 0; padding: 0 0 0 .5rem; list-style: none;
  font-size: .9rem } .legend li { display: flex; align-items: center; gap: .45rem }
.legend li::marker { content: "" } .legend svg { width: 30px; height: 12px; flex: none }
.scroll { overflow: auto; max-height: 26rem; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap } td.word, th.word { text-align: left }
th { position: sticky; top: 0; background: var(--panel); font-weight: 600 }
tr + tr td { border-top: 1px solid var(--line) }
.text { font: 13.5px/1.75 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--panel); border-radius: 6px; padding: .8rem; margin: 0 }
.lines { white-space: pre; overflow-x: auto }
.text span, .swatch { background: rgb(var(--heat) / var(--h)) } .text .end { color: var(--quiet) }
.key { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem; margin: .5rem 0; font-size: .88rem }
.swatch { min-width: 1.9rem; padding: 0 .3rem; text-align: center; border-radius: 3px }
.cell { background: rgb(var(--heat) / var(--h)) } details { margin-top: .8rem } summary { cursor: pointer }
@media (max-width: 30rem) { th, td { padding: .28rem .38rem } table { font-size: .82rem } }
footer { margin-top: 2.5rem; font-size: .88rem }
"""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Cells are text; a column whose cells are no numbers stands to the left. caption: for those who cannot see."""
    words = [any(_is_word(row[i]) for row in rows) for i in range(len(headings))]

    def line(cells: Sequence[str], tag: str) -> str:
        kind = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{kind}{' class=word' if word else ''}>{escape(cell)}</{tag}>"
            for cell, word in zip(cells, words, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{line(headings, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _is_word(cell: str) -> bool:
    return any(letter.isalpha() for letter in cell) and not cell.startswith(("≤", "−"))


def section(title: str, words: str, *parts: str) -> str:
    """words: plain text."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(words)}</p>{''.join(parts)}</section>"


def pair(left: str, right: str) -> str:
    """Two things side by side, on a phone one below the other."""
    return f'<div class="pair"><div>{left}</div><div>{right}</div></div>'


def page(title: str, facts: Sequence[str], command: str, sections: Sequence[str], footer: str) -> str:
    """The whole document."""
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><ul class="facts">{listed}</ul>'
        f'<code class="command">{escape(command)}</code></header>'
        f"<main>{''.join(sections)}</main><footer>{escape(footer)}</footer></body></html>\n"
    )
