"""Checks of a dataset before training: unreadable images, duplicates, conflicting labels and class coverage.

Every image is decoded once. Duplicates are images with equal bytes. All errors are reported in one message; the rest
are warnings. Published benchmark lists must stay unchanged, so duplicates in them are warnings: Oxford Pets lists some
images twice, and dSprites has equal images at two angles.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..short_repr import short_repr
from .datasets import DatasetSplits
from .errors import DataError, ImageError
from .files import LeftOut
from .image_set import ImageTensors
from .images import MAX_IMAGE_PIXELS
from .labels import label_text, near_duplicates, shown_apart
from .layouts import Split
from .splitting import stratified_split

MAX_LISTED = 20  # images or classes named in one message


class ImageKey(NamedTuple):
    """An image's split, and its number within the split, from 0."""

    split: Split
    number: int


@dataclass(frozen=True)
class CheckedDataset:
    """Prepared tensors that passed the checks, and the warnings for the user.

    Attributes:
        left_out: files of the dataset that its readers did not take. Those that matter are also warnings.
    """

    train: ImageTensors
    validation: ImageTensors | None
    test: ImageTensors | None
    warnings: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    __repr__ = short_repr


def check_dataset(
    splits: DatasetSplits,
    preprocess: Mapping[str, Any],
    *,
    val_fraction: float = 0.0,
    seed: int = 0,
    skip_bad: bool = False,
    max_pixels: int = MAX_IMAGE_PIXELS,
    on_image: Callable[[], None] | None = None,
) -> CheckedDataset:
    """Decode every image, check the dataset, and hold out validation images if it has no validation split.

    Args:
        val_fraction: share of the training images to hold out, in [0, 1). Duplicates of an image stay together.
            0 holds out none.
        seed: selects the held-out images.
        skip_bad: drop bad images instead of raising. These are unreadable images, duplicates across splits (the
            earlier split's copy, so that a test image leaves the training split), and all copies of an image with
            two labels.
        max_pixels: limit on an image's width times height.
        on_image: called after each image.

    Raises:
        DataError: a label is empty or not UTF-8; no image is decoded then. Otherwise with all problems in one
            message: unreadable images, duplicates across splits, an image with two labels in one split, fewer than
            two classes, a class that is validated or tested but not trained, or a class with a single image while
            validation images are held out.
    """
    for label in splits.train.labels:
        label_text(label, "labels")
    tensors = {
        name: ImageTensors(images, preprocess, max_pixels=max_pixels) for name, images in splits.by_name().items()
    }
    digests, unreadable = _decode_all(tensors, on_image)
    report = _Report(skip_bad)
    report.warnings += [f"left out: {files}" for files in splits.left_out if files.matters]
    report.warnings += [
        f"labels that differ only in case, spaces or Unicode form: {shown_apart(group)}; "
        "merge them if they are one class"
        for group in near_duplicates(splits.train.labels)
    ]
    report.add(
        {key: f"{_name(tensors, key)}: {reason}" for key, reason in unreadable.items()},
        f"{len(unreadable)} of {len(digests) + len(unreadable)} images cannot be read",
        "repair them, or leave them out",
        keep=False,
    )
    duplicates = _duplicates(digests)
    across = _across_splits(tensors, duplicates)
    report.add(
        across,
        f"{len(across)} images are in two splits",
        "remove one copy, or leave out the earlier split's",
        keep=splits.published,
    )
    conflicting = _conflicting_labels(tensors, duplicates)
    report.add(
        conflicting,
        f"{len(conflicting)} images have two labels",
        "correct the labels, or leave the images out",
        keep=splits.published,
    )
    if repeated := _repeated(tensors, duplicates, {*across, *conflicting}):
        report.warnings.append(f"{len(repeated)} images are duplicates within a split:{_listing(repeated)}")

    kept = {name: _without(split, name, report.dropped) for name, split in tensors.items()}
    # An unreadable image that is not dropped gets its index as a digest, so that it counts as a distinct image.
    train_digests = [
        digests.get(ImageKey("train", i), str(i).encode())
        for i in range(len(tensors["train"]))
        if ImageKey("train", i) not in report.dropped
    ]
    holds_out = val_fraction > 0 and "validation" not in kept
    errors, warnings = _check_classes(kept, train_digests if holds_out else None, splits.published)
    if report.errors or errors:
        raise DataError("\n".join([*report.errors, *errors]))
    train, validation = kept["train"], kept.get("validation")
    if holds_out:
        train, validation = _hold_out(train, train_digests, val_fraction, seed)
    return CheckedDataset(train, validation, kept.get("test"), (*report.warnings, *warnings), splits.left_out)


class _Report:
    """The errors and warnings about bad images, and the images to drop."""

    def __init__(self, skip_bad: bool) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.dropped: set[ImageKey] = set()
        self._skip_bad = skip_bad

    def add(self, bad: Mapping[ImageKey, str], problem: str, remedy: str, *, keep: bool) -> None:
        """Report bad images as an error, or as a warning if they are dropped or (`keep`) used as they are."""
        if not bad:
            return
        listed = _listing(bad.values())
        if keep:
            self.warnings.append(f"{problem}, kept because the lists are published:{listed}")
        elif self._skip_bad:
            self.dropped.update(bad)
            self.warnings.append(f"{problem}, left out:{listed}")
        else:
            self.errors.append(f"{problem} ({remedy} with --skip-bad):{listed}")


def _decode_all(
    tensors: Mapping[Split, ImageTensors], on_image: Callable[[], None] | None
) -> tuple[dict[ImageKey, bytes], dict[ImageKey, str]]:
    """Return the sha256 of each image that can be decoded, and the reason for each that cannot."""
    digests: dict[ImageKey, bytes] = {}
    unreadable: dict[ImageKey, str] = {}
    for name, split in tensors.items():
        for i in range(len(split)):
            try:
                split.decode(i, split.images.read(i))
                digests[ImageKey(name, i)] = split.digest(i)
            except ImageError as error:
                unreadable[ImageKey(name, i)] = str(error)
            if on_image is not None:
                on_image()
    return digests, unreadable


def _duplicates(digests: Mapping[ImageKey, bytes]) -> list[list[ImageKey]]:
    """Return groups of images with equal bytes, each in the order of the splits."""
    groups: dict[bytes, list[ImageKey]] = {}
    for key, digest in digests.items():
        groups.setdefault(digest, []).append(key)
    return [group for group in groups.values() if len(group) > 1]


def _across_splits(tensors: Mapping[Split, ImageTensors], duplicates: Iterable[list[ImageKey]]) -> dict[ImageKey, str]:
    """Return the images with a duplicate in a later split. The later copy is the one to keep."""
    found: dict[ImageKey, str] = {}
    for group in duplicates:
        last = group[-1]
        for key in group:
            if key.split != last.split:
                found[key] = f"{_described(tensors, key)} = {_described(tensors, last)}"
    return found


def _conflicting_labels(
    tensors: Mapping[Split, ImageTensors], duplicates: Iterable[list[ImageKey]]
) -> dict[ImageKey, str]:
    """Return the images that have more than one label within a split."""
    found: dict[ImageKey, str] = {}
    for group in duplicates:
        for name in tensors:
            copies = [key for key in group if key.split == name]
            if len({_label(tensors, key) for key in copies}) > 1:
                found |= {key: _described(tensors, key) for key in copies}
    return found


def _repeated(
    tensors: Mapping[Split, ImageTensors], duplicates: Iterable[list[ImageKey]], reported: set[ImageKey]
) -> list[str]:
    """Describe the duplicates within a split that are not reported yet."""
    found = []
    for group in duplicates:
        first: dict[Split, ImageKey] = {}
        for key in group:
            if key not in reported and first.setdefault(key.split, key) != key:
                found.append(f"{_described(tensors, key)} = {_name(tensors, first[key.split])}")
    return found


def _check_classes(
    tensors: Mapping[Split, ImageTensors], digests: Sequence[bytes] | None, published: bool
) -> tuple[list[str], list[str]]:
    """Return errors and warnings about the classes.

    Args:
        digests: of the training images, if validation images are to be held out of them.
    """
    labels = tensors["train"].images.labels
    errors: list[str] = []
    warnings: list[str] = []
    empty = [name for name, split in tensors.items() if not len(split)]
    if empty:
        return [f"no {' and no '.join(empty)} images are left; add images that can be read"], []
    targets = tensors["train"].images.targets
    counts = Counter(targets)
    if len(counts) < 2:
        errors.append(
            f"all training images have the class {labels[targets[0]]!r}; a task needs at least 2 classes: "
            "add images of another class"
        )
    held_out = {target for name, split in tensors.items() if name != "train" for target in split.images.targets}
    if untrained := sorted(held_out - set(counts)):
        line = f"classes with validation or test images, but without training images: {_names(labels, untrained)}"
        if published:
            warnings.append(line)
        else:
            errors.append(f"{line}; add training images of these classes, or remove the others")
    if unused := sorted(set(range(len(labels))) - set(counts) - held_out):
        warnings.append(f"classes without images: {_names(labels, unused)}")
    if digests is None:
        single = sorted(target for target, count in counts.items() if count == 1)
        if single:
            warnings.append(f"classes with one training image: {_names(labels, single)}")
    else:
        distinct = Counter(target for target, _ in set(zip(targets, digests, strict=True)))
        single = sorted(target for target, count in distinct.items() if count == 1)
        if single:
            errors.append(
                f"classes with one image, which is too few to train and validate: {_names(labels, single)}; add "
                "images, give validation images (--val), or hold out none (--val-fraction 0)"
            )
    return errors, warnings


def _hold_out(
    tensors: ImageTensors, digests: Sequence[bytes], fraction: float, seed: int
) -> tuple[ImageTensors, ImageTensors]:
    """Split into training and validation images, stratified by class; duplicates follow the first copy."""
    firsts: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        firsts.setdefault(digest, i)
    digest_of = {tensors.images.sources[i]: digest for digest, i in firsts.items()}
    _, held_out = stratified_split(tensors.images.subset(list(firsts.values())), fraction, seed)
    selected = {digest_of[source] for source in held_out.sources}
    kept = [i for i, digest in enumerate(digests) if digest not in selected]
    return tensors.subset(kept), tensors.subset([i for i, digest in enumerate(digests) if digest in selected])


def _without(tensors: ImageTensors, split: Split, dropped: set[ImageKey]) -> ImageTensors:
    return tensors.subset([i for i in range(len(tensors)) if ImageKey(split, i) not in dropped])


def _label(tensors: Mapping[Split, ImageTensors], key: ImageKey) -> str:
    images = tensors[key.split].images
    return images.labels[images.targets[key.number]]


def _name(tensors: Mapping[Split, ImageTensors], key: ImageKey) -> str:
    return str(tensors[key.split].images.sources[key.number])


def _described(tensors: Mapping[Split, ImageTensors], key: ImageKey) -> str:
    return f"{_name(tensors, key)} ({key.split}, {_label(tensors, key)})"


def _names(labels: Sequence[str], targets: Sequence[int]) -> str:
    shown = ", ".join(labels[target] for target in targets[:MAX_LISTED])
    return shown + (f" and {len(targets) - MAX_LISTED} more" if len(targets) > MAX_LISTED else "")


def _listing(lines: Iterable[str]) -> str:
    lines = list(lines)
    shown = lines[:MAX_LISTED] + ([f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else [])
    return "".join(f"\n  {line}" for line in shown)
