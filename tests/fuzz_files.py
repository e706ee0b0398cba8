"""Mutated adapter files by the thousand: each is read or refused with an AdapterError, in time and in little memory.

    python -m tests.fuzz_files [--files 100000] [--seed 0] [--jobs 2] [--keep FOLDER]

File i of a seed is always the same, for any number of files and jobs. `make fuzz` runs it; the suite has a
short run. A file that does what it should not is written to `--keep` and ends the run with exit code 1.
"""

import argparse
import json
import multiprocessing
import resource
import signal
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapters import Adapter, AdapterError, load_backbone

from .support.adapter_files import GOOD
from .support.models import random_adapter
from .support.mutations import mutated

SECONDS_EACH = 5.0
ROOM_BYTES = 256 * 1024**2  # of address space beyond what the process has: a lie about sizes must not be believed
FILES_MEMORY = 2.0  # times the file: its bytes and its numbers
SLACK_BYTES = 1024**2  # parsed JSON, messages
SHOWN = 10


@dataclass
class Outcome:
    """The results of the files; `failures` name the file's index."""

    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    excess_bytes: int = 0  # of memory, beyond twice the file
    messages: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)

    def add(self, other: "Outcome") -> None:
        self.read += other.read
        self.refused += other.refused
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.excess_bytes = max(self.excess_bytes, other.excess_bytes)
        self.messages += other.messages
        self.failures |= other.failures


class Hang(BaseException):
    """A file takes too long; no `except Exception` may swallow it."""


def corpus() -> list[bytes]:
    """Good files: tiny ones, whose every byte is hit, and those of the demo backbone in all forms."""
    backbone = load_backbone("demo")
    forms: list[dict[str, Any]] = [
        {"kernels": 1, "rank": 1, "rescale": "none"},
        {"kernels": 2, "rank": 4, "rescale": "scalar"},
        {"kernels": 3, "rank": 2, "rescale": "channel", "norms": True},
    ]
    made = [random_adapter(backbone, seed=i, classes=2 + i, **form) for i, form in enumerate(forms)]
    halves = [_cast(made[0], torch.float16), _cast(made[1], torch.bfloat16)]
    return [GOOD] * 6 + [adapter.data for adapter in made] + halves


def _cast(adapter: Adapter, dtype: torch.dtype) -> bytes:
    return Adapter.create(
        {name: tensor.to(dtype) for name, tensor in adapter.tensors.items()},
        config=adapter.config,
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        labels=adapter.labels,
        preprocess=adapter.preprocess,
        metrics={"accuracy": 0.5, "by class": [1, {"a": None}]},
        created="2026-01-01T00:00:00+00:00",
    ).data


# Running


def fuzz(indices: range, seed: int, keep: Path | None = None) -> Outcome:
    """Read these files of a seed in this process, whose address space is bounded from now on."""
    files = corpus()
    for data in files:
        assert Adapter.read(data).data == data
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM_BYTES, most))
    signal.signal(signal.SIGALRM, _hang)
    tracemalloc.start()
    outcome = Outcome()
    for index in indices:
        data = mutated(files, seed, index)
        failure = one(data, outcome)
        if failure is not None:
            outcome.failures[index] = failure
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{index}.safetensors").write_bytes(data)
    tracemalloc.stop()
    return outcome


def one(data: bytes, outcome: Outcome) -> str | None:
    """Read one file; what it did that it should not."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS_EACH)
    try:
        adapter = Adapter.read(data)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except AdapterError as refusal:
        signal.setitimer(signal.ITIMER_REAL, 0)
        outcome.refused += 1
        outcome.messages[str(refusal.problems[0].message)[:30]] += 1
        wrong = None if refusal.problems and _sendable(str(refusal)) else "refused by a message that cannot be sent"
    except Hang:
        return f"took more than {SECONDS_EACH:g} s"
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return f"{type(error).__name__}: {str(error)[:200]}"
    else:
        outcome.read += 1
        wrong = None if _sound(adapter, data) else "read, though it breaks the format"
    outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - start)
    # The file itself counts: it was in memory before.
    used = len(data) + tracemalloc.get_traced_memory()[1] - before
    excess_bytes = used - int(FILES_MEMORY * len(data))
    outcome.excess_bytes = max(outcome.excess_bytes, excess_bytes)
    if excess_bytes > SLACK_BYTES:
        wrong = f"took {used} bytes of memory for a file of {len(data)}"
    return wrong


def _sendable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def _sound(adapter: Adapter, data: bytes) -> bool:
    told = [adapter.labels, adapter.preprocess, adapter.metrics, adapter.config.model_dump()]
    json.dumps(told, allow_nan=False, ensure_ascii=False).encode()
    return adapter.data == data and all(tensor.isfinite().all() for tensor in adapter.tensors.values())


def _hang(_signal: int, _frame: object) -> None:
    raise Hang


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def in_processes(files: int, seed: int, jobs: int, keep: Path | None) -> Outcome:
    total = Outcome()
    parts = [(range(job, files, jobs), seed, keep) for job in range(jobs)]
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        for outcome in pool.starmap(fuzz, parts):
            total.add(outcome)
    return total


def report(outcome: Outcome) -> Iterator[str]:
    yield f"{outcome.read + outcome.refused} files: {outcome.refused} refused, {outcome.read} read"
    memory = f"{outcome.excess_bytes // 1024} KiB of memory beyond twice the file"
    yield f"slowest {outcome.slowest_s * 1000:.0f} ms; at most {memory}"
    for message, count in outcome.messages.most_common(SHOWN):
        yield f"  {count:7d}  {message}..."
    for index, failure in sorted(outcome.failures.items())[:SHOWN]:
        yield f"FAILED: file {index}: {failure}"
    if outcome.failures:
        yield f"{len(outcome.failures)} files did what they should not"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    outcome = in_processes(options.files, options.seed, options.jobs, options.keep)
    print("\n".join(report(outcome)))
    sys.exit(1 if outcome.failures else 0)


if __name__ == "__main__":
    main()
