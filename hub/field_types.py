"""Types of fields of the wire models: names, numbers, weights, measured accuracies, and their checks."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from .control_characters import found_in

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
TASK_PATTERN = r"^([a-z0-9][a-z0-9_-]{0,62}:)?[a-z0-9][a-z0-9_-]{0,62}$"  # `task`, or `tenant:task`
DIGEST_PATTERN = r"^[0-9a-f]{64}$"
MAX_LABEL_CHARACTERS = 200
# As a browser sends `Origin`; other text would never match.
ORIGIN_PATTERN = r"^https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?$"


def clean_label(text: str) -> str:
    """Return a label without spaces around it, in Unicode's composed form: macOS writes file names decomposed.

    Raises:
        ValueError: the label is empty, invisible or too long, or has control characters.
    """
    if (found := found_in(text)) is not None:
        raise ValueError(f"has the control character {found}; remove it")
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        raise ValueError("is empty; give the label a name")
    if all(unicodedata.category(character) in ("Cf", "Zs") for character in text):
        raise ValueError("has no visible character; give the label a name")
    if len(text) > MAX_LABEL_CHARACTERS:
        raise ValueError(f"has {len(text)} characters (limit {MAX_LABEL_CHARACTERS}); shorten it")
    return text


def folded_label(label: str) -> str:
    """Return a text that is equal for labels which differ only in case, spaces or Unicode form."""
    return " ".join(unicodedata.normalize("NFC", label.casefold()).split())


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
Label = Annotated[str, AfterValidator(clean_label)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
TaskName = Annotated[str, Field(pattern=TASK_PATTERN)]
VersionNumber = Annotated[int, Field(ge=1, le=2**53)]  # largest integer that every JSON parser reads exactly
Reference = Annotated[str, Field(max_length=63)]  # a version's number or an alias
Weight = Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(_weight)]
VersionWeights = Annotated[dict[VersionNumber, Weight], Field(min_length=1), BeforeValidator(_weights)]

# Metrics of a version: prefix of the names, name of the number of images, and what these images are; best first.
MeasuredOn = Literal["test images", "held-out images", "left-out images", "validation images"]
ACCURACIES: tuple[tuple[str, str, MeasuredOn], ...] = (
    ("test", "test_images", "test images"),
    ("held_out", "train_images", "held-out images"),
    ("leave_one_out", "train_images", "left-out images"),
    ("val", "val_images", "validation images"),
)
MIN_TEST_IMAGES = 10  # with fewer, an accuracy on other images comes first


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def count_of(value: Any) -> int | None:
    """Return a value if it is a count; None otherwise."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


class Body(BaseModel):
    """Base class of the wire models. Unknown members are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasuredAccuracy(Body):
    """Accuracy that a version's training recorded, on images that did not train it."""

    accuracy: float
    interval: tuple[float, float] | None  # 95 % confidence
    images: int | None
    measured_on: MeasuredOn


def accuracy_of(metrics: Mapping[str, Any]) -> MeasuredAccuracy | None:
    """Return the most telling accuracy in an adapter's metrics; None if there is none."""
    few = (count_of(metrics.get("test_images")) or MIN_TEST_IMAGES) < MIN_TEST_IMAGES
    for prefix, counted, measured_on in (*ACCURACIES[few:], *ACCURACIES[:few]):
        value, interval = metrics.get(f"{prefix}_accuracy"), metrics.get(f"{prefix}_interval")
        if not _is_share(value):
            continue
        pair = None
        if isinstance(interval, list) and len(interval) == 2 and all(map(_is_share, interval)):
            pair = interval[0], interval[1]
        return MeasuredAccuracy(
            accuracy=value,
            interval=pair,
            images=count_of(metrics.get(counted)),
            measured_on=measured_on,
        )
    return None
