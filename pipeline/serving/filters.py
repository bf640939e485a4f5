"""Parse the filter in a URL: `?min_confidence=0.8&classes=3,7&selected=false`."""

from __future__ import annotations

from collections.abc import Sequence

from data.labels.overlay import RowFilter
from data.settings import nearest

PARAMETERS = ("min_confidence", "classes", "selected")
_EXPECTED = "min_confidence=0…1, classes=3,7 and selected=true|false, each at most once"


class FilterError(ValueError):
    """An invalid query; the message says what was expected."""


def parse_filter(query: Sequence[tuple[str, str]], num_classes: int) -> RowFilter:
    """Return the filter of a URL's parameters. Raises FilterError for an unknown or repeated parameter, or a value out of range."""
    values: dict[str, str] = {}
    for name, value in query:
        if name not in PARAMETERS:
            raise FilterError(f"{name}: no such parameter; expected {_EXPECTED}{nearest(name, PARAMETERS)}")
        if name in values:
            raise FilterError(f"{name}: given twice; expected {_EXPECTED}")
        values[name] = value
    classes = values.get("classes")
    return RowFilter(
        selected=_flag(values.get("selected", "true")),
        min_confidence=_fraction(values.get("min_confidence", "0")),
        classes=None if classes is None else frozenset(_class(text, num_classes) for text in classes.split(",")),
    )


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise FilterError(f"selected={text}: expected true or false")
    return text == "true"


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # also refuses nan
        raise FilterError(f"min_confidence={text}: expected a number from 0 to 1")
    return value


def _class(text: str, num_classes: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < num_classes):
        raise FilterError(f"classes: {text!r}: expected class numbers from 0 to {num_classes - 1}, as in classes=3,7")
    return int(text)
