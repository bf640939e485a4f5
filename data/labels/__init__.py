"""Pseudo-labels: the files of one run, and `PseudoLabels`, for the training of others.

`PseudoLabels` is imported when it is first asked for: it needs torch, which selection and status do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.labels.pseudo_labels import PseudoLabeled as PseudoLabeled
    from data.labels.pseudo_labels import PseudoLabels as PseudoLabels

__all__ = ["PseudoLabeled", "PseudoLabels"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from data.labels import pseudo_labels  # noqa: PLC0415 (see above)

        return getattr(pseudo_labels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
