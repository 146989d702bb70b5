"""A body is read up to the limit, whatever it announces, and one that is too long is heard out."""

from __future__ import annotations

import io

import pytest

from llm_engine.server import body
from llm_engine.server.body import read_body
from llm_engine.server.http_errors import ApiError

MB = 1024 * 1024


def test_a_body_at_the_limit_is_read() -> None:
    assert len(read_body({"wsgi.input": io.BytesIO(b"x" * MB), "CONTENT_LENGTH": str(MB)}, 1)) == MB


@pytest.mark.parametrize("announced", [{"CONTENT_LENGTH": str(MB + 1)}, {}])
def test_a_longer_one_is_refused_after_its_end(announced: dict[str, str]) -> None:
    source = io.BytesIO(b"x" * (MB + 1))
    with pytest.raises(ApiError) as caught:
        read_body({"wsgi.input": source, **announced}, 1)
    assert caught.value.status == 413
    assert "1 MB" in caught.value.message
    assert source.read() == b""


def test_an_endless_one_is_not_heard_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        given = 0

        def read(self, size: int) -> bytes:
            self.given += size
            return b"x" * size

    monkeypatch.setattr(body, "_DISCARD_BYTES", 4 * MB)
    source = Endless()
    with pytest.raises(ApiError):
        read_body({"wsgi.input": source}, 1)
    assert source.given < 6 * MB
