"""Tokens for web servers. Each is bound to an origin (scheme, host and port), and is sent to no other."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache

from data.storage.retry import StorageError

TOKEN_VARIABLE = "NOISY_STUDENT_TOKEN"
_ORIGIN = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.IGNORECASE)
_AFTER_HOST = ("", "/", "?", "#")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NEXT = re.compile(r",\s*(?=https?://)", re.IGNORECASE)  # a token may have commas
_given: dict[str, str] = {}
logger = logging.getLogger(__name__)


def origin_of(url: str) -> str | None:
    """`scheme://host:port` of a URL, the same for equal origins; None where the host is not plain (`user@host`, `a\\@b`)."""
    match = _ORIGIN.match(url)
    if match is None or url[match.end() : match.end() + 1] not in _AFTER_HOST:
        return None
    scheme, host, port = match.groups()
    return f"{scheme.lower()}://{host.lower()}:{int(port) if port else _DEFAULT_PORTS[scheme.lower()]}"


def is_token(text: str) -> bool:
    """True for what can stand in a header: printable ASCII without spaces."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def give_token(url: str, token: str) -> None:
    """From now on, this process sends `token` to the origin of `url`. Raises StorageError, which does not repeat the token."""
    origin = origin_of(url)
    if origin is None:
        raise StorageError("token: expected with an http:// or https:// address of a plain host and port")
    if not is_token(token):
        raise StorageError("token: expected printable ASCII characters without spaces")
    _given[origin] = token


def token_for(url: str) -> str | None:
    """The token of the URL's origin: one that was given, else that of the environment, else None."""
    if (origin := origin_of(url)) is None:
        return None
    return _given.get(origin) or parse_tokens(os.environ.get(TOKEN_VARIABLE, "")).get(origin)


@lru_cache(maxsize=4)
def parse_tokens(text: str) -> Mapping[str, str]:
    """Origin → token of `https://labels.example:8080=TOKEN,…`. What has another form is logged, once, and sent to nobody."""
    found: dict[str, str] = {}
    for number, part in enumerate(_NEXT.split(text.strip()) if text.strip() else [], 1):
        address, _, token = part.partition("=")
        origin = origin_of(address) if _ORIGIN.fullmatch(address.removesuffix("/")) else None
        if origin is None or not is_token(token.strip()):
            logger.warning(
                "%s: part %d is sent to no server, as it does not say to which; expected %s=https://HOST:PORT=TOKEN, "
                "or several such parts with commas between them", TOKEN_VARIABLE, number, TOKEN_VARIABLE,
            )  # fmt: skip
            continue
        found[origin] = token.strip()
    return found
