"""torch's private operators still have the signatures and results that `cpu_operators` was checked with."""

import pytest
import torch

from adapters.serving import cpu_operators


@pytest.fixture
def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_this_version_of_torch_was_checked() -> None:
    """Run the tests of this folder with the new version, then add it to `CHECKED`."""
    assert cpu_operators.version_is_checked()
    assert not cpu_operators.version_is_checked("1.0.0")


def test_the_operators_are_where_they_were() -> None:
    """Otherwise the layers would silently stay slow."""
    assert cpu_operators.has_onednn()
    assert cpu_operators.has_int8() == cpu_operators.has_vnni()


def test_torch_still_tells_the_instructions_of_the_cpu() -> None:
    assert hasattr(torch.cpu, "_is_vnni_supported")
    assert hasattr(torch.cpu, "_is_avx512_bf16_supported")


@torch.inference_mode()
def test_onednn_computes_the_plain_product(seeded: torch.Generator) -> None:
    x, weight, bias = (torch.randn(shape, generator=seeded) for shape in ((3, 5, 40), (96, 40), (96,)))
    found = cpu_operators.onednn_linear(x, cpu_operators.onednn_pack(weight), bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), atol=1e-5, rtol=0)


@pytest.mark.skipif(not cpu_operators.has_int8(), reason="this CPU has no VNNI")
@torch.inference_mode()
def test_int8_computes_the_exact_integer_product_also_with_the_largest_numbers(seeded: torch.Generator) -> None:
    x = torch.randint(0, 256, (7, 40), dtype=torch.uint8, generator=seeded)
    weight = torch.randint(-127, 128, (96, 40), dtype=torch.int8, generator=seeded)
    x[0], weight[0] = 255, 127  # pairs of products above 16 bits
    scales = torch.rand(96, generator=seeded) + 0.1
    found = cpu_operators.int8_linear(x, cpu_operators.int8_pack(weight), scales, torch.zeros(96, dtype=torch.int64))
    expected = (x.double() @ weight.double().T) * scales.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.skipif(not cpu_operators.has_int8(), reason="this CPU has no VNNI")
def test_int8_does_not_take_onednn_s_reference_code(capfd: pytest.CaptureFixture[str]) -> None:
    """It is 1,000 times slower; on a CPU without AMX, int8 activations in place of uint8 took it."""
    x, packed = torch.ones(7, 40, dtype=torch.uint8), cpu_operators.int8_pack(torch.ones(96, 40, dtype=torch.int8))
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        cpu_operators.int8_linear(x, packed, torch.ones(96), torch.zeros(96, dtype=torch.int64))
    lines = [line for line in capfd.readouterr().out.splitlines() if ",matmul," in line]
    assert lines
    assert not [line for line in lines if "ref" in line.split(",matmul,")[1].split(",")[0]]
