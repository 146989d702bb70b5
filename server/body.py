"""Reading a request's body, never keeping more of it than allowed."""

from __future__ import annotations

import time
from typing import Any

from .http_errors import ApiError

_PIECE = 64 * 1024
_DISCARD_BYTES = 128 * 1024 * 1024
_DISCARD_S = 5.0


def read_body(environ: dict[str, Any], limit_mb: int) -> bytes:
    """The body. Raises ``ApiError`` 413 above the limit.

    A chunked body announces no length and no layer below counts it, so the bytes are counted here. What is too long is
    read on and dropped, up to a point: a client that is still sending would otherwise see a broken pipe and no answer.
    """
    limit = limit_mb * 1024 * 1024
    source = environ["wsgi.input"]
    pieces: list[bytes] = []
    size = 0
    too_large = int(environ.get("CONTENT_LENGTH") or 0) > limit
    while not too_large and (piece := source.read(_PIECE)):
        size += len(piece)
        pieces.append(piece)
        too_large = size > limit
    if too_large:
        pieces.clear()
        _discard(source)
        raise ApiError(413, f"the body exceeds {limit_mb} MB, the most this server accepts")
    return b"".join(pieces)


def _discard(source: Any) -> None:
    left, deadline = _DISCARD_BYTES, time.monotonic() + _DISCARD_S
    while left > 0 and time.monotonic() < deadline and (piece := source.read(_PIECE)):
        left -= len(piece)
