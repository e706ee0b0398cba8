"""Snapshots: which images train and which test, and the warnings about them."""

from hub.dataset_schemas import Split, Use
from hub.registry.datasets.entries import ListedImage
from hub.services.datasets.snapshots import TESTED_IMAGES, Snapshot


def images(label: str, uses: dict[Use, int], split: Split = "auto", first: int = 0) -> list[ListedImage]:
    """Return images with digests in order."""
    each = [use for use, count in uses.items() for _ in range(count)]
    names = [f"{label}{first + i:063x}" for i in range(len(each))]
    return [ListedImage(name, name, label, split, use) for name, use in zip(names, each, strict=True)]


def uses(snapshot: Snapshot, label: str) -> list[Use]:
    return [image.use for image in snapshot.images if image.label == label]


FINE = images("a", {"train": 8, "test": 2})


def test_a_label_whose_digests_all_train_tests_with_its_first_image() -> None:
    snapshot = Snapshot.of([*FINE, *reversed(images("b", {"train": TESTED_IMAGES}))])
    assert uses(snapshot, "b") == ["test", *["train"] * (TESTED_IMAGES - 1)]
    assert snapshot.warnings == ()
    again = Snapshot.of([*images("b", {"train": TESTED_IMAGES}), *FINE])
    assert again.text("x") == snapshot.text("x")


def test_a_label_with_a_test_image_keeps_the_uses_of_its_digests() -> None:
    given = images("b", {"train": 9, "test": 1})
    assert uses(Snapshot.of([*FINE, *given]), "b") == [image.use for image in given]


def test_a_label_with_few_images_has_no_test_image_and_a_warning() -> None:
    snapshot = Snapshot.of([*FINE, *images("b", {"train": TESTED_IMAGES - 1})])
    assert set(uses(snapshot, "b")) == {"train"}
    (warning,) = snapshot.warnings
    assert warning.startswith("no test image of 'b', so the accuracy on test images does not cover")


def test_images_with_a_split_by_hand_stay_where_they_are() -> None:
    snapshot = Snapshot.of([*FINE, *images("b", {"train": 9}, split="train")])
    assert set(uses(snapshot, "b")) == {"train"}
    assert "no test image of 'b'" in snapshot.warnings[0]
    mixed = images("b", {"train": 9}, split="train") + images("b", {"train": 1}, first=9)
    assert uses(Snapshot.of([*FINE, *mixed]), "b") == [*["train"] * 9, "test"]


def test_a_dataset_without_test_images_has_no_warning_about_them() -> None:
    assert Snapshot.of([*images("a", {"train": 2}), *images("b", {"train": 2})]).warnings == ()


def test_a_label_whose_digests_all_test_trains_with_a_warning() -> None:
    snapshot = Snapshot.of([*FINE, *images("b", {"test": 6})])
    assert set(uses(snapshot, "b")) == {"train"}
    (warning,) = snapshot.warnings
    assert warning.startswith("too few images of 'b' to test on")
