"""What goes over the wire, shared by gateway and client."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
TASK_PATTERN = r"^([a-z0-9][a-z0-9_-]{0,62}:)?[a-z0-9][a-z0-9_-]{0,62}$"  # `task`, or `tenant:task`
LATEST = "latest"
MAX_IMAGES = 64


def _number(value: Any) -> Any:
    """Pydantic would take text and booleans, too; its strict integers would refuse 1.0, which JSON writes for 1."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


NUMBER = BeforeValidator(_number)
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
TaskName = Annotated[str, Field(pattern=TASK_PATTERN)]
VersionNumber = Annotated[int, Field(ge=1, le=2**53)]  # as far as every JSON reader counts exactly
Reference = Annotated[str, Field(max_length=63)]  # a version's number or an alias
Weight = Annotated[int, Field(ge=1, le=1_000_000), NUMBER]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VersionInfo(_Wire):
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


class Registered(VersionInfo):
    """The answer to a registration."""

    task: str


class Sharing(_Wire):
    """Who beside its own tenant may see a task and classify with it, as `tenant:task`: all tenants, or some."""

    public: Annotated[bool, Field(strict=True)] = False
    tenants: list[Name] = Field(default=[], max_length=1000)

    def allows(self, tenant: str) -> bool:
        return self.public or tenant in self.tenants


class TaskInfo(_Wire):
    """A task with its versions, and what each alias points at: version -> weight."""

    task: str
    labels: list[str]
    versions: list[VersionInfo]
    aliases: dict[str, dict[int, int]]
    sharing: Sharing | None = None  # the owner's to know


class SourceBody(_Wire):
    """Where the hub finds an adapter file by itself, and what its sha256 must be."""

    source: Annotated[str, Field(min_length=1, max_length=2048)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class TaskSummary(_Wire):
    """A task in a list."""

    task: str
    latest: int | None
    classes: int
    aliases: dict[str, dict[int, int]]


class TaskList(_Wire):
    tasks: list[TaskSummary]


class AliasChange(_Wire):
    """Where an alias shall point: one version, or several with weights (a canary)."""

    version: Annotated[VersionNumber, NUMBER] | None = None
    weights: Annotated[dict[VersionNumber, Weight], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "AliasChange":
        if (self.version is None) == (self.weights is None):
            raise ValueError("give either version or weights")
        return self

    def targets(self) -> dict[int, int]:
        """Version -> weight."""
        return self.weights if self.weights is not None else {self.version: 1}  # type: ignore[dict-item]


class Prediction(_Wire):
    """A label and its probability."""

    label: str
    score: float


class ImagesBody(_Wire):
    """Images as base64 text, RFC 4648 section 4."""

    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)


class Classified(_Wire):
    """The answer to one task's classification: for each image its best labels, best first."""

    task: str
    version: int
    digest: str
    predictions: list[list[Prediction]]


class Input(_Wire):
    """One image for one task."""

    task: TaskName
    image: str
    version: Reference = LATEST


class InputsBody(_Wire):
    inputs: list[Input] = Field(min_length=1, max_length=MAX_IMAGES)


class Result(_Wire):
    """One input's answer."""

    task: str
    version: int
    digest: str
    predictions: list[Prediction]


class Results(_Wire):
    """The answer to a call for several tasks, in the order of its inputs."""

    results: list[Result]


class FieldProblemInfo(_Wire):
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


class Health(_Wire):
    status: Literal["ok"] = "ok"


class TenantLimits(_Wire):
    """What a tenant may use, over all gateways."""

    requests_per_second: float = Field(200.0, ge=1e-3, le=1e6, description="calls of any kind")
    images_per_second: float = Field(1000.0, ge=1e-3, le=1e7)
    images_in_flight: int = Field(1024, ge=1, le=10**6, description="images accepted and not yet answered")
    tasks: int = Field(1000, ge=0, le=10**7)
    versions: int = Field(100, ge=0, le=10**5, description="versions a task")
    stored_bytes: int = Field(10 * 1024**3, ge=0, le=10**14, description="bytes of all versions' adapter files")
    weight: float = Field(1.0, ge=0.01, le=100, description="share of a busy worker beside other tenants'")


class LimitsChange(_Wire):
    """Limits to change; the others stay."""

    requests_per_second: Annotated[float, Field(ge=1e-3, le=1e6), NUMBER] | None = None
    images_per_second: Annotated[float, Field(ge=1e-3, le=1e7), NUMBER] | None = None
    images_in_flight: Annotated[int, Field(ge=1, le=10**6), NUMBER] | None = None
    tasks: Annotated[int, Field(ge=0, le=10**7), NUMBER] | None = None
    versions: Annotated[int, Field(ge=0, le=10**5), NUMBER] | None = None
    stored_bytes: Annotated[int, Field(ge=0, le=10**14), NUMBER] | None = None
    weight: Annotated[float, Field(ge=0.01, le=100), NUMBER] | None = None

    def on(self, limits: TenantLimits) -> TenantLimits:
        return limits.model_copy(update=self.model_dump(exclude_none=True))


class TenantInfo(_Wire):
    tenant: str
    created: str
    limits: TenantLimits


class TenantList(_Wire):
    tenants: list[TenantInfo]


class NewTenant(_Wire):
    tenant: Name
    limits: LimitsChange = LimitsChange()


class TenantChange(_Wire):
    limits: LimitsChange


class KeyInfo(_Wire):
    """What is known of a key; never the key itself. Times are RFC 3339."""

    id: str
    name: str
    role: Literal["admin", "owner", "caller"]
    created: str
    expires: str | None
    last_used: str | None


class KeyList(_Wire):
    keys: list[KeyInfo]


class AdminKeyRequest(_Wire):
    """A new admin key."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    expires: Annotated[AwareDatetime, Field(strict=True)] | None = None


class KeyRequest(AdminKeyRequest):
    """A new key of a tenant."""

    role: Literal["owner", "caller"] = "caller"


class NewKey(KeyInfo):
    """A key that was made just now: the one time that it is shown."""

    key: str


class UsedNow(_Wire):
    """What a tenant has and does at this moment."""

    tasks: int
    stored_bytes: int
    images_in_flight: int


class Counted(_Wire):
    """What a tenant has done since it was made."""

    requests: int
    images: int
    refused: int


class Usage(_Wire):
    tenant: str
    limits: TenantLimits
    used: UsedNow
    counted: Counted


class AuditEntry(_Wire):
    """A change: when, by which key, from where, and what. `address` is the sender's as the gateway saw it."""

    id: str
    at: str
    key: str
    name: str
    role: str
    address: str
    tenant: str
    action: str
    detail: dict[str, Any]


class AuditPage(_Wire):
    """Changes, oldest first; `next` is the `after` of the next page, None at the end."""

    entries: list[AuditEntry]
    next: str | None


class TaskRate(_Wire):
    """A task, as the tenant that calls it names it, and what it has at this moment."""

    tenant: str
    task: str
    images_per_second: float


class WorkerStatus(_Wire):
    """What a worker does at this moment, and what it did since it started."""

    worker: str
    uptime_s: float
    device: str
    slots: int
    slots_used: int
    host_bytes: int
    host_limit_bytes: int
    waiting: int  # images
    images_per_second: float
    images_per_pass: float
    adapters_per_pass: float
    tasks: list[TaskRate]  # the busiest
    hits: int
    loads: int
    load_s: float
    evictions: int
    failures: int


class TenantStatus(_Wire):
    """A tenant that did something in the last minute."""

    tenant: str
    images_in_flight: int
    counted: Counted


class HubStatus(_Wire):
    """What the hub does at this moment."""

    workers: list[WorkerStatus]
    tasks: list[TaskRate]  # the busiest over all workers
    tenants: list[TenantStatus]


class GcRequest(_Wire):
    older_than_s: Annotated[int, Field(ge=0, le=10**9, description="age of a file that may go"), NUMBER] = 3600


class Collected(_Wire):
    """What a collection removed, and what it left."""

    removed: int
    bytes: int
    kept: int
