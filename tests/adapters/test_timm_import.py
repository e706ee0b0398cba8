"""timm is imported without torch's compiler, which stays usable."""

import subprocess
import sys

import pytest

LOADED = "loaded = sorted(n for n in sys.modules if n.partition('.')[0] == 'sympy' or n.startswith('torch._dynamo'))"
COMPILE = "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item() == 2"


def run(code: str) -> None:
    """Run code in a new process, where no other test has imported anything."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["adapters.backbone", "adapters.serving.bank", "hub.worker.replica"])
def test_a_process_with_a_backbone_does_not_import_the_compiler(module: str) -> None:
    """torchvision or timm may import more of it one day: then this process takes 150 MB more again."""
    run(
        f"""import sys, torch, {module}
from adapters import Bank, load_backbone
bank = Bank(load_backbone("demo"), slots=1)
bank.warm_up(torch.zeros(2, *bank.input_size), 1, 2)
{LOADED}
assert not loaded, loaded"""
    )


def test_a_model_can_be_compiled_afterwards() -> None:
    run(
        f"""import torch, adapters.backbone
{COMPILE}
from torch._dynamo.utils import is_compile_supported
from torchvision.ops import roi_align
x = torch.randn(1, 2, 8, 8)
assert roi_align(x, torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]]), 2).shape == (1, 2, 2, 2)"""
    )


def test_a_compiler_that_is_there_stays() -> None:
    run(
        f"""import torch, torch._dynamo as before, adapters.backbone, torch._dynamo as after
assert before is after
{COMPILE}"""
    )


@pytest.mark.parametrize(
    "wanted",
    [
        "from torch._dynamo import config",
        "import torch._dynamo; torch._dynamo.reset()",
        "from torch._dynamo.utils import counters",
        "import torch._dynamo.config",
    ],
)
def test_the_stand_in_makes_room_where_a_library_wants_more_of_the_compiler(wanted: str) -> None:
    run(
        f"""import sys, torch
from adapters.timm_import import _without_compiler
for name in [name for name in sys.modules if name.startswith("torch._dynamo")]:
    raise AssertionError(name)
with _without_compiler():
    {wanted}
{COMPILE}"""
    )
