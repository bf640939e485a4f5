"""Pseudo-labels: the files of a run, and `PseudoLabels` for the training of others.

`PseudoLabels` is imported when it is first asked for: it needs torch, which selection and status do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.labels.pseudo_labels import PseudoLabels as PseudoLabels

__all__ = ["PseudoLabels"]


def __getattr__(name: str) -> Any:
    if name == "PseudoLabels":
        from data.labels.pseudo_labels import PseudoLabels

        return PseudoLabels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
