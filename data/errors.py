"""The error for wrong or damaged shards, manifests, indexes and labels."""

from __future__ import annotations

from .storage.redact import redacted


class DataError(ValueError):
    """Wrong or damaged data; the message names the file and says what to do."""


def damaged(url: str, problem: str, remedy: str) -> str:
    """The message for a damaged file."""
    return f"{redacted(url)}: damaged or cut short ({problem}); {remedy}"
