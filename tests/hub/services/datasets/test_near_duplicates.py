"""Near-duplicates by features: groups, chains, the mean of all images, warnings of snapshots."""

import numpy as np

from hub.registry.datasets.entries import ListedImage
from hub.services.datasets.near_duplicates import BLOCK_ROWS, SIMILARITY, groups_of, relative_rows, split_warnings
from hub.services.datasets.snapshots import Snapshot


def random_rows(count: int, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def test_copies_are_one_group_in_every_block() -> None:
    rows = random_rows(3 * BLOCK_ROWS)
    copies = [5, BLOCK_ROWS + 1, 3 * BLOCK_ROWS - 1]
    rows[copies] = rows[5] + random_rows(3, seed=1) * 0.01
    groups, nearest = groups_of(relative_rows(rows))
    assert set(groups[copies]) == {5}
    assert np.bincount(groups).max() == 3
    assert (np.bincount(groups) > 1).sum() == 1
    assert np.flatnonzero(nearest).tolist() == copies
    assert nearest[copies].min() > SIMILARITY


def test_groups_are_those_of_a_search_pair_by_pair() -> None:
    generator = np.random.default_rng(3)
    centres = random_rows(40)
    rows = relative_rows(centres[generator.integers(40, size=400)] + random_rows(400, seed=4) * 0.09)
    expected = np.arange(len(rows))
    for i, j in np.argwhere(rows @ rows.T > SIMILARITY):
        expected[expected == expected[j]] = expected[i]
    groups, _ = groups_of(rows)
    sizes = np.bincount(groups)
    assert 1 < (sizes > 1).sum() < 400
    assert sorted(sizes[sizes > 0]) == sorted(size for size in np.bincount(expected) if size)
    assert all(len(set(expected[groups == group])) == 1 for group in np.unique(groups))


def test_the_ends_of_a_chain_are_in_one_group() -> None:
    angles = np.arange(40) * 0.1  # neighbours have a cosine of 0.995, the ends are opposite
    rows = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    groups, _ = groups_of(rows)
    assert set(groups) == {0}


def test_two_equal_images_are_similar_and_two_different_ones_are_not() -> None:
    assert set(groups_of(relative_rows(np.repeat(random_rows(1), 2, 0)))[0]) == {0}
    assert set(groups_of(relative_rows(random_rows(2)))[0]) == {0, 1}
    assert len(groups_of(relative_rows(np.empty((0, 4), np.float32)))[0]) == 0


def test_what_all_images_share_makes_no_near_duplicates() -> None:
    rows = 30 + random_rows(50)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (unit @ unit.T).min() > SIMILARITY
    assert len(set(groups_of(relative_rows(rows))[0])) == 50


def test_a_snapshot_warns_of_test_images_that_training_images_repeat() -> None:
    names = [f"{i:064x}" for i in range(20)]
    uses = ["train"] * 14 + ["test"] * 6
    images = [
        ListedImage(name, name, "ab"[i % 2], use, use)  # type: ignore[arg-type]
        for i, (name, use) in enumerate(zip(names, uses, strict=True))
    ]
    snapshot = Snapshot.of(images)
    features = random_rows(20).astype(np.float16)
    rows = dict(zip(names, features, strict=True))
    assert split_warnings(snapshot, rows) == []
    rows[names[1]] = rows[names[0]]  # both train
    assert split_warnings(snapshot, rows) == []
    rows[names[15]] = rows[names[0]]
    (warning,) = split_warnings(snapshot, rows)
    assert warning.startswith("1 of 6 test images has a near-duplicate among the training images")
    rows[names[19]] = rows[names[3]]
    assert split_warnings(snapshot, rows)[0].startswith("2 of 6 test images have near-duplicates")
    assert split_warnings(snapshot, {name: rows[name] for name in names[:14]}) == []
    assert split_warnings(snapshot, {}) == []
