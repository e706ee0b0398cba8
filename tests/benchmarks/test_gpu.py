"""The benchmark of a GPU, where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and the benchmark would run")
def test_benchmark_of_a_gpu_measures_nothing_when_there_is_none() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "no CUDA device: nothing was measured" in done.stderr
