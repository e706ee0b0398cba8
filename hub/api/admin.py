"""Routes of tenants, keys, limits, usage, audit and garbage collection.

An owner's key reaches its own tenant; an admin key reaches all tenants.
"""

from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Path, Query, Response
from fastapi.responses import StreamingResponse

from ..admin_schemas import (
    AdminKeyRequest,
    AuditPage,
    Collected,
    GcRequest,
    HubStatus,
    HubTrainingList,
    KeyList,
    KeyRequest,
    NewKey,
    NewTenant,
    TenantChange,
    TenantInfo,
    TenantList,
    Usage,
)
from ..admission.authentication import Caller
from ..field_types import NAME_PATTERN
from ..registry.keys import ADMIN
from ..schemas import MAX_PAGE, TaskList
from ..services.administration import AdministrationService
from .bodies import JSON, RequestBody
from .dependencies import CallerDependencies, Limit, json_reply
from .openapi import BINARY, OCTETS, request_body, schema_of
from .problems import CURSOR_PATTERN, KEY_ID_PATTERN

TAR = "application/x-tar"
TenantName = Annotated[str, Path(pattern=NAME_PATTERN)]
KeyId = Annotated[str, Path(pattern=KEY_ID_PATTERN, description="a key's public id")]
After = Annotated[str, Query(pattern=CURSOR_PATTERN, description="`next` of the previous page")]
TenantsCursor = Annotated[str | None, Query(pattern=NAME_PATTERN, description="`next` of the previous page")]
KeysCursor = Annotated[str | None, Query(pattern=KEY_ID_PATTERN, description="`next` of the previous page")]
Count = Annotated[int, Query(ge=1, le=1000)]
Order = Annotated[Literal["asc", "desc"], Query(description="desc: newest first")]
Datasets = Annotated[bool, Query(description="false: without the images of the tenant's datasets")]


def add_admin_routes(api: FastAPI, administration: AdministrationService, dependencies: CallerDependencies) -> None:
    """Add the routes to an application."""
    tenants = administration.tenants
    AnyCaller = Annotated[Caller, Depends(dependencies.any_caller)]
    TenantCaller = Annotated[Caller, Depends(dependencies.tenant_caller)]
    Admin = Annotated[Caller, Depends(dependencies.admin)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]

    async def manager(caller: AnyCaller, tenant: TenantName) -> Caller:
        caller.require_manager(tenant)
        return caller

    Manager = Annotated[Caller, Depends(manager)]
    large = [Depends(dependencies.large_reply)]

    @api.get("/v1/usage")
    async def get_own_usage(caller: TenantCaller) -> Usage:
        caller.require_unbound()
        return await tenants.usage(caller.tenant)

    @api.get("/v1/tenants")
    async def list_tenants(_caller: Admin, limit: Limit = MAX_PAGE, cursor: TenantsCursor = None) -> TenantList:
        return await tenants.page(limit, cursor or "")

    @api.post("/v1/tenants", status_code=201, openapi_extra=request_body({JSON: schema_of(NewTenant)}))
    async def create_tenant(caller: Admin, body: Body) -> TenantInfo:
        new = await body.read_json(NewTenant)
        return await tenants.create(caller, new.tenant, new.limits)

    @api.get("/v1/tenants/{tenant}")
    async def get_tenant(_caller: Manager, tenant: TenantName) -> TenantInfo:
        return await tenants.get(tenant)

    @api.patch("/v1/tenants/{tenant}", openapi_extra=request_body({JSON: schema_of(TenantChange)}))
    async def change_tenant(caller: Admin, tenant: TenantName, body: Body) -> TenantInfo:
        change = await body.read_json(TenantChange)
        return await administration.change_limits(caller, tenant, change.limits)

    @api.delete("/v1/tenants/{tenant}", status_code=204)
    async def delete_tenant(caller: Admin, tenant: TenantName) -> None:
        await administration.delete(caller, tenant)

    @api.get("/v1/tenants/{tenant}/usage")
    async def get_usage(_caller: Manager, tenant: TenantName) -> Usage:
        return await tenants.usage(tenant)

    @api.get("/v1/tenants/{tenant}/keys", response_model=KeyList, dependencies=large)
    async def list_keys(
        caller: Manager, tenant: TenantName, limit: Limit = MAX_PAGE, cursor: KeysCursor = None
    ) -> Response:
        return json_reply(await administration.key_page(caller, tenant, limit, cursor or ""))

    @api.post("/v1/tenants/{tenant}/keys", status_code=201, openapi_extra=request_body({JSON: schema_of(KeyRequest)}))
    async def create_key(caller: Manager, tenant: TenantName, body: Body) -> NewKey:
        new = await body.read_json(KeyRequest)
        return await administration.keys.create(
            caller, tenant, new.role, new.name, new.expires, tasks=new.tasks, origins=new.origins
        )

    @api.delete("/v1/tenants/{tenant}/keys/{id}", status_code=204)
    async def revoke_key(caller: Manager, tenant: TenantName, id: KeyId) -> None:
        await administration.revoke(caller, tenant, id)

    @api.get("/v1/tenants/{tenant}/audit", response_model=AuditPage, dependencies=large)
    async def get_audit(
        caller: Manager, tenant: TenantName, after: After = "0", count: Count = 100, order: Order = "asc"
    ) -> Response:
        return json_reply(await administration.audit(caller, tenant, after, count, newest_first=order == "desc"))

    @api.get(
        "/v1/tenants/{tenant}/export",
        response_class=StreamingResponse,
        dependencies=[Depends(dependencies.export)],
        responses={200: {"content": {TAR: {"schema": BINARY}}}},
    )
    async def export_tenant(_caller: Manager, tenant: TenantName, datasets: Datasets = True) -> StreamingResponse:
        export = await administration.export(tenant, datasets=datasets)
        headers = {
            "content-disposition": f'attachment; filename="{tenant}.tar"',
            "content-length": str(export.size_bytes),
        }
        return StreamingResponse(export.chunks, media_type=TAR, headers=headers)

    @api.post("/v1/tenants/{tenant}/import", status_code=201, openapi_extra=request_body({TAR: BINARY, OCTETS: BINARY}))
    async def import_tenant(caller: Admin, tenant: TenantName, body: Body, datasets: Datasets = True) -> TaskList:
        return await administration.restore(caller, tenant, body.stream(), datasets=datasets)

    @api.get("/v1/admin/keys", response_model=KeyList, dependencies=large)
    async def list_admin_keys(caller: Admin, limit: Limit = MAX_PAGE, cursor: KeysCursor = None) -> Response:
        return json_reply(await administration.key_page(caller, "", limit, cursor or ""))

    @api.post("/v1/admin/keys", status_code=201, openapi_extra=request_body({JSON: schema_of(AdminKeyRequest)}))
    async def create_admin_key(caller: Admin, body: Body) -> NewKey:
        new = await body.read_json(AdminKeyRequest)
        return await administration.keys.create(caller, "", ADMIN, new.name, new.expires)

    @api.delete("/v1/admin/keys/{id}", status_code=204)
    async def revoke_admin_key(caller: Admin, id: KeyId) -> None:
        await administration.revoke(caller, "", id)

    @api.get("/v1/admin/trainings")
    async def list_all_trainings(_caller: Admin) -> HubTrainingList:
        return await administration.trainings()

    @api.get("/v1/audit", response_model=AuditPage, dependencies=large)
    async def get_whole_audit(
        caller: Admin,
        after: After = "0",
        count: Count = 100,
        of: Annotated[Literal["all", "admins"], Query()] = "all",
        order: Order = "asc",
    ) -> Response:
        newest_first = order == "desc"
        page = await administration.audit(caller, None, after, count, admins=of == "admins", newest_first=newest_first)
        return json_reply(page)

    @api.get("/v1/status")
    async def get_status(_caller: Admin) -> HubStatus:
        return await administration.status()

    @api.post(
        "/v1/gc",
        summary="Delete stored files that belong to no version",
        openapi_extra=request_body({JSON: schema_of(GcRequest)}, required=False),
    )
    async def collect_garbage(caller: Admin, body: Body) -> Collected:
        options = await body.read_json(GcRequest, default=b"{}")
        return await administration.collect_garbage(caller, options.older_than_s)
