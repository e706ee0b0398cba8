"""An int8 layer equals a plain product of the rounded numbers, and its widest input features are not rounded."""

import pytest
import torch
from torch import Tensor, nn

from adapters import Backbone
from adapters.serving import cpu_operators
from adapters.serving.int8_linear import WIDE, Int8Linear, quantise_rows, quantise_weight, widest_inputs
from tests.support.marks import needs_vnni

FEW = torch.tensor([3, 17])  # of the layers' inputs, in float32
NONE = torch.arange(0)


def layer(d_in: int = 40, d_out: int = 96, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)


@needs_vnni
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wide", [FEW, NONE], ids=["two wide inputs", "none"])
@torch.inference_mode()
def test_int8_equals_a_plain_product_of_the_rounded_numbers(bias: bool, wide: Tensor) -> None:
    linear = layer(bias=bias)
    x = torch.randn(2, 5, 40) * torch.tensor([0.001, 1.0, 1000.0, 3.0, 0.0]).unsqueeze(1)  # each token its own scale
    narrow, weight = x.index_fill(-1, wide, 0), linear.weight.index_fill(1, wide, 0)
    low = narrow.amin(-1, keepdim=True).double()
    step_x = (narrow.amax(-1, keepdim=True) - low) / 255
    step_w = weight.abs().amax(1, keepdim=True) / 127
    rounded_x = torch.where(step_x > 0, ((narrow - low) / step_x).round() * step_x + low, torch.zeros(()))
    rounded_w = (weight / step_w).round() * step_w
    expected = rounded_x @ rounded_w.double().T + x[..., wide].double() @ linear.weight[:, wide].double().T
    found = Int8Linear(linear, wide)(x).double() - (linear.bias.double() if bias else 0)
    limit = 1e-5 * x.abs().amax(-1, keepdim=True).double() + 1e-6
    # A number just between two integers may round either way.
    assert ((found - expected).abs() <= limit + step_x * step_w.abs().max().double() * 127 * 0.01).all()


@needs_vnni
@torch.inference_mode()
def test_a_large_input_feature_does_not_coarsen_the_others() -> None:
    linear = layer()
    x = torch.randn(50, 40)
    x[:, 17] *= 1000
    error_rounded, error_wide = ((Int8Linear(linear, wide)(x) - linear(x)).norm() for wide in (NONE, FEW))
    assert error_wide < 0.01 * error_rounded


@needs_vnni
@torch.inference_mode()
def test_int8_accepts_any_leading_axes_and_strides() -> None:
    linear = layer()
    packed = Int8Linear(linear, FEW)
    rows = torch.randn(40, 3, 4).permute(2, 1, 0)
    torch.testing.assert_close(packed(rows), linear(rows), atol=0.05, rtol=0)
    torch.testing.assert_close(packed(rows[0, 0]), packed(rows)[0, 0], atol=1e-6, rtol=0)
    assert packed(rows[:0]).shape == (0, 3, 96)


@torch.inference_mode()
def test_quantised_numbers_are_within_half_a_step_also_over_several_chunks() -> None:
    x = torch.randn(300, 1000)
    x[7] = 0
    x[8] = 5
    codes, lows, scales = quantise_rows(x, NONE)
    assert codes.dtype == torch.uint8
    assert {int(codes.min()), int(codes.max())} == {0, 255}
    assert ((codes * scales + lows - x).abs() <= 0.51 * scales).all()
    weight, steps = quantise_weight(x)
    assert ((weight * steps.unsqueeze(1) - x).abs() <= 0.5001 * steps.unsqueeze(1)).all()


@torch.inference_mode()
def test_the_wide_features_are_left_out_of_a_token_s_scale() -> None:
    x = torch.randn(300, 1000)
    x[:, FEW] = 1e4
    _, lows, scales = quantise_rows(x, FEW)
    assert float(lows.min()) > -6
    assert float(scales.max()) < 12 / 255


@torch.inference_mode()
def test_the_widest_inputs_of_each_layer_are_found(backbone: Backbone) -> None:
    model = backbone.clone()
    norm = model.get_submodule("blocks.0.norm1")
    norm.weight = nn.Parameter(norm.weight.index_fill(0, FEW, 100), requires_grad=False)  # the clone's alone
    names = [site.name for site in backbone.sites]
    found = widest_inputs(model, names, backbone.input_size)
    assert set(found) == set(names)
    assert all(len(wide) == WIDE for wide in found.values())
    assert set(FEW.tolist()) <= set(found["blocks.0.attn.qkv"].tolist())
    again = widest_inputs(model, names, backbone.input_size)
    assert all(torch.equal(found[name], again[name]) for name in names)


@needs_vnni
def test_int8_weights_take_a_quarter_of_the_memory() -> None:
    weight = layer(512, 512).weight
    packed = cpu_operators.int8_pack(quantise_weight(weight)[0])
    assert packed.element_size() * packed.nelement() * 4 <= weight.nbytes * 1.05
