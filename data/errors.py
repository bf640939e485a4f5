"""The error of shards, manifests, indexes and labels that are not right."""

from __future__ import annotations


class DataError(ValueError):
    """Shards, a manifest or an index that do not fit; the message names the file and says what to do."""
