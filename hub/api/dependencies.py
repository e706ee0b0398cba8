"""Parts that routes share: the caller and the body as FastAPI dependencies, parameters, and headers of replies."""

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request, Response, Security
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from ..admission.authentication import Authenticator, Caller
from ..admission.quotas import EXPORTS, EXPORTS_QUEUED, LARGE_REPLIES, LARGE_REPLIES_QUEUED
from ..concurrency import TenantConcurrencyLimit, TenantThreads
from ..errors import FieldProblem, InvalidRequest
from ..field_types import NAME_PATTERN, TASK_PATTERN
from ..observability import request_context
from ..schemas import MAX_PAGE
from ..worker_api import PassStats
from .bodies import JSON, NO_BODY, RequestBody
from .limits.unread_replies import send_pieces
from .limits.upload_guard import claim_body
from .problems import invalid_fields
from .request_heads import announces_body

# For the OpenAPI document only. `Authenticator` reads the header, because FastAPI's own errors are not problems.
BEARER = HTTPBearer(auto_error=False)

TaskName = Annotated[str, Path(pattern=TASK_PATTERN, description="`task`, or `tenant:task` of another tenant")]
AliasName = Annotated[str, Path(pattern=NAME_PATTERN)]
VersionNumber = Annotated[int, Path(ge=1, le=2**53)]
VersionReference = Annotated[str, Path(max_length=63, description="a version's number or an alias")]
QueryVersion = Annotated[str, Query(max_length=63, description="a version's number or an alias")]
TOP_K = 5  # where a call does not set it
TopK = Annotated[int, Query(ge=1, le=1000, description="labels per image")]
Coverage = Annotated[
    float | None,
    Query(gt=0, lt=1, description="adds to each image the smallest set of labels that covers this share of images"),
]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="entries of a page; a page may have fewer")]
CANARY_HEADER = "x-canary-key"
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
OPTION_HEADERS = (CANARY_HEADER, JSON_LENGTH_HEADER)  # refused on routes that do not have them
OPTION_HEADER_NAMES = frozenset(name.lower().encode() for name in OPTION_HEADERS)
CanaryKey = Annotated[
    str | None,
    Header(
        alias=CANARY_HEADER,
        max_length=256,
        description="calls with the same key get the same version of an alias with several versions",
    ),
]


Recheck = Callable[[], Awaitable[None]]  # raises `Unauthenticated` if the caller's key was revoked or has expired


class CallerDependencies:
    """FastAPI dependencies that authenticate the caller, check its role, or give its body."""

    def __init__(self, authenticator: Authenticator, threads: TenantThreads) -> None:
        """
        Args:
            threads: parse large bodies, in turns by tenant.
        """
        replies = TenantConcurrencyLimit(LARGE_REPLIES, LARGE_REPLIES + LARGE_REPLIES_QUEUED)
        exports = TenantConcurrencyLimit(EXPORTS, EXPORTS + EXPORTS_QUEUED)

        async def authenticated(request: Request) -> Caller:
            authorization, origin = request.headers.get("authorization"), request.headers.get("origin")
            caller = await authenticator.authenticate(authorization, client_address(request), origin)
            claim_body(request.scope, caller.tenant)
            request_context.note_tenant(caller.tenant)
            return caller

        async def any_caller(request: Request, _bearer: Annotated[object, Security(BEARER)]) -> Caller:
            caller = await authenticated(request)
            _refuse_unknown_options(request)
            if not _has_body(request):
                recheck = partial(authenticator.recheck, request.headers["authorization"])
                await RequestBody(request, recheck, threads.of(caller.tenant)).refuse_content()
            return caller

        async def tenant_caller(caller: Annotated[Caller, Depends(any_caller)]) -> Caller:
            caller.require_tenant()
            return caller

        async def owner(caller: Annotated[Caller, Depends(any_caller)]) -> Caller:
            caller.require_owner()
            return caller

        async def admin(caller: Annotated[Caller, Depends(any_caller)]) -> Caller:
            caller.require_admin()
            return caller

        async def body(request: Request, caller: Annotated[Caller, Depends(any_caller)]) -> RequestBody:
            recheck = partial(authenticator.recheck, request.headers["authorization"])
            return RequestBody(request, recheck, threads.of(caller.tenant))

        async def plain(request: Request) -> tuple[Caller, RequestBody]:
            caller = await authenticated(request)
            caller.require_tenant()
            return caller, await body(request, caller)

        async def recheck(request: Request) -> Recheck:
            return partial(authenticator.recheck, request.headers["authorization"])

        async def large_reply(caller: Annotated[Caller, Depends(any_caller)]) -> AsyncIterator[None]:
            async with replies.acquire(caller.tenant):
                yield  # until the client has read the reply, a `LargeReply`

        async def export(caller: Annotated[Caller, Depends(any_caller)]) -> AsyncIterator[None]:
            async with exports.acquire(caller.tenant):
                yield  # until the client has read the reply

        self.any_caller, self.tenant_caller, self.owner, self.admin = any_caller, tenant_caller, owner, admin
        self.body, self.recheck, self.large_reply = body, recheck, large_reply
        self.export = export
        self.plain = plain  # what `tenant_caller` and `body` return, for a request without unknown options


class LargeReply(Response):
    """A reply that is sent in pieces, each when the client has read most of those before.

    Otherwise the server would take the whole reply at once, and the dependency `large_reply` would end while the reply
    is in memory for as long as the client does not read it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_pieces({"type": "http.response.body", "body": self.body}, send)


def json_reply(content: BaseModel | str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a reply whose content is complete. FastAPI would check each entry of a long list once more."""
    text = content if isinstance(content, str) else content.model_dump_json()
    return Response(text, status, headers, JSON)


def client_address(request: Request) -> str:
    """Return the IP address that connected to the hub's port; "" if it is unknown.

    The server takes the address from the connection, or from the header of a trusted proxy (docs/security.md). Headers
    from clients have no effect.
    """
    return _ip_address(request.client.host) if request.client else ""


@lru_cache(maxsize=1024)
def _ip_address(host: str) -> str:
    """Return an IP address in its usual form; "" if the text is none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return str(address)


def batch_headers(stats: Sequence[PassStats]) -> dict[str, str]:
    """Return the headers about the forward passes that computed a reply, and record their times.

    For several images the headers have the largest pass and the longest times.
    """
    times_ms = {name: max(getattr(s, f"{name}_ms") for s in stats) for name in ("load", "queue", "compute")}
    request_context.note_times(**{name: ms / 1000 for name, ms in times_ms.items()})
    decode_s = request_context.time_s("decode")
    shown = times_ms if decode_s is None else {"decode": decode_s * 1000} | times_ms
    return {
        "x-worker": stats[0].worker,
        "x-batch-images": str(max(s.images for s in stats)),
        "x-batch-tasks": str(max(s.tasks for s in stats)),
        "server-timing": ", ".join(f"{name};dur={ms:.2f}" for name, ms in shown.items()),
    }


async def no_options(request: Request) -> None:
    """Refuse options and a body: the dependency of routes without a key.

    Raises:
        InvalidRequest: the request has an option, or its headers announce a body.
    """
    _refuse_unknown_options(request)
    if announces_body(request.scope["headers"]):
        raise InvalidRequest.at("body", NO_BODY)


def _refuse_unknown_options(request: Request) -> None:
    """Refuse query parameters and option headers that the route does not have, and parameters that are sent twice.

    A misspelt parameter would silently keep its default, and of two values one would be lost.

    Raises:
        InvalidRequest: the error names each of them.
    """
    dependant = _route(request).dependant
    query, headers = request.query_params, request.headers
    known = sorted(_query_names(dependant))
    accepts = f"this route accepts {', '.join(known) or 'none'}"
    problems = [FieldProblem(name, f"unknown query parameter; {accepts}") for name in sorted({*query} - {*known})]
    own = {name.lower() for name in _header_names(dependant)}
    for name in OPTION_HEADERS:
        if name in headers and name.lower() not in own:
            problems.append(FieldProblem(name, "this route does not have this header; remove it"))
    counts = {name: len(query.getlist(name)) for name in known}
    problems += [FieldProblem(name, f"is sent {n} times; send it once") for name, n in counts.items() if n > 1]
    if problems:
        raise invalid_fields(problems)


def _route(request: Request) -> APIRoute:
    route: APIRoute = request.scope["route"]
    return route


def _has_body(request: Request) -> bool:
    return "requestBody" in (_route(request).openapi_extra or {})


def _query_names(dependant: Dependant) -> Iterator[str]:
    """Yield the names of all query parameters of a route and of its dependencies."""
    yield from (field.alias for field in dependant.query_params)
    for dependency in dependant.dependencies:
        yield from _query_names(dependency)


def _header_names(dependant: Dependant) -> Iterator[str]:
    """Yield the names of all headers that a route and its dependencies read as parameters."""
    yield from (field.alias for field in dependant.header_params)
    for dependency in dependant.dependencies:
        yield from _header_names(dependency)
