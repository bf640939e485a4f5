"""Pseudo-labels: the label files of a run, and `PseudoLabels` for other projects' training.

`PseudoLabels` is imported on first use, as the pipeline's own users of label files do not need what it imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pseudo_labels import PseudoLabels as PseudoLabels

__all__ = ["PseudoLabels"]


def __getattr__(name: str) -> Any:
    if name == "PseudoLabels":
        from .pseudo_labels import PseudoLabels

        return PseudoLabels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
