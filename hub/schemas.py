"""JSON bodies of the HTTP API under /v1, shared by gateway and client."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .control_characters import PLAIN
from .errors import shown
from .field_types import (
    DIGEST_PATTERN,
    NUMBER,
    TASK_PATTERN,
    Label,
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
MAX_TASKS = 1000  # of one image
EVERY = "*"  # every task of the tenant
MAX_REPLY_BYTES = 8 * 1024**2  # of the labels and numbers of one reply to a classification
MAX_PAGE = 1000  # entries of a list in one reply
NEXT = "the parameter `cursor` of the next page; absent on the last page"
UNKNOWN_BELOW = 0.01  # default of a task: the rarest of a hundred of its own images is unknown too


def _optional(description: str | None = None) -> Any:
    """Return the default of a member that replies omit. Replies about older adapter files stay as they were."""
    return Field(None, exclude_if=lambda value: value is None, description=description)


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
    coverage: list[tuple[float, float]] | None = _optional(
        "pairs (coverage, threshold): labels whose score is at least the threshold are the set of this coverage"
    )
    typicality: Literal[True] | None = _optional("true if answers have a typicality")

    def measured_accuracy(self) -> MeasuredAccuracy | None:
        """Return the accuracy in the adapter's metrics, which the training tool wrote; None if there is none."""
        return accuracy_of(self.metrics or {})

    def train_images(self) -> int | None:
        """Return the number of training images in the adapter's metrics."""
        return count_of((self.metrics or {}).get("train_images"))


class Keep(_Body):
    """Classified images that the hub keeps in the task's dataset: their choice, their number a day, their days."""

    images: Literal["none", "uncertain", "sample", "all"] = "none"
    per_day: Annotated[int, Field(ge=1, le=100_000), NUMBER] = 200
    days: Annotated[int, Field(ge=1, le=3650), NUMBER] = 30


class TaskSettings(_Body):
    """Settings of a task. In a change, an omitted member keeps its value."""

    unknown_below: Annotated[float, Field(ge=0, le=1), NUMBER] = Field(
        UNKNOWN_BELOW, description="an image with a lower typicality is unknown"
    )
    labels: list[Label] = Field(
        default=[], max_length=1000, description="labels that the dataset lists even without images"
    )
    promote: Literal["never", "if_better", "always"] = Field(
        "never", description="whether the alias `stable` moves to each version that a training in the hub makes"
    )
    keep: Keep = Field(Keep(), description="classified images that the hub keeps")

    def given(self) -> dict[str, Any]:
        """Return the members that were set."""
        return self.model_dump(exclude_unset=True)


class LiveVersion(_Body):
    """The version behind `latest` before a registration."""

    version: int
    accuracy: MeasuredAccuracy | None


class Registered(VersionInfo):
    """Reply to a registration. `accuracy` and `previous` set the new version beside the one that was live before."""

    task: str
    moved: list[str] = Field(default=[])  # aliases that point at this version since this registration
    accuracy: MeasuredAccuracy | None = None
    previous: LiveVersion | None = None
    unknown_below: float | None = _optional("the task's setting, if the registration set it")


class Sharing(_Body):
    """Tenants that may see a task and classify with it as `tenant:task`, besides the task's own tenant."""

    public: Annotated[bool, Field(strict=True)] = False
    tenants: list[Name] = Field(default=[], max_length=1000)


class TaskInfo(_Body):
    """A task with its aliases and a page of its versions. An alias maps versions to weights."""

    task: str
    labels: list[str]
    versions: list[VersionInfo]
    aliases: dict[str, dict[int, int]]
    sharing: Sharing | None = None  # only in replies to the task's own tenant
    unknown_below: float = UNKNOWN_BELOW
    promote: str = "never"
    keep: Keep = Keep()
    next: str | None = _optional(NEXT)


class SourceBody(_Body):
    """URL of an adapter file that the hub downloads, and the sha256 that the file must have."""

    source: Annotated[str, Field(min_length=1, max_length=2048), PLAIN]
    digest: Annotated[str, Field(pattern=DIGEST_PATTERN)] | None = None


TaskSort = Literal["name", "labels", "images", "accuracy", "version", "registered"]


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
    """A page of tasks: the tenant's own, then those shared with it by name, then public ones."""

    tasks: list[TaskSummary]
    next: str | None = _optional(NEXT)


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


BodyTopK = Annotated[int, Field(ge=1, le=1000, description="labels per image"), NUMBER]
BodyCoverage = Annotated[
    float, Field(gt=0, lt=1, description="share of images that a set of labels shall cover, see `sets`"), NUMBER
]


class ClassifyOptions(_Body):
    """Options of a classification in its body; None: as in the query. An option may be set only once."""

    top_k: BodyTopK | None = None
    version: Annotated[Reference, Field(description="a version's number or an alias")] | None = None
    coverage: BodyCoverage | None = None


class ImagesBody(ClassifyOptions):
    """Images as base64 texts (RFC 4648), and options."""

    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)


class Classified(_Body):
    """Reply to a classification with one task: for each image its best labels, best first.

    Each list has one entry per image. `typicality` and `unknown` are present where the adapter has typicality, `sets`
    where the call has a coverage.
    """

    task: str
    version: int
    digest: str
    predictions: list[list[Prediction]]
    typicality: list[float] | None = _optional()
    unknown: list[bool] | None = _optional()
    sets: list[list[str]] | None = _optional()
    image: list[str | None] | None = _optional("digest of each image that the task's dataset keeps, else null")


class Input(_Body):
    """One image and its task."""

    task: TaskName
    image: str
    version: Reference = LATEST


class InputsBody(_Body):
    inputs: list[Input] = Field(min_length=1, max_length=MAX_IMAGES)
    top_k: BodyTopK | None = None
    coverage: BodyCoverage | None = None


def _every_or_names(value: Any, names: ValidatorFunctionWrapHandler) -> Any:
    """Accept `EVERY` as the only text, and a list of names."""
    if value == EVERY:
        return [EVERY]
    if isinstance(value, str):
        message = "is {value}; must be a list of names of tasks, or * for every task"
        raise PydanticCustomError("tasks", message, {"value": shown(value)})
    return names(value)


Tasks = Annotated[
    list[TaskName],
    Field(min_length=1, max_length=MAX_TASKS),
    WrapValidator(_every_or_names),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"type": "string", "pattern": TASK_PATTERN},
                    "minItems": 1,
                    "maxItems": 1000,
                },
                {"type": "string", "const": EVERY},
            ]
        }
    ),
]


class TasksBody(_Body):
    """One image and the tasks that classify it: names, or `*` for every task of the key's tenant that has a version."""

    image: str
    tasks: Tasks
    top_k: BodyTopK | None = None
    coverage: BodyCoverage | None = None

    @property
    def every(self) -> bool:
        """Whether every task of the tenant is meant."""
        return self.tasks == [EVERY]


class Result(_Body):
    """Predictions of one input. Its last members are present as in `Classified`."""

    task: str
    version: int
    digest: str
    predictions: list[Prediction]
    typicality: float | None = _optional()
    unknown: bool | None = _optional()
    set: list[str] | None = _optional()
    image: str | None = _optional("digest of the image if the task's dataset keeps it")


class SkippedTask(_Body):
    """A task among those of `*` that cannot answer, and why."""

    task: str
    reason: str


class Results(_Body):
    """Reply to a classification with several tasks, in the order of its inputs or tasks; by name for `*`."""

    results: list[Result]
    skipped: list[SkippedTask] | None = _optional("tasks of the tenant without an answer; only in replies to `*`")


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


class ServedBackbone(_Body):
    """The hub's backbone, and the sizes of adapters that its workers accept."""

    name: str
    fingerprint: str
    input_size: tuple[int, int, int] = Field(description="channels, height and width of an image, in pixels")
    image_size: int | None = Field(description="side that the hub was started with, in pixels; null: the model's own")
    checkpoint: str | None = Field(description="name of the hub's file of local weights; null: the backbone's own")
    max_rank: int
    max_kernels: int
    factor: int
