"""HTML pages from Jinja2 templates. Every value is escaped: class names, keys and reasons come from the data."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

MAX_CLASS_ROWS = 200  # of a table of all classes


@dataclass(frozen=True)
class Figure:
    """An SVG image and the text that describes it to those who cannot see it."""

    svg: bytes
    alt: str

    @property
    def source(self) -> str:
        """A data: URI. As an image of its own, the SVG's text is no part of the page's markup."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


class Section(NamedTuple):
    """A section of a page.

    Attributes:
        template: its name.
        values: what the template shows.
        is_narrow: stands beside the next one that is narrow, where the page is wide.
    """

    template: str
    values: Mapping[str, Any]
    is_narrow: bool = False


def environment(package: str) -> Environment:
    """The templates of a package's folder `templates`, and those that all pages share: base.html, macros.html, style.css.

    An undefined variable raises jinja2.UndefinedError.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("pipeline.pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def printable(text: str) -> str:
    """`text` with � for control characters, bidi overrides and lone surrogates; line ends and no-break spaces stay."""
    return "".join(sign if sign.isprintable() or sign in "\n\xa0" else "\ufffd" for sign in text)


def _finalize(value: Any) -> Any:
    """Make a value printable before Jinja2 escapes it; markup from macros stays as it is."""
    return value if hasattr(value, "__html__") else printable(str(value))
