"""Snapshots: immutable lists of the images that trainings used, stored by the sha256 of their JSON text."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.data.labels import sorted_labels

from ...dataset_schemas import SnapshotInfo, Use
from ...errors import Conflict
from ...registry.datasets.entries import ListedImage

FORMAT = "karst-snapshot/1"
MAX_LISTED = 10  # labels in one warning
TESTED_IMAGES = 5  # training images of a label, of which one tests: about the share of the split `auto`
# Images times labels of one training. The head has a score of 8 bytes for each image and label, several times at once.
MAX_SCORES = 20_000_000


@dataclass(frozen=True)
class SnapshotImage:
    """One image of a snapshot."""

    digest: str
    label: str
    use: Use


@dataclass(frozen=True)
class Snapshot:
    """The labelled images of a dataset at one moment, in order of their digests."""

    images: tuple[SnapshotImage, ...]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Sequence[ListedImage]) -> "Snapshot":
        """Return the labelled images. The split `auto` depends on the label where the digest alone would not do.

        A label without a training image trains on its images with the split `auto`. A label with at least
        `TESTED_IMAGES` training images and no test image tests with one of those with the split `auto`: the one whose
        digest is the lowest.

        Raises:
            Conflict: the images cannot train a classifier.
        """
        labelled = sorted((image for image in dataset if image.label is not None), key=lambda image: image.digest)
        labels = sorted_labels(str(image.label) for image in labelled)
        if not labelled:
            raise Conflict("The dataset has no labelled image. Add images with labels first.")
        if len(labels) < 2:
            raise Conflict(f"The dataset has one label only ({labels[0]!r}). Add images of a second label.")
        if len(labelled) * len(labels) > MAX_SCORES:
            raise Conflict(
                f"{len(labelled)} labelled images of {len(labels)} labels are too many for one training (images times "
                f"labels: limit {MAX_SCORES}). Merge labels, or train a task for each part of them."
            )
        trained = Counter(image.label for image in labelled if image.use == "train")
        rescued = [label for label in labels if not trained[label]]
        tested = {image.label for image in labelled if image.use == "test"}
        chosen: dict[str | None, str] = {}  # label without a test image -> the image that becomes one
        for image in labelled:  # in order of the digests
            if image.label not in tested and image.split == "auto" and trained[image.label] >= TESTED_IMAGES:
                chosen.setdefault(image.label, image.digest)

        def use(image: ListedImage) -> Use:
            if image.label in rescued and image.split == "auto":
                return "train"
            return "test" if chosen.get(image.label) == image.digest else image.use

        images = tuple(SnapshotImage(image.digest, str(image.label), use(image)) for image in labelled)
        untrained = set(labels) - {image.label for image in images if image.use == "train"}
        if untrained:
            raise Conflict(f"All images of {_listed(sorted(untrained))} have the split test. Add some to train on.")
        counts = Counter(image.label for image in images if image.use == "train")
        if max(counts.values()) < 2:
            raise Conflict("No label has two images to train on. Add a second image to at least one label.")
        warnings = []
        if rescued:
            warnings.append(f"too few images of {_listed(rescued)} to test on; all of them train")
        if single := [label for label in labels if counts[label] == 1]:
            warnings.append(f"one image only of {_listed(single)}; add more, ten or more are better")
        untested = [label for label in labels if label not in {*tested, *chosen, *rescued}]
        if untested and any(image.use == "test" for image in images):
            warnings.append(
                f"no test image of {_listed(untested)}, so the accuracy on test images does not cover these labels. A "
                f"training takes one of a label that has {TESTED_IMAGES} images or more with the split auto; or set an "
                f"image's split to test"
            )
        return cls(images, labels, tuple(warnings))

    def text(self, task: str) -> bytes:
        """Return the JSON text. Equal datasets have equal texts."""
        # Image by image: one call of `dumps` would hold Python's interpreter lock until the end.
        images = [json.dumps([image.digest, image.label, image.use], ensure_ascii=False) for image in self.images]
        head = json.dumps({"format": FORMAT, "task": task}, ensure_ascii=False)
        return f'{head[:-1]}, "images": [{", ".join(images)}]}}'.encode()

    def info(self, text: bytes) -> SnapshotInfo:
        """Return the digest of the text, and the numbers of images."""
        test = sum(image.use == "test" for image in self.images)
        return SnapshotInfo(
            digest=hashlib.sha256(text).hexdigest(),
            images=len(self.images),
            train=len(self.images) - test,
            test=test,
        )


def _listed(labels: Sequence[str]) -> str:
    more = len(labels) - MAX_LISTED
    return ", ".join(map(repr, labels[:MAX_LISTED])) + (f" and {more} more labels" if more > 0 else "")
