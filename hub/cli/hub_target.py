"""The hub that `karst-hub train` trains for: its backbone, the sizes that it accepts, and the version in use.

Without this, a training for another backbone ends in a refused upload hours later.
"""

from dataclasses import dataclass

from rich.console import Console

from adapters import KarstConfig
from adapters.evaluation.outputs import AccuracyInUse

from ..client.client import Client
from ..errors import HubError
from ..schemas import ServedBackbone

TIMEOUT_S = 20.0
FOREIGN_NAME = ":"  # of `hf-hub:...` and `local-dir:...`, which may name the hub's weights too


class TargetError(ValueError):
    """An option that does not suit the hub; the message names the option."""


@dataclass(frozen=True)
class HubTarget:
    """A hub's backbone, and the version of the task that callers get now; None: there is none."""

    url: str
    backbone: ServedBackbone
    in_use: AccuracyInUse | None

    @property
    def advice(self) -> str:
        """A sentence that says which weights the hub has."""
        served = self.backbone
        if served.checkpoint is not None:
            weights = f"from its file {served.checkpoint}; copy that file and name it with --checkpoint"
        else:
            weights = "without a checkpoint file; omit --checkpoint and HUB_CHECKPOINT"
        return f"the hub at {self.url} serves {served.name} {weights}. To train for another hub, unset HUB_URL"

    def loading(self, backbone: str | None, image_size: int | None) -> tuple[str, int | None]:
        """Return the name and the image size to load, in which the hub's values replace None.

        Raises:
            TargetError: a given name or size is not the hub's.
        """
        served = self.backbone
        _, height, width = served.input_size
        if backbone is not None and backbone != served.name and FOREIGN_NAME not in backbone + served.name:
            raise TargetError(f"the backbone is {backbone} (--backbone or HUB_BACKBONE), but {self.advice}")
        if image_size is not None and image_size != height:
            raise TargetError(
                f"the image size is {image_size} (--image-size or HUB_IMAGE_SIZE), but the hub at {self.url} serves "
                f"images of {height} x {width} pixels. Omit the option; to train for another hub, unset HUB_URL"
            )
        return backbone or served.name, image_size or served.image_size

    def check_sizes(self, config: KarstConfig) -> None:
        """Check that the hub accepts adapters of these sizes.

        Raises:
            TargetError: too many kernels, too large a rank, or another factor.
        """
        served = self.backbone
        for option, value, largest in (
            ("--kernels", config.kernels, served.max_kernels),
            ("--rank", config.rank, served.max_rank),
        ):
            if value > largest:
                raise TargetError(f"{option} {value}: the hub at {self.url} accepts at most {largest}")
        if config.factor != served.factor:
            raise TargetError(f"--factor {config.factor}: the hub at {self.url} accepts only {served.factor}")


def ask_hub(console: Console, url: str, key: str | None, task: str) -> HubTarget | None:
    """Ask a hub for its backbone and for the version of a task that callers get now.

    Args:
        console: gets one line: the hub's backbone, or why it is unknown.
        key: any key of the hub.
        task: name of the task; the hub need not have it.

    Returns:
        None if the hub's backbone is unknown.
    """
    if key is None:
        _unknown(console, f"HUB_URL is {url}, but HUB_KEY is not set, so the hub's backbone is unknown")
        return None
    try:
        with Client(url, key, timeout_s=TIMEOUT_S) as client:
            served = client.backbone()
            in_use = _in_use(client, task)
    except HubError as error:
        _unknown(console, f"the backbone of the hub at {url} is unknown: {error}")
        return None
    _, height, width = served.input_size
    console.print(
        f"the hub at {url} serves {served.name} (fingerprint {served.fingerprint[:12]}, {width} x {height} pixels); "
        "the training uses it",
        soft_wrap=True,
    )
    return HubTarget(url, served, in_use)


def _in_use(client: Client, task: str) -> AccuracyInUse | None:
    try:
        version = client.version(task)
    except HubError:  # a new task, an admin's key, or a file name that is no task's name
        return None
    found = version.measured_accuracy()
    if found is None:
        return None
    name = f"version {version.version} of {task}"
    return AccuracyInUse(name, found.accuracy, found.interval, found.images, found.measured_on)


def _unknown(console: Console, reason: str) -> None:
    console.print(
        f"warning: {reason}. The training goes on without it; the hub refuses an adapter of another backbone",
        soft_wrap=True,
    )
