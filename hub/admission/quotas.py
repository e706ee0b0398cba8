"""Limits that hold for every tenant and that no setting changes. `docs/tenants.md` has the same table.

Every number is per tenant. This module imports nothing: gateways, workers and the registry use these numbers, and none
of those may import another.

An admin sets a tenant's other limits (`schemas.TenantLimits`). The settings `HUB_MAX_*` limit the size of one request,
and their error is 413.
"""

GATEWAY_CALLS = 64  # running classification calls per gateway; further calls wait in the tenant's queue
GATEWAY_CALLS_QUEUED = 448  # queued classification calls per gateway; further calls get 429
KEY_CALLS = 512  # open requests per key at HAProxy, the sum of both limits above; further requests get 429
BODY_BYTES = 512 * 1024**2  # bytes of request bodies in memory per gateway; further bytes get 429
IMAGES_DECODED = 128  # images decoded or at workers per gateway; further images wait in the tenant's queue
SOURCE_DOWNLOADS = 2  # running downloads of adapter files by reference per gateway; further calls wait
SOURCE_DOWNLOADS_QUEUED = 2  # queued downloads per gateway; further calls get 429
WORKER_IMAGES_QUEUED = 512  # images in a worker's queue; further images get 429
ADAPTER_LOADS = 4  # adapters that a worker loads at the same time; further loads wait in the tenant's queue
API_KEYS = 1000  # API keys; further keys get 429
REGISTRY_READS = 2  # running reads of tasks with their versions per gateway; further reads wait
REGISTRY_BYTES = 128 * 1024**2  # bytes of tasks and metadata of versions in the registry; further ones get 429
