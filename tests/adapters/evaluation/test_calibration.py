"""Temperature, intervals and label sets on scores whose right answer is known."""

import math

import pytest
import torch
from torch import Tensor

from adapters.evaluation.calibration import coverage_table, fit_confidence, fit_temperature
from adapters.evaluation.intervals import accuracy_interval, coverage_threshold


def honest(n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits (n, K) whose softmax is the true probability of each label, and labels drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [1e-6, 0.1, 1.0, 30.0, 1e6])
def test_temperature_is_found_when_scores_are_scaled(factor: float) -> None:
    logits, targets = honest(4000, 5)
    beta, loss = fit_temperature(logits * factor, targets)
    assert beta * factor == pytest.approx(1.0, rel=0.08)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-3)


def test_temperature_of_useless_scores_gives_even_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (2000,), generator=generator)
    beta, loss = fit_temperature(scores, targets)
    assert beta < 0.1
    assert loss == pytest.approx(math.log(4), rel=0.01)


def test_temperature_is_finite_when_every_score_is_right() -> None:
    scores = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    beta, loss = fit_temperature(scores, torch.arange(20) % 4)
    assert math.isfinite(beta)
    assert loss < 0.3


@pytest.mark.parametrize("factor", [1e-6, 0.1, 1.0, 30.0, 1e6])
def test_confidence_is_right_when_scores_are_scaled(factor: float) -> None:
    logits, targets = honest(4000, 5)
    assert fit_confidence(logits * factor, targets) * factor == pytest.approx(1.0, rel=0.08)


def test_confidence_is_nearer_to_the_accuracy_than_that_of_the_likelihood_when_some_labels_look_impossible() -> None:
    logits, targets = honest(4000, 5)
    logits[logits < logits.amax(1, keepdim=True) - 2] -= 20  # probabilities of rare labels far too small
    right = float((logits.argmax(1) == targets).double().mean())
    gaps = [
        abs(float((logits * beta).softmax(1).amax(1).mean()) - right)
        for beta in (fit_temperature(logits, targets)[0], fit_confidence(logits, targets))
    ]
    assert gaps[1] < 0.7 * gaps[0]


def test_confidence_is_below_one_when_every_score_is_right() -> None:
    scores = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    beta = fit_confidence(scores, torch.arange(20) % 4)
    assert 0.9 < float((scores * beta).softmax(1).amax()) < 0.999


def test_confidence_is_finite_when_scores_are_infinite_or_equal() -> None:
    scores = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    scores[0, 0] = -torch.inf
    assert math.isfinite(fit_confidence(scores, torch.arange(12) % 3))
    assert math.isfinite(fit_confidence(torch.zeros(6, 3, dtype=torch.float64), torch.arange(6) % 3))


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_interval_equals_published_values_of_wilson(right: int, images: int, low: float, high: float) -> None:
    assert accuracy_interval(right, images) == pytest.approx((low, high), abs=1e-4)


def test_interval_is_everything_without_images() -> None:
    assert accuracy_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95, 0.99])
def test_sets_cover_the_share_that_was_asked_for(coverage: float) -> None:
    logits, targets = honest(20_000, 6)
    probabilities = logits.softmax(1)
    table = coverage_table(probabilities[:10_000], targets[:10_000])
    threshold = coverage_threshold(table, coverage)
    covered = probabilities[10_000:].gather(1, targets[10_000:, None])[:, 0] >= threshold
    assert float(covered.double().mean()) == pytest.approx(coverage, abs=0.015)


def test_threshold_is_zero_when_images_are_too_few() -> None:
    logits, targets = honest(10, 3)
    table = coverage_table(logits.softmax(1), targets)
    assert coverage_threshold(table, 0.99) == 0.0
    assert coverage_threshold(table, 0.5) > 0.0


@pytest.mark.parametrize("coverage", [0.4, 0.999])
def test_coverage_outside_of_the_table_is_refused(coverage: float) -> None:
    logits, targets = honest(50, 3)
    table = coverage_table(logits.softmax(1), targets)
    with pytest.raises(ValueError, match=r"not between 0\.5 and 0\.995"):
        coverage_threshold(table, coverage)
