"""Where a training writes, and what every report says about how the adapter was made."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..data.errors import DataError
from ..format.file import Adapter

VERSIONED_PACKAGES = ("karst-hub", "torch", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class AccuracyInUse:
    """Accuracy of a classifier in use, to show beside a new one.

    Attributes:
        name: of the classifier, for the user.
        accuracy: in [0, 1], on its own images.
        interval: 95 % interval; None: unknown.
        images: number of images that it was measured on; None: unknown.
        measured_on: kind of these images, such as `held-out images`.
    """

    name: str
    accuracy: float
    interval: tuple[float, float] | None
    images: int | None
    measured_on: str

    @property
    def measurement(self) -> str:
        """The images that it was measured on."""
        count = "" if self.images is None else f"{self.images} "
        return f"{count}{self.measured_on} of its own"

    @property
    def sentence(self) -> str:
        """The figures as one line of text."""
        interval = "" if self.interval is None else " (95 % interval {:.1%} to {:.1%})".format(*self.interval)
        return f"{self.name}: {self.accuracy:.1%} of {self.measurement}{interval}"


def report_folder(output: Path) -> Path:
    """Return the folder of an adapter's report: `flowers.report` beside `flowers.safetensors`.

    Raises:
        DataError: the adapter or its report cannot be written there.
    """
    folder = output.with_name(f"{output.name.removesuffix('.safetensors')}.report")
    if not output.absolute().parent.is_dir():
        raise DataError(f"{output}: the folder {output.absolute().parent} does not exist; create it, or change --out")
    if output.is_dir():
        raise DataError(f"{output}: is a folder; --out must name a file")
    if folder.exists() and not folder.is_dir():
        raise DataError(
            f"{folder}: is a file, but the report needs a folder of this name; move the file, or change --out"
        )
    return folder


def rejected_file(output: Path) -> Path:
    """Return the file of an adapter that is no better than chance: `flowers.rejected.safetensors`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.rejected.safetensors")


def check_free(output: Path, report: Path) -> None:
    """Check that a training with this output and report folder would replace no file.

    Raises:
        DataError: it would replace the result of an earlier training.
    """
    for path in (output, rejected_file(output), report / "report.json"):
        if path.exists():
            raise DataError(
                f"{path} exists, from an earlier training. Choose another output, or replace the file and its report: "
                "--overwrite, in Python overwrite=True"
            )


def checkpoint_file(output: Path) -> Path:
    """Return the checkpoint file of a training in progress: `flowers.checkpoint` beside `flowers.safetensors`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.checkpoint")


def described(adapter: Adapter) -> dict[str, Any]:
    return {
        "digest": adapter.digest,
        "backbone": adapter.backbone,
        "fingerprint": adapter.fingerprint,
        "config": adapter.config.model_dump(mode="json"),
        "preprocess": adapter.preprocess,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree on the path, without an installed package
            found[name] = "unknown"
    return found
