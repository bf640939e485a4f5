"""Check the server's token, and Host names of this machine."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping

from data import storage
from data.settings import UsageError
from data.storage.redact import SERVER_TOKEN_VARIABLE
from data.storage.web_tokens import TOKEN_VARIABLE, is_token, parse_tokens

HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")


def read_token(token_file: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the token that clients must send: from the file, else from the environment, else None. Raises UsageError if unusable."""
    source = f"serve.token_file={token_file}" if token_file else SERVER_TOKEN_VARIABLE
    try:
        text = storage.read_text(token_file) if token_file else environment.get(SERVER_TOKEN_VARIABLE)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: expected a file with a token ({error})") from None
    if text is None:
        _refuse_old_variable(environment.get(TOKEN_VARIABLE, ""))
        return None
    if not is_token(token := text.strip()):
        raise UsageError(f"{source}: expected a token of printable ASCII characters without spaces")
    return token


def _refuse_old_variable(text: str) -> None:
    """Raise UsageError if the client variable holds a bare token: it was meant for the server, which would start without one."""
    if text.strip() and not parse_tokens(text):
        raise UsageError(
            f"{TOKEN_VARIABLE} is the clients' ({TOKEN_VARIABLE}=https://HOST:PORT=TOKEN); expected the server's token in "
            f"{SERVER_TOKEN_VARIABLE}, or serve.token_file=FILE"
        )


def check_host(host: str, token: str | None, open_to_all: bool) -> None:
    """Raise UsageError if other machines can reach the address and there is no token."""
    if token is None and not open_to_all and not is_loopback(host):
        raise UsageError(
            f"serve.host={host}: others can reach it, and there is no token; set serve.token_file=FILE or "
            f"{SERVER_TOKEN_VARIABLE}, or serve.open_to_all=true if everyone may read"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` is a loopback address or `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def names_loopback(header: str) -> bool:
    """Whether a Host header is a loopback name; browsers send one only for pages of this machine."""
    match = HOST.fullmatch(header)
    return match is not None and is_loopback(match[1].strip("[]"))


def has_token(header: str, token: str) -> bool:
    """Whether an Authorization header has the token: as Bearer, or as the password of Basic (the form browsers prompt for)."""
    scheme, _, given = header.partition(" ")
    found = given.strip().encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            found = base64.b64decode(found, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(hashlib.sha256(found).digest(), hashlib.sha256(token.encode()).digest())
