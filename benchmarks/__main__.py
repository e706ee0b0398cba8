"""Benchmarks one after another, with the expected time before each; `make bench` runs this.

    python -m benchmarks [PART ...]

Without names it runs the default parts. Each part is the command of the same name and writes its own result. The
minutes are those of two cores without other load. Then `python -m benchmarks.performance_report` writes the page.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple


class Part(NamedTuple):
    """A benchmark: the minutes that it takes, and its subject."""

    minutes: int
    subject: str


PARTS = {
    "mixed_batch": Part(5, "a batch of eight adapters beside the frozen backbone"),
    "over_http": Part(26, "the hub over HTTP beside an empty application"),
    "many_tasks": Part(3, "one image for many tasks"),
    "engine": Part(15, "a worker's engine: many adapters, cold adapters, greedy tenants"),
    "servers": Part(25, "other model servers over HTTP (first run `benchmarks/servers/install.sh`)"),
    "peers": Part(12, "libraries and processes that hold many adapters"),
    "idle": Part(3, "a hub without calls: seconds to ready, share of a core, memory"),
    "feed": Part(6, "CPU time of gateways and workers beside a stand-in for a fast device"),
    "rate_limits": Part(2, "the wait for a tenant's limits"),
    "train_step": Part(11, "a step of training beside other methods"),
}
DEFAULT = ("mixed_batch", "over_http")


def main() -> None:
    """Print the plan, run the parts, and end with exit code 1 if a part failed."""
    listed = "\n".join(f"  {name:<12} {part.minutes:>2} min  {part.subject}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"parts:\n{listed}\ndefault: {' '.join(DEFAULT)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run, see below")
    parser.add_argument("--dry-run", action="store_true", help="print the plan only")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    parts = options.parts or list(DEFAULT)
    print("\n".join(plan(parts, datetime.now())), flush=True)
    if not options.dry_run:
        sys.exit(run(parts))


def plan(parts: Sequence[str], now: datetime) -> list[str]:
    """Return the lines that a run prints before it starts: the total, the end, and each part's minutes."""
    total = sum(PARTS[name].minutes for name in parts)
    end = now + timedelta(minutes=total)
    lines = [f"About {total} minutes on two idle cores, until {end:%H:%M}:"]
    lines += [f"  {name:<12} {PARTS[name].minutes:>2} min  {PARTS[name].subject}" for name in parts]
    others = [name for name in PARTS if name not in parts]
    return [*lines, f"Other parts: make bench PART=NAME, with NAME one of {', '.join(others)}."] if others else lines


def run(parts: Sequence[str]) -> int:
    """Run the parts as commands; return 0, or 1 if one of them failed. A failed part does not stop the others."""
    failed = []
    for number, name in enumerate(parts, 1):
        left = sum(PARTS[later].minutes for later in parts[number - 1 :])
        print(f"[{number}/{len(parts)}] {name}: about {PARTS[name].minutes} min, {left} min to the end", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode
        print(
            f"[{number}/{len(parts)}] {name}: {(time.monotonic() - began) / 60:.1f} min, exit code {code}", flush=True
        )
        failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    main()
