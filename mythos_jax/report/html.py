"""The skeleton of a self-contained HTML page: sections, tables, pairs of columns. The page loads nothing."""

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
    return f"<section><h2>{escape(title)}</h2><p>{escape(words)}</p>{''.join(parts)}</section>"


def pair(left: str, right: str) -> str:
    """Two blocks next to each other; on a narrow screen one below the other."""
    return f'<div class="pair"><div>{left}</div><div>{right}</div></div>'


def document(title: str, facts: Sequence[str], command: str, sections: Sequence[str], footer: str) -> str:
    """The complete HTML document."""
    style = files("mythos_jax.report").joinpath("style.css").read_text(encoding="utf-8")
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><ul class="facts">{items}</ul>'
        f'<code class="command">{escape(command)}</code></header>'
        f"<main>{''.join(sections)}</main><footer>{escape(footer)}</footer></body></html>\n"
    )
