"""Tokens for web servers. A token belongs to one origin (scheme, host and port) and is sent to no other."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache

from .redact import TOKEN_VARIABLE as TOKEN_VARIABLE
from .retry import StorageError

_ORIGIN = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.IGNORECASE)
_AFTER_HOST = ("", "/", "?", "#")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NEXT = re.compile(r",\s*(?=https?://)", re.IGNORECASE)  # a token may have commas
_given: dict[str, str] = {}
logger = logging.getLogger(__name__)


def origin_of(url: str) -> str | None:
    """`scheme://host:port` of a URL, lower case, with the default port; None for an unusual host (`user@host`, `a\\@b`)."""
    match = _ORIGIN.match(url)
    if match is None or url[match.end() : match.end() + 1] not in _AFTER_HOST:
        return None
    scheme, host, port = match.groups()
    return f"{scheme.lower()}://{host.lower()}:{int(port) if port else _DEFAULT_PORTS[scheme.lower()]}"


def is_token(text: str) -> bool:
    """Whether a text can be a token in a header: printable ASCII without spaces."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def give_token(url: str, token: str) -> None:
    """Send `token` to the origin of `url` from now on. Raises StorageError, which does not repeat the token."""
    origin = origin_of(url)
    if origin is None:
        raise StorageError("token: expected with an http:// or https:// address of a plain host and port")
    if not is_token(token):
        raise StorageError("token: expected printable ASCII characters without spaces")
    _given[origin] = token


def token_for(url: str) -> str | None:
    """The token for the URL's origin: from `give_token`, else from the environment, else None."""
    if (origin := origin_of(url)) is None:
        return None
    return _given.get(origin) or parse_tokens(os.environ.get(TOKEN_VARIABLE, "")).get(origin)


@lru_cache(maxsize=4)
def parse_tokens(text: str) -> Mapping[str, str]:
    """Origin → token from `https://labels.example:8080=TOKEN,…`. A part of another form is skipped with one warning."""
    found: dict[str, str] = {}
    for number, part in enumerate(_NEXT.split(text.strip()) if text.strip() else [], 1):
        address, _, token = part.partition("=")
        origin = origin_of(address) if _ORIGIN.fullmatch(address.removesuffix("/")) else None
        if origin is None or not is_token(token.strip()):
            logger.warning(
                "%s: part %d names no server and is sent to none; expected %s=https://HOST:PORT=TOKEN, "
                "or several such parts with commas between them", TOKEN_VARIABLE, number, TOKEN_VARIABLE,
            )  # fmt: skip
            continue
        found[origin] = token.strip()
    return found
