"""A few seconds of the soak test; `make soak` runs it for five minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_soak_for_a_few_seconds() -> None:
    """In a process of its own: Ray reads its switches from the environment once."""
    script = "import json; from tests.soak import soak; print(json.dumps(soak(12, 30, 6)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["images"] > 50
