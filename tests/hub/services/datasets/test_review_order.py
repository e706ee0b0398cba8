"""Order of review: clusters, uncertain images, wrong labels."""

import numpy as np

from hub.services.datasets.review_order import k_means, suspects_first, typical_first, uncertain_first, unit_rows


def clouds(count: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` clouds of `each` rows around the unit vectors, and the cloud of each row."""
    generator = np.random.default_rng(seed)
    of = np.repeat(np.arange(count), each)
    return (np.eye(count)[of] + generator.normal(0, 0.05, (len(of), count))).astype(np.float32), of


def test_k_means_finds_separate_clouds() -> None:
    rows, of = clouds(6, 30)
    found = k_means(rows, 6)
    assert len({(int(a), int(b)) for a, b in zip(found, of, strict=True)}) == 6


def test_k_means_of_equal_rows_has_one_cluster() -> None:
    assert set(k_means(np.ones((10, 3), np.float32), 4)) == {0}
    assert len(k_means(np.empty((0, 3), np.float32), 4)) == 0


def test_first_images_are_one_of_each_cloud_without_a_label() -> None:
    rows, of = clouds(6, 30)
    chosen = typical_first(unit_rows(rows), np.zeros(len(rows), bool), 6)
    assert sorted(of[chosen]) == list(range(6))
    labelled = np.zeros(len(rows), bool)
    labelled[[0, 30, 60]] = True
    following = typical_first(unit_rows(rows), labelled, 3)
    assert not labelled[following].any()
    assert len(set(following)) == 3


def test_first_images_are_all_images_when_more_are_wanted() -> None:
    rows, _ = clouds(2, 3)
    assert sorted(typical_first(unit_rows(rows), np.zeros(6, bool), 50)) == list(range(6))


def test_uncertain_images_come_from_different_clusters() -> None:
    rows, of = clouds(4, 25)
    probabilities = np.full((100, 2), 0.5, np.float32)
    probabilities[:, 0] += 0.001 * np.arange(100, dtype=np.float32)
    chosen = uncertain_first(unit_rows(rows), probabilities, 4)
    assert len(chosen) == len(set(chosen)) == 4
    assert len(set(of[chosen])) > 1
    assert list(uncertain_first(unit_rows(rows), probabilities, 200)) == list(range(100))


def test_a_changed_label_is_the_first_suspect_and_a_right_one_is_none() -> None:
    left_out = np.array([[0.9, 0.1], [0.8, 0.2], [0.05, 0.95], [0.4, 0.6]], np.float32)
    assert list(suspects_first(left_out, np.array([0, 1, 0, 0]))) == [2, 1, 3]


def test_a_label_of_lower_probability_is_more_suspicious_than_one_with_a_larger_difference() -> None:
    left_out = np.array([[0.1, 0.9, 0.0], [0.05, 0.5, 0.45]], np.float32)
    assert list(suspects_first(left_out, np.array([0, 0]))) == [1, 0]
