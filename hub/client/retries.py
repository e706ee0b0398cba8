"""What comes back to a client: which error a response tells, and whether and when to try again."""

import math
import random
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from ..errors import TYPE_PREFIX, FieldProblem, HubError, LimitReached, TooLarge, Unauthenticated, Unavailable
from ..schemas import ProblemDetails

BLIND_TRIES = 4  # where nobody says when to come back
MOST_BACKOFF_S = 2.0

_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_LOST = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)


def error_of(response: httpx.Response, first: int = 0) -> HubError:
    """The error that a response tells; a proxy's, which is no problem of the hub's, by its status.

    Args:
        response: read whole.
        first: index of the call's first input among all of the caller's; the hub counts from the call's own.
    """
    retry_after_s = _seconds(response.headers.get("retry-after", ""))
    by_status = _BY_STATUS.get(response.status_code, HubError)
    try:
        problem = ProblemDetails.model_validate_json(response.content)
    except ValueError:
        return by_status(f"HTTP {response.status_code}: {response.text[:200]}", (), retry_after_s)

    def counted(text: str) -> str:
        return re.sub(r"\binputs\.(\d{1,9})", lambda found: f"inputs.{int(found[1]) + first}", text)

    kind = _BY_CODE.get(problem.type.removeprefix(TYPE_PREFIX), by_status)
    fields = [FieldProblem(counted(e.field), counted(e.message)) for e in problem.errors]
    return kind(counted(problem.detail), fields, retry_after_s)


def pause_s(error: HubError, *, repeatable: bool, tries: int, left_s: float) -> float | None:
    """How long to wait before a call is tried again; None: it is not.

    A call that must not be done twice is tried again only where it surely was not done: over a limit (429), or never
    sent. A wait that the caller's time limit ended is not begun again.

    Args:
        error: what the last try ended with; its cause is httpx's error where no response came.
        repeatable: the call may be done twice.
        tries: how many there were.
        left_s: time in which a try may begin.
    """
    cause = error.__cause__
    if isinstance(cause, httpx.RequestError):
        again = isinstance(cause, _NOT_SENT) or (repeatable and isinstance(cause, _LOST))
    else:
        again = isinstance(error, LimitReached) or (repeatable and isinstance(error, Unavailable))
    if not again or (error.retry_after_s is None and tries >= BLIND_TRIES):
        return None
    backoff_s = min(MOST_BACKOFF_S, 0.25 * 2 ** min(tries - 1, 10))
    pause = (error.retry_after_s or 0) + backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 (spreads the callers)
    return pause if pause <= left_s else None


def _seconds(retry_after: str) -> int | None:
    """`Retry-After` (RFC 9110, 10.2.3): seconds, or a date; None where it is neither."""
    if retry_after.isdecimal() and len(retry_after) < 10:
        return int(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0, math.ceil((at.astimezone(UTC) - datetime.now(UTC)).total_seconds()))


def _kinds(kind: type[HubError]) -> Iterator[type[HubError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


_BY_CODE = {kind.code: kind for kind in _kinds(HubError)}
_BY_STATUS: dict[int, type[HubError]] = {
    kind.status: kind for kind in (Unauthenticated, LimitReached, TooLarge, Unavailable)
}
