"""HTTP: the routes of tenants, keys, limits, use and audit; an owner reaches its own tenant's, an admin all."""

from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.responses import StreamingResponse

from ..admission.authentication import Caller
from ..registry.tenants import ADMIN
from ..schemas import (
    NAME_PATTERN,
    AdminKeyRequest,
    AuditPage,
    Collected,
    GcRequest,
    HubStatus,
    KeyList,
    KeyRequest,
    NewKey,
    NewTenant,
    TaskList,
    TenantChange,
    TenantInfo,
    TenantList,
    Usage,
)
from ..services.administration import Administration
from .dependencies import BINARY, JSON, MAX_CHANGE_BYTES, Doors, documented, parse_json, read_body, schema_of

TAR = "application/x-tar"
TenantName = Annotated[str, Path(pattern=NAME_PATTERN)]
KeyId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="a key's public id")]
After = Annotated[str, Query(pattern=r"^[0-9]{1,15}(-[0-9]{1,10})?$", description="`next` of the page before")]
Count = Annotated[int, Query(ge=1, le=1000)]


def add_administration(api: FastAPI, administration: Administration, doors: Doors) -> None:
    """Add the routes to an application."""
    tenants = administration.tenants
    Any = Annotated[Caller, Depends(doors.any_key)]
    Member = Annotated[Caller, Depends(doors.tenant_key)]
    Admin = Annotated[Caller, Depends(doors.admin)]

    async def manager(who: Any, tenant: TenantName) -> Caller:
        who.must_manage(tenant)
        return who

    Manager = Annotated[Caller, Depends(manager)]

    @api.get("/v1/usage")
    async def own_usage(who: Member) -> Usage:
        return await tenants.usage(who.tenant)

    @api.get("/v1/tenants")
    async def list_tenants(_who: Admin) -> TenantList:
        return TenantList(tenants=await tenants.all())

    @api.post("/v1/tenants", status_code=201, openapi_extra=documented({JSON: schema_of(NewTenant)}))
    async def create_tenant(who: Admin, request: Request) -> TenantInfo:
        new = parse_json(NewTenant, await read_body(request, MAX_CHANGE_BYTES, "body"))
        return await tenants.create(who, new.tenant, new.limits)

    @api.get("/v1/tenants/{tenant}")
    async def get_tenant(_who: Manager, tenant: TenantName) -> TenantInfo:
        return await tenants.get(tenant)

    @api.patch("/v1/tenants/{tenant}", openapi_extra=documented({JSON: schema_of(TenantChange)}))
    async def change_tenant(who: Admin, tenant: TenantName, request: Request) -> TenantInfo:
        change = parse_json(TenantChange, await read_body(request, MAX_CHANGE_BYTES, "body"))
        return await administration.change_limits(who, tenant, change.limits)

    @api.delete("/v1/tenants/{tenant}", status_code=204)
    async def delete_tenant(who: Admin, tenant: TenantName) -> None:
        await administration.delete(who, tenant)

    @api.get("/v1/tenants/{tenant}/usage")
    async def get_usage(_who: Manager, tenant: TenantName) -> Usage:
        return await tenants.usage(tenant)

    @api.get("/v1/tenants/{tenant}/keys")
    async def list_keys(_who: Manager, tenant: TenantName) -> KeyList:
        return KeyList(keys=await tenants.keys(tenant))

    @api.post("/v1/tenants/{tenant}/keys", status_code=201, openapi_extra=documented({JSON: schema_of(KeyRequest)}))
    async def create_key(who: Manager, tenant: TenantName, request: Request) -> NewKey:
        new = parse_json(KeyRequest, await read_body(request, MAX_CHANGE_BYTES, "body"))
        return await tenants.add_key(who, tenant, new.role, new.name, new.expires)

    @api.delete("/v1/tenants/{tenant}/keys/{id}", status_code=204)
    async def revoke_key(who: Manager, tenant: TenantName, id: KeyId) -> None:
        await administration.revoke(who, tenant, id)

    @api.get("/v1/tenants/{tenant}/audit")
    async def get_audit(_who: Manager, tenant: TenantName, after: After = "0", count: Count = 100) -> AuditPage:
        return await administration.audit(tenant, after, count)

    @api.get(
        "/v1/tenants/{tenant}/export",
        response_class=StreamingResponse,
        responses={200: {"content": {TAR: {"schema": BINARY}}}},
    )
    async def export_tenant(_who: Manager, tenant: TenantName) -> StreamingResponse:
        export = await administration.export(tenant)
        headers = {
            "content-disposition": f'attachment; filename="{tenant}.tar"',
            "content-length": str(export.size_bytes),
        }
        return StreamingResponse(export.chunks, media_type=TAR, headers=headers)

    @api.post("/v1/tenants/{tenant}/import", status_code=201, openapi_extra=documented({TAR: BINARY}))
    async def import_tenant(who: Admin, tenant: TenantName, request: Request) -> TaskList:
        return await administration.restore(who, tenant, request.stream())

    @api.get("/v1/admin/keys")
    async def list_admin_keys(_who: Admin) -> KeyList:
        return KeyList(keys=await tenants.keys(""))

    @api.post("/v1/admin/keys", status_code=201, openapi_extra=documented({JSON: schema_of(AdminKeyRequest)}))
    async def create_admin_key(who: Admin, request: Request) -> NewKey:
        new = parse_json(AdminKeyRequest, await read_body(request, MAX_CHANGE_BYTES, "body"))
        return await tenants.add_key(who, "", ADMIN, new.name, new.expires)

    @api.delete("/v1/admin/keys/{id}", status_code=204)
    async def revoke_admin_key(who: Admin, id: KeyId) -> None:
        await administration.revoke(who, "", id)

    @api.get("/v1/audit")
    async def get_whole_audit(
        _who: Admin, after: After = "0", count: Count = 100, of: Annotated[Literal["all", "admins"], Query()] = "all"
    ) -> AuditPage:
        return await administration.audit(None, after, count, admins=of == "admins")

    @api.get("/v1/status")
    async def get_status(_who: Admin) -> HubStatus:
        return await administration.status()

    @api.post("/v1/gc", openapi_extra=documented({JSON: schema_of(GcRequest)}, required=False))
    async def collect(who: Admin, request: Request) -> Collected:
        ask = parse_json(GcRequest, await read_body(request, MAX_CHANGE_BYTES, "body") or b"{}")
        return await administration.collect(who, ask.older_than_s)
