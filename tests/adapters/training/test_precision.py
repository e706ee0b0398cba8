"""The number format of training, from the CPU's instruction sets."""

from typing import Any

import pytest
import torch

from adapters.training.precision import autocast_dtype, cpu_capabilities

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
def test_training_computes_in_bfloat16_when_the_cpu_has_instructions_for_it(name: str) -> None:
    assert autocast_dtype(CPU, {name: True, "avx2": True}) is torch.bfloat16


@pytest.mark.parametrize("capabilities", [{}, {"avx2": True}, {"amx_bf16": False, "avx512_f": True}])
def test_training_computes_in_float32_when_bfloat16_would_be_emulated(capabilities: dict[str, Any]) -> None:
    assert autocast_dtype(CPU, capabilities) is torch.float32


def test_training_computes_in_float32_on_other_devices() -> None:
    assert autocast_dtype(torch.device("cuda"), {"amx_bf16": True}) is torch.float32


def test_capabilities_name_this_machine_s_architecture() -> None:
    assert cpu_capabilities()["architecture"]


def test_capabilities_are_unknown_with_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_capabilities() == {}
