"""Errors as clients see them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from aiohttp import web


def error_response(
    status: int, message: str, headers: Iterable[tuple[str, str]] = (), close: bool = False
) -> web.Response:
    """An error as JSON. `close`: end the connection after it."""
    text = json.dumps({"error": message}) + "\n"
    response = web.Response(status=status, text=text, content_type="application/json")
    response.headers.extend([*headers, ("X-Content-Type-Options", "nosniff")])
    if close:
        response.force_close()
    return response
