"""Stratified splits into training and validation images."""

from pathlib import Path

import pytest

from adapters import DataError
from adapters.data.image_set import ImageSet
from adapters.data.splitting import stratified_split


def numbered(targets: tuple[int, ...], labels: tuple[str, ...]) -> ImageSet:
    return ImageSet(tuple(Path(f"{i}.png") for i in range(len(targets))), targets, labels)


IMAGES = numbered((0,) * 10 + (1,) * 20 + (2,) * 30, ("a", "b", "c"))


def test_split_keeps_class_proportions_and_every_image_when_classes_differ_in_size() -> None:
    kept, held_out = stratified_split(IMAGES, 0.2, seed=0)
    assert [held_out.targets.count(k) for k in range(3)] == [2, 4, 6]
    assert [kept.targets.count(k) for k in range(3)] == [8, 16, 24]
    assert sorted(map(str, kept.sources + held_out.sources)) == sorted(map(str, IMAGES.sources))
    assert kept.labels == held_out.labels == IMAGES.labels
    for source, target in zip(held_out.sources, held_out.targets, strict=True):
        assert IMAGES.targets[IMAGES.sources.index(source)] == target


def test_split_selects_other_images_when_the_seed_differs() -> None:
    assert stratified_split(IMAGES, 0.25, seed=3) == stratified_split(IMAGES, 0.25, seed=3)
    assert stratified_split(IMAGES, 0.25, seed=3) != stratified_split(IMAGES, 0.25, seed=4)


@pytest.mark.parametrize(
    ("targets", "fraction", "message"),
    [
        ((0, 0, 0, 1), 0.5, r"cannot hold out 50% of 4 images for validation; .*only 1 member"),
        ((0, 0, 1, 1), 0.25, r"cannot hold out 25% of 4 images for validation; .*should be greater or equal"),
        ((0, 1), 0.5, r"cannot hold out 50% of 2 images for validation; .*"),
        ((0, 0, 1, 1), 0.0, r"cannot hold out 0% of 4 images for validation; .*"),
        ((0, 0, 1, 1), 1.0, r"cannot hold out 100% of 4 images for validation; .*"),
    ],
)
def test_split_names_the_reason_when_a_class_has_too_few_images(
    targets: tuple[int, ...], fraction: float, message: str
) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        stratified_split(numbered(targets, ("a", "b")), fraction, seed=0)
