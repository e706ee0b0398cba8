"""Drift: whether answered images still look like those that trained a version. Arithmetic on counts alone.

Labels: the population stability index between the snapshot's labels and the answers' labels. Between two samples of one
distribution with n and m images and B bins it is about (1/n + 1/m) times a chi-squared variable with B - 1 degrees of
freedom (Yurdakul, "Statistical Properties of Population Stability Index", 2018), so its limit grows for few images.

Typicality: by definition uniform between 0 and 1 for images like those of the training, so its mean is 0.5 with a
variance of 1/12 per image.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

from ...admission.quotas import USAGE_LABELS
from ...registry.datasets.usage import OTHER, VersionCounts
from ...usage_schemas import Drift, LabelDrift, LabelShare, TypicalityDrift

FEW_IMAGES = 50  # below which nothing is decided
LARGE_INDEX = 0.25  # the field's usual border of a large shift
CHANCE = 0.001  # of a verdict for labels without a shift
ERRORS = 3.3  # standard errors of the mean typicality; the same chance
LOW_MEAN = 0.4  # a smaller change of the mean typicality is of no use to know, however certain
EXPECTED = 5  # images of a bin, below which its label shares a bin with other rare labels
SHOWN = 5  # labels


def drift_of(version: int, counts: VersionCounts, trained: Mapping[str, int] | None, references: int | None) -> Drift:
    """Return the drift of the images that a version has answered.

    Args:
        trained: label -> images of the version's snapshot; None if it is unknown.
        references: held-out images behind the version's typicality; None if their number is unknown.
    """
    labels = None
    if trained and counts.n >= FEW_IMAGES and _are_all_named(counts, trained):
        labels = _label_drift(counts, trained)
    typicality = _typicality_drift(counts, references) if counts.m >= FEW_IMAGES else None
    verdict, text = _verdict(version, counts, labels, typicality)
    return Drift(version=version, images=counts.n, verdict=verdict, text=text, labels=labels, typicality=typicality)


def _are_all_named(counts: VersionCounts, trained: Mapping[str, int]) -> bool:
    """Return whether no label of the version is counted as one of the others."""
    return len(trained) <= USAGE_LABELS and (OTHER in trained or OTHER not in counts.l)


def _label_drift(counts: VersionCounts, trained: Mapping[str, int]) -> LabelDrift:
    answered = counts.l
    total, known = sum(answered.values()), sum(trained.values())
    names = {*trained, *answered}
    # Labels that are rare in both share a bin: an almost empty bin would make a large index by chance.
    frequent = [
        name
        for name in sorted(names)
        if EXPECTED * (total + known) <= (trained.get(name, 0) + answered.get(name, 0)) * min(total, known)
    ]
    bins = np.array([[trained.get(name, 0), answered.get(name, 0)] for name in frequent], dtype=float).reshape(-1, 2)
    rest = np.array([[known, total]], dtype=float) - bins.sum(0)
    if rest.sum() > 0:
        bins = np.concatenate([bins, rest])
    shares = (bins + 0.5) / (bins + 0.5).sum(0)  # half an image more: no share of 0 under the logarithm
    index = float(((shares[:, 1] - shares[:, 0]) * np.log(shares[:, 1] / shares[:, 0])).sum())
    limit = max(LARGE_INDEX, _chi_squared(len(bins) - 1) * (1 / known + 1 / total))
    compared = [
        LabelShare(
            label=name,
            trained=round(trained.get(name, 0) / known, 4),
            answered=round(answered.get(name, 0) / total, 4),
        )
        for name in names
    ]
    compared.sort(key=lambda share: (-abs(share.answered - share.trained), share.label))
    return LabelDrift(
        stability_index=round(index, 4),
        limit=round(limit, 4),
        trained_images=known,
        shares=compared[:SHOWN],
        drifts=index > limit,
    )


def _chi_squared(degrees: int) -> float:
    """Return what a chi-squared variable exceeds with the probability `CHANCE` (Wilson and Hilferty, 1931)."""
    if degrees == 0:
        return 0.0
    part = 2 / (9 * degrees)
    return degrees * (1 - part + NormalDist().inv_cdf(1 - CHANCE) * math.sqrt(part)) ** 3


def _typicality_drift(counts: VersionCounts, references: int | None) -> TypicalityDrift:
    mean = counts.t / counts.m
    # The table behind typicality is a sample too: its error does not shrink with more answered images.
    error = math.sqrt((1 / counts.m + (1 / references if references else 0)) / 12)
    limit = min(LOW_MEAN, 0.5 - ERRORS * error)
    return TypicalityDrift(
        mean=round(mean, 4),
        standard_error=round(error, 4),
        limit=round(limit, 4),
        images=counts.m,
        drifts=mean < limit,
    )


def _verdict(
    version: int,
    counts: VersionCounts,
    labels: LabelDrift | None,
    typicality: TypicalityDrift | None,
) -> tuple[str, str]:
    if counts.n < FEW_IMAGES:
        return "few", f"Version {version} has answered {counts.n} images; {FEW_IMAGES} are needed to see drift."
    findings = []
    if typicality is not None and typicality.drifts:
        findings.append(
            f"the images look less like those of the training (mean typicality {typicality.mean:.2f} in place of 0.50)"
        )
    if labels is not None and labels.drifts:
        most = labels.shares[0]
        findings.append(
            f"the answers have other labels than the training's images ({most.label!r}: {most.answered:.0%} of the "
            f"answers, {most.trained:.0%} of the training)"
        )
    if findings:
        return "drift", f"Drift of version {version}: {'; '.join(findings)}. Review its newest images and train again."
    if labels is None and typicality is None:
        return "few", f"Version {version} has neither labels to compare nor typicality, so the hub cannot see drift."
    missing = (
        [] if labels is not None else ["Its labels are not compared: the hub does not know those of its training."]
    )
    missing += [] if typicality is not None else ["Its answers have no typicality."]
    text = f"The {counts.n} images that version {version} has answered look like those of the training."
    return "none", " ".join([text, *missing])
