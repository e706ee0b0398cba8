"""An int8 layer equals a plain product of the rounded numbers, for tokens and features of any size."""

import pytest
import torch
from torch import Tensor, nn

from adapters.serving import cpu_operators
from adapters.serving.int8.linear import Int8Linear, quantise_rows
from adapters.serving.int8.rounding import Rotation, round_weight
from tests.support.marks import needs_vnni

FEW = torch.tensor([3, 17])  # features in float32
NONE = torch.arange(0)
PLAIN = Rotation(NONE, torch.ones(1000), torch.eye(1))


def layer(d_in: int = 40, d_out: int = 96, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)


@needs_vnni
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d_in", [40, 37, 5])
@torch.inference_mode()
def test_int8_equals_a_plain_product_of_the_rounded_numbers(bias: bool, d_in: int) -> None:
    linear, inputs = layer(d_in, bias=bias), torch.randn(20, d_in)
    x = torch.randn(2, 5, d_in) * torch.tensor([0.001, 1.0, 1000.0, 3.0, 0.0]).unsqueeze(1)  # each token its own scale
    weight = round_weight(linear.weight, inputs)
    turned = weight.rotation.of_inputs(x.flatten(0, 1)).view(x.shape)
    low = turned.amin(-1, keepdim=True).double()
    step = (turned.amax(-1, keepdim=True) - low) / 255
    rounded = torch.where(step > 0, ((turned - low) / step).round() * step + low, torch.zeros(()))
    wide = weight.rotation.wide
    expected = rounded @ (weight.codes * weight.scales.unsqueeze(1)).double().T
    expected += x[..., wide].double() @ linear.weight[:, wide].double().T
    found = Int8Linear(linear, inputs)(x).double() - (linear.bias.double() if bias else 0)
    limit = 1e-5 * x.abs().amax(-1, keepdim=True).double() + 1e-6
    # A number just between two integers may round either way.
    assert ((found - expected).abs() <= limit + step * weight.scales.max().double() * 127 * 0.01).all()


@needs_vnni
@torch.inference_mode()
def test_a_class_token_has_sixteen_bits_and_the_other_tokens_stay_as_they_are() -> None:
    linear = layer()
    x = torch.randn(3, 7, 40)
    x[1, 0] = 0
    plain, finer = (Int8Linear(linear, x.flatten(0, 1), class_token=wanted) for wanted in (False, True))
    weight = round_weight(linear.weight, x.flatten(0, 1)).restored(linear.weight)
    exact = x @ weight.T + linear.bias  # activations in float32
    before, after = plain(x) - exact, finer(x) - exact
    torch.testing.assert_close(after[:, 1:], before[:, 1:], atol=1e-6, rtol=0)
    assert after[:, 0].norm() < 0.02 * before[:, 0].norm()
    assert finer(x[:0]).shape == (0, 7, 96)


@needs_vnni
@torch.inference_mode()
def test_a_large_input_feature_does_not_coarsen_the_others() -> None:
    linear = layer()
    x = torch.randn(50, 40)
    x[:, 17] *= 1000
    unaware, aware = ((Int8Linear(linear, inputs)(x) - linear(x)).norm() for inputs in (torch.randn(50, 40), x))
    assert aware < 0.01 * unaware


@needs_vnni
@torch.inference_mode()
def test_a_feature_that_no_example_has_does_not_coarsen_the_others() -> None:
    linear, x = layer(), torch.randn(50, 40)
    inactive = torch.randn(50, 40).index_fill(1, FEW, 0)
    known, unknown = ((Int8Linear(linear, inputs)(x) - linear(x)).norm() for inputs in (torch.randn(50, 40), inactive))
    assert unknown < 1.5 * known


@needs_vnni
@torch.inference_mode()
def test_int8_accepts_any_leading_axes_and_strides() -> None:
    linear = layer()
    packed = Int8Linear(linear)
    rows = torch.randn(40, 3, 4).permute(2, 1, 0)
    torch.testing.assert_close(packed(rows), linear(rows), atol=0.05, rtol=0)
    torch.testing.assert_close(packed(rows[0, 0]), packed(rows)[0, 0], atol=1e-6, rtol=0)
    assert packed(rows[:0]).shape == (0, 3, 96)


@torch.inference_mode()
def test_quantised_numbers_are_within_half_a_step_also_over_several_chunks() -> None:
    x = torch.randn(300, 1000)
    x[7] = 0
    x[8] = 5
    codes, scales, rest = quantise_rows(x, PLAIN)
    lows = rest[:, 1:]
    assert codes.dtype == torch.uint8
    assert {int(codes.min()), int(codes.max())} == {0, 255}
    assert ((codes * scales + lows - x).abs() <= 0.51 * scales).all()
    rotation = round_weight(torch.randn(3, 1000)).rotation
    codes, scales, rest = quantise_rows(x, rotation)
    assert ((codes * scales + rest[:, 1:2] - rotation.of_inputs(x)).abs() <= 0.51 * scales).all()


@torch.inference_mode()
def test_the_wide_features_are_left_out_of_a_token_s_scale() -> None:
    x = torch.randn(300, 1000)
    x[:, FEW] = 1e4
    few = PLAIN._replace(wide=FEW, factors=torch.ones(1000).index_fill_(0, FEW, 0))
    _, scales, rest = quantise_rows(x, few)
    assert (rest[:, 0] == 1).all()
    assert torch.equal(rest[:, 2:], x[:, FEW])
    assert float(rest[:, 1].min()) > -6
    assert float(scales.max()) < 12 / 255


@needs_vnni
def test_int8_weights_take_a_quarter_of_the_memory() -> None:
    weight = layer(512, 512).weight
    packed = cpu_operators.int8_pack(round_weight(weight).codes)
    assert packed.element_size() * packed.nelement() * 4 <= weight.nbytes * 1.05
    held = [value for value in vars(Int8Linear(layer(512, 512))).values() if isinstance(value, Tensor)]
    assert sum(tensor.nbytes for tensor in held) * 4 <= weight.nbytes * 1.15
