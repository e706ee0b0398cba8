"""Mixed batches and the hub on one GPU: correctness, cost, graphs and compilation, copies under load, the whole hub.

    python -m benchmarks.gpu [--device cuda] [--parts correctness ratio ...] [--output FILE]

`make bench-gpu` runs it on one H100 or H200 in about ten minutes and writes `benchmarks/results/gpu.json` with the
card's name. With `--device cpu` the same code runs in a small form that tests it. Its figures are no GPU's, so it
writes no file unless --output names one, and it lists the parts and forms that it did not run.

* correctness: logits of a mixed batch beside those of merged models. In bfloat16 both are compared with float32.
* ratio: time of a mixed batch over the frozen backbone's, for each batch size and number of kernels N.
* forms: the frozen pass and the mixed pass as they are, as a CUDA graph, and compiled. A mixed pass is compiled with
  the adapters' products inside the compiled code, and with the products outside, between its pieces. A form that fails
  has its error instead of a time. The graph of the mixed pass reads one slot for all rows.
* copies: time of a mixed batch while another thread writes adapters into slots, over the time without.
* hub: images per second of `karst-hub serve` over HTTP, with the load of the GPU and of each kind of process. The
  first resource at 90 % is the bound.

Contenders take turns in every round, and a ratio is the median over rounds of the ratio within a round. CUDA events
measure the time on a GPU. Weights are random, because speed does not depend on them.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from adapters import Backbone, Bank, KarstConfig, load_backbone
from adapters.backbone import features

from . import cores, over_http
from .common import machine, random_adapter, spread
from .load import closed_loop, rate

OUTPUT = Path(__file__).parent / "results" / "gpu.json"
BAR = 1.10  # mixed over frozen at a batch of 32 and more, bfloat16, N = 2
CORRECT_FLOAT32 = 1e-3  # of the largest logit
CORRECT_BFLOAT16 = 2.0  # error of the mixed batch over that of merged models
BOUND = 0.9  # load from which a resource is the bound
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Scale(NamedTuple):
    """Numbers of a run: a GPU's, or the small ones of a CPU."""

    models: Mapping[str, int | None]  # timm name -> side in pixels, None: its own
    batches: Sequence[int]
    kernels: Sequence[int]
    rounds: int
    warm_up: int
    seconds: float
    callers: int
    hub_batch: int


SCALES = {
    "cuda": Scale(
        {"vit_base_patch16_224": None, "vit_small_patch14_dinov2.lvd142m": 98},
        (1, 8, 32, 128),
        (2, 8),
        30,
        10,
        15,
        256,
        128,
    ),
    "cpu": Scale({"demo": None}, (1, 4), (2,), 3, 1, 0.5, 4, 8),
}


class Site(NamedTuple):
    """Device and numbers of a run."""

    device: str
    scale: Scale

    def backbone(self, name: str, dtype: str) -> Backbone:
        torch.manual_seed(0)
        size = self.scale.models[name]
        return load_backbone(name, device=self.device, dtype=DTYPES[dtype], pretrained=False, image_size=size)

    def pixels(self, backbone: Backbone, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(batch, *backbone.input_size, generator=generator)
        return pixels.to(device=self.device, dtype=backbone.dtype)


def main() -> None:
    """Run the parts, print and write the result; exit code 1: a mixed batch computes wrong logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SCALES, default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json on a GPU, none on a CPU")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured. `--device cpu` runs the small form, which tests this script.")
    site = Site(options.device, SCALES[options.device])
    result: dict[str, Any] = {"machine": machine(), "device": options.device, "card": card(options.device)}
    skipped = [part for part in options.parts if options.device == "cpu" and part in GPU_ONLY]
    parts = [part for part in options.parts if part not in skipped]
    print(
        f"{result['card']}: {', '.join(parts)}; about {sum(MINUTES[p] for p in parts)} minutes on an H100", flush=True
    )
    output = options.output or (OUTPUT if options.device == "cuda" else None)
    for part in parts:
        began = time.monotonic()
        result[part] = PARTS[part](site)
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({part: result[part] for part in parts}, indent=1))
    if options.device == "cpu":
        print(f"Not run on a CPU: {', '.join(skipped) or 'no part'}; forms that are GPU's: {', '.join(GPU_FORMS)}.")
        print("No GPU was measured.")
    sys.exit(1 if any(not row["holds"] for row in result.get("correctness", [])) else 0)


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU, small form"


@torch.inference_mode()
def correctness(site: Site) -> list[dict[str, Any]]:
    """Compare mixed batches with merged models: the largest difference over the largest logit."""
    rows = []
    for name in site.scale.models:
        exact = site.backbone(name, "float32")
        for kernels in site.scale.kernels:
            adapters = [random_adapter(exact, KarstConfig(kernels=kernels), seed=seed) for seed in range(4)]
            reference = merged(exact, adapters, site.pixels(exact, len(adapters)))
            for dtype in DTYPES:
                backbone = exact if dtype == "float32" else site.backbone(name, dtype)
                pixels = site.pixels(exact, len(adapters)).to(backbone.dtype)
                bank = Bank(backbone, slots=len(adapters), max_kernels=kernels, max_rank=8)
                own = [random_adapter(backbone, KarstConfig(kernels=kernels), seed=seed) for seed in range(4)]
                mixed = torch.stack(bank.forward(pixels, [bank.put(adapter) for adapter in own])).float()
                alone = merged(backbone, own, pixels)
                largest = reference.abs().max()
                errors = {
                    "mixed_to_merged": float((mixed - alone).abs().max() / largest),
                    "mixed_to_float32": float((mixed - reference).abs().max() / largest),
                    "merged_to_float32": float((alone - reference).abs().max() / largest),
                }
                if dtype == "float32":
                    holds = errors["mixed_to_merged"] <= CORRECT_FLOAT32
                else:
                    holds = errors["mixed_to_float32"] <= CORRECT_BFLOAT16 * errors["merged_to_float32"]
                rows.append({"backbone": name, "kernels": kernels, "dtype": dtype, **errors, "holds": holds})
    return rows


def merged(backbone: Backbone, adapters: Sequence[Any], pixels: Tensor) -> Tensor:
    return torch.cat(
        [adapter.merge(backbone)(one[None]) for adapter, one in zip(adapters, pixels, strict=True)]
    ).float()


@torch.inference_mode()
def ratio(site: Site) -> list[dict[str, Any]]:
    """Measure mixed over frozen for each backbone, dtype, N and batch size."""
    rows = []
    cases = [(name, dtype, n) for name in site.scale.models for dtype in DTYPES for n in site.scale.kernels]
    for name, dtype, kernels in track(cases, "ratio"):
        backbone = site.backbone(name, dtype)
        bank, slots = filled(backbone, kernels, max(site.scale.batches))
        for batch in site.scale.batches:
            pixels = site.pixels(backbone, batch)
            found = in_turn(
                site,
                {
                    "frozen": partial(features, backbone.model, pixels),
                    "mixed": partial(bank.forward, pixels, slots[:batch]),
                },
            )
            row = {"backbone": name, "dtype": dtype, "kernels": kernels, "batch": batch, **found["ms"]}
            row["mixed_to_frozen"] = spread(
                [a / b for a, b in zip(*(found["all"][n] for n in ("mixed", "frozen")), strict=True)]
            )
            row["images_per_s"] = round(1e3 * batch / row["mixed_ms"], 1)
            if batch >= 32 and dtype == "bfloat16" and kernels == 2:
                row["holds"] = row["mixed_to_frozen"]["median"] <= BAR
            rows.append(row)
        del bank
        gc.collect()
    return rows


def filled(backbone: Backbone, kernels: int, count: int) -> tuple[Bank, list[Any]]:
    """Return a bank with an adapter in each of `count` slots."""
    bank = Bank(backbone, slots=count, max_kernels=kernels, max_rank=8)
    packed = [
        bank.pack(random_adapter(backbone, KarstConfig(kernels=kernels), seed=seed)) for seed in range(min(4, count))
    ]
    return bank, [bank.put(packed[i % len(packed)]) for i in range(count)]


def in_turn(site: Site, runs: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
    """Return the milliseconds of each contender in every round, and their medians as `NAME_ms`."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(site.scale.warm_up + site.scale.rounds):
        for name, run in runs.items() if number % 2 else reversed(runs.items()):
            ms = timed_ms(site.device, run)
            if number >= site.scale.warm_up:
                taken[name].append(ms)
    return {"all": taken, "ms": {f"{name}_ms": round(statistics.median(ms), 4) for name, ms in taken.items()}}


def timed_ms(device: str, run: Callable[[], object]) -> float:
    if device == "cpu":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


GPU_FORMS = ("frozen as a graph", "mixed as a graph", "frozen compiled with graphs")


def forms(site: Site) -> list[dict[str, Any]]:
    """Measure each form of the frozen and the mixed pass in bfloat16 with N = 2."""
    rows = []
    makers: dict[str, Callable[[Site, str, int], Callable[[], object]]] = {
        "frozen": lambda site, name, batch: frozen_run(site, name, batch, lambda model: model),
        "frozen compiled": lambda site, name, batch: frozen_run(site, name, batch, partial(compiled, site)),
        "frozen compiled with graphs": lambda site, name, batch: frozen_run(
            site, name, batch, partial(torch.compile, mode="reduce-overhead")
        ),
        "frozen as a graph": lambda site, name, batch: graph_of(frozen_run(site, name, batch, lambda model: model)),
        "mixed": lambda site, name, batch: mixed_run(site, name, batch, None),
        "mixed compiled, products inside": lambda site, name, batch: mixed_run(site, name, batch, "inside"),
        "mixed compiled, products outside": lambda site, name, batch: mixed_run(site, name, batch, "outside"),
        "mixed as a graph": mixed_graph,
    }
    for name in site.scale.models:
        for batch in site.scale.batches:
            row: dict[str, Any] = {"backbone": name, "batch": batch, "ms": {}, "failed": {}}
            for form, make in makers.items():
                if site.device == "cpu" and form in GPU_FORMS:
                    continue
                try:
                    with torch.inference_mode():
                        row["ms"][form] = in_turn(site, {"one": make(site, name, batch)})["ms"]["one_ms"]
                except Exception as error:  # a form that this version of torch cannot build
                    row["failed"][form] = f"{type(error).__name__}: {str(error)[:300]}"
                torch._dynamo.reset()
                gc.collect()
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def compiled(site: Site, model: Any) -> Any:
    """Compile a model; on a CPU Dynamo traces it, and the pieces run as they are (there may be no C++ compiler)."""
    return torch.compile(model, backend="inductor" if site.device == "cuda" else "eager", dynamic=False)


def frozen_run(site: Site, name: str, batch: int, form: Callable[[Any], Any]) -> Callable[[], object]:
    backbone = site.backbone(name, "bfloat16")
    model = form(backbone.model)
    return partial(model, site.pixels(backbone, batch))


def mixed_run(site: Site, name: str, batch: int, products: str | None) -> Callable[[], object]:
    """Return a mixed pass; `products` compiles the bank's model with the adapters' products inside or outside.

    This replaces the bank's own model, which no other code does: it shows what an engine with that form would reach.
    """
    backbone = site.backbone(name, "bfloat16")
    bank, slots = filled(backbone, 2, batch)
    if products == "outside":
        for module in bank._model.modules():
            if type(module).__name__ == "AdaptedLinear":
                module.forward = torch.compiler.disable(module.forward)  # the compiled code breaks here
    if products is not None:
        model = bank._model
        model.forward_features = compiled(site, model.forward_features)
    return partial(bank.forward, site.pixels(backbone, batch), slots)


def graph_of(run: Callable[[], Any]) -> Callable[[], object]:
    """Capture a pass as a CUDA graph; its tensors stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    graph.kept = kept  # otherwise its memory could be freed
    return graph.replay


def mixed_graph(site: Site, name: str, batch: int) -> Callable[[], object]:
    backbone = site.backbone(name, "bfloat16")
    bank = Bank(backbone, slots=1, max_kernels=2, max_rank=8)
    return graph_of(partial(bank.warm_up, site.pixels(backbone, batch), 2, 8))


@torch.inference_mode()
def copies(site: Site) -> list[dict[str, Any]]:
    """Measure a mixed batch with and without a thread that puts and evicts adapters all the time."""
    rows = []
    for name in site.scale.models:
        backbone = site.backbone(name, "bfloat16")
        batch = site.scale.batches[-2]
        bank = Bank(backbone, slots=2 * batch, max_kernels=2, max_rank=8)
        packed = [bank.pack(random_adapter(backbone, KarstConfig(), seed=seed)) for seed in range(4)]
        slots = [bank.put(packed[i % len(packed)]) for i in range(batch)]
        run = partial(bank.forward, site.pixels(backbone, batch), slots)
        quiet, busy, puts = [], [], 0
        for _ in track(range(max(3, site.scale.rounds // 5)), f"copies, {name}"):
            quiet += [timed_ms(site.device, run) for _ in range(5)]
            with copying(bank, packed) as counted:
                busy += [timed_ms(site.device, run) for _ in range(5)]
            puts += counted[0]
        rows.append(
            {
                "backbone": name,
                "batch": batch,
                "with_to_without": round(statistics.median(busy) / statistics.median(quiet), 3),
                "puts_per_s": round(1e3 * puts / sum(busy), 1),
                "adapter_mb": round(packed[0].size_bytes / 1e6, 2),
            }
        )
    return rows


@contextmanager
def copying(bank: Bank, packed: Sequence[Any]) -> Iterator[list[int]]:
    """Put and evict adapters in a thread; the list counts them."""
    counted, stop = [0], threading.Event()

    def work() -> None:
        while not stop.is_set():
            bank.evict(bank.put(packed[counted[0] % len(packed)]))
            counted[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield counted
    finally:
        stop.set()
        thread.join()


def hub(site: Site) -> list[dict[str, Any]]:
    """Measure the whole hub over HTTP with eight adapters and one image a call, and name the bound."""
    rows = []
    for name in site.scale.models:
        if site.scale.models[name] is None:  # the stage of `over_http` serves a backbone at its own image size
            settings = {"device": site.device, "dtype": "bfloat16", "batch_size": str(site.scale.hub_batch)}
            rows.append(over_http.run(name, {"hub": partial(hub_stage, site)}, **settings)["hub"])
    return rows


def hub_stage(site: Site, stage: over_http.Stage) -> dict[str, Any]:
    calls = [stage.classify(i % len(stage.adapters), i) for i in range(8 * len(stage.pictures))]
    closed_loop(stage.hub.address, calls, site.scale.callers, 3.0)
    before, began = cores.cpu_s(over_http.ROLES), time.perf_counter()
    with gpu_load(site.device) as samples:
        replies = closed_loop(stage.hub.address, calls, site.scale.callers, site.scale.seconds)
    seconds = time.perf_counter() - began
    taken = {role: (s - before[role]) / seconds for role, s in cores.cpu_s(over_http.ROLES).items()}
    load = {f"cores of {role}": round(own, 2) for role, own in taken.items() if own > 0.01}
    gpu = statistics.mean(samples) / 100 if samples else None
    all_cores = sum(taken.values()) / (machine()["cores"] or 1)
    # One gateway, one worker and HAProxy have one busy thread each, besides decoding.
    candidates = {"GPU": gpu or 0.0, "all cores": all_cores, "gateway": taken.get("gateway", 0.0)}
    bound = next((what for what, own in candidates.items() if own >= BOUND), "none of GPU, cores and gateway")
    batches = [int(reply.header("x-batch-images")) for reply in replies if reply.status == 200]
    return {
        "images_per_s": round(rate(replies, site.scale.callers), 1),
        "median_batch": statistics.median(batches),
        "gpu_load": gpu,
        "load": load,
        "bound": bound,
    }


@contextmanager
def gpu_load(device: str) -> Iterator[list[float]]:
    """Sample the load of the first GPU, in percent, four times a second."""
    samples: list[float] = []
    if device == "cpu":
        yield samples
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0", "-lms", "250"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield samples
        finally:
            process.terminate()
            lines = process.communicate()[0].splitlines()
            samples += [float(line) for line in lines if line.strip().isdigit()]


PARTS: dict[str, Callable[[Site], Any]] = {
    "correctness": correctness,
    "ratio": ratio,
    "forms": forms,
    "copies": copies,
    "hub": hub,
}
MINUTES = {"correctness": 1, "ratio": 3, "forms": 4, "copies": 1, "hub": 2}
GPU_ONLY = ("hub",)


if __name__ == "__main__":
    main()
