"""Error tree of the hub. Each class has an HTTP status and a stable code; the code ends the problem type's URI.

HubError
 |- InvalidRequest       422  a field, a parameter or a body is not valid
 |   |- InvalidImage     422  the bytes are not a usable image
 |   `- InvalidAdapter   422  the file is not a valid adapter for this hub
 |- Unauthenticated      401  the key is missing or unknown
 |- Forbidden            403  the key's role does not allow the request
 |- NotFound             404  the tenant sees no such task, version or alias
 |- RequestTimeout       408  the body arrived too slowly
 |- Conflict             409  the change contradicts the current state
 |- TooLarge             413  a body, an image or a file is over its limit
 |- LimitReached         429  the tenant has reached one of its limits
 |- Unavailable          503  a part that the hub needs is unavailable
 `- InsufficientStorage  507  the hub's disk is nearly full
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

TYPE_PREFIX = "urn:karst-hub:problem:"
# Bounds of a problem, so that its JSON is always under 16 KB: a client's text in it may be any size.
MAX_DETAIL_BYTES = 2000
MAX_FIELD_BYTES = 200
MAX_MESSAGE_BYTES = 500
MAX_ERRORS = 50
MAX_ERRORS_BYTES = 10_000
MAX_SHOWN = 40  # characters of a refused value


def cut(text: str, limit: int) -> str:
    """Return a text, or the start of it and `...`, that takes at most `limit` bytes in JSON."""
    start = text[:limit]
    if len(start) == len(text) and len(json.dumps(text)) - 2 <= limit:
        return text
    used = len(json.dumps("...")) - 2
    for length, character in enumerate(start):
        used += len(json.dumps(character)) - 2
        if used > limit:
            return f"{text[:length]}..."
    return f"{start}..."


def shown(value: object) -> str:
    """Return the start of a refused value, as Python writes it. Its cost does not grow with the value."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str | bytes) else value)
    except ValueError:  # an integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


@dataclass(frozen=True)
class FieldProblem:
    """One fault of a request. `field` names the parameter, JSON field, tensor or metadata entry.

    Both texts are cut, because they may repeat a client's text.
    """

    field: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "field", cut(self.field, MAX_FIELD_BYTES))
        object.__setattr__(self, "message", cut(self.message, MAX_MESSAGE_BYTES))

    def json(self) -> dict[str, str]:
        """Return the entry of `errors` in a problem."""
        return {"field": self.field, "message": self.message}


class HubError(Exception):
    """Base class of all errors that a client sees. Only its subclasses are raised."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal server error"

    def __init__(self, detail: str, errors: Sequence[FieldProblem] = (), retry_after_s: int | None = None) -> None:
        """
        Args:
            detail: cut to `MAX_DETAIL_BYTES`.
            errors: cut to `MAX_ERRORS` entries and to `MAX_ERRORS_BYTES`.
            retry_after_s: seconds after which a retry may succeed.
        """
        self.detail = cut(detail, MAX_DETAIL_BYTES)
        super().__init__(self.detail)
        self.errors = _first(errors)
        self.retry_after_s = retry_after_s

    @classmethod
    def at(cls, field: str, message: str, **options: Any) -> Self:
        """Return an error about one field. Its detail is "field: message".

        Args:
            options: further arguments of the class, such as `retry_after_s`.
        """
        return cls(f"{field}: {message}", [FieldProblem(field, message)], **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.detail, self.errors, self.retry_after_s)

    @property
    def reason(self) -> str:
        """The first field's message, for a text that names the field itself; without fields the detail."""
        return self.errors[0].message if self.errors else self.detail

    def problem(self) -> dict[str, Any]:
        """Return the members of an `application/problem+json` body (RFC 9457, section 3.1)."""
        body: dict[str, Any] = {
            "type": TYPE_PREFIX + self.code,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = [error.json() for error in self.errors]
        return body


def _first(errors: Sequence[FieldProblem]) -> tuple[FieldProblem, ...]:
    """Return the first errors that a problem has room for."""
    used, found = 0, []
    for error in errors[:MAX_ERRORS]:
        used += len(json.dumps(error.json()))
        if used > MAX_ERRORS_BYTES:
            break
        found.append(error)
    return tuple(found)


class InvalidRequest(HubError):
    """A field, a parameter or a body is not valid; the client must correct the request."""

    status, code, title = 422, "invalid-request", "Invalid request"


class InvalidImage(InvalidRequest):
    """The bytes are not an image that the hub can classify."""

    code, title = "invalid-image", "Invalid image"


class InvalidAdapter(InvalidRequest):
    """The file breaks `karst/1` or does not fit this hub's backbone; `errors` names each tensor or field."""

    code, title = "invalid-adapter", "Invalid adapter"


class Unauthenticated(HubError):
    """The request has no `Authorization: Bearer <key>`, or the hub does not know the key."""

    status, code, title = 401, "unauthenticated", "Unauthorized"


class Forbidden(HubError):
    """The key's role does not allow the request."""

    status, code, title = 403, "forbidden", "Forbidden"


class NotFound(HubError):
    """The tenant sees no task, version or alias of this name."""

    status, code, title = 404, "not-found", "Not found"


class RequestTimeout(HubError):
    """The request's body arrived too slowly or stopped arriving; the client may send it again."""

    status, code, title = 408, "request-timeout", "Request timeout"


class Conflict(HubError):
    """The change contradicts the current state, such as deleting a version behind an alias."""

    status, code, title = 409, "conflict", "Conflict"


class TooLarge(HubError):
    """A body, an image or an adapter file is over its limit; the detail names the limit."""

    status, code, title = 413, "too-large", "Content too large"


class LimitReached(HubError):
    """The tenant has reached one of its limits. The hub has done nothing; the client may retry later."""

    status, code, title = 429, "limit-reached", "Too many requests"

    def __init__(self, detail: str, errors: Sequence[FieldProblem] = (), retry_after_s: int | None = 1) -> None:
        super().__init__(detail, errors, retry_after_s)


class Unavailable(HubError):
    """The registry, the store or the workers are unavailable. The hub has changed nothing; the client may retry."""

    status, code, title = 503, "unavailable", "Service unavailable"

    def __init__(self, detail: str, errors: Sequence[FieldProblem] = (), retry_after_s: int | None = 2) -> None:
        super().__init__(detail, errors, retry_after_s)


class InsufficientStorage(HubError):
    """The hub's disk has too little free space for the file; the hub has stored nothing."""

    status, code, title = 507, "insufficient-storage", "Insufficient storage"
