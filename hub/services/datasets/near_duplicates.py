"""Near-duplicates among images: arithmetic on pooled frozen features alone.

Two images are near-duplicates if the cosine of their features, without the mean of all images, exceeds `SIMILARITY`.
Without the mean, images of one fixed camera or on one background are not alike for what they all share.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .snapshots import Snapshot

Floats = NDArray[np.float32]
Places = NDArray[np.int64]

SIMILARITY = 0.99  # docs/datasets.md has the measurement
BLOCK_ROWS = 256
MAX_PRODUCTS = 100_000_000  # of a test image with a training image in one training: about a second of one core


def relative_rows(features: NDArray[np.floating]) -> Floats:
    """Return the rows (n, D) almost without their mean, with length 1.

    A share 1/n of the mean stays. Otherwise two equal images, and no others, would be zeros.
    """
    rows = features.astype(np.float32)
    if len(rows):
        rows -= rows.mean(0) * np.float32(1 - 1 / len(rows))
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)


def groups_of(rows: Floats) -> tuple[Places, Floats]:
    """Return the group of each row, and the similarity to its nearest other row.

    A row is in the group of each of its near-duplicates, so the ends of a chain are in one group too.

    Args:
        rows: (n, D), as `relative_rows` returns them.

    Returns:
        Groups (n,): the place of the first row of the group. Similarities (n,); 0 for a row without a near-duplicate.
    """
    groups = np.arange(len(rows))
    nearest = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS] @ rows[start:].T
        size = len(block)
        block[:, :size] = np.triu(block[:, :size], 1)  # each pair once, no row with itself
        block[block <= SIMILARITY] = 0
        similar = np.flatnonzero(block.any(1))
        if len(similar):
            nearest[start : start + size] = np.maximum(nearest[start : start + size], block.max(1))
            nearest[start:] = np.maximum(nearest[start:], block.max(0))
        for row in similar:
            joined = np.unique(groups[start + np.append(np.flatnonzero(block[row]), row)])
            if len(joined) > 1:
                groups[np.isin(groups, joined)] = joined[0]
    return groups, nearest


def split_warnings(snapshot: Snapshot, rows: Mapping[str, NDArray[np.float16]]) -> list[str]:
    """Return a warning if test images of a snapshot have near-duplicates among its training images.

    Args:
        rows: features (D,) by digest; images without any are not compared.
    """
    images = [image for image in snapshot.images if image.digest in rows]
    tests = np.array([image.use == "test" for image in images], bool)
    if not tests.any() or tests.all():
        return []
    relative = relative_rows(np.stack([rows[image.digest] for image in images]))
    train, test = relative[~tests], relative[tests][: max(1, MAX_PRODUCTS // int((~tests).sum()))]
    copies = 0
    for start in range(0, len(test), BLOCK_ROWS):
        copies += int(((test[start : start + BLOCK_ROWS] @ train.T).max(1) > SIMILARITY).sum())
    if not copies:
        return []
    verb = "has a near-duplicate" if copies == 1 else "have near-duplicates"
    return [
        f"{copies} of {len(test)} test images {verb} among the training images, so the accuracy on test images may be "
        "too high. List them with GET .../near-duplicates, then delete the copies or give each group one split"
    ]
