"""Drift: labels and typicality of answered images against those of the training."""

import numpy as np
import pytest

from hub.registry.datasets.usage import VersionCounts
from hub.services.usage.drift import FEW_IMAGES, drift_of

TRAINED = {"rose": 100, "tulip": 100, "daisy": 200}


def counted(labels: dict[str, int], typicality: np.ndarray | None = None) -> VersionCounts:
    counts = VersionCounts(n=sum(labels.values()), l=labels)
    if typicality is None:
        return counts
    return counts.model_copy(update={"m": len(typicality), "t": float(typicality.sum())})


def answers(rng: np.random.Generator, count: int, shares: tuple[float, ...], trained: dict[str, int]) -> dict[str, int]:
    return dict(zip(trained, rng.multinomial(count, shares).tolist(), strict=True))


@pytest.mark.parametrize("count", [50, 60, 100, 300, 3000])
@pytest.mark.parametrize("classes", [2, 3, 20])
def test_images_like_those_of_the_training_are_hardly_ever_called_drift(count: int, classes: int) -> None:
    rng = np.random.default_rng(count + classes)
    shares = rng.dirichlet(np.full(classes, 2.0))
    drifts = 0
    for _ in range(1000):
        trained = dict(zip(map(str, range(classes)), rng.multinomial(200, shares).tolist(), strict=True))
        found = drift_of(1, counted(answers(rng, count, tuple(shares), trained), rng.uniform(size=count)), trained, 200)
        drifts += found.verdict == "drift"
    assert drifts <= 8, f"{drifts} of 1000"


def test_other_labels_than_those_of_the_training_are_drift_and_are_named() -> None:
    found = drift_of(3, counted({"rose": 200, "tulip": 40, "daisy": 10}), TRAINED, None)
    assert found.labels is not None
    assert (found.verdict, found.labels.drifts, found.typicality) == ("drift", True, None)
    assert found.labels.stability_index > found.labels.limit >= 0.25
    assert (found.labels.shares[0].label, found.labels.shares[0].trained) == ("rose", 0.25)
    assert "'rose': 80% of the answers, 25% of the training" in found.text


def test_a_lower_typicality_is_drift_and_a_higher_one_is_not() -> None:
    rng = np.random.default_rng(0)
    low = drift_of(1, counted({"rose": 200}, rng.uniform(0, 0.6, 200)), None, 500)
    high = drift_of(1, counted({"rose": 200}, rng.uniform(0.4, 1, 200)), None, 500)
    assert low.typicality is not None
    assert (low.verdict, low.labels) == ("drift", None)
    assert low.typicality.mean < low.typicality.limit <= 0.4
    assert "mean typicality 0.3" in low.text
    assert high.verdict == "none"


def test_few_images_decide_nothing() -> None:
    found = drift_of(1, counted({"rose": FEW_IMAGES - 1}, np.zeros(FEW_IMAGES - 1)), TRAINED, 100)
    assert (found.verdict, found.labels, found.typicality) == ("few", None, None)
    assert f"{FEW_IMAGES} are needed" in found.text


def test_an_uncertain_reference_widens_the_limit_of_typicality() -> None:
    limits = []
    for references in (None, 1000, 10):
        found = drift_of(1, counted({"rose": 1000}, np.full(1000, 0.35)), None, references)
        assert found.typicality is not None
        limits.append(found.typicality.limit)
    assert limits[0] == limits[1] == 0.4
    assert limits[2] < 0.35


@pytest.mark.parametrize("labels", [{"rose": 60, "other": 40}, {str(i): 3 for i in range(101)}])
def test_labels_are_not_compared_where_some_are_counted_together(labels: dict[str, int]) -> None:
    trained = TRAINED if "rose" in labels else {str(i): 3 for i in range(101)}
    found = drift_of(1, counted(labels, np.full(sum(labels.values()), 0.5)), trained, 100)
    assert (found.verdict, found.labels) == ("none", None)
    assert "labels are not compared" in found.text
