"""Metrics against hand-made values and scikit-learn's; the bank against the merged form over real images."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import log_loss, recall_score, top_k_accuracy_score

from adapters import AdapterError, Bank, BankFullError, DataError, load_backbone
from adapters.data.images import ImageSet, decode_image, eval_transform, normalise
from adapters.training.evaluate import (
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
from tests.support.models import png, random_adapter

LABELS = tuple("abcdefg")


def random_answers(n: int = 200, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=generator) * 2
    targets = torch.randint(0, classes, (n,), generator=generator)
    logits[torch.arange(n), targets] += 1.5  # better than chance
    return logits, targets


def certain(*probabilities: float) -> torch.Tensor:
    """Two-class logits whose softmax gives the first class these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    root = tmp_path_factory.mktemp("images")
    paths = []
    for i in range(9):
        paths.append(root / f"{i}.png")
        paths[-1].write_bytes(png(i))
    return ImageSet(tuple(paths), (0, 1, 2, 0, 1, 2, 0, 1, 2), ("class 0", "class 1", "class 2"))


def labelled(images: ImageSet, labels: tuple[str, ...]) -> ImageSet:
    return dataclasses.replace(images, labels=labels)


def test_accuracies_by_hand() -> None:
    logits = torch.tensor([[3.0, 2, 1], [1, 3, 2], [2, 3, 1], [1, 2, 3]])
    targets = torch.tensor([0, 2, 2, 2])
    assert top_k_accuracy(logits, targets, 1) == 0.5
    assert top_k_accuracy(logits, targets, 2) == 0.75
    assert top_k_accuracy(logits, targets, 3) == 1
    assert per_class_accuracy(logits, targets) == [1, None, pytest.approx(1 / 3)]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_accuracies_are_scikit_learn_s(k) -> None:
    logits, targets = random_answers()
    assert top_k_accuracy(logits, targets, k) == pytest.approx(
        top_k_accuracy_score(targets, logits, k=k, labels=range(7))
    )
    assert per_class_accuracy(logits, targets) == pytest.approx(recall_score(targets, logits.argmax(1), average=None))
    assert negative_log_likelihood(logits, targets) == pytest.approx(log_loss(targets, logits.double().softmax(1)))


def test_calibration_error_by_hand() -> None:
    """Two bins of 1/15: one has 0.65 twice, one of them right; the other has 0.9 three times, two of them right."""
    logits = certain(0.65, 0.35, 0.9, 0.9, 0.1)
    targets = torch.tensor([0, 0, 0, 1, 1])
    by_hand = 2 / 5 * abs(0.65 - 1 / 2) + 3 / 5 * abs(0.9 - 2 / 3)
    assert expected_calibration_error(logits, targets) == pytest.approx(by_hand)


def test_calibration_error_at_its_ends() -> None:
    always = certain(1.0, 1.0)
    assert expected_calibration_error(always, torch.tensor([0, 0])) == 0
    assert expected_calibration_error(always, torch.tensor([1, 1])) == 1
    # Sure of half, right in half, in the same bin: calibrated on the whole.
    assert expected_calibration_error(certain(0.5, 0.5), torch.tensor([0, 1])) == pytest.approx(0)


def test_calibration_error_counts_bins_apart() -> None:
    """Over- and under-confidence in one bin cancel out, in two bins they do not."""
    logits, targets = certain(0.8, 0.8, 0.6, 0.6), torch.tensor([0, 1, 0, 0])
    assert expected_calibration_error(logits, targets, bins=1) == pytest.approx(abs(0.7 - 0.75))
    assert expected_calibration_error(logits, targets) == pytest.approx((0.3 + 0.4) / 2)


def test_the_bootstrap_interval_is_scipy_s() -> None:
    right = torch.arange(200) % 5 != 0  # 80 %
    low, high = bootstrap_interval(right, seed=0, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (right.numpy().astype(float),), np.mean, n_resamples=5_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert bootstrap_interval(right, seed=0) == bootstrap_interval(right, seed=0)
    assert bootstrap_interval(right, seed=0) != bootstrap_interval(right, seed=1)
    assert bootstrap_interval(torch.ones(10, dtype=torch.bool), seed=0) == (1, 1)
    narrow, wide = bootstrap_interval(right, seed=0, level=0.5), bootstrap_interval(right, seed=0)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


def test_scores_put_the_figures_together() -> None:
    logits, targets = random_answers()
    found = scores(logits, targets, LABELS, seed=3)
    assert found.images == 200
    assert found.top1 == top_k_accuracy(logits, targets, 1)
    assert found.top1_interval == bootstrap_interval(logits.argmax(1) == targets, seed=3)
    assert found.top5 == top_k_accuracy(logits, targets, 5)
    assert list(found.per_class) == list(LABELS)
    assert scores(logits[:, :5], targets % 5, LABELS[:5]).top5 is None  # it would be 1


def test_agreement_by_hand() -> None:
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


def test_the_bank_s_answers_are_the_merged_model_s(backbone, images) -> None:
    adapter = random_adapter(backbone, classes=5, kernels=3, rank=4)
    there = labelled(images, adapter.labels)
    bank = Bank(backbone, slots=1, max_rank=8, max_kernels=4)
    outputs = evaluate(bank, adapter, there)
    assert bank.free == 1
    assert outputs.targets.tolist() == list(images.targets)
    assert outputs.images_per_s > 0
    found = compare_merged(backbone, adapter, there, outputs)
    assert found.agrees
    assert found.label_changes == 0
    other = compare_merged(backbone, random_adapter(backbone, seed=1, kernels=3, rank=4), there, outputs)
    assert not other.agrees


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_tolerance_of_its_own(dtype, images) -> None:
    torch.manual_seed(0)
    half = load_backbone("demo", pretrained=False, dtype=dtype)
    adapter, other = (random_adapter(half, seed=i, classes=5, kernels=3, rank=4) for i in (0, 1))
    there = labelled(images, adapter.labels)
    outputs = evaluate(Bank(half, slots=1), adapter, there)
    assert compare_merged(half, adapter, there, outputs).agrees
    assert not compare_merged(half, other, there, outputs).agrees


def test_images_are_prepared_as_the_adapter_says(backbone, images) -> None:
    preprocess = random_adapter(backbone).preprocess | {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    adapter = dataclasses.replace(random_adapter(backbone), preprocess=preprocess)
    there = labelled(images, adapter.labels)
    found = evaluate(Bank(backbone, slots=1), adapter, there)
    transform = eval_transform(preprocess)
    pixels = torch.stack([transform(decode_image(path)) for path in images.paths])
    pixels = normalise(pixels, torch.tensor(preprocess["mean"]), torch.tensor(preprocess["std"]))
    with torch.inference_mode():
        torch.testing.assert_close(found.logits, adapter.merge(backbone)(pixels), rtol=1e-3, atol=1e-4)


def test_labels_are_the_adapter_s(backbone, images) -> None:
    bank, adapter = Bank(backbone, slots=1), random_adapter(backbone)
    with pytest.raises(DataError, match=r"labels other are not the adapter's, class 0, class 1"):
        evaluate(bank, adapter, labelled(images, ("class 0", "other")))
    with pytest.raises(DataError, match="labels class 1, class 0 are not"):  # their order is the head's
        evaluate(bank, random_adapter(backbone, classes=2), labelled(images, ("class 1", "class 0")))
    with pytest.raises(DataError, match="no images"):
        evaluate(bank, adapter, labelled(images, adapter.labels).subset([]))


def test_a_slot_comes_back_whatever_happens(backbone, images, tmp_path) -> None:
    adapter = random_adapter(backbone)
    bank = Bank(backbone, slots=1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    there = labelled(dataclasses.replace(images, paths=(broken, *images.paths[1:])), adapter.labels)
    with pytest.raises(DataError, match=r"broken\.png"):
        evaluate(bank, adapter, there)
    assert bank.free == 1
    with pytest.raises(AdapterError, match="kernels"):
        evaluate(Bank(backbone, slots=1, max_kernels=1), adapter, there)
    bank.put(adapter)
    with pytest.raises(BankFullError):
        evaluate(bank, adapter, there)


def test_outputs_hold_float32_on_the_cpu(backbone, images) -> None:
    adapter = random_adapter(backbone)
    found = evaluate(Bank(backbone, slots=1), adapter, labelled(images, adapter.labels))
    assert isinstance(found, Outputs)
    assert (found.logits.dtype, found.logits.device.type, found.logits.shape) == (torch.float32, "cpu", (9, 5))
