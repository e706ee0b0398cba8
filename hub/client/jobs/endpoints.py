"""Methods of both clients for trainings, in the form of `client/endpoints`."""

from pathlib import Path

from ...dataset_schemas import Comparison, TrainingInfo, TrainingList
from ..replies import AnyPath, model, to_file
from ..request_parts import JSON, json_body, route, without_none
from ..transport import Call
from .waiting import TrainingCall


def train(
    name: str,
    *,
    recipe: str = "instant",
    budget_s: int | None = None,
    wait: bool = True,
    progress: bool | None = None,
) -> TrainingCall:
    """Train a new version from a task's dataset, and return when it is live as `latest`.

    Args:
        recipe: `instant`: a classifier head on the stored features, in seconds. `karst`, `auto`: also train KARST, and
            keep it if it is better on held-out images; minutes.
        budget_s: seconds for KARST, by default 600.
        wait: whether to wait for the end of `karst` and `auto`; otherwise return the queued training. An interrupted
            wait does not end the training: `cancel_training` does.
        progress: whether to show a progress bar; None: in a notebook and on a terminal.

    Raises:
        Conflict: The images cannot train a classifier, or the training has failed or was cancelled.
        LimitReached: Too many trainings of the tenant wait.
    """
    body = json_body(without_none(recipe=recipe, budget_s=budget_s))
    path = route("tasks", name, "trainings")
    start = Call("POST", path, model(TrainingInfo), headers=JSON, content=body, idempotent=False)
    return TrainingCall(start, lambda begun: training(name, begun.id), wait, progress)


def trainings(name: str) -> Call[TrainingList]:
    """List the trainings of a task, newest first."""
    return Call("GET", route("tasks", name, "trainings"), model(TrainingList))


def training(name: str, id: str) -> Call[TrainingInfo]:
    """Return a training with its progress and its report."""
    return Call("GET", route("tasks", name, "trainings", id), model(TrainingInfo))


def cancel_training(name: str, id: str) -> Call[TrainingInfo]:
    """End a queued or running training, and return it. One that has ended stays as it is."""
    return Call("DELETE", route("tasks", name, "trainings", id), model(TrainingInfo))


def training_report(name: str, id: str, to: AnyPath, *, file: str = "report.html") -> Call[Path]:
    """Download a file of a training's report to `to`; `report_files` of the training lists them.

    Raises:
        NotFound: The training has no such file.
    """
    return to_file(route("tasks", name, "trainings", id, "report", file), to)


def compare(name: str, *, a: str | int = "stable", b: str | int = "latest") -> Call[Comparison]:
    """Compare two versions on the test images of a task's dataset that neither was trained on.

    Args:
        a, b: version numbers or aliases.

    Raises:
        Conflict: No test image is left, or an alias points at several versions.
    """
    return Call("GET", route("tasks", name, "compare"), model(Comparison), params={"a": str(a), "b": str(b)})
