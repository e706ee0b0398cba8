"""JSON bodies of the HTTP API under /v1, shared by gateway and client."""

import re
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
TASK_PATTERN = r"^([a-z0-9][a-z0-9_-]{0,62}:)?[a-z0-9][a-z0-9_-]{0,62}$"  # `task`, or `tenant:task`
DIGEST_PATTERN = r"^[0-9a-f]{64}$"
LATEST = "latest"
MAX_IMAGES = 64


def _number(value: Any) -> Any:
    """Refuse text and booleans, which pydantic would convert. Its strict integers would refuse 1.0, a JSON number."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_type", "must be a number")
    return value


def _weight(value: Any) -> Any:
    """Refuse a fraction with an example, since weights are often taken for shares of 1."""
    if isinstance(value, float) and not value.is_integer():
        message = "is {value}; weights are whole numbers, such as 90 and 10"
        raise PydanticCustomError("weight", message, {"value": value})
    return _number(value)


def _weights(value: Any) -> Any:
    """Refuse all keys but plain numbers: pydantic would read `01` as 1, and one of two targets would be lost."""
    if not isinstance(value, dict):
        message = "must map versions to weights, such as {example}"
        raise PydanticCustomError("weights", message, {"example": '{"3": 90, "4": 10}'})
    for key in value:
        if not re.fullmatch("[1-9][0-9]*", str(key)):
            raise PydanticCustomError("version", "{key} is not a version number, such as 3", {"key": repr(key)[:40]})
    return value


NUMBER = BeforeValidator(_number)
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
TaskName = Annotated[str, Field(pattern=TASK_PATTERN)]
VersionNumber = Annotated[int, Field(ge=1, le=2**53)]  # largest integer that every JSON parser reads exactly
Reference = Annotated[str, Field(max_length=63)]  # a version's number or an alias
Weight = Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(_weight)]


# Metrics of a version: prefix of the names, name of the number of images, and what these images are; best first.
ACCURACIES: tuple[
    tuple[str, str, Literal["test images", "held-out images", "left-out images", "validation images"]], ...
] = (
    ("test", "test_images", "test images"),
    ("held_out", "train_images", "held-out images"),
    ("leave_one_out", "train_images", "left-out images"),
    ("val", "val_images", "validation images"),
)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasuredAccuracy(_Body):
    """Accuracy that a version's training recorded, on images that did not train it."""

    accuracy: float
    interval: tuple[float, float] | None  # 95 % confidence
    images: int | None
    measured_on: Literal["test images", "held-out images", "left-out images", "validation images"]


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
        metrics = self.metrics or {}
        for prefix, counted, measured_on in ACCURACIES:
            value, interval = metrics.get(f"{prefix}_accuracy"), metrics.get(f"{prefix}_interval")
            if not _is_share(value):
                continue
            pair = None
            if isinstance(interval, list) and len(interval) == 2 and all(map(_is_share, interval)):
                pair = interval[0], interval[1]
            return MeasuredAccuracy(
                accuracy=value,
                interval=pair,
                images=_count(metrics.get(counted)),
                measured_on=measured_on,
            )
        return None

    def train_images(self) -> int | None:
        """Return the number of training images in the adapter's metrics."""
        return _count((self.metrics or {}).get("train_images"))


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
    weights: Annotated[dict[VersionNumber, Weight], Field(min_length=1), BeforeValidator(_weights)] | None = None

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
