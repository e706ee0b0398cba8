"""Methods of `client.images` and the trainings of both clients, in the form of `endpoints`."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..dataset_schemas import (
    AddCounts,
    DatasetImage,
    DatasetInfo,
    FeedbackGiven,
    ImagePage,
    ImagesAdded,
    LabelRenamed,
    NearDuplicatePage,
    ReviewKind,
    ReviewQueue,
    Split,
    Use,
)
from ..schemas import TaskInfo
from .image_encoding import ImageSources, encode, iterate_images
from .replies import AnyPath, model, nothing, to_file
from .request_parts import JSON, item_count, json_body, route, without_none
from .transport import Call, CallSeries


def create_task(
    name: str, *, labels: Sequence[str] | None = None, promote: str | None = None, unknown_below: float | None = None
) -> Call[TaskInfo]:
    """Create a task without a version, or change the settings of an existing one; None keeps a setting.

    Args:
        labels: labels that the dataset lists even without images.
        promote: whether the alias `stable` moves to a version that a training in the hub makes: `never`, `if_better`
            than the stable one on the same test images, or `always`.
        unknown_below: an image with a lower typicality is unknown; 0 to 1, by default 0.01.
    """
    given = None if labels is None else list(labels)
    body = json_body(without_none(labels=given, promote=promote, unknown_below=unknown_below))
    return Call("PUT", route("tasks", name), model(TaskInfo), headers=JSON, content=body)


def add(
    task: str, images: ImageSources, *, label: str | None = None, split: Split | None = None, progress: bool = False
) -> CallSeries[tuple[str, bytes], ImagesAdded, ImagesAdded]:
    """Add any number of images to a task's dataset, in concurrent calls of limited size.

    Images that are there already are not stored again; with another label they move to it. The hub lists unusable
    images in `refused` and keeps the others.

    Args:
        images: as in `classify`.
        label: of all these images; None adds them without a label.
        split: `train`, `test`, or `auto` (the digest decides). None: `auto`, or unchanged for a known image.
        progress: show a progress bar on stderr.

    Raises:
        NotFound: The task does not exist; `create_task` makes it.
        LimitReached: The tenant has reached a limit of images or of their bytes.
    """
    sources = iterate_images(images)
    params = without_none(label=label, split=split)

    def call(_first: int, items: Sequence[tuple[str, bytes]], _reply: ImagesAdded | None) -> Call[ImagesAdded]:
        files = [("image", name, data) for name, data in items]
        return Call("POST", route("tasks", task, "images"), model(ImagesAdded), params=params, files=files)

    def items() -> Iterator[tuple[tuple[str, bytes], int]]:
        for i, image in enumerate(sources):
            name = Path(image).name if isinstance(image, str | os.PathLike) else f"images.{i}"
            data = encode(image, f"images.{i}")
            yield (name, data), len(data)

    return CallSeries(items(), call, _joined, item_count(sources), progress, verb="adding")


def list_images(
    task: str,
    *,
    label: str | None = None,
    unlabelled: bool = False,
    split: Use | None = None,
    cursor: str | None = None,
    count: int = 100,
) -> Call[ImagePage]:
    """List images of a dataset, newest first.

    Args:
        label: only images with this label.
        unlabelled: only images without a label.
        split: only images that `train`, or only images that `test`.
        cursor: `next` of the previous page.
        count: images of a page, at most 1,000.
    """
    flag = "true" if unlabelled else None
    params = without_none(label=label, unlabelled=flag, split=split, cursor=cursor, count=count)
    return Call("GET", route("tasks", task, "images"), model(ImagePage), params=params)


def label(task: str, digest: str, label: str | None, *, split: Split | None = None) -> Call[DatasetImage]:
    """Set the label of an image, and its split if given; a label of None removes the label."""
    body = {"label": label} | without_none(split=split)
    path = route("tasks", task, "images", digest)
    return Call("PATCH", path, model(DatasetImage), headers=JSON, content=json_body(body))


def delete(task: str, digest: str) -> Call[None]:
    """Delete an image from a dataset."""
    return Call("DELETE", route("tasks", task, "images", digest), nothing)


def download_image(task: str, digest: str, to: AnyPath) -> Call[Path]:
    """Download an image's file, as it was sent, to `to`."""
    return to_file(route("tasks", task, "images", digest), to)


def info(task: str) -> Call[DatasetInfo]:
    """Return the labels of a dataset with their numbers of images."""
    return Call("GET", route("tasks", task, "dataset"), model(DatasetInfo))


def rename_label(task: str, label: str, to: str) -> Call[LabelRenamed]:
    """Rename a label. If the dataset has the new name already, both labels become one."""
    path = route("tasks", task, "dataset", "rename-label")
    body = json_body({"label": label, "to": to})
    return Call("POST", path, model(LabelRenamed), headers=JSON, content=body, idempotent=False)


def duplicates(task: str, *, cursor: str | None = None, count: int = 20) -> Call[NearDuplicatePage]:
    """Return groups of near-duplicates in a dataset: those across splits first, then the most similar.

    Args:
        cursor: `next` of the previous page.
        count: groups of a page, at most 100.
    """
    params = without_none(cursor=cursor, count=count)
    return Call("GET", route("tasks", task, "near-duplicates"), model(NearDuplicatePage), params=params)


def feedback(task: str, image: str, label: str) -> Call[FeedbackGiven]:
    """Give a kept image, or any image of the dataset, its true label.

    Args:
        image: its digest, as the reply to the classification named it.

    Raises:
        NotFound: The dataset has no such image.
    """
    body = json_body({"image": image, "label": label})
    return Call("POST", route("tasks", task, "feedback"), model(FeedbackGiven), headers=JSON, content=body)


def review(task: str, *, kind: ReviewKind = "unlabelled", count: int = 20) -> Call[ReviewQueue]:
    """Return images to label, most useful first.

    Args:
        kind: `unlabelled`, or `errors` for images whose label is probably wrong.
        count: images of the reply, at most 100.
    """
    return Call("GET", route("tasks", task, "review"), model(ReviewQueue), params={"kind": kind, "count": count})


def _joined(parts: Sequence[ImagesAdded]) -> ImagesAdded:
    counts = {name: sum(getattr(part.counts, name) for part in parts) for name in AddCounts.model_fields}
    return ImagesAdded(
        counts=AddCounts(**counts),
        added=[image for part in parts for image in part.added],
        already_there=[image for part in parts for image in part.already_there],
        moved=[image for part in parts for image in part.moved],
        refused=[image for part in parts for image in part.refused],
        warnings=[*dict.fromkeys(text for part in parts for text in part.warnings)],
    )
