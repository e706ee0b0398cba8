"""Limits that hold for every tenant and that no setting changes. `docs/tenants.md` has the same table.

Every number is per tenant. This module imports nothing: gateways, workers and the registry use these numbers, and none
of those may import another.

An admin sets a tenant's other limits (`schemas.TenantLimits`). The settings `HUB_MAX_*` limit the size of one request,
and their error is 413.
"""

GATEWAY_CALLS = 64  # running classification calls per gateway; further calls wait in the tenant's queue
GATEWAY_CALLS_BESIDE = 8  # the same while another tenant is active: more would only wait for the gateway's core
GATEWAY_CALLS_QUEUED = 448  # queued classification calls per gateway; further calls get 429
KEY_CALLS = 512  # open requests per key at HAProxy, the sum of both limits above; further requests get 429
BODY_BYTES = 512 * 1024**2  # bytes of request bodies in memory per gateway; further bytes get 429
BODY_BYTES_PER_S = 32 * 1024**2  # bytes of bodies per second per gateway beside another active tenant; others wait
PIXELS_PER_IMAGE = 2_000_000  # pixels that count as one image; a larger image counts once for each such part begun
BYTES_PER_IMAGE = 2 * 1024**2  # bytes of a JPEG or AVIF that count as one image, if its pixels count as less
ANSWERS_PER_IMAGE = 100  # answers of one call for one image that cost a gateway as much as one image
IMAGES_DECODED = 128  # images decoded or at workers per gateway; further images wait in the tenant's queue
PARSED_AT_ONCE = 1  # large JSON bodies parsed, or adapter files checked, per gateway; further ones wait for a turn
UNPACKED_AT_ONCE = 1  # steps of zips (32 images, or 16 MiB) unpacked per gateway; further ones wait for a turn
STORE_CALLS = 2  # adapter files read or written at once per gateway; further calls wait for a turn
UPLOADS = 4  # adapter files that are read and registered at once per gateway; further uploads wait, unread
UPLOADS_QUEUED = 60  # queued uploads of adapter files per gateway; further uploads get 429
REFUSED_UPLOADS = 120  # refused adapter files per minute per gateway; further uploads get 429
SOURCE_DOWNLOADS = 2  # running downloads of adapter files by reference per gateway; further calls wait
SOURCE_DOWNLOADS_QUEUED = 2  # queued downloads per gateway; further calls get 429
WORKER_IMAGES_QUEUED = 512  # images in a worker's queue; further images get 429
ADAPTER_LOADS = 4  # adapters that a worker loads at the same time; further loads wait in the tenant's queue
DELETED_FILES = 10_000  # files without a version that no collection has removed yet; further registrations get 429
CHANGES_PER_MINUTE = 600  # changes of tasks, datasets and keys with keys of the tenant; further changes get 429
SHARES = 10_000  # names of tenants in the sharing of all tasks together; further names get 429
SHARED_WITH_ONE = 1000  # tasks that the tenant shares with one other tenant by name; further ones get 429
AUDIT_ENTRIES = 10_000  # kept entries of the tenant in its own audit and in the hub's; older entries are removed
API_KEYS = 1000  # API keys; further keys get 429
DATASET_LABELS = 10_000  # labels of one dataset; further labels get 429
IMAGE_UPLOADS = 4  # running uploads to datasets per gateway; further uploads wait in the tenant's queue
IMAGE_UPLOADS_QUEUED = 32  # queued uploads per gateway; further uploads get 429
REVIEWS = 1  # running calls for a review queue or near-duplicates per gateway; further calls wait in the tenant's queue
REVIEWS_QUEUED = 8  # queued calls of these kinds per gateway; further calls get 429
KEPT_QUEUED = 64  # classified images per gateway that wait to be kept; further ones are not kept
WORKER_FEATURES_QUEUED = 1024  # images that wait for features at a worker; further images are computed later
TRAININGS = 1  # running trainings with recipe `instant` per gateway; further trainings wait in the tenant's queue
TRAININGS_QUEUED = 8  # queued trainings per gateway; further trainings get 429
FITS = 1  # classifiers of datasets that one gateway fits; further ones wait for the tenant's turn
TRAINING_JOBS = 20  # queued and running jobs of recipes `karst` and `auto`; further ones get 429
TRAINING_BYTES = 4 * 1024**3  # bytes of snapshots and reports; oldest ones make room, then further trainings get 429
TRAINING_STREAMS = 16  # open streams of progress per gateway; further ones get 429
COMPARISONS = 1  # running comparisons of versions per gateway; further ones wait in the tenant's queue
COMPARISONS_QUEUED = 4  # queued comparisons per gateway; further ones get 429
USAGE_LABELS = 100  # labels in the usage of a version's day; further labels share the name `other`
USAGE_VERSIONS = 16  # versions in the usage of a task's day; further versions share the name `other`
USAGE_TASK_BYTES = 4 * 1024**2  # bytes of a task's usage in the registry; its oldest days are removed
USAGE_BYTES = 64 * 1024**2  # bytes of the usage of all tasks in the registry; oldest days of the next task are removed
USAGE_QUEUED = 10_000  # counts per gateway that wait to be written; further labels are `other`, further tasks are lost
EXPORTS = 1  # exports that one gateway prepares or sends; further exports wait
EXPORTS_QUEUED = 16  # queued exports per gateway; further ones get 429
LARGE_REPLIES = 8  # files, thumbnails, lists of images, trainings, keys, audit that one gateway sends; others wait
LARGE_REPLIES_QUEUED = 504  # queued requests of this kind per gateway; further ones get 429
REPLY_BYTES = 256 * 1024**2  # bytes of large replies in memory per gateway; a further reply is dropped for 429
REGISTRY_READS = 2  # running reads of tasks with their versions per gateway; further reads wait
REGISTRY_BYTES = 128 * 1024**2  # bytes of tasks, versions' metadata and trainings in the registry; further get 429
