"""The skeleton of a self-contained HTML page: sections, tables, columns, numbers. The page loads nothing."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Cells are plain text; words are aligned left, numbers right. caption: for screen readers."""
    is_text = [any(_is_text(row[i]) for row in rows) for i in range(len(headings))]

    def cells(values: Sequence[str], opening: str, tag: str) -> str:
        return "".join(
            f"<{opening}{' class=word' if text else ''}>{escape(value)}</{tag}>"
            for value, text in zip(values, is_text, strict=True)
        )

    heading = cells(headings, 'th scope="col"', "th")
    body = "".join(f"<tr>{cells(row, 'td', 'td')}</tr>" for row in rows)
    return scrollable(f"<table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>", caption)


def _is_text(cell: str) -> bool:
    """Whether a cell is words; "≤ 8" and "−0.1" are numbers."""
    return any(character.isalpha() for character in cell) and not cell.startswith(("≤", "−"))


def scrollable(content: str, caption: str) -> str:
    """A region that scrolls by itself, also with the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">{content}</div>'


def section(title: str, words: str, *parts: str) -> str:
    """A titled section; words: plain text, parts: HTML."""
    text = f"<p>{escape(words)}</p>" if words else ""
    return f"<section><h2>{escape(title)}</h2>{text}{''.join(parts)}</section>"


def pair(left: str, right: str) -> str:
    """Two blocks next to each other; on a narrow screen one below the other."""
    return f'<div class="pair"><div>{left}</div><div>{right}</div></div>'


def charts(parts: Sequence[str]) -> str:
    """Blocks of the same width, as many side by side as the screen has room for."""
    return f'<div class="charts">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def tiles(pairs: Sequence[tuple[str, str]]) -> str:
    """Numbers, each under its name."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="tiles">{items}</dl>'


def share_table(rows: Sequence[tuple[str, Sequence[float]]], corner: str, highest: float, caption: str) -> str:
    """Shares of experts, each cell coloured by its share of `highest`. rows: each with its name. corner: what rows
    are."""
    experts = "".join(f'<th scope="col">expert {e}</th>' for e in range(len(rows[0][1])))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(_share_cell(share, highest) for share in shares)}</tr>'
        for name, shares in rows
    )
    heading = f'<thead><tr><th scope="col">{escape(corner)}</th>{experts}</tr></thead>'
    return scrollable(f"<table>{heading}<tbody>{body}</tbody></table>", caption)


def _share_cell(share: float, highest: float) -> str:
    return f'<td class="cell" style="--h:{0.75 * share / highest:.2f}">{share:.1%}</td>'


def document(
    title: str, facts: Sequence[str], command: str, sections: Sequence[str], footer: str, head: str = ""
) -> str:
    """The complete HTML document. head: HTML for its head."""
    style = files("mythos_jax.report").joinpath("style.css").read_text(encoding="utf-8")
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style>{head}</head><body>"
        f'<header><h1>{escape(title)}</h1><ul class="facts">{items}</ul>'
        f'<code class="command">{escape(command)}</code></header>'
        f"<main>{''.join(sections)}</main><footer>{escape(footer)}</footer></body></html>\n"
    )
