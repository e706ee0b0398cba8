"""The Kronecker functions against numpy's kron, from the paper's equation in float64."""

import numpy as np
import pytest
import torch

from adapters.method import kronecker
from tests.support.reference import written_out


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kernels", [1, 2, 5])
@pytest.mark.parametrize(("d_in", "d_out", "factor"), [(24, 24, 4), (32, 64, 8), (20, 30, 8), (7, 12, 8)])
def test_delta_and_apply_equal_the_paper_s_sum(splits: int, kernels: int, d_in: int, d_out: int, factor: int) -> None:
    rng = np.random.default_rng(0)
    shapes = kronecker.shapes(d_in, d_out * splits, splits, kernels=kernels, rank=3, factor=factor)
    c, a, b = (rng.normal(size=shape) for shape in shapes)
    expected = written_out(c, a, b, gain=0.7)
    assert expected.shape == (d_out * splits, d_in)

    ct, at, bt = (torch.from_numpy(t) for t in (c, a, b))
    np.testing.assert_allclose(kronecker.delta(ct, at, bt, 0.7), expected, atol=1e-6, rtol=0)

    x = rng.normal(size=(2, 5, d_in))
    np.testing.assert_allclose(kronecker.apply(torch.from_numpy(x), ct, at, bt, 0.7), x @ expected.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(5,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("splits", [1, 3])
def test_linear_has_the_gradients_of_the_explicit_dw(splits: int, rows: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    shapes = kronecker.shapes(24, 16 * splits, splits, kernels=3, rank=3, factor=8)
    c, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    x = torch.randn(*rows, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16 * splits, 24, dtype=torch.float64)
    b0 = torch.randn(16 * splits, dtype=torch.float64) if bias else None
    upstream = torch.randn(*rows, 16 * splits, dtype=torch.float64)

    y = kronecker.linear(x, weight, b0, c, a, b, 0.7)
    found = torch.autograd.grad(y, [x, c, a, b], upstream)
    expected = torch.nn.functional.linear(x, weight + kronecker.delta(c, a, b, 0.7), b0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [x, c, a, b], upstream))


def test_linear_computes_in_autocast_s_dtype_and_keeps_float32_gradients() -> None:
    torch.manual_seed(0)
    shapes = kronecker.shapes(64, 64, 1, kernels=2, rank=4, factor=8)
    c, a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
    x, weight = torch.randn(2, 9, 64), torch.randn(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = kronecker.linear(x, weight, None, c, a, b)
    assert y.dtype == torch.bfloat16
    rough = torch.autograd.grad(y.float().square().sum(), [c, a, b])
    exact = torch.autograd.grad(kronecker.linear(x, weight, None, c, a, b).square().sum(), [c, a, b])
    for one, other in zip(rough, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize(
    ("dim", "factor", "expected"),
    [(768, 8, (8, 96)), (768, 96, (8, 96)), (768, 1, (1, 768)), (20, 8, (4, 5)), (7, 8, (1, 7)), (64, 8, (8, 8))],
)
def test_factorise_returns_the_closest_divisor_pair(dim: int, factor: int, expected: tuple[int, int]) -> None:
    assert kronecker.factorise(dim, factor) == expected


def test_the_number_of_trainable_numbers_equals_the_documented_one() -> None:
    """ViT-B/16 without its head, scalar re-scaling: 1,204,296 for N = 8, 301,128 for N = 2 (docs/method.md)."""
    for kernels, total in [(8, 1_204_296), (2, 301_128), (1, 150_600)]:
        count = 0
        for d_in, d_out, splits in [(768, 2304, 3), (768, 768, 1), (768, 3072, 1), (3072, 768, 1)]:
            sizes = kronecker.shapes(d_in, d_out, splits, kernels=kernels, rank=8, factor=8)
            count += sum(int(np.prod(size)) for size in sizes)
        scalars = 3 * 2  # scale and shift at three sites of a block
        assert 12 * (count + scalars) == total
