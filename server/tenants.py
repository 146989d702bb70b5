"""On whose behalf a request comes."""

from __future__ import annotations

import hashlib


def tenant_of(user: str | None, authorization: str | None) -> str | None:
    """What its ``user`` field says, else the bearer key of its ``Authorization`` header: a digest of it, since tenants
    are shown in logs and metrics, and keys must not be. ``None`` where it brings neither."""
    if user is not None:
        return user
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        return None
    return "key-" + hashlib.sha256(key.encode()).hexdigest()[:16]
