"""Text files about data and weights: names and values are escaped, so that a line stays one line, a table cell one cell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

_MARKED = re.compile(r"[\\`*\[\]<>|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # `_` within a word is plain
_TICKS = re.compile("`+")
_ESCAPED_NAMES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # as sha256sum escapes them


def markdown_templates(package: str) -> Environment:
    """The Markdown templates of a package's folder `templates`. An undefined variable raises jinja2.UndefinedError."""
    templates = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "markdown": markdown,
        "code_span": code_span,
        "json": json.dumps,
        "count": "{:,}".format,
        "percent": "{:.1%}".format,
    }
    return templates


def aligned_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for the console: the first column starts at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def class_lines(names: Iterable[str]) -> str:
    """Write a line per class. A name with line breaks, control characters, spaces around it or a leading quotation mark becomes a
    JSON string.
    """
    return "".join(f"{name if _is_plain(name) else json.dumps(name)}\n" for name in names)


def _is_plain(name: str) -> bool:
    return name.isprintable() and name == name.strip() != "" and not name.startswith('"')


def markdown(text: str) -> str:
    """Escape text so that Markdown shows it as it is, within a line or a table's cell; control characters as `\\n`, `\\x1b`, …."""
    visible = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)
    return _MARKED.sub(lambda match: f"\\{match[0]}", visible)


def code_span(text: str) -> str:
    """Quote a line of text as code in Markdown."""
    ticks = "`" * (max((len(run) for run in _TICKS.findall(text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def checksum_line(digest: str, name: str) -> str:
    """Write a line for `sha256sum --check`; it marks and escapes a name with a line break or backslash."""
    escaped = "".join(_ESCAPED_NAMES.get(sign, sign) for sign in name)
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"
