"""Secrets do not reach a file, a log or an error."""

from __future__ import annotations

import os
import re

BLANK = "***"
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_SHORTEST = 8  # a shorter value is a placeholder, and would blank ordinary words


def redacted(text: str) -> str:
    """`text` without passwords and signed parts of URLs, and without the credentials in this process's environment."""
    text = re.sub(r"(\w+://)[^/\s@]+@", r"\1***@", text)
    text = re.sub(r"(?i)([?&](?:[\w-]*(?:token|secret|password|signature|credential|key))=)[^&\s'\"]+", r"\1***", text)
    for value in filter(None, map(os.environ.get, _SECRETS)):
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return text
