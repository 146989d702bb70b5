"""Reading a request's body, never more of it than allowed."""

from __future__ import annotations

from typing import Any

from .http_errors import ApiError

_PIECE = 64 * 1024


def read_body(environ: dict[str, Any], limit_mb: int) -> bytes:
    """The body. Raises ``ApiError`` 413 above the limit, before reading where the length is announced.

    A chunked body announces nothing and no layer below counts it, so the bytes are counted here.
    """
    limit = limit_mb * 1024 * 1024
    too_large = ApiError(413, f"the body exceeds {limit_mb} MB, the most this server accepts")
    if int(environ.get("CONTENT_LENGTH") or 0) > limit:
        raise too_large
    pieces: list[bytes] = []
    size = 0
    while piece := environ["wsgi.input"].read(_PIECE):
        size += len(piece)
        if size > limit:
            raise too_large
        pieces.append(piece)
    return b"".join(pieces)
