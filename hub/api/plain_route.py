"""Route whose usual requests do not go through FastAPI's dependencies, which take a quarter of a gateway's CPU time.

A usual request has no parameters but those of `PlainRequest`, in their plainest form. FastAPI handles all others, so
that every error of a parameter is FastAPI's.
"""

import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from ..field_types import TASK_PATTERN

TASK = re.compile(TASK_PATTERN)
# Values of these need no decoding, and FastAPI accepts them as they are.
OPTIONS = {b"top_k": re.compile(rb"1000|[1-9][0-9]{0,2}"), b"version": re.compile(rb"[a-z0-9_-]{1,63}")}


@dataclass(frozen=True)
class PlainRequest:
    """Parameters of a request that has no other ones; None: the route's default."""

    task: str
    top_k: int | None
    version: str | None


def plain_request(request: Request, other_headers: frozenset[bytes]) -> PlainRequest | None:
    """Return the parameters of a usual request; None for any other one, which FastAPI then checks.

    Args:
        other_headers: names of headers, in lower case, that a usual request does not have.
    """
    task = request.path_params["task"]
    if not TASK.fullmatch(task) or any(name in other_headers for name, _ in request.scope["headers"]):
        return None
    found: dict[bytes, bytes] = {}
    query: bytes = request.scope["query_string"]
    for pair in query.split(b"&") if query else ():
        name, _, value = pair.partition(b"=")
        if name in found or name not in OPTIONS or not OPTIONS[name].fullmatch(value):
            return None
        found[name] = value
    top_k, version = found.get(b"top_k"), found.get(b"version")
    return PlainRequest(task, None if top_k is None else int(top_k), None if version is None else version.decode())


def plain_route(
    answer: Callable[[Request, PlainRequest], Awaitable[Response]], other_headers: frozenset[bytes]
) -> type[APIRoute]:
    """Return the class of a route whose usual requests `answer` handles. FastAPI handles all others.

    Args:
        other_headers: see `plain_request`.
    """

    class PlainRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            by_fastapi = super().get_route_handler()

            async def handle(request: Request) -> Response:
                plain = plain_request(request, other_headers)
                return await (by_fastapi(request) if plain is None else answer(request, plain))

            return handle

    return PlainRoute
