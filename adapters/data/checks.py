"""Label problems, found before training: every image is opened once, and its bytes are compared with the others'.

What cannot be right stops here with all of it listed; what only may be wrong is a warning. A benchmark's published
lists are not to be changed, so that copies in them (Oxford Pets lists images twice, dSprites has the same picture
under two angles) are warnings, too.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..training.train import split
from .datasets import Part, Splits
from .images import DataError, ImageError, Pixels

MAX_LISTED = 20

Place = tuple[Part, int]  # an image: its part and its index there


@dataclass(frozen=True)
class Checked:
    """Images that can be trained on, decoded; `warnings` are for a person to read."""

    train: Pixels
    validation: Pixels | None
    test: Pixels | None
    warnings: tuple[str, ...]


def check(
    splits: Splits,
    preprocess: Mapping[str, Any],
    *,
    val_fraction: float = 0.0,
    seed: int = 0,
    skip_bad: bool = False,
    on_image: Callable[[], None] | None = None,
) -> Checked:
    """Open every image, look for label problems, and hold out validation images where none are given.

    Args:
        val_fraction: share of the training images to hold out if there is no validation set; copies of one image
            stay on one side. 0 holds out none.
        seed: of that choice.
        skip_bad: leave bad images out instead of refusing the set: unreadable ones; of copies in several parts
            those in the earlier part (a test image is taken out of training, not the other way round); all copies
            of an image that has two labels.
        on_image: called after each image, for progress.

    Raises:
        DataError: every problem in one message: unreadable images, the same image in two parts or under two labels
            of one part, fewer than two classes, a class that is tested but never trained, or one with a single
            image of which validation images are to be held out.
    """
    parts = {name: Pixels(images, preprocess) for name, images in splits.parts().items()}
    digests, unreadable = _open_all(parts, on_image)
    errors: list[str] = []
    warnings: list[str] = []
    dropped: set[Place] = set()

    def found(bad: Mapping[Place, str], what: str, remedy: str, *, keep: bool) -> None:
        """Errors, unless the images are skipped or kept as they are."""
        if not bad:
            return
        listed = _listing(bad.values())
        if keep:
            warnings.append(f"{what}, kept because the lists are published:{listed}")
        elif skip_bad:
            dropped.update(bad)
            warnings.append(f"{what}, left out:{listed}")
        else:
            errors.append(f"{what} ({remedy} with --skip-bad):{listed}")

    found(
        {place: f"{_name(parts, place)}: {reason}" for place, reason in unreadable.items()},
        f"{len(unreadable)} of {len(digests) + len(unreadable)} images cannot be read",
        "leave them out",
        keep=False,
    )
    copies = _copies(digests)
    leaks = _leaks(parts, copies)
    found(leaks, f"{len(leaks)} images are in two parts", "leave out the earlier part's", keep=splits.published)
    two = _two_labels(parts, copies)
    found(two, f"{len(two)} images are there under two labels", "leave them out", keep=splits.published)
    if twice := _same_label(parts, copies, {*leaks, *two}):
        warnings.append(f"{len(twice)} images are copies of others in the same part:{_listing(twice)}")

    kept = {name: _without(pixels, name, dropped) for name, pixels in parts.items()}
    kept_digests = [  # an unreadable image, where it is not skipped, counts as one of its own
        digests.get(("train", i), str(i).encode()) for i in range(len(parts["train"])) if ("train", i) not in dropped
    ]
    holds_out = val_fraction > 0 and "validation" not in kept
    more_errors, more_warnings = _class_problems(kept, kept_digests if holds_out else None, splits.published)
    if errors or more_errors:
        raise DataError("\n".join([*errors, *more_errors]))
    train, validation = kept["train"], kept.get("validation")
    if holds_out:
        train, validation = _hold_out(train, kept_digests, val_fraction, seed)
    return Checked(train, validation, kept.get("test"), (*warnings, *more_warnings))


def _open_all(
    parts: Mapping[Part, Pixels], on_image: Callable[[], None] | None
) -> tuple[dict[Place, bytes], dict[Place, str]]:
    """sha256 of every image that can be decoded, and why the others cannot."""
    digests: dict[Place, bytes] = {}
    unreadable: dict[Place, str] = {}
    for part, pixels in parts.items():
        for i in range(len(pixels)):
            try:
                pixels.decode(i, pixels.images.read(i))
                digests[part, i] = pixels.digest(i)
            except ImageError as error:
                unreadable[part, i] = str(error)
            if on_image is not None:
                on_image()
    return digests, unreadable


def _copies(digests: Mapping[Place, bytes]) -> list[list[Place]]:
    """Images with the same bytes, each group in the order of the parts."""
    groups: dict[bytes, list[Place]] = {}
    for place, digest in digests.items():
        groups.setdefault(digest, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _leaks(parts: Mapping[Part, Pixels], copies: Iterable[list[Place]]) -> dict[Place, str]:
    """Images of a part that are in a later part, too: the later one's is the one to keep."""
    found: dict[Place, str] = {}
    for group in copies:
        last = group[-1]
        for place in group:
            if place[0] != last[0]:
                found[place] = f"{_described(parts, place)} = {_described(parts, last)}"
    return found


def _two_labels(parts: Mapping[Part, Pixels], copies: Iterable[list[Place]]) -> dict[Place, str]:
    """Images of one part that stand there under more than one label."""
    found: dict[Place, str] = {}
    for group in copies:
        for part in parts:
            here = [place for place in group if place[0] == part]
            if len({_label(parts, place) for place in here}) > 1:
                found |= {place: _described(parts, place) for place in here}
    return found


def _same_label(parts: Mapping[Part, Pixels], copies: Iterable[list[Place]], known: set[Place]) -> list[str]:
    found = []
    for group in copies:
        first: dict[Part, Place] = {}
        for place in group:
            if place not in known and first.setdefault(place[0], place) != place:
                found.append(f"{_described(parts, place)} = {_name(parts, first[place[0]])}")
    return found


def _class_problems(
    parts: Mapping[Part, Pixels], digests: Sequence[bytes] | None, published: bool
) -> tuple[list[str], list[str]]:
    """Errors and warnings about the classes; `digests` of the training images if some are to be held out."""
    labels = parts["train"].images.labels
    errors: list[str] = []
    warnings: list[str] = []
    emptied = [name for name, pixels in parts.items() if not len(pixels)]
    if emptied:
        return [f"no {' and no '.join(emptied)} images are left"], []
    targets = parts["train"].images.targets
    counts = Counter(targets)
    if len(counts) < 2:
        errors.append(f"every training image is of class {labels[targets[0]]!r}; a task needs at least 2 classes")
    held = {target for name, pixels in parts.items() if name != "train" for target in pixels.images.targets}
    if untrained := sorted(held - set(counts)):
        line = f"classes without a training image, but with validation or test images: {_names(labels, untrained)}"
        (warnings if published else errors).append(line)
    if unseen := sorted(set(range(len(labels))) - set(counts) - held):
        warnings.append(f"classes without any image: {_names(labels, unseen)}")
    if digests is None:
        single = sorted(target for target, count in counts.items() if count == 1)
        if single:
            warnings.append(f"classes with one training image: {_names(labels, single)}")
    else:
        distinct = Counter(target for target, _ in set(zip(targets, digests, strict=True)))
        single = sorted(target for target, count in distinct.items() if count == 1)
        if single:
            errors.append(
                f"classes with one image, which cannot both train and validate: {_names(labels, single)}; add images, "
                "give validation images (--val), or hold out none (--val-fraction 0)"
            )
    return errors, warnings


def _hold_out(pixels: Pixels, digests: Sequence[bytes], fraction: float, seed: int) -> tuple[Pixels, Pixels]:
    """Training and validation images, every class in both; copies of one image follow the first of them."""
    firsts: dict[bytes, int] = {}
    for i, digest in enumerate(digests):
        firsts.setdefault(digest, i)
    first_of = {pixels.images.paths[i]: digest for digest, i in firsts.items()}
    _, held = split(pixels.images.subset(list(firsts.values())), fraction, seed)
    chosen = {first_of[path] for path in held.paths}
    kept = [i for i, digest in enumerate(digests) if digest not in chosen]
    return pixels.subset(kept), pixels.subset([i for i, digest in enumerate(digests) if digest in chosen])


def _without(pixels: Pixels, part: Part, dropped: set[Place]) -> Pixels:
    return pixels.subset([i for i in range(len(pixels)) if (part, i) not in dropped])


def _label(parts: Mapping[Part, Pixels], place: Place) -> str:
    images = parts[place[0]].images
    return images.labels[images.targets[place[1]]]


def _name(parts: Mapping[Part, Pixels], place: Place) -> str:
    return str(parts[place[0]].images.paths[place[1]])


def _described(parts: Mapping[Part, Pixels], place: Place) -> str:
    return f"{_name(parts, place)} ({place[0]}, {_label(parts, place)})"


def _names(labels: Sequence[str], targets: Sequence[int]) -> str:
    shown = ", ".join(labels[target] for target in targets[:MAX_LISTED])
    return shown + (f" and {len(targets) - MAX_LISTED} more" if len(targets) > MAX_LISTED else "")


def _listing(lines: Iterable[str]) -> str:
    lines = list(lines)
    shown = lines[:MAX_LISTED] + ([f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else [])
    return "".join(f"\n  {line}" for line in shown)
