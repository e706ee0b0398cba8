"""A weight in int8 keeps the products with inputs like those that the rounding saw."""

import pytest
import torch
from torch import Tensor

from adapters.serving.int8 import rounding
from adapters.serving.int8.rounding import WIDE, Rotation, round_weight

ROWS, D_IN, D_OUT = 2000, 96, 64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int) -> Tensor:
    """Return inputs that vary mostly in a few directions, as those of a ViT's layers do."""
    return draw(ROWS, 8, seed=seed) @ draw(8, D_IN) + 0.05 * draw(ROWS, D_IN, seed=seed + 1)


def error(weight: Tensor, inputs: Tensor | None, x: Tensor) -> float:
    """Return the error of the products with x after rounding for some inputs, relative to the products."""
    restored = round_weight(weight, inputs).restored(weight)
    return float((x @ (restored - weight).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("joint", [rounding.JOINT, 40])
def test_rounding_for_the_inputs_halves_the_error_on_others_like_them(
    monkeypatch: pytest.MonkeyPatch, joint: int
) -> None:
    monkeypatch.setattr(rounding, "JOINT", joint)
    weight = draw(D_OUT, D_IN, seed=9)
    assert error(weight, correlated(1), correlated(3)) < 0.5 * error(weight, None, correlated(3))


def test_codes_are_the_nearest_ones_without_inputs_or_where_these_do_not_correlate() -> None:
    weight = draw(D_OUT, D_IN)
    rounded = round_weight(weight)
    assert int(rounded.codes.abs().max()) == 127
    exact = rounded.rotation.of_weight(weight) / rounded.scales.unsqueeze(1)
    assert ((rounded.codes - exact).abs() <= 0.501).all()
    x = draw(ROWS, D_IN, seed=2)
    assert error(weight, draw(ROWS, D_IN, seed=1), x) < 1.1 * error(weight, None, x)


@pytest.mark.parametrize("inputs", [torch.zeros(10, D_IN), draw(1, D_IN).expand(3, -1)], ids=["zeros", "one direction"])
def test_inputs_without_variation_round_too(inputs: Tensor) -> None:
    weight = draw(D_OUT, D_IN)
    assert error(weight, inputs, draw(ROWS, D_IN, seed=2)) < 0.1
    assert not torch.isnan(round_weight(torch.zeros(3, D_IN), inputs).scales).any()


@pytest.mark.parametrize("d_in", [96, 40, 7, 1])
def test_a_rotation_changes_no_product_and_leaves_out_the_widest_features(d_in: int) -> None:
    inputs = draw(ROWS, d_in) * torch.where(torch.arange(d_in) % 13 == 0, 100.0, 1.0)
    wide, factors, block = rotation = round_weight(draw(D_OUT, d_in), inputs).rotation
    assert len(wide) == min(WIDE, d_in)
    assert {i for i in range(d_in) if i % 13 == 0} <= set(wide.tolist())
    assert set(torch.nonzero(factors == 0).flatten().tolist()) == set(wide.tolist())
    torch.testing.assert_close(block @ block, torch.eye(len(block)))
    x, weight = draw(5, d_in, seed=1), draw(3, d_in, seed=2)
    narrow = x.index_fill(1, wide, 0) @ weight.T
    torch.testing.assert_close(rotation.of_inputs(x) @ rotation.of_weight(weight).T, narrow, atol=1e-4, rtol=1e-4)


def test_a_rotation_spreads_one_large_number_over_its_neighbours() -> None:
    rotation = Rotation(torch.arange(0), *round_weight(draw(1, 96)).rotation[1:])
    x = torch.zeros(1, 96)
    x[0, 50] = 8
    assert sorted({float(value) for value in rotation.of_inputs(x).abs().flatten()}) == pytest.approx([0, 2])
