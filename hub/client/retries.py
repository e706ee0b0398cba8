"""Errors of responses, and the retry policy of the clients."""

import math
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from ..errors import TYPE_PREFIX, FieldProblem, HubError, LimitReached, TooLarge, Unauthenticated, Unavailable
from ..schemas import ProblemDetails

MAX_ATTEMPTS = 4  # limit for errors without Retry-After
MAX_BACKOFF_S = 2.0

_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_CONNECTION_LOST = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def error_of(response: httpx.Response, first: int = 0, now: Callable[[], datetime] = _utc_now) -> HubError:
    """Return the error of a response. A response without problem JSON, such as a proxy's, maps by its status.

    Args:
        response: a response with its whole body.
        first: index of the call's first input among all inputs of the caller. The hub numbers the inputs of each
            call from 0, so the function adds `first` to the numbers.
        now: clock for a date in `Retry-After`.
    """
    retry_after_s = _retry_after_s(response.headers.get("retry-after", ""), now)
    by_status = _CLASS_OF_STATUS.get(response.status_code, HubError)
    try:
        problem = ProblemDetails.model_validate_json(response.content)
    except ValueError:
        return by_status(_without_problem(response), (), retry_after_s)

    def renumber(text: str) -> str:
        return re.sub(r"\binputs\.(\d{1,9})", lambda match: f"inputs.{int(match[1]) + first}", text)

    kind = _CLASS_OF_CODE.get(problem.type.removeprefix(TYPE_PREFIX), by_status)
    fields = [FieldProblem(renumber(e.field), renumber(e.message)) for e in problem.errors]
    return kind(renumber(problem.detail), fields, retry_after_s)


class RetrySchedule:
    """Attempts and deadline of one call."""

    def __init__(self, retry_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            retry_s: seconds after the first attempt in which further attempts may begin.
            clock: monotonic clock in seconds.
        """
        self.attempts = 0
        self._clock = clock
        self._deadline_s = clock() + retry_s

    def pause_s(self, error: HubError, *, idempotent: bool) -> float | None:
        """Count a failed attempt. Return the seconds to wait before the next attempt, or None to give up.

        A call that is not idempotent is retried only if the hub cannot have run it: after a 429, or if the request
        was never sent. A timed-out read is not retried, since the next attempt would wait as long again.

        Args:
            error: error of the attempt. Its cause is an httpx error if no response arrived.
            idempotent: two executions of the call have the same effect as one.
        """
        self.attempts += 1
        cause = error.__cause__
        if isinstance(cause, httpx.RequestError):
            retry = isinstance(cause, _NEVER_SENT) or (idempotent and isinstance(cause, _CONNECTION_LOST))
        else:
            retry = isinstance(error, LimitReached) or (idempotent and isinstance(error, Unavailable))
        if not retry or (error.retry_after_s is None and self.attempts >= MAX_ATTEMPTS):
            return None
        backoff_s = min(MAX_BACKOFF_S, 0.25 * 2 ** min(self.attempts - 1, 10))
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 (spreads the retries of many clients)
        pause = (error.retry_after_s or 0) + backoff_s * jitter
        return pause if self._clock() + pause <= self._deadline_s else None


def _without_problem(response: httpx.Response) -> str:
    """Return an error's text for a response that is not a hub's, such as a proxy's page or a redirect."""
    status = f"HTTP {response.status_code} {response.reason_phrase}".strip()
    if response.is_redirect:
        return (
            f"{status}: {response.url} redirects to {response.headers.get('location')}, and the client follows no "
            "redirects, since they would carry the key; use the URL of the hub itself (HUB_URL)"
        )
    text = re.sub(r"<style.*?</style>|<[^>]*>", " ", response.text[:5000], flags=re.DOTALL)
    return f"{status}, not from a hub: {' '.join(text.split())[:200]!r}"


def _retry_after_s(retry_after: str, now: Callable[[], datetime]) -> int | None:
    """Parse `Retry-After` (RFC 9110, 10.2.3), which is a number of seconds or a date. None: the header is invalid."""
    if retry_after.isdecimal() and len(retry_after) < 10:
        return int(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0, math.ceil((at.astimezone(UTC) - now()).total_seconds()))


def _subclasses(kind: type[HubError]) -> Iterator[type[HubError]]:
    """Yield an error class and all classes below it."""
    yield kind
    for subclass in kind.__subclasses__():
        yield from _subclasses(subclass)


_CLASS_OF_CODE = {kind.code: kind for kind in _subclasses(HubError)}
_CLASS_OF_STATUS: dict[int, type[HubError]] = {
    **{kind.status: kind for kind in (Unauthenticated, LimitReached, TooLarge, Unavailable)},
    **dict.fromkeys((502, 504), Unavailable),  # of a proxy whose hub is away for a moment
}
