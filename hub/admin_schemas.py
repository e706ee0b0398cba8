"""JSON bodies of the routes for tenants, keys, limits, audit and status; see `schemas` for those of tasks."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, model_validator

from .control_characters import PLAIN
from .dataset_schemas import TrainingProgress, TrainingState
from .field_types import NUMBER, ORIGIN_PATTERN, Name, TaskName
from .field_types import Body as _Body

NEXT_CURSOR: Any = Field(
    None,
    exclude_if=lambda value: value is None,
    description="the parameter `cursor` of the next page; absent on the last page",
)


class TenantLimits(_Body):
    """Limits of a tenant over all gateways."""

    requests_per_second: float = Field(200.0, ge=1e-3, le=1e6, description="requests of any kind per second")
    images_per_second: float = Field(1000.0, ge=1e-3, le=1e7, description="classified images per second")
    images_in_flight: int = Field(1024, ge=1, le=10**6, description="images of unfinished requests")
    tasks: int = Field(1000, ge=0, le=10**7, description="tasks of the tenant")
    versions: int = Field(100, ge=0, le=10**5, description="versions per task")
    stored_bytes: int = Field(
        10 * 1024**3,
        ge=0,
        le=10**14,
        description="bytes of adapter files: of all versions, and of deleted ones until their removal",
    )
    images: int = Field(200_000, ge=0, le=10**8, description="images in the datasets of all tasks")
    image_bytes: int = Field(20 * 1024**3, ge=0, le=10**14, description="bytes of the images in the datasets")
    weight: float = Field(1.0, ge=0.01, le=100, description="share of a busy worker relative to other tenants")


class LimitsChange(_Body):
    """Limits to change; an omitted limit keeps its value."""

    requests_per_second: Annotated[float, Field(ge=1e-3, le=1e6), NUMBER] | None = None
    images_per_second: Annotated[float, Field(ge=1e-3, le=1e7), NUMBER] | None = None
    images_in_flight: Annotated[int, Field(ge=1, le=10**6), NUMBER] | None = None
    tasks: Annotated[int, Field(ge=0, le=10**7), NUMBER] | None = None
    versions: Annotated[int, Field(ge=0, le=10**5), NUMBER] | None = None
    stored_bytes: Annotated[int, Field(ge=0, le=10**14), NUMBER] | None = None
    images: Annotated[int, Field(ge=0, le=10**8), NUMBER] | None = None
    image_bytes: Annotated[int, Field(ge=0, le=10**14), NUMBER] | None = None
    weight: Annotated[float, Field(ge=0.01, le=100), NUMBER] | None = None

    def on(self, limits: TenantLimits) -> TenantLimits:
        """Return the limits after the change."""
        return limits.model_copy(update=self.model_dump(exclude_none=True))


class TenantInfo(_Body):
    tenant: str
    created: str
    limits: TenantLimits


class TenantList(_Body):
    tenants: list[TenantInfo]
    next: str | None = NEXT_CURSOR


class NewTenant(_Body):
    tenant: Name
    limits: LimitsChange = LimitsChange()


class TenantChange(_Body):
    limits: LimitsChange


class KeyInfo(_Body):
    """Facts about a key without the key itself. Times are RFC 3339."""

    id: str
    name: str
    role: Literal["admin", "owner", "caller"]
    created: str
    expires: str | None
    last_used: str | None
    tasks: list[str] | None = None  # that the key may use; null: all
    origins: list[str] | None = None  # web origins that the key works from; null: any client


class KeyList(_Body):
    """A page of keys, oldest first. From page to page the keys are in the order of their ids."""

    keys: list[KeyInfo]
    next: str | None = NEXT_CURSOR


class AdminKeyRequest(_Body):
    """Request for a new admin key."""

    name: Annotated[str, Field(min_length=1, max_length=100), PLAIN]
    expires: Annotated[AwareDatetime, Field(strict=True)] | None = None


Origin = Annotated[str, Field(max_length=300, pattern=ORIGIN_PATTERN)]


class KeyRequest(AdminKeyRequest):
    """Request for a new key of a tenant. A key with `tasks` or `origins` must be a caller's key."""

    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "properties": {"role": {"const": "owner"}},
                "required": ["role"],
                "anyOf": [
                    {"properties": {name: {"type": "array"}}, "required": [name]} for name in ("tasks", "origins")
                ],
            }
        }
    )

    role: Literal["owner", "caller"] = "caller"
    tasks: Annotated[list[TaskName], Field(min_length=1, max_length=100)] | None = None
    origins: Annotated[list[Origin], Field(min_length=1, max_length=20)] | None = None

    @model_validator(mode="after")
    def _only_callers_are_bound(self) -> "KeyRequest":
        if self.role == "owner" and (self.tasks is not None or self.origins is not None):
            raise ValueError("an owner's key cannot be bound to tasks or origins; use the role caller")
        return self


class TokenRequest(_Body):
    """Request for a token: a substitute for the calling key, for one task and at most an hour."""

    task: TaskName
    expires_s: Annotated[int, Field(ge=1, le=3600, description="seconds until the token expires"), NUMBER] = 3600
    origins: Annotated[list[Origin], Field(min_length=1, max_length=20)] | None = None


class NewToken(_Body):
    """A new token. Clients send it as they send a key."""

    token: str
    task: str
    expires: str
    origins: list[str] | None


class NewKey(KeyInfo):
    """A new key. No later reply contains the key again."""

    key: str


class Login(_Body):
    """New keys of a login link; a link gives one or both."""

    tenant: str | None
    key: str | None
    admin_key: str | None
    expires: str


class UsedNow(_Body):
    """Current use of a tenant."""

    tasks: int
    stored_bytes: int
    deleted_bytes: int = Field(
        0, description="bytes of files without a version that no collection has removed yet; they count as stored"
    )
    images_in_flight: int
    images: int = 0
    image_bytes: int = 0
    training_bytes: int = Field(0, description="bytes of the snapshots and reports of trainings")


class Counted(_Body):
    """Counters of a tenant since its creation."""

    requests: int
    images: int
    refused: int


class Usage(_Body):
    tenant: str
    limits: TenantLimits
    used: UsedNow
    counted: Counted


class AuditEntry(_Body):
    """One change: its time, its key, the client's address as the gateway saw it, and the action."""

    id: str
    at: str
    key: str
    name: str
    role: str
    address: str
    tenant: str
    action: str
    detail: dict[str, Any]


class AuditPage(_Body):
    """Changes, oldest first. `next` is the parameter `after` of the next page; null on the last page."""

    entries: list[AuditEntry]
    next: str | None


class TaskRate(_Body):
    """Current rate of a task, under the name that the calling tenant uses."""

    tenant: str
    task: str
    images_per_second: float


class WorkerStatus(_Body):
    """Current state of a worker, and its counters since its start."""

    worker: str
    uptime_s: float
    device: str
    slots: int
    slots_used: int
    host_bytes: int
    host_limit_bytes: int
    waiting: int  # queued images
    images_per_second: float
    images_per_pass: float
    adapters_per_pass: float
    tasks: list[TaskRate]  # the busiest tasks
    hits: int
    loads: int
    load_s: float
    evictions: int
    failures: int
    # The form of each kind of frozen layer, and the milliseconds that each form took at start.
    frozen_layers: list[str] = Field(default_factory=list)


class TenantStatus(_Body):
    """A tenant with requests in the last minute."""

    tenant: str
    images_in_flight: int
    counted: Counted


class ErrorCount(_Body):
    """Refused and failed requests of one kind in the last hour, with the minute of the last one.

    `kind` is the code of the problem's type, or `http-<status>` for a reply without one. `http-499`: the client
    disconnected.
    """

    kind: str
    status: int
    count: int
    last: str


class HubStatus(_Body):
    """Current state of the hub."""

    workers: list[WorkerStatus]
    tasks: list[TaskRate]  # the busiest over all workers
    tenants: list[TenantStatus]
    errors: list[ErrorCount] = Field(default=[])  # of the last hour, the most frequent kind first
    # Why changes are refused now, with the remedy: Redis may evict keys. The state of the gateway that answers.
    changes_refused: str | None = None


class HubTraining(_Body):
    """A training of any tenant. `images` are those of its snapshot, `ended` is the time of its end."""

    tenant: str
    task: str
    id: str
    recipe: str
    state: TrainingState
    created: str
    started: str | None
    ended: str | None
    seconds: float
    images: int
    progress: TrainingProgress | None
    version: int | None
    error: str | None


class HubTrainingList(_Body):
    """Trainings of all tenants: running ones, queued ones in the order in which they start, then the last ended ones.

    Each part has at most 100 trainings. `running` and `queued` count all.
    """

    trainings: list[HubTraining]
    running: int
    queued: int


class GcRequest(_Body):
    older_than_s: Annotated[int, Field(ge=0, le=10**9, description="delete only older files"), NUMBER] = 3600


class Collected(_Body):
    """Result of a garbage collection: deleted files, their bytes, and remaining files."""

    removed: int
    bytes: int
    kept: int
