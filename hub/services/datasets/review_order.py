"""Order in which images are reviewed: arithmetic on features and probabilities alone.

While few images have labels, the first images are typical ones of parts of the feature space without any label (Hacohen
et al., "Active Learning on a Budget", ICML 2022). Later they are images between two labels, from different parts.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Places = NDArray[np.int64]

NEIGHBOURS = 20  # of an image, for how typical it is
OVERSAMPLED = 10  # uncertain images per wanted image, from which clusters choose
ROUNDS = 10  # of k-means
TRIALS = 5  # candidates of each starting point, of which the best is taken
MAX_CLUSTERS = 300
FEW = 5  # labelled images per label, below which typical images go first
MAX_OWN = 0.5  # probability of the own label, at or above which a label is no suspect


def unit_rows(features: NDArray[np.floating]) -> Floats:
    """Return the rows (n, D) without their mean, with length 1."""
    rows = features.astype(np.float32)
    rows -= rows.mean(0) if len(rows) else 0
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)


def typical_first(rows: Floats, labelled: NDArray[np.bool_], count: int, seed: int = 0) -> Places:
    """Return the places of `count` unlabelled images at most: one typical image of each cluster without a label.

    Args:
        rows: (n, D), as `unit_rows` returns them.
        labelled: (n,).
    """
    count = min(count, int((~labelled).sum()))
    clusters = k_means(rows, min(int(labelled.sum()) + count, MAX_CLUSTERS, len(rows)), seed)
    known = np.bincount(clusters, weights=labelled, minlength=clusters.max(initial=0) + 1)
    sizes = np.bincount(clusters)
    queues = {}
    for cluster in np.lexsort((-sizes, known)):
        members = np.flatnonzero(clusters == cluster)
        free = members[~labelled[members]]
        if len(free):
            queues[cluster] = list(free[np.argsort(-_typical(rows[free], rows[members]), kind="stable")])
    chosen: list[int] = []
    while len(chosen) < count:  # one image of each cluster, then a second one
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(int(queue.pop(0)))
    return np.array(chosen, np.int64)


def uncertain_first(rows: Floats, probabilities: Floats, count: int, seed: int = 0) -> Places:
    """Return the places of `count` images at most: those between two labels, from different clusters.

    Args:
        rows: (n, D) of unlabelled images.
        probabilities: (n, K), K of at least 2.
    """
    margins = margins_of(probabilities)
    near = np.argsort(margins, kind="stable")[: OVERSAMPLED * count]
    if len(near) <= count:
        return near
    clusters = k_means(rows[near], count, seed)
    first = [int(near[np.flatnonzero(clusters == cluster)[0]]) for cluster in np.unique(clusters)]
    rest = [int(place) for place in near if place not in set(first)]
    chosen = np.array((first + rest)[:count], np.int64)
    return chosen[np.argsort(margins[chosen], kind="stable")]


def margins_of(probabilities: Floats) -> Floats:
    """Return the difference (n,) between the two highest probabilities of each row."""
    best = np.partition(probabilities, -2, axis=1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0], np.float32)


def suspects_first(left_out: Floats, targets: Places) -> Places:
    """Return the places of images whose label is probably wrong, most suspicious first.

    The probability of the own label decides, the score "self-confidence" of Northcutt et al. ("Confident Learning",
    JAIR 2021). The difference to the best label would put first what the classifier is sure about: it is often sure and
    wrong where labels are near each other, such as two counts.

    Args:
        left_out: probabilities (n, K) of each image from a classifier that was fitted without it.
        targets: (n,), numbers of the labels that the images have.
    """
    own = left_out[np.arange(len(targets)), targets]
    other = np.where(np.arange(left_out.shape[1]) == targets[:, None], 0, left_out).max(1, initial=0)
    order = np.argsort(own, kind="stable")
    return np.asarray(order[(own < other)[order] & (own < MAX_OWN)[order]], np.int64)


def k_means(rows: Floats, clusters: int, seed: int = 0) -> Places:
    """Return the cluster (n,) of each row, by Lloyd's algorithm from spread starting points (k-means++).

    scikit-learn's would add about 100 MB to each gateway, whose process needs nothing else of it.
    """
    if not len(rows):
        return np.empty(0, np.int64)
    generator = np.random.default_rng(seed)
    centres = rows[[int(generator.integers(len(rows)))]]
    nearest = _distances(rows, centres)[:, 0]
    while len(centres) < clusters and nearest.sum() > 0:
        drawn = generator.choice(len(rows), TRIALS, p=nearest / nearest.sum())
        nearer = np.minimum(nearest[:, None], _distances(rows, rows[drawn]))
        chosen = int(nearer.sum(0).argmin())
        centres = np.concatenate([centres, rows[[drawn[chosen]]]])
        nearest = nearer[:, chosen]
    for _ in range(ROUNDS):
        found = _distances(rows, centres).argmin(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, found, rows)
        counts = np.bincount(found, minlength=len(centres))[:, None]
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
    return np.asarray(_distances(rows, centres).argmin(1), np.int64)


def _distances(rows: Floats, centres: Floats) -> NDArray[np.float64]:
    squares = np.square(rows).sum(1)[:, None] - 2 * rows @ centres.T + np.square(centres).sum(1)
    return np.asarray(np.maximum(squares.astype(np.float64), 0), np.float64)


def _typical(free: Floats, members: Floats) -> Floats:
    """Return how near each row is to its nearest members of its cluster, itself among them."""
    similar = free @ members.T
    count = min(NEIGHBOURS, similar.shape[1])
    return np.asarray(np.partition(similar, -count, axis=1)[:, -count:].mean(1), np.float32)
