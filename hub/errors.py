"""The hub's errors. Each knows its HTTP status and its stable code, which ends the problem type's URI.

HubError
 |- InvalidRequest       422  a field, a parameter or a body that is not what it should be
 |   |- InvalidImage     422  bytes that are no usable image
 |   `- InvalidAdapter   422  a file that is no valid adapter for this hub
 |- Unauthenticated      401  no key, or one that the hub does not know
 |- Forbidden            403  the key's role may not do this
 |- NotFound             404  no such task, version or alias that the tenant may see
 |- RequestTimeout       408  the body came too slowly
 |- Conflict             409  the change contradicts what is there
 |- TooLarge             413  a body, an image or a file over its limit
 |- LimitReached         429  a limit of the tenant is reached; try again later
 `- Unavailable          503  something the hub needs is away for now; try again
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

TYPE_PREFIX = "urn:karst-hub:problem:"


@dataclass(frozen=True)
class FieldProblem:
    """One thing that is wrong: `field` names the parameter, JSON field, tensor or metadata entry."""

    field: str
    message: str


class HubError(Exception):
    """What a client is told; `problem()` is the RFC 9457 body. Raised only as one of its kinds."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "The hub failed"

    def __init__(self, detail: str, errors: Sequence[FieldProblem] = (), retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = tuple(errors)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.detail, self.errors, self.retry_after_s)

    def problem(self) -> dict[str, Any]:
        """The members of an `application/problem+json` body (RFC 9457, section 3.1)."""
        body: dict[str, Any] = {
            "type": TYPE_PREFIX + self.code,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = [{"field": e.field, "message": e.message} for e in self.errors]
        return body


class InvalidRequest(HubError):
    """A field, a parameter or a body that is not what it should be; mend the request."""

    status, code, title = 422, "invalid-request", "The request is not valid"


class InvalidImage(InvalidRequest):
    """The bytes are no image that can be classified; send a JPEG, PNG, WebP, BMP, GIF or TIFF."""

    code, title = "invalid-image", "The image cannot be used"


class InvalidAdapter(InvalidRequest):
    """The file breaks `karst/1` or does not fit this hub's backbone; `errors` names each tensor or field."""

    code, title = "invalid-adapter", "The adapter cannot be used"


class Unauthenticated(HubError):
    """There is no `Authorization: Bearer <key>`, or the hub does not know the key."""

    status, code, title = 401, "unauthenticated", "A valid key is needed"


class Forbidden(HubError):
    """The key's role may not do this; use an owner's key."""

    status, code, title = 403, "forbidden", "The key may not do this"


class NotFound(HubError):
    """Nothing of this name among the tasks, versions and aliases that the tenant may see."""

    status, code, title = 404, "not-found", "There is no such thing"


class RequestTimeout(HubError):
    """The request's body came too slowly, or stopped coming; send it again."""

    status, code, title = 408, "request-timeout", "The request took too long"


class Conflict(HubError):
    """The change contradicts what is there, such as deleting a version that an alias points at."""

    status, code, title = 409, "conflict", "The change contradicts what is there"


class TooLarge(HubError):
    """A body, an image or an adapter file over its limit; the detail names the limit."""

    status, code, title = 413, "too-large", "Too large"


class LimitReached(HubError):
    """The tenant has reached one of its limits, which the detail names; nothing was done; try again later."""

    status, code, title = 429, "limit-reached", "A limit of the tenant is reached"

    def __init__(self, detail: str, errors: Sequence[FieldProblem] = (), retry_after_s: int | None = 1) -> None:
        super().__init__(detail, errors, retry_after_s)


class Unavailable(HubError):
    """Registry, store or workers are away or full for now; nothing was changed; try again after `Retry-After`."""

    status, code, title = 503, "unavailable", "Unavailable for now"

    def __init__(self, detail: str, errors: Sequence[FieldProblem] = (), retry_after_s: int | None = 2) -> None:
        super().__init__(detail, errors, retry_after_s)
