"""Metrics against hand-computed values and scikit-learn; the bank against the merged form on real images."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import log_loss, recall_score, top_k_accuracy_score

from adapters import AdapterError, Backbone, Bank, BankFullError, DataError, load_backbone
from adapters.data.image_set import ImageSet
from adapters.data.images import decode_image, eval_transform, normalise
from adapters.evaluation.evaluate import (
    Outputs,
    agreement,
    bootstrap_interval,
    compare_merged,
    evaluate,
    expected_calibration_error,
    negative_log_likelihood,
    per_class_accuracy,
    scores,
    top_k_accuracy,
)
from tests.support.image_sets import image_file
from tests.support.models import png, random_adapter

LABELS = tuple("abcdefg")


def random_logits(n: int = 200, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=generator) * 2
    targets = torch.randint(0, classes, (n,), generator=generator)
    logits[torch.arange(n), targets] += 1.5  # better than chance
    return logits, targets


def certain(*probabilities: float) -> torch.Tensor:
    """Return two-class logits whose softmax gives the first class these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("images")
    paths = []
    for i in range(9):
        paths.append(root / f"{i}.png")
        paths[-1].write_bytes(png(i))
    return ImageSet(tuple(paths), (0, 1, 2, 0, 1, 2, 0, 1, 2), ("class 0", "class 1", "class 2"))


def labelled(images: ImageSet, labels: tuple[str, ...]) -> ImageSet:
    return dataclasses.replace(images, labels=labels)


def test_accuracies_equal_hand_computed_values_when_logits_are_few() -> None:
    logits = torch.tensor([[3.0, 2, 1], [1, 3, 2], [2, 3, 1], [1, 2, 3]])
    targets = torch.tensor([0, 2, 2, 2])
    assert top_k_accuracy(logits, targets, 1) == 0.5
    assert top_k_accuracy(logits, targets, 2) == 0.75
    assert top_k_accuracy(logits, targets, 3) == 1
    assert per_class_accuracy(logits, targets) == [1, None, pytest.approx(1 / 3)]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_accuracies_equal_scikit_learn_when_logits_are_random(k: int) -> None:
    logits, targets = random_logits()
    assert top_k_accuracy(logits, targets, k) == pytest.approx(
        top_k_accuracy_score(targets, logits, k=k, labels=range(7))
    )
    assert per_class_accuracy(logits, targets) == pytest.approx(recall_score(targets, logits.argmax(1), average=None))
    assert negative_log_likelihood(logits, targets) == pytest.approx(log_loss(targets, logits.double().softmax(1)))


def test_calibration_error_equals_the_hand_computed_value_when_two_bins_are_used() -> None:
    """One bin of width 1/15 has 0.65 twice, one correct; the other has 0.9 three times, two correct."""
    logits = certain(0.65, 0.35, 0.9, 0.9, 0.1)
    targets = torch.tensor([0, 0, 0, 1, 1])
    by_hand = 2 / 5 * abs(0.65 - 1 / 2) + 3 / 5 * abs(0.9 - 2 / 3)
    assert expected_calibration_error(logits, targets) == pytest.approx(by_hand)


def test_calibration_error_is_0_or_1_when_predictions_are_certain() -> None:
    always = certain(1.0, 1.0)
    assert expected_calibration_error(always, torch.tensor([0, 0])) == 0
    assert expected_calibration_error(always, torch.tensor([1, 1])) == 1
    # Confidence 0.5 and accuracy 0.5 in one bin: calibrated.
    assert expected_calibration_error(certain(0.5, 0.5), torch.tensor([0, 1])) == pytest.approx(0)


def test_calibration_error_separates_bins_when_confidences_differ() -> None:
    """Over- and under-confidence cancel out in one bin, but not in two."""
    logits, targets = certain(0.8, 0.8, 0.6, 0.6), torch.tensor([0, 1, 0, 0])
    assert expected_calibration_error(logits, targets, bins=1) == pytest.approx(abs(0.7 - 0.75))
    assert expected_calibration_error(logits, targets) == pytest.approx((0.3 + 0.4) / 2)


def test_bootstrap_interval_equals_scipy_when_resampled_often() -> None:
    correct = torch.arange(200) % 5 != 0  # 80 %
    low, high = bootstrap_interval(correct, seed=0, resamples=20_000)
    reference = scipy.stats.bootstrap(
        (correct.numpy().astype(float),), np.mean, n_resamples=5_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.006)
    assert bootstrap_interval(correct, seed=0) == bootstrap_interval(correct, seed=0)
    assert bootstrap_interval(correct, seed=0) != bootstrap_interval(correct, seed=1)
    assert bootstrap_interval(torch.ones(10, dtype=torch.bool), seed=0) == (1, 1)
    narrow, wide = bootstrap_interval(correct, seed=0, level=0.5), bootstrap_interval(correct, seed=0)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


def test_scores_contain_every_metric_when_given_logits() -> None:
    logits, targets = random_logits()
    found = scores(logits, targets, LABELS, seed=3)
    assert found.images == 200
    assert found.top1 == top_k_accuracy(logits, targets, 1)
    assert found.top1_interval == bootstrap_interval(logits.argmax(1) == targets, seed=3)
    assert found.top5 == top_k_accuracy(logits, targets, 5)
    assert list(found.per_class) == list(LABELS)
    assert scores(logits[:, :5], targets % 5, LABELS[:5]).top5 is None  # it would always be 1


def test_agreement_depends_on_the_tolerance_when_logits_differ() -> None:
    merged = torch.tensor([[10.0, 0], [1, 2]])
    unmerged = merged + torch.tensor([[0.009, 0], [0, -0.005]])
    close = agreement(unmerged, merged, 1e-3)
    assert close.agrees
    assert close.largest_difference == pytest.approx(0.009, rel=1e-3)
    assert (close.largest_logit, close.label_changes) == (10, 0)
    far = agreement(merged.flip(1), merged, 1e-3)
    assert not far.agrees
    assert far.label_changes == 2
    assert not agreement(merged * float("nan"), merged, 1e-3).agrees


def test_bank_agrees_with_the_merged_model_when_the_adapter_is_the_same(backbone: Backbone, images: ImageSet) -> None:
    adapter = random_adapter(backbone, classes=5, kernels=3, rank=4)
    with_labels = labelled(images, adapter.labels)
    bank = Bank(backbone, slots=1, max_rank=8, max_kernels=4)
    outputs = evaluate(bank, adapter, with_labels)
    assert bank.free == 1
    assert outputs.targets.tolist() == list(images.targets)
    assert outputs.images_per_s > 0
    found = compare_merged(backbone, adapter, with_labels, outputs)
    assert found.agrees
    assert found.label_changes == 0
    other = compare_merged(backbone, random_adapter(backbone, seed=1, kernels=3, rank=4), with_labels, outputs)
    assert not other.agrees


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_within_its_tolerance_when_the_adapter_is_the_same(
    dtype: torch.dtype, images: ImageSet
) -> None:
    torch.manual_seed(0)
    half = load_backbone("demo", pretrained=False, dtype=dtype)
    adapter, other = (random_adapter(half, seed=i, classes=5, kernels=3, rank=4) for i in (0, 1))
    with_labels = labelled(images, adapter.labels)
    outputs = evaluate(Bank(half, slots=1), adapter, with_labels)
    assert compare_merged(half, adapter, with_labels, outputs).agrees
    assert not compare_merged(half, other, with_labels, outputs).agrees


def test_evaluate_preprocesses_images_as_in_the_metadata_when_it_differs_from_the_backbone(
    backbone: Backbone, images: ImageSet
) -> None:
    preprocess = random_adapter(backbone).preprocess | {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    adapter = dataclasses.replace(random_adapter(backbone), preprocess=preprocess)
    with_labels = labelled(images, adapter.labels)
    found = evaluate(Bank(backbone, slots=1), adapter, with_labels)
    transform = eval_transform(preprocess)
    pixels = torch.stack([transform(decode_image(image_file(images, i))) for i in range(len(images))])
    pixels = normalise(pixels, torch.tensor(preprocess["mean"]), torch.tensor(preprocess["std"]))
    with torch.inference_mode():
        torch.testing.assert_close(found.logits, adapter.merge(backbone)(pixels), rtol=1e-3, atol=1e-4)


def test_evaluate_refuses_images_when_their_labels_differ_from_the_adapter(
    backbone: Backbone, images: ImageSet
) -> None:
    bank, adapter = Bank(backbone, slots=1), random_adapter(backbone)
    with pytest.raises(
        DataError, match=r"the labels other; expected the adapter's labels in its order: class 0, class 1"
    ):
        evaluate(bank, adapter, labelled(images, ("class 0", "other")))
    with pytest.raises(DataError, match="the labels class 1, class 0; expected"):  # the head depends on their order
        evaluate(bank, random_adapter(backbone, classes=2), labelled(images, ("class 1", "class 0")))
    with pytest.raises(DataError, match="no images"):
        evaluate(bank, adapter, labelled(images, adapter.labels).subset([]))


def test_evaluate_releases_its_slot_when_an_image_is_invalid(
    backbone: Backbone, images: ImageSet, tmp_path: Path
) -> None:
    adapter = random_adapter(backbone)
    bank = Bank(backbone, slots=1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with_labels = labelled(dataclasses.replace(images, sources=(broken, *images.sources[1:])), adapter.labels)
    with pytest.raises(DataError, match=r"broken\.png"):
        evaluate(bank, adapter, with_labels)
    assert bank.free == 1
    with pytest.raises(AdapterError, match="kernels"):
        evaluate(Bank(backbone, slots=1, max_kernels=1), adapter, with_labels)
    bank.put(adapter)
    with pytest.raises(BankFullError):
        evaluate(bank, adapter, with_labels)


def test_evaluate_returns_float32_on_the_cpu_when_it_succeeds(backbone: Backbone, images: ImageSet) -> None:
    adapter = random_adapter(backbone)
    found = evaluate(Bank(backbone, slots=1), adapter, labelled(images, adapter.labels))
    assert isinstance(found, Outputs)
    assert (found.logits.dtype, found.logits.device.type, found.logits.shape) == (torch.float32, "cpu", (9, 5))
