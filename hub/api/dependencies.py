"""Parts that routes share: the caller and the body as FastAPI dependencies, parameters, and headers of replies."""

import ipaddress
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request, Response, Security
from fastapi.dependencies.models import Dependant
from fastapi.security import HTTPBearer

from ..admission.authentication import Authenticator, Caller
from ..errors import FieldProblem
from ..observability import request_context
from ..schemas import NAME_PATTERN, TASK_PATTERN
from ..worker_api import PassStats
from .bodies import RequestBody
from .problems import invalid_fields
from .upload_guard import claim_body

# For the OpenAPI document only. `Authenticator` reads the header, because FastAPI's own errors are not problems.
BEARER = HTTPBearer(auto_error=False)

TaskName = Annotated[str, Path(pattern=TASK_PATTERN, description="`task`, or `tenant:task` of another tenant")]
AliasName = Annotated[str, Path(pattern=NAME_PATTERN)]
VersionNumber = Annotated[int, Path(ge=1, le=2**53)]
VersionReference = Annotated[str, Path(max_length=63, description="a version's number or an alias")]
QueryVersion = Annotated[str, Query(max_length=63, description="a version's number or an alias")]
TopK = Annotated[int, Query(ge=1, le=1000, description="labels per image")]
Coverage = Annotated[
    float | None,
    Query(gt=0, lt=1, description="adds to each image the smallest set of labels that covers this share of images"),
]
CanaryKey = Annotated[
    str | None,
    Header(
        alias="x-canary-key",
        max_length=256,
        description="calls with the same key get the same version of an alias with several versions",
    ),
]


class CallerDependencies:
    """FastAPI dependencies that authenticate the caller, check its role, or give its body."""

    def __init__(self, authenticator: Authenticator) -> None:
        async def any_caller(request: Request, _bearer: Annotated[object, Security(BEARER)]) -> Caller:
            sent = request.headers
            caller = await authenticator.authenticate(
                sent.get("authorization"), client_address(request), sent.get("origin")
            )
            claim_body(request.scope, caller.tenant)
            request_context.note_tenant(caller.tenant)
            _refuse_unknown_query(request)
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

        async def body(request: Request, _caller: Annotated[Caller, Depends(any_caller)]) -> RequestBody:
            return RequestBody(request, partial(authenticator.recheck, request.headers["authorization"]))

        self.any_caller, self.tenant_caller, self.owner, self.admin = any_caller, tenant_caller, owner, admin
        self.body = body


def client_address(request: Request) -> str:
    """Return the IP address that connected to the hub's port; "" if it is unknown.

    The server takes the address from the connection, or from the header of a trusted proxy (docs/security.md). Headers
    from clients have no effect.
    """
    try:
        address = ipaddress.ip_address(request.client.host if request.client else "")
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return str(address)


def add_batch_headers(response: Response, stats: Sequence[PassStats]) -> None:
    """Add the headers about the forward passes that computed a reply, and record their times.

    For several images the headers have the largest pass and the longest times.
    """
    response.headers["x-worker"] = stats[0].worker
    response.headers["x-batch-images"] = str(max(s.images for s in stats))
    response.headers["x-batch-tasks"] = str(max(s.tasks for s in stats))
    times_ms = {name: max(getattr(s, f"{name}_ms") for s in stats) for name in ("load", "queue", "compute")}
    response.headers["server-timing"] = ", ".join(f"{name};dur={ms:.2f}" for name, ms in times_ms.items())
    request_context.note_times(**{name: ms / 1000 for name, ms in times_ms.items()})


def _refuse_unknown_query(request: Request) -> None:
    """Refuse a query parameter that the route does not have. A misspelt one would silently keep its default.

    Raises:
        InvalidRequest: unknown parameters under /v1. Elsewhere they are ignored, since the protocols may add some.
    """
    route = request.scope["route"]
    if not request.query_params or not route.path.startswith("/v1/"):
        return
    known = _query_names(route.dependant)
    unknown = sorted({*request.query_params} - known)
    if unknown:
        message = f"unknown query parameter; this route accepts {', '.join(sorted(known)) or 'none'}"
        raise invalid_fields([FieldProblem(name, message) for name in unknown])


def _query_names(dependant: Dependant) -> set[str]:
    """Return the names of all query parameters of a route and of its dependencies."""
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_query_names(dependency) for dependency in dependant.dependencies))
