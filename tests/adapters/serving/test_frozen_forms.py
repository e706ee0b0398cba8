"""Every form of a frozen layer agrees with a slow reference, and the fastest form is chosen."""

from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adapters import Backbone, Bank, load_backbone
from adapters.backbone import features
from adapters.serving import cpu_operators, frozen_forms
from adapters.serving.blocks import class_token_layers, leave_out_other_tokens
from adapters.serving.frozen_forms import (
    Form,
    build,
    can_int8,
    forms_of,
    kind_of,
    measure_forms,
    prepack_layers,
    unmeasured_forms,
)
from adapters.serving.int8.linear import Int8Linear
from tests.support.marks import needs_vnni
from tests.support.models import local_backbone, random_adapter, random_pixels


def layer(d_in: int = 40, d_out: int = 96, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("form", ["linear", "onednn"])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_float32_form_computes_the_exact_product(form: Form, bias: bool) -> None:
    linear = layer(bias=bias)
    x = torch.randn(2, 5, 40)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(build(linear, form)(x).double(), exact, atol=1e-5, rtol=0)


def test_the_fastest_form_is_chosen_for_each_kind_and_described(backbone: Backbone) -> None:
    found = measure_forms(backbone, 2)
    assert set(found.chosen) == {kind_of(site) for site in backbone.sites}
    assert {kind.role for kind in found.chosen} == {"qkv", "proj", "fc1", "fc2"}
    for kind, form in found.chosen.items():
        assert form in found.ms[kind]
        assert form == "linear" or found.ms[kind][form] <= found.ms[kind]["linear"]
    line = found.describe()[0]
    assert line.startswith(f"qkv {backbone.sites[0].d_in}x{backbone.sites[0].d_out}: ")
    assert "onednn" in line
    assert " ms" in line


def test_the_plain_layer_stays_when_no_form_is_faster(backbone: Backbone) -> None:
    ticks = count()  # every run takes one tick
    found = measure_forms(backbone, 1, clock=lambda: float(next(ticks)))
    assert set(found.chosen.values()) == {"linear"}


def test_forms_are_measured_by_cpu_time_when_torch_has_one_thread(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def clock(name: str) -> float:
        used.append(name)
        return float(len(used))

    clocks = {name: partial(clock, name) for name in ("thread_time", "perf_counter")}
    monkeypatch.setattr(frozen_forms, "time", SimpleNamespace(**clocks))
    before = torch.get_num_threads()
    try:
        for threads, name in ((1, "thread_time"), (2, "perf_counter")):
            torch.set_num_threads(threads)
            measure_forms(backbone, 1)
            assert set(used) == {name}
            used.clear()
    finally:
        torch.set_num_threads(before)


def test_the_plain_layer_serves_when_torch_lacks_the_operators(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_operators, "has_onednn", lambda: False)
    monkeypatch.setattr(cpu_operators, "has_int8", lambda: False)
    assert forms_of(backbone.model.get_submodule(backbone.sites[0].name).weight, int8=True) == ["linear"]
    assert not can_int8(backbone)
    forms = measure_forms(backbone, 1, int8=True)
    assert set(forms.chosen.values()) == {"linear"}
    pixels = random_pixels(backbone, 2)
    with torch.inference_mode():
        expected = features(backbone.model, pixels)
    torch.testing.assert_close(Bank(backbone, slots=1, forms=forms).frozen_features(pixels), expected)


def test_float32_is_never_computed_in_fewer_bits(backbone: Backbone) -> None:
    assert set(measure_forms(backbone, 1).chosen.values()) <= {"linear", "onednn"}
    assert set(unmeasured_forms(backbone).chosen.values()) <= {"linear", "onednn"}


@pytest.mark.parametrize(
    ("linear", "onednn", "int8", "form"),
    [(2.0, 1.5, 1.0, "int8"), (2.0, 1.2, 1.0, "onednn"), (1.2, 1.19, 1.0, "linear"), (1.41, 1.4, 1.0, "int8")],
)
def test_int8_is_chosen_only_where_it_saves_much_time(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, linear: float, onednn: float, int8: float, form: Form
) -> None:
    times: dict[Form, float] = {"linear": linear, "onednn": onednn, "int8": int8}
    monkeypatch.setattr(frozen_forms, "forms_of", lambda *_, **__: list(times))
    monkeypatch.setattr(frozen_forms, "build", lambda *_: nn.Identity())
    monkeypatch.setattr(frozen_forms, "_fastest_runs", lambda *_: times)
    assert set(measure_forms(backbone, 1, int8=True).chosen.values()) == {form}


@needs_vnni
@torch.inference_mode()
def test_layers_for_the_class_token_alone_stay_float32_in_an_int8_bank(tmp_path: Path) -> None:
    backbone = local_backbone(tmp_path, "vit_tiny_patch16_224", depth=2, img_size=64)
    model = backbone.clone()
    pixels = random_pixels(backbone, 1)
    alone = class_token_layers(model, pixels, partial(torch.allclose, atol=1e-4))
    assert alone == ["blocks.1.attn.proj", "blocks.1.norm2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "norm"]
    prepack_layers(model, backbone, unmeasured_forms(backbone, int8=True), alone=alone)
    forms = {site.name: type(model.get_submodule(site.name)) for site in backbone.sites}
    assert {name for name, form in forms.items() if form is nn.Linear} == {s for s in alone if "norm" not in s}
    assert {form for name, form in forms.items() if name not in alone} == {Int8Linear}
    leave_out_other_tokens(model, alone)
    found = Bank(backbone, slots=1, forms=unmeasured_forms(backbone, int8=True)).frozen_features(pixels)
    torch.testing.assert_close(found, features(model, pixels))


@needs_vnni
@torch.inference_mode()
def test_an_int8_bank_is_close_to_float32_and_adapters_stay_exact(backbone: Backbone) -> None:
    int8 = Bank(backbone, slots=2, forms=unmeasured_forms(backbone, int8=True))
    assert set(int8.forms.chosen.values()) == {"int8"}
    pixels = random_pixels(backbone, 8)
    frozen = features(backbone.model, pixels)
    found = int8.frozen_features(pixels)
    assert float((found - frozen).norm() / frozen.norm()) < 0.02
    adapter = random_adapter(backbone)
    exact = Bank(backbone, slots=2)
    right = torch.stack(exact.forward(pixels, [exact.put(adapter)] * 8))
    logits = torch.stack(int8.forward(pixels, [int8.put(adapter)] * 8))
    assert float((logits - right).norm() / right.norm()) < 0.05


@torch.inference_mode()
def test_bfloat16_layers_equal_torch_s_own() -> None:
    backbone = load_backbone("demo", dtype=torch.bfloat16)
    pixels = random_pixels(backbone, 2).bfloat16()
    found = Bank(backbone, slots=1, forms=measure_forms(backbone, 2)).frozen_features(pixels)
    torch.testing.assert_close(found, features(backbone.model, pixels), atol=0.1, rtol=0.05)
