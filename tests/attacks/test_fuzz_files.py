"""A short run of `make fuzz` over adapter files, and the peak memory of a large file."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz_files import Outcome, corpus, in_processes, report
from tests.support.mutations import mutated

# Prints the peak memory of a process that reads a large file, as a multiple of the file's size.
READ_LARGE = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from adapters import Adapter
from adapters.method.config import KarstConfig
from tests.support.models import PREPROCESS

torch.set_num_threads(1)
side = 3000
data = Adapter.create(
    {"head.weight": torch.zeros(5, side * side // 5 * 2), "head.bias": torch.zeros(5)},
    config=KarstConfig(), backbone="demo", fingerprint="0" * 64, labels=list("abcde"), preprocess=PREPROCESS,
    created="2026-01-01T00:00:00+00:00",
).data
def peak():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
def now():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1])
Path("/proc/self/clear_refs").write_text("5")
before = now()
Adapter.read(data)
print((peak() - before) * 1024 / len(data) + 1)
"""


@pytest.mark.slow
def test_read_accepts_or_refuses_two_thousand_mutated_files(tmp_path: Path) -> None:
    outcome = in_processes(2000, seed=1, jobs=1, keep=tmp_path)
    assert not outcome.failures, "\n".join(report(outcome))
    assert outcome.read + outcome.refused == 2000
    # The mutations must produce both: refusals for many reasons, and files that are still valid.
    assert outcome.read > 50
    assert len(outcome.messages) > 40


def test_mutated_returns_the_same_file_when_seed_and_index_are_equal() -> None:
    files = corpus()
    assert mutated(files, 3, 17) == mutated(files, 3, 17)
    assert mutated(files, 3, 17) != mutated(files, 3, 18)


def test_the_report_names_a_failure() -> None:
    text = "\n".join(report(Outcome(read=1, failures={7: "took too long"})))
    assert "FAILED: file 7: took too long" in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.slow
def test_read_needs_at_most_twice_the_memory_of_a_large_file() -> None:
    done = subprocess.run([sys.executable, "-c", READ_LARGE], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 2.1
