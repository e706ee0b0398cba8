"""Tokens: short-lived substitutes for a key, for one task, that a web page or a phone may hold.

A token has the id of its key, the task, the expiry time and the allowed origins, and a signature (HMAC-SHA256). The
signing key is the stored hash of the API key, so the hub stores nothing per token, and a revoked key ends its tokens.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass

TOKEN_PREFIX = "kt_"  # noqa: S105 (not a secret)
MAX_TOKEN_CHARS = 4096
DOMAIN = b"karst-hub token\0"  # the stored hash signs nothing else


@dataclass(frozen=True)
class Token:
    """Contents of a token.

    Attributes:
        key_id: public id of the key that the token acts for.
        task: the only task that the token may use.
        expires_s: seconds since 1970.
        origins: web origins that may use the token; none: any client.
    """

    key_id: str
    task: str
    expires_s: int
    origins: Sequence[str] = ()


def sign(token: Token, key_hash: str) -> str:
    """Return a token as text.

    Args:
        key_hash: the stored hash of its key, in hex.
    """
    fields = [token.key_id, token.task, token.expires_s, *token.origins]
    payload = json.dumps(fields, separators=(",", ":")).encode()
    return f"{TOKEN_PREFIX}{_encode(payload)}.{_encode(_signature(payload, key_hash))}"


def read(text: str) -> Token | None:
    """Return the contents of a token without a check of its signature; None if the text is not a token."""
    payload, _ = _parts(text)
    try:
        key_id, task, expires_s, *origins = json.loads(payload)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = all(isinstance(value, str) for value in (key_id, task, *origins))
    if not texts or not isinstance(expires_s, int) or isinstance(expires_s, bool):
        return None
    return Token(key_id, task, expires_s, tuple(origins))


def is_signed(text: str, key_hash: str) -> bool:
    """Return whether the signature of a token is valid; compares in constant time."""
    payload, signature = _parts(text)
    return hmac.compare_digest(signature, _signature(payload, key_hash))


def _signature(payload: bytes, key_hash: str) -> bytes:
    return hmac.digest(bytes.fromhex(key_hash), DOMAIN + payload, hashlib.sha256)


def _parts(text: str) -> tuple[bytes, bytes]:
    """Return payload and signature; empty where the text is malformed."""
    if len(text) > MAX_TOKEN_CHARS:
        return b"", b""
    payload, _, signature = text.removeprefix(TOKEN_PREFIX).partition(".")
    try:
        return _decode(payload), _decode(signature)
    except (binascii.Error, ValueError):
        return b"", b""


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
