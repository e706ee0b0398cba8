"""The closed-form head, against the same mathematics written out image by image."""

import pytest
import torch
from torch import Tensor

from adapters.training.instant import fit_head


def clusters(images: int, classes: int, width: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features (n, D) around random means, and targets (n,)."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(images) % classes
    means = torch.randn(classes, width, generator=generator)
    return means[targets] * spread + torch.randn(images, width, generator=generator), targets


def written_out(features: Tensor, targets: Tensor, image: Tensor, classes: int, added: float, degrees: int) -> Tensor:
    """Return the scores (K,) of one image from a classifier that is fitted to `features`, the plain way."""
    x = features.double()
    means = torch.stack([x[targets == k].mean(0) for k in range(classes)])
    residuals = x - means[targets]
    scatter = residuals.T @ residuals + added * torch.eye(x.shape[1], dtype=torch.float64)
    off = image.double() - means
    scores: Tensor = -(off * torch.linalg.solve(scatter, off.T).T).sum(1) / 2 * degrees
    return scores


@pytest.mark.parametrize(("images", "width"), [(40, 6), (24, 60)], ids=["more images", "more features"])
def test_left_out_scores_equal_a_refit_without_the_image(images: int, width: int) -> None:
    features, targets = clusters(images, 3, width, 1.0)
    head = fit_head(features, targets, 3)
    residuals = features.double() - torch.stack([features[targets == k].double().mean(0) for k in range(3)])[targets]
    added = head.shrinkage * float(residuals.square().sum()) / width
    for i in (0, 1, images - 1):
        kept = torch.arange(images) != i
        expected = written_out(features[kept], targets[kept], features[i], 3, added, images - 3)
        found = head.scores[i]
        # Scores are scaled by one temperature, and softmax ignores a common offset.
        scale = (found[0] - found[1]) / (expected[0] - expected[1])
        torch.testing.assert_close(found - found[0], (expected - expected[0]) * scale, rtol=1e-6, atol=1e-6)
        assert scale > 0


def test_head_recognises_new_images_when_classes_are_apart() -> None:
    features, targets = clusters(90, 3, 20, 2.0)
    head = fit_head(features[:45], targets[:45], 3)
    logits = features[45:] @ head.weight.T + head.bias
    assert float((logits.argmax(1) == targets[45:]).double().mean()) > 0.95


def test_left_out_accuracy_is_chance_when_labels_are_random() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(400, 100, generator=generator)
    targets = torch.randint(0, 4, (400,), generator=generator)
    head = fit_head(features, targets, 4)
    assert abs(float((head.scores.argmax(1) == targets).double().mean()) - 0.25) < 0.08
    confidence = head.scores.softmax(1).max(1).values.mean()
    assert float(confidence) < 0.35  # the temperature admits that nothing was learned


def test_classes_weigh_the_same_when_one_has_many_more_images() -> None:
    generator = torch.Generator().manual_seed(2)
    targets = torch.tensor([0] * 190 + [1] * 10)
    features = torch.randn(200, 4, generator=generator) + 1.5 * targets[:, None]
    head = fit_head(features, targets, 2)
    recall = [(head.scores.argmax(1) == targets)[targets == k].double().mean() for k in (0, 1)]
    assert float(recall[1]) > 0.7
    assert float(recall[0]) > 0.7


def test_image_alone_in_its_class_is_never_recognised_when_left_out() -> None:
    features, targets = clusters(20, 2, 5, 2.0)
    features = torch.cat([features, features.new_full((1, 5), 9.0)])
    targets = torch.cat([targets, torch.tensor([2])])
    head = fit_head(features, targets, 3)
    assert head.scores[-1, 2] == -torch.inf
    assert int((features[-1] @ head.weight.T + head.bias).argmax()) == 2
    assert head.weight.isfinite().all()


@pytest.mark.parametrize(
    ("targets", "message"), [([0, 0, 2], "class 1 has no image"), ([0, 1, 2], "at least one class needs two")]
)
def test_fit_head_names_the_fault_when_images_are_missing(targets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_head(torch.randn(3, 4), torch.tensor(targets), 3)


def test_identical_images_give_a_finite_head() -> None:
    features = torch.ones(8, 5)
    head = fit_head(features, torch.arange(8) % 2, 2)
    assert head.weight.isfinite().all()
    assert head.bias.isfinite().all()
