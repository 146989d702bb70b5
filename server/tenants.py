"""On whose behalf a request comes."""

from __future__ import annotations

import hashlib

_KEY = "key-"


def tenant_of(user: str | None, authorization: str | None, tenant_from: str) -> str | None:
    """The bearer key of its ``Authorization`` header or its ``user`` field, the first of them where ``tenant_from`` is
    ``key``, the second where it is ``user``, the other where it brings only that; ``None`` where it brings neither.

    Of a key a digest: tenants are shown in logs and metrics, and keys must not be. No ``user`` is taken for one.
    """
    digest = _digest_of(authorization)
    if user is None or (digest is not None and tenant_from == "key"):
        return digest
    return f"user-{user}" if user.startswith(_KEY) else user


def _digest_of(authorization: str | None) -> str | None:
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        return None
    return _KEY + hashlib.sha256(key.encode()).hexdigest()[:16]
