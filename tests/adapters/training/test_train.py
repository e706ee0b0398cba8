"""The recipe: repeatable, better than chance, chosen on validation images, and harmless to the backbone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adapters import Adapter, DataError, KarstConfig, extract
from adapters.backbone import fingerprint
from adapters.data.images import ImageSet, Pixels, preprocess_of, read_folder
from adapters.training.train import Recipe, _schedule, accuracy, linear_probe, split, steps_per_epoch, train_model
from tests.support.models import coloured_noise, random_pixels

COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}
CONFIG = KarstConfig(kernels=2, rank=4)
RECIPE = Recipe(epochs=3, warmup_epochs=1, batch_size=8, lr=5e-3)


def make_task(root: Path, count: int, seed: int) -> ImageSet:
    return read_folder(coloured_noise(root, COLOURS, count, seed))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return make_task(tmp_path_factory.mktemp("train"), count=12, seed=0)


@pytest.fixture(scope="module")
def train(backbone, images) -> Pixels:
    return Pixels(images, preprocess_of(backbone))


@pytest.fixture(scope="module")
def held_out(backbone, tmp_path_factory) -> Pixels:
    return Pixels(make_task(tmp_path_factory.mktemp("test"), count=6, seed=1), preprocess_of(backbone))


@pytest.fixture(scope="module")
def fitted(backbone, train):
    return train_model(backbone, train, CONFIG, RECIPE)


def numbers(fitted) -> dict[str, torch.Tensor]:
    return fitted.model.tensors()


def test_an_easy_task_is_learnt(fitted, held_out) -> None:
    assert accuracy(fitted.model, held_out) > 0.9  # chance is 1 in 3
    assert fitted.history[-1].loss < fitted.history[0].loss
    assert fitted.history[-1].train_accuracy > fitted.history[0].train_accuracy


def test_the_same_seed_gives_the_same_bits(backbone, train, fitted) -> None:
    torch.manual_seed(99)  # whatever the caller's random state
    again = train_model(backbone, train, CONFIG, RECIPE)
    assert again.history == fitted.history
    assert all(torch.equal(numbers(again)[name], tensor) for name, tensor in numbers(fitted).items())


def test_another_seed_gives_another_adapter(backbone, train, fitted) -> None:
    other = train_model(backbone, train, CONFIG, RECIPE.model_copy(update={"seed": 1, "epochs": 1}))
    assert not any(torch.equal(numbers(other)[n], t) for n, t in numbers(fitted).items() if n.endswith("karst_a"))


def test_the_caller_s_random_numbers_go_on_as_if_nothing_was(backbone, train) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_model(backbone, train, CONFIG, RECIPE.model_copy(update={"epochs": 1}))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backbone_stays_as_it_was(backbone, fitted) -> None:
    assert fingerprint(backbone.model) == backbone.fingerprint
    assert not backbone.model.training
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.model.modules())


def test_everything_that_karst_has_was_trained(fitted) -> None:
    assert not fitted.model.training
    for name, parameter in fitted.model.named_parameters():
        if name.rpartition(".")[2] in ("b", "s1", "s2", "in_s1", "in_s2"):  # these start at zero
            assert parameter.abs().max() > 0, name


def test_without_validation_the_last_epoch_is_taken(fitted) -> None:
    assert [epoch.number for epoch in fitted.history] == [1, 2, 3]
    assert [epoch.val_accuracy for epoch in fitted.history] == [None] * 3
    assert fitted.chosen == fitted.history[-1]


def test_the_best_validation_epoch_is_taken(backbone, images, train) -> None:
    """Validated on wrong answers, a model that starts by guessing gets worse: an early epoch is best."""
    wrong = ImageSet(images.paths, tuple((t + 1) % 3 for t in images.targets), images.labels)
    validation = Pixels(wrong, preprocess_of(backbone))
    recipe = RECIPE.model_copy(update={"lr": 1e-3, "seed": 4})
    fitted = train_model(backbone, train, CONFIG, recipe, validation=validation)
    scores = [epoch.val_accuracy for epoch in fitted.history]
    assert scores[-1] < max(scores)
    assert fitted.chosen == max(fitted.history, key=lambda epoch: (epoch.val_accuracy, epoch.number))
    assert accuracy(fitted.model, validation) == fitted.chosen.val_accuracy


def test_of_equal_epochs_the_later_is_taken(backbone, train, held_out) -> None:
    recipe = RECIPE.model_copy(update={"lr": 1e-12, "epochs": 2})  # nothing moves
    fitted = train_model(backbone, train, CONFIG, recipe, validation=held_out)
    assert fitted.history[0].val_accuracy == fitted.history[1].val_accuracy
    assert fitted.chosen.number == 2


def test_progress_is_told_step_by_step(backbone, train) -> None:
    steps, epochs = [], []
    recipe = RECIPE.model_copy(update={"epochs": 2})
    fitted = train_model(
        backbone, train, CONFIG, recipe, on_step=lambda *step: steps.append(step), on_epoch=epochs.append
    )
    assert len(steps) == 2 * steps_per_epoch(len(train), recipe) == 2 * 4  # 36 images: 4 batches of 8, 4 left over
    assert tuple(epochs) == fitted.history
    last = steps[4:]
    assert [number for number, _, _ in steps] == [1] * 4 + [2] * 4
    assert np.mean([loss for _, loss, _ in last]) == pytest.approx(epochs[-1].loss)
    assert np.mean([accuracy for _, _, accuracy in last]) == pytest.approx(epochs[-1].train_accuracy)


def test_fewer_images_than_a_batch_are_one_step() -> None:
    assert steps_per_epoch(3, Recipe(batch_size=32)) == 1
    assert steps_per_epoch(33, Recipe(batch_size=32)) == 1
    assert steps_per_epoch(64, Recipe(batch_size=32)) == 2


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    """KARST.md: from lr / 100 to lr over the warm-up epochs, then down to lr / 10."""
    recipe = Recipe(epochs=10, warmup_epochs=2, lr=1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = _schedule(optimizer, recipe, steps=5)
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    warm = np.linspace(0.01, 1, 11)
    falling = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(40) / 40)) / 2
    np.testing.assert_allclose(rates, [*warm[:10], *falling], rtol=1e-6)
    assert schedule.get_last_lr()[0] == pytest.approx(0.1)


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 10), (1, 0), (2, 10), (3, 0)])
def test_the_learning_rate_is_never_over_its_peak_nor_zero(epochs, warmup) -> None:
    recipe = Recipe(epochs=epochs, warmup_epochs=warmup, lr=1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = _schedule(optimizer, recipe, steps=3)
    for _ in range(epochs * 3):
        assert 0.01 <= schedule.get_last_lr()[0] <= 1
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_ends_the_training(backbone, train) -> None:
    with pytest.raises(FloatingPointError, match=r"^the loss is (nan|inf); try a lower learning rate"):
        train_model(backbone, train, CONFIG, Recipe(epochs=2, warmup_epochs=0, batch_size=8, lr=1e30))


def test_an_unusable_image_ends_the_training_by_name(backbone, tmp_path) -> None:
    broken = make_task(tmp_path, count=2, seed=0)
    broken.paths[3].write_bytes(b"text")
    with pytest.raises(DataError, match=r"green/1.png: not an image"):
        train_model(backbone, Pixels(broken, preprocess_of(backbone)), CONFIG, RECIPE)


def test_the_extracted_adapter_is_the_trained_model(backbone, fitted, held_out, tmp_path) -> None:
    path = tmp_path / "colours.safetensors"
    extract(fitted.model, held_out.images.labels, metrics={"test_accuracy": 1.0}).write(path)
    adapter = Adapter.read(path)
    adapter.check(backbone)
    assert adapter.labels == ("blue", "green", "red")
    pixels = random_pixels(backbone, 4)
    with torch.inference_mode():
        torch.testing.assert_close(adapter.merge(backbone)(pixels), fitted.model(pixels), atol=1e-4, rtol=0)


def test_a_split_is_stratified_and_loses_nothing() -> None:
    targets = (0,) * 10 + (1,) * 20 + (2,) * 30
    images = ImageSet(tuple(Path(f"{i}.png") for i in range(60)), targets, ("a", "b", "c"))
    kept, held = split(images, 0.2, seed=0)
    assert [held.targets.count(k) for k in range(3)] == [2, 4, 6]
    assert [kept.targets.count(k) for k in range(3)] == [8, 16, 24]
    assert sorted(kept.paths + held.paths) == sorted(images.paths)
    assert kept.labels == held.labels == images.labels
    assert all(images.targets[images.paths.index(path)] == t for path, t in zip(held.paths, held.targets, strict=True))


def test_a_split_is_the_seed_s(images) -> None:
    assert split(images, 0.25, seed=3) == split(images, 0.25, seed=3)
    assert split(images, 0.25, seed=3) != split(images, 0.25, seed=4)


@pytest.mark.parametrize(
    ("targets", "fraction", "message"),
    [
        ((0, 0, 0, 1), 0.5, r"cannot hold out 50% of 4 images for validation: .*only 1 member"),
        ((0, 0, 1, 1), 0.25, r"cannot hold out 25% of 4 images for validation: .*should be greater or equal"),
        ((0, 1), 0.5, r"cannot hold out 50% of 2 images for validation: .*"),
        ((0, 0, 1, 1), 0.0, r"cannot hold out 0% of 4 images for validation: .*"),
        ((0, 0, 1, 1), 1.0, r"cannot hold out 100% of 4 images for validation: .*"),
    ],
)
def test_a_split_that_cannot_be_is_refused(targets, fraction, message) -> None:
    images = ImageSet(tuple(Path(f"{i}.png") for i in range(len(targets))), targets, ("a", "b"))
    with pytest.raises(DataError, match=f"^{message}"):
        split(images, fraction, seed=0)


def test_a_linear_probe_is_an_accuracy(backbone, train, images, held_out) -> None:
    assert linear_probe(backbone, train, held_out) > 0.9
    wrong = ImageSet(images.paths, tuple((t + 1) % 3 for t in images.targets), images.labels)
    assert linear_probe(backbone, train, Pixels(wrong, preprocess_of(backbone))) < 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("warmup_epochs", -1), ("batch_size", 0), ("lr", 0), ("drop_path", 1), ("seed", -1), ("steps", 5)],
)
def test_a_recipe_that_makes_no_sense_is_refused(field, value) -> None:
    with pytest.raises(ValueError, match=field):
        Recipe(**{field: value})
