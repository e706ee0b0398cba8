"""What goes over the wire, shared by gateway and client."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
LATEST = "latest"
MAX_IMAGES = 64

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
VersionNumber = Annotated[int, Field(ge=1, le=2**53)]  # as far as every JSON reader counts exactly
Reference = Annotated[str, Field(max_length=63)]  # a version's number or an alias
Weight = Annotated[int, Field(ge=1, le=1_000_000)]


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


class TaskInfo(_Wire):
    """A task with its versions, and what each alias points at: version -> weight."""

    task: str
    labels: list[str]
    versions: list[VersionInfo]
    aliases: dict[str, dict[int, int]]


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

    version: VersionNumber | None = None
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

    task: Name
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


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblemInfo] = []


class Health(_Wire):
    status: Literal["ok"] = "ok"
