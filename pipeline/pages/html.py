"""Pieces of an HTML page. Every text is escaped here: class names, keys and reasons come from the data."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #fff; --ink: #1b2430; --soft: #566170; --line: #dde1e7;
  --accent: #1d4ed8; --right: #1f6f43; --wrong: #b3370d; --bar: #9db7f5; }
@media (prefers-color-scheme: dark) { :root { --ground: #11151b; --card: #1a2029; --ink: #e8ebf0; --soft: #a3adba;
  --line: #313a47; --accent: #8fb2ff; --right: #6fcf97; --wrong: #ff9d70; --bar: #3f5ea8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word; }
main { max-width: 1180px; margin: 0 auto; padding: 1.2rem clamp(0.7rem, 2.5vw, 2.2rem) 3rem; }
h1 { font-size: clamp(1.3rem, 1rem + 1.6vw, 2rem); line-height: 1.25; margin: 0.2rem 0 0.6rem; }
h2 { font-size: 1.2rem; margin: 0 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.1rem 0 0.4rem; }
p { margin: 0.4rem 0 0.8rem; max-width: 75ch; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1rem 1.2rem; margin: 1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.7rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 0.7rem 0.9rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 0.85rem; }
.note { border-left: 4px solid var(--wrong); padding: 0.3rem 0.8rem; margin: 0.6rem 0; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.plots > * { flex: 1 1 18rem; min-width: 0; }
figure { margin: 0; }
.plot { max-width: 560px; }
.plot img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 12px;
  padding: 6px; }
.scroll { overflow-x: auto; max-width: 100%; margin-bottom: 0.8rem; }
.plots figcaption { padding-top: 0.3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
caption { text-align: left; padding-bottom: 0.3rem; }
th, td { padding: 0.28rem 0.7rem 0.28rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 4.6rem; }
thead th { white-space: normal; color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.texts td, .texts th { text-align: left; }
.texts td:last-child { white-space: normal; min-width: 15rem; overflow-wrap: anywhere; }
@media (max-width: 500px) { table { font-size: 0.84rem; } section { padding: 0.8rem 0.9rem; } }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(98px, 1fr)); gap: 0.6rem; margin: 0.6rem 0; }
.sample { border: 2px solid var(--line); border-radius: 10px; padding: 6px; font-size: 0.8rem; line-height: 1.3; }
.sample img, .sample .gone { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  background: #000; image-rendering: pixelated; margin-bottom: 4px; }
.sample .gone { background: var(--ground); color: var(--soft); display: grid; place-items: center; text-align: center; }
.sample.photo img { image-rendering: auto; }
.sample.is-right { border-color: var(--right); }
.sample.is-wrong { border-color: var(--wrong); border-style: dashed; }
.is-right .verdict { color: var(--right); } .is-wrong .verdict { color: var(--wrong); font-weight: 600; }
details { margin: 0.8rem 0 0; } summary { cursor: pointer; color: var(--accent); }
pre { white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--ground); border-radius: 8px; padding: 0.7rem; font-size: 0.82rem; margin: 0.5rem 0; }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; border-color: #ccc; } }
"""


def text(value: object) -> str:
    """Escaped text; what cannot be shown or encoded appears as �."""
    return html.escape(printable(str(value)))


def printable(value: str) -> str:
    """`value` with � for control characters and lone surrogates, but for line ends."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in value)


def page(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # browsers ask the server for one otherwise
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A titled card of HTML parts; nothing when all parts are empty."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def heading(title: str) -> str:
    """A heading within a section."""
    return f"<h3>{text(title)}</h3>"


def paragraph(words: str, css: str = "") -> str:
    """A paragraph of plain words."""
    return f'<p class="{css}">{text(words)}</p>' if css else f"<p>{text(words)}</p>"


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Large figures, each with what it is."""
    cells = "".join(
        f'<div class="tile"><b>{_joined(value)}</b><span>{_joined(what)}</span></div>' for value, what in values
    )
    return f'<div class="tiles">{cells}</div>'


def _joined(words: str) -> str:
    """Escaped, with no line break before a per cent sign."""
    return text(words).replace(" %", "&nbsp;%")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", css: str = "") -> str:
    """A table whose first column names the rows; it scrolls by itself where it is too wide."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = [
        f'<tr><th scope="row">{text(row[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    ]
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}">{title}<thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def plot(svg: bytes, alt: str, caption: str = "") -> str:
    """A figure on a white card: an image of its own, so that its text is no part of the page's markup."""
    source = base64.b64encode(svg).decode()
    words = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure class="plot"><img src="data:image/svg+xml;base64,{source}" alt="{text(alt)}">{words}</figure>'


def side_by_side(*parts: str) -> str:
    """Parts next to each other where there is room."""
    shown = "".join(f"<div>{part}</div>" for part in parts if part)
    return f'<div class="plots">{shown}</div>' if shown else ""


def folded(summary: str, content: str) -> str:
    """Content to open."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def code(words: str) -> str:
    """A block of code or configuration."""
    return f"<pre>{text(words)}</pre>"
