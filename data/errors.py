"""The error for wrong or damaged shards, manifests, indexes and labels."""

from __future__ import annotations


class DataError(ValueError):
    """Wrong or damaged data; the message names the file and says what to do."""
