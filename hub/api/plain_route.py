"""Middleware that answers usual requests of a route without FastAPI's routing and dependencies.

FastAPI would take a quarter of a gateway's CPU time. A usual request has no parameters but those of `PlainRequest`, in
their plainest form. FastAPI handles all others, so that every error of a parameter is FastAPI's.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import HubError
from ..field_types import TASK_PATTERN
from .dependencies import OPTION_HEADER_NAMES
from .problems import error_response, route_path

TASK = re.compile(TASK_PATTERN)
# Values of these need no decoding, and FastAPI accepts them as they are.
OPTIONS = {b"top_k": re.compile(rb"1000|[1-9][0-9]{0,2}"), b"version": re.compile(rb"[a-z0-9_-]{1,63}")}


@dataclass(frozen=True)
class PlainRequest:
    """Parameters of a request that has no other ones; None: the route's default."""

    task: str
    top_k: int | None
    version: str | None


def plain_request(scope: Scope, route: APIRoute) -> PlainRequest | None:
    """Return the parameters of a usual request; None for any other one, which FastAPI then checks.

    Args:
        route: its path has the parameter `task`.
    """
    if scope["type"] != "http" or scope["method"] not in (route.methods or ()):
        return None
    path = route.path_regex.match(route_path(scope))
    if path is None or not TASK.fullmatch(task := path["task"]):
        return None
    if any(name in OPTION_HEADER_NAMES for name, _ in scope["headers"]):
        return None
    found: dict[bytes, bytes] = {}
    query: bytes = scope["query_string"]
    for pair in query.split(b"&") if query else ():
        name, _, value = pair.partition(b"=")
        if name in found or name not in OPTIONS or not OPTIONS[name].fullmatch(value):
            return None
        found[name] = value
    top_k, version = found.get(b"top_k"), found.get(b"version")
    return PlainRequest(task, None if top_k is None else int(top_k), None if version is None else version.decode())


class PlainRouteMiddleware:
    """ASGI middleware that answers the usual requests of one route. The application gets all others."""

    def __init__(
        self, app: ASGIApp, *, route: APIRoute, answer: Callable[[Request, PlainRequest], Awaitable[Response]]
    ) -> None:
        """
        Args:
            route: FastAPI's; see `plain_request`.
            answer: returns the reply of `route`, or raises one of the hub's errors; any other error gets status 500.
        """
        self._app = app
        self._route = route
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plain = plain_request(scope, self._route)
        if plain is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route  # as Starlette's router sets it; traces have its path
        try:
            response = await self._answer(Request(scope, receive, send), plain)
        except HubError as error:
            response = error_response(error, scope)
        await response(scope, receive, send)
