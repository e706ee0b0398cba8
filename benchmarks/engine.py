"""A thousand adapters against one: a worker's whole engine (adapter cache, batcher, bank) without Ray and HTTP.

    python -m benchmarks.engine [--backbone vit_tiny_patch16_224] [--scenarios many zipf ...] [--rounds 5]

`many`    1,000 adapters in slots, round robin, against one adapter
`zipf`    10,000 adapters in the store, 256 slots, Zipf(1.0) traffic, against one adapter
`twice`   twice as many adapters as slots, uniform traffic, against as many as slots
`cold`    the first answer of an adapter in host memory, or in the store only, against a warm adapter; and its effect
          on other callers
`greedy`  a tenant that offers ten times the worker's throughput, and its effect on another tenant
`memory`  resident memory over 100,000 put/evict cycles of a bank and 10,000 loads from the store

Callers send single images in a closed loop; there are twice as many callers as images in a batch. The compared cases
take turns in every round, so other load on the machine affects them equally. A ratio is the median over rounds of the
ratio within a round. Weights are random. Adapters have N = 2, rank 8, factor 8 and float16 files. The benchmark checks
the answers against merged models.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters import Adapter, Bank, load_backbone
from hub.worker.replica import Worker

from .common import machine, spread
from .traffic import BATCH, CALLERS, CONFIG, Driven, Site, arriving, drive, flooding, probed

OUTPUT = Path(__file__).parent / "results" / "engine.json"


def main() -> None:
    """Run the scenarios, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="a timm name, or demo")
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512, help="images of a contender in a round")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of adapters and cycles, for a try")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes; other scenarios in it stay")
    options = parser.parse_args()
    torch.manual_seed(0)
    backbone = load_backbone(options.backbone, pretrained=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        site = Site(backbone, Path(folder), options.rounds, options.images, options.scale)
        for name in options.scenarios:
            found = asyncio.run(SCENARIOS[name](site))
            rows += [{"scenario": name, "backbone": options.backbone} | one for one in found]
            Console().print(table(rows))
    kept = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    kept = [row for row in kept if row["scenario"] not in options.scenarios]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "batch": BATCH, "callers": CALLERS, "rows": kept + rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


async def compare(
    worker: Worker, site: Site, name: str, traffic: Iterator[str], against: Iterator[str], bar: float
) -> list[dict[str, Any]]:
    """Measure the throughput of two kinds of traffic in turn, and their p99."""
    rounds: list[tuple[Driven, Driven]] = []
    reads = site.store.reads
    for _ in track(range(1 + site.rounds), name):  # the first round is a warm-up
        base = await drive(worker, site, itertools.islice(against, site.images))
        rounds.append((await drive(worker, site, itertools.islice(traffic, site.images)), base))
    ratios = [one.rate / base.rate for one, base in rounds[1:]]
    tails = [one.p99 / base.p99 for one, base in rounds[1:]]
    status = worker.status()
    return [
        row(f"{name}: images a second", ratios, bar, at_least=True)
        | {"images_a_second": spread([one.rate for one, _ in rounds[1:]])}
        | {"hits": status.hits, "loads": status.loads, "store_reads": site.store.reads - reads},
        row(f"{name}: p99", tails, 2.0 if name.startswith("twice") else None),
    ]


async def many(site: Site) -> list[dict[str, Any]]:
    digests = site.digests(site.count(1000))
    worker = await site.worker(len(digests))
    await drive(worker, site, digests)
    name = f"{len(digests)} adapters round robin / one"
    return await compare(worker, site, name, itertools.cycle(digests), itertools.repeat(digests[0]), 0.97)


async def zipf(site: Site) -> list[dict[str, Any]]:
    digests = site.digests(site.count(10_000))
    worker = await site.worker(site.count(256))
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(digests) + 1)))
    traffic = drawn(lambda rng: rng.choices(digests, cum_weights=weights)[0])
    await drive(worker, site, itertools.islice(traffic, 4 * site.images))  # popular adapters are in their slots
    name = f"{len(digests)} adapters, {worker._bank.slots} slots, Zipf(1.0) / one"
    return await compare(worker, site, name, traffic, itertools.repeat(digests[0]), 0.90)


async def twice(site: Site) -> list[dict[str, Any]]:
    slots = site.count(64)
    digests = site.digests(2 * slots)
    worker = await site.worker(slots)
    name = "twice the slots, uniform / all resident"
    everything = drawn(lambda rng: rng.choice(digests))
    # Half of them stay after a run over all adapters; the first calls of a run load the others again.
    return await compare(worker, site, name, everything, drawn(lambda rng: rng.choice(digests[:slots])), 0.80)


async def cold(site: Site) -> list[dict[str, Any]]:
    """Measure cold calls, or warm ones instead, five per second, beside four callers of warm adapters."""
    slots = site.count(64)
    digests = site.digests(slots // 2 + site.count(128))
    warm, colder = digests[: slots // 2], itertools.cycle(digests[slots // 2 :])  # least recently used: always evicted
    rows = []
    for tier, host_cache_bytes, bar in (("host memory", 2**34, 20.0), ("the store", 0, 60.0)):
        worker = await site.worker(slots, host_cache_bytes=host_cache_bytes)
        await drive(worker, site, [*digests, *warm])
        added, tails = [], []
        for _ in track(range(1 + site.rounds), f"cold, from {tier}"):
            probes, quiet = await probed(worker, site, warm, itertools.cycle(warm))
            first, busy = await probed(worker, site, warm, colder)
            added.append(statistics.median(first) - statistics.median(probes))
            tails.append(busy.p99 / quiet.p99)
        rows.append(row(f"first answer from {tier} - warm p50, ms", added[1:], bar))
        rows.append(row(f"others' p99 meanwhile, from {tier} / without", tails[1:], 1.1))
    return rows


async def greedy(site: Site) -> list[dict[str, Any]]:
    """Measure a tenant with random calls at a fifth of the worker's throughput, beside a greedy one at ten times."""
    digests = site.digests(site.count(64))
    worker = await site.worker(len(digests))
    await drive(worker, site, digests)
    capacity = (await drive(worker, site, itertools.islice(itertools.cycle(digests), site.images))).rate
    ratios, refused, ms = [], [], []
    for _ in track(range(1 + site.rounds), "greedy"):
        alone = await arriving(worker, site, digests, "modest", capacity / 5)
        flood = asyncio.create_task(flooding(worker, site, digests, 10 * capacity))
        await asyncio.sleep(1)
        # Its first calls meet the large passes of the greedy tenant alone, and do not count.
        await drive(worker, site, digests[:4], 1, "modest")
        beside = await arriving(worker, site, digests, "modest", capacity / 5)
        flood.cancel()
        refused.append(await flood)
        await drive(worker, site, digests[:CALLERS])  # the rest of the greedy tenant's queue completes
        ratios.append(beside.p95 / alone.p95)
        ms.append({"alone_p50": alone.p50, "alone_p95": alone.p95, "beside_p50": beside.p50, "beside_p95": beside.p95})
    found = row("modest tenant's p95 beside a greedy one / alone", ratios[1:], 1.5)
    spreads = {name: spread([one[name] for one in ms[1:]]) for name in ms[0]}
    return [found | {"refused": statistics.mean(refused), "ms": spreads}]


async def memory(site: Site) -> list[dict[str, Any]]:
    """Measure resident memory after each tenth of the cycles."""
    bank = Bank(site.backbone, slots=8, max_rank=CONFIG.rank, max_kernels=CONFIG.kernels)
    packed = [bank.pack(Adapter.read(site.store.get(digest))) for digest in site.digests(8)]
    cycles, loads = site.count(100_000), site.count(10_000)

    def put_and_evict(count: int) -> None:
        for i in range(count):
            bank.evict(bank.put(packed[i % len(packed)]))

    put_mb = await _grown(lambda: asyncio.to_thread(put_and_evict, cycles // 10))
    worker = await site.worker(8, host_cache_bytes=4 * packed[0].size_bytes)
    turns = itertools.cycle(site.digests(64))

    async def load() -> None:
        for _ in range(loads // 10):
            await worker.prefetch(next(turns))

    load_mb = await _grown(load)
    return [
        row(f"MB that {cycles} put/evict cycles added after the first tenth", [put_mb[-1] - put_mb[0]] * 2, 5.0)
        | {"mb": put_mb},
        row(f"MB that {loads} loads added after the first tenth", [load_mb[-1] - load_mb[0]] * 2, 5.0)
        | {"mb": load_mb, "loads": worker.status().loads},
    ]


async def _grown(work: Callable[[], Any]) -> list[float]:
    """Return resident megabytes after each of ten stretches of work."""
    out = []
    for _ in track(range(10), "memory"):
        await work()
        out.append(round(psutil.Process().memory_info().rss / 2**20, 1))
    return out


SCENARIOS: dict[str, Callable[[Site], Any]] = {
    "many": many,
    "zipf": zipf,
    "twice": twice,
    "cold": cold,
    "greedy": greedy,
    "memory": memory,
}


def drawn(draw: Callable[[random.Random], str]) -> Iterator[str]:
    """Yield an endless sequence of draws, the same for each call."""
    rng = random.Random(0)
    while True:
        yield draw(rng)


def row(what: str, values: Sequence[float], bar: float | None, *, at_least: bool = False) -> dict[str, Any]:
    """Return one figure with its target."""
    found = spread(list(values))
    holds = None if bar is None else (found["median"] >= bar if at_least else found["median"] <= bar)
    return {"what": what, "value": found, "bar": bar, "at_least": at_least, "holds": holds}


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows for a terminal: medians, quartiles, targets."""
    out = Table("", box=box.SIMPLE_HEAD)
    for heading in ("median", "quartiles", "bar", "holds"):
        out.add_column(heading, justify="right", no_wrap=True)
    for one in rows:
        value = one["value"]
        bar = "" if one["bar"] is None else f"{'>=' if one['at_least'] else '<='} {one['bar']:g}"
        holds = {None: "", True: "yes", False: "NO"}[one["holds"]]
        out.add_row(one["what"], f"{value['median']:.3f}", f"{value['q1']:.3f}-{value['q3']:.3f}", bar, holds)
    return out


if __name__ == "__main__":
    main()
