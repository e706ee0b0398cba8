"""Number format of training on a CPU: bfloat16 where the CPU multiplies it natively."""

from collections.abc import Mapping
from typing import Any

import torch

# Names of `torch.cpu.get_capabilities`: Intel AMX, AVX-512 BF16 (also AMD since Zen 4), and Arm's BF16 extension.
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def cpu_capabilities() -> Mapping[str, Any]:
    """Return this CPU's instruction sets; empty with a torch that cannot tell."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def autocast_dtype(device: torch.device, capabilities: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype in which training computes on a device. Trained numbers and losses stay in float32.

    Without native instructions, torch emulates bfloat16 on a CPU, which is slower than float32.
    """
    if device.type == "cpu" and any(capabilities.get(name) for name in BFLOAT16):
        return torch.bfloat16
    return torch.float32
