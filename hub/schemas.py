"""JSON bodies of the HTTP API under /v1, shared by gateway and client."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from .field_types import (
    DIGEST_PATTERN,
    NUMBER,
    MeasuredAccuracy,
    Name,
    Reference,
    TaskName,
    VersionNumber,
    VersionWeights,
    accuracy_of,
    count_of,
)
from .field_types import Body as _Body

LATEST = "latest"
MAX_IMAGES = 64


class VersionInfo(_Body):
    """One immutable version of a task."""

    version: int
    digest: str
    labels: list[str]
    backbone: str
    fingerprint: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    metrics: dict[str, Any] | None
    size_bytes: int
    registered: str

    def measured_accuracy(self) -> MeasuredAccuracy | None:
        """Return the accuracy in the adapter's metrics, which the training tool wrote; None if there is none."""
        return accuracy_of(self.metrics or {})

    def train_images(self) -> int | None:
        """Return the number of training images in the adapter's metrics."""
        return count_of((self.metrics or {}).get("train_images"))


class Registered(VersionInfo):
    """Reply to a registration."""

    task: str


class Sharing(_Body):
    """Tenants that may see a task and classify with it as `tenant:task`, besides the task's own tenant."""

    public: Annotated[bool, Field(strict=True)] = False
    tenants: list[Name] = Field(default=[], max_length=1000)

    def allows(self, tenant: str) -> bool:
        """Return whether another tenant may use the task."""
        return self.public or tenant in self.tenants


class TaskInfo(_Body):
    """A task with its versions and aliases. An alias maps versions to weights."""

    task: str
    labels: list[str]
    versions: list[VersionInfo]
    aliases: dict[str, dict[int, int]]
    sharing: Sharing | None = None  # only in replies to the task's own tenant


class SourceBody(_Body):
    """URL of an adapter file that the hub downloads, and the sha256 that the file must have."""

    source: Annotated[str, Field(min_length=1, max_length=2048)]
    digest: Annotated[str, Field(pattern=DIGEST_PATTERN)] | None = None


class TaskSummary(_Body):
    """One task of a list. `classes` and the fields after `aliases` describe the version of the alias `latest`."""

    task: str
    latest: int | None
    classes: int
    aliases: dict[str, dict[int, int]]
    accuracy: MeasuredAccuracy | None = None
    train_images: int | None = None
    registered: str | None = None


class TaskList(_Body):
    tasks: list[TaskSummary]


class AliasChange(_Body):
    """New target of an alias: one version, or several versions with weights (a canary)."""

    version: Annotated[VersionNumber, NUMBER] | None = None
    weights: VersionWeights | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "AliasChange":
        if (self.version is None) == (self.weights is None):
            raise ValueError("set either version or weights, not both")
        return self

    def targets(self) -> dict[int, int]:
        """Return version -> weight."""
        return self.weights if self.weights is not None else {self.version: 1}  # type: ignore[dict-item]


class Prediction(_Body):
    """A label and its probability."""

    label: str
    score: float


class ClassifyOptions(_Body):
    """Options of a classification in its body; None: as in the query. An option may be set only once."""

    top_k: Annotated[int, Field(ge=1, le=1000, description="labels per image"), NUMBER] | None = None
    version: Annotated[Reference, Field(description="a version's number or an alias")] | None = None


class ImagesBody(ClassifyOptions):
    """Images as base64 texts (RFC 4648), and options."""

    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)


class Classified(_Body):
    """Reply to a classification with one task: for each image its best labels, best first."""

    task: str
    version: int
    digest: str
    predictions: list[list[Prediction]]


class Input(_Body):
    """One image and its task."""

    task: TaskName
    image: str
    version: Reference = LATEST


class InputsBody(_Body):
    inputs: list[Input] = Field(min_length=1, max_length=MAX_IMAGES)
    top_k: Annotated[int, Field(ge=1, le=1000, description="labels per image"), NUMBER] | None = None


class Result(_Body):
    """Predictions of one input."""

    task: str
    version: int
    digest: str
    predictions: list[Prediction]


class Results(_Body):
    """Reply to a classification with several tasks, in the order of its inputs."""

    results: list[Result]


class FieldProblemInfo(_Body):
    field: str
    message: str


class ProblemDetails(BaseModel):
    """An error as RFC 9457 problem details."""

    model_config = ConfigDict(title="Problem")

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblemInfo] = []


class Health(_Body):
    status: Literal["ok"] = "ok"


class TenantLimits(_Body):
    """Limits of a tenant over all gateways."""

    requests_per_second: float = Field(200.0, ge=1e-3, le=1e6, description="requests of any kind per second")
    images_per_second: float = Field(1000.0, ge=1e-3, le=1e7, description="classified images per second")
    images_in_flight: int = Field(1024, ge=1, le=10**6, description="images of unfinished requests")
    tasks: int = Field(1000, ge=0, le=10**7, description="tasks of the tenant")
    versions: int = Field(100, ge=0, le=10**5, description="versions per task")
    stored_bytes: int = Field(10 * 1024**3, ge=0, le=10**14, description="bytes of the adapter files of all versions")
    weight: float = Field(1.0, ge=0.01, le=100, description="share of a busy worker relative to other tenants")


class LimitsChange(_Body):
    """Limits to change; an omitted limit keeps its value."""

    requests_per_second: Annotated[float, Field(ge=1e-3, le=1e6), NUMBER] | None = None
    images_per_second: Annotated[float, Field(ge=1e-3, le=1e7), NUMBER] | None = None
    images_in_flight: Annotated[int, Field(ge=1, le=10**6), NUMBER] | None = None
    tasks: Annotated[int, Field(ge=0, le=10**7), NUMBER] | None = None
    versions: Annotated[int, Field(ge=0, le=10**5), NUMBER] | None = None
    stored_bytes: Annotated[int, Field(ge=0, le=10**14), NUMBER] | None = None
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


class KeyList(_Body):
    keys: list[KeyInfo]


class AdminKeyRequest(_Body):
    """Request for a new admin key."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    expires: Annotated[AwareDatetime, Field(strict=True)] | None = None


class KeyRequest(AdminKeyRequest):
    """Request for a new key of a tenant."""

    role: Literal["owner", "caller"] = "caller"


class NewKey(KeyInfo):
    """A new key. No later reply contains the key again."""

    key: str


class UsedNow(_Body):
    """Current use of a tenant."""

    tasks: int
    stored_bytes: int
    images_in_flight: int


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


class TenantStatus(_Body):
    """A tenant with requests in the last minute."""

    tenant: str
    images_in_flight: int
    counted: Counted


class HubStatus(_Body):
    """Current state of the hub."""

    workers: list[WorkerStatus]
    tasks: list[TaskRate]  # the busiest over all workers
    tenants: list[TenantStatus]


class GcRequest(_Body):
    older_than_s: Annotated[int, Field(ge=0, le=10**9, description="delete only older files"), NUMBER] = 3600


class Collected(_Body):
    """Result of a garbage collection: deleted files, their bytes, and remaining files."""

    removed: int
    bytes: int
    kept: int
