"""Blank secrets in text: passwords and signatures in URLs, tokens in headers, and the credentials in this process's environment.

Not covered: a secret outside a URL or header that is in no environment variable of `_SECRETS`.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote, quote_plus, unquote_plus

BLANK = "***"
TOKEN_VARIABLE = "NOISY_STUDENT_TOKEN"  # what this program sends to web servers (`data.storage.web_tokens`)
SERVER_TOKEN_VARIABLE = "NOISY_STUDENT_SERVER_TOKEN"  # what clients must send to `stage=serve`
_SECRETS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    TOKEN_VARIABLE, SERVER_TOKEN_VARIABLE,
    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_CLIENT_SECRET", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
)  # fmt: skip
_SHORTEST = 8  # characters; blanking a shorter value, usually a placeholder, would blank ordinary words
_URL = re.compile(r"([A-Za-z][\w+.-]*://)([^\s'\"<>]+)")
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:]+):\d{1,5}")
_PARAMETER = re.compile(
    r"(?i)([?&;#](?:[\w.-]*(?:token|secret|password|passwd|passphrase|signature|credentials?|key|keyid)|(?:[\w.-]*[_.-])?"
    r"(?:sig|pwd|pass|jwt|auth|authorization|bearer|sas))=)[^&;#\s'\"<>]+"
)
_HEADER = re.compile(r"(?i)\b(authorization:?\s*basic|bearer)(\s+)[\w.~+/=-]{8,}")


def redacted(text: str) -> str:
    """`text` with its secrets replaced by BLANK."""
    text = _URL.sub(lambda match: match[1] + _without_password(match[2]), text)
    text = _PARAMETER.sub(rf"\1{BLANK}", text)
    text = _HEADER.sub(rf"\1\2{BLANK}", text)
    for value in sorted(set(_values()), key=len, reverse=True):
        text = text.replace(value, BLANK)
    return text


def _without_password(rest: str) -> str:
    """Blank the password in what follows `scheme://`. A password may hold unencoded special characters; then blank too much rather than
    too little. An @ after `host/` or `host:port/` belongs to a file name."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.partition("@")
    if at and ":" not in user:  # a user or token without a password
        return BLANK + rest[authority.rindex("@") :]
    if "@" not in rest or ":" not in authority or (not at and _HOST_AND_PORT.fullmatch(authority)):
        return rest
    return BLANK + rest[rest.rindex("@") :]


def _values() -> list[str]:
    """The secret values in the environment, as they are and URL-encoded."""
    given = [value for value in map(os.environ.get, _SECRETS) if value]
    # ORIGIN=TOKEN,…: see `data.storage.web_tokens`
    tokens = [part.partition("=")[2] for value in given for part in value.split(",")]
    plain = [value for value in (*given, *tokens) if len(value) >= _SHORTEST]
    return [
        form
        for value in plain
        for form in (value, quote(value, safe=""), quote(value), quote_plus(value), unquote_plus(value))
    ]
