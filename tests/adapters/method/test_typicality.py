"""Typicality: its definition holds on held-out images, and foreign features get 0."""

import pytest
import torch
from torch import Tensor

from adapters.method.typicality import Typicality, fit_typicality


def images(n: int, width: int = 40, seed: int = 0) -> Tensor:
    """Return features (n, D) with a few wide directions and many narrow ones."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.cat([torch.full((5,), 3.0), torch.full((width - 5,), 0.5)])
    return torch.randn(n, width, generator=generator) * scale + 1


@pytest.mark.parametrize(("n", "draws"), [(30, 12), (120, 6), (400, 2)])
def test_share_of_new_images_below_a_typicality_is_that_typicality(n: int, draws: int) -> None:
    found = []
    for seed in range(draws):
        everything = images(n + 500, seed=seed)
        found.append(fit_typicality(everything[:n])(everything[n:]))
    for level in (0.05, 0.2, 0.5, 0.8):
        assert float((torch.cat(found) < level).double().mean()) == pytest.approx(level, abs=0.06)


@pytest.mark.parametrize("n", [5, 40, 400])
def test_foreign_features_are_refused_at_one_percent(n: int) -> None:
    typicality = fit_typicality(images(n))
    foreign = images(200, seed=1) + 4 * torch.randn(40, generator=torch.Generator().manual_seed(2))
    assert float((typicality(foreign) < 0.01).double().mean()) > 0.95


def test_tensors_of_a_file_give_the_same_typicality() -> None:
    typicality = fit_typicality(images(100))
    again = Typicality.of(typicality.tensors)
    assert again is not None
    probe = images(50, seed=3)
    torch.testing.assert_close(again(probe), typicality(probe))
    assert Typicality.of({"head.weight": torch.zeros(2, 40)}) is None


def test_typicality_falls_as_the_distance_grows() -> None:
    typicality = fit_typicality(images(100))
    shares = typicality.shares(torch.logspace(-3, 12, 500))
    assert (shares.diff() <= 0).all()
    assert shares[0] > 0.9
    assert shares[-1] == 0.0


def test_two_images_and_identical_images_give_finite_numbers() -> None:
    for features in (images(2), torch.ones(6, 10)):
        found = fit_typicality(features)(features)
        assert found.isfinite().all()
        assert ((found >= 0) & (found <= 1)).all()


def test_model_is_small() -> None:
    width = 768
    tensors = fit_typicality(images(300, width)).tensors
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < 200_000
