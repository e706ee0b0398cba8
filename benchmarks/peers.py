"""Many adapters on one machine: ours beside peft, Ray Serve's multiplexing and a process a task.

    python -m benchmarks.peers [--sizes 1 8 64 512] [--backbone NAME] [--rounds 5] [--contenders ours LoRA ...]

Every contender has `size` tasks, each with an adapter and a head of its own, and classifies the same images in every
round; the images' tasks go round robin, on from where the last round ended. What each of them is:

* ours: `Bank.forward` of mixed batches; KARST with N = 2 and rank 8, a slot for every adapter.
* LoRA: Hugging Face's peft, mixed batches by `adapter_names=`; same layers, rank nearest to as many numbers.
* LoKr: peft's, likewise; it has no mixed batches, so each task of a batch is one `set_adapter` and one pass.
* Serve: one merged model a task in one replica of Ray Serve, `@serve.multiplexed` and `@serve.batch`, with
  `IN_FLIGHT` calls under way. It keeps as many models as fit `--memory-gb`; loading one is a copy within memory.
* processes: one merged model in a process of its own a task, asked through pipes one after another.

What has no mixed batch gets all images of a task in a batch at once. Serve's replica holds the images and is told
which, so no call carries pixels. peft's adapters are copied layer by layer, since `add_adapter` takes longer the more
there are; only the last one goes through it, and its time is reported. A few answers of each contender are compared
with those of merged models before anything is timed.

Every contender runs in a process of its own with as many torch threads as the others; they take turns in every round,
so whatever else the machine does falls on all of them alike. A ratio is the median over rounds of the ratio within a
round. Memory is what the adapters add to a process that has the backbone: `private` is what no other process shares,
`resident` is RSS. A process a task counts whole; Ray's own processes do not count. A contender that does not fit
into memory or the time for setting up has null and a reason.
"""

import argparse
import asyncio
import copy
import ctypes
import gc
import json
import logging
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from adapters import Adapter, Backbone, Bank, KarstConfig, load_backbone
from adapters.backbone import features

from .common import machine, random_adapter, spread

BACKBONE = "vit_tiny_patch16_224"
CONFIG = KarstConfig(kernels=2, rank=8)
SIZES = (1, 8, 64, 512)
CLASSES = 10
DISTINCT = 8  # different KARST adapters; task t has number t % DISTINCT
IN_FLIGHT = 64  # calls to Serve
TOLERANCE = 1e-3
WARM_UP_ROUNDS = 1
ROUND_LIMIT_S = 900
RESERVE = 1.5e9  # bytes of memory that must stay free
OUTPUT = Path(__file__).parent / "results" / "peers.json"

Work = list[tuple[int, int]]  # (task, image)


class MismatchError(RuntimeError):
    """A contender's answers are not the merged models'."""


class TooLargeError(RuntimeError):
    """A contender of this size cannot be had here; the message says why."""


@dataclass(frozen=True)
class Spec:
    """What every contender of one size is given."""

    backbone: str
    adapters: tuple[bytes, ...]  # KARST files
    size: int
    batch: int
    images: int
    threads: int
    memory_gb: float

    def load(self) -> tuple[Backbone, Tensor]:
        """The backbone, the same in every process, and pixels (images, 3, H, W); both have been used once."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        backbone = load_backbone(self.backbone, pretrained=False)
        pixels = torch.randn(self.images, *backbone.input_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            features(backbone.model, pixels[: self.batch])
        return backbone, pixels

    def karst(self) -> list[Adapter]:
        return [Adapter.read(data) for data in self.adapters]

    def work(self, number: int) -> Work:
        """Round `number`."""
        return [((number * self.images + i) % self.size, i) for i in range(self.images)]

    def batches(self, work: Work) -> list[Work]:
        return [work[i : i + self.batch] for i in range(0, len(work), self.batch)]


@dataclass(frozen=True)
class Memory:
    """Bytes of a process, or of several together."""

    private: int = 0
    resident: int = 0

    @classmethod
    def now(cls) -> "Memory":
        """Of this process, after everything that is free has gone back to the system."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        sizes = {"Rss": 0, "Private_Clean": 0, "Private_Dirty": 0}
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in sizes:
                sizes[name] = 1024 * int(rest.split()[0])
        return cls(sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Rss"])

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.private + other.private, self.resident + other.resident)

    def __sub__(self, other: "Memory") -> "Memory":
        return Memory(self.private - other.private, self.resident - other.resident)

    def mb(self) -> dict[str, float]:
        return {"private": round(self.private / 1e6, 1), "resident": round(self.resident / 1e6, 1)}


@dataclass(frozen=True)
class Contender:
    """A contender that is ready: its answers in the order of the work, and how one merged model answers a task."""

    run: Callable[[Work], list[Tensor]]
    merged: Callable[[int, Tensor], Tensor]
    memory: Memory
    notes: dict[str, Any] = field(default_factory=dict)


@contextmanager
def ours(spec: Spec) -> Iterator[Contender]:
    backbone, pixels = spec.load()
    adapters = spec.karst()
    before = Memory.now()
    bank = Bank(backbone, slots=spec.size, max_rank=CONFIG.rank, max_kernels=CONFIG.kernels)
    packed = [bank.pack(adapter) for adapter in adapters]
    slots = [bank.put(packed[task % len(packed)]) for task in range(spec.size)]
    began = time.perf_counter()
    bank.evict(slots[-1])
    slots[-1] = bank.put(adapters[(spec.size - 1) % len(adapters)])
    add_s = time.perf_counter() - began
    del packed
    memory = Memory.now() - before

    def run(work: Work) -> list[Tensor]:
        batches = spec.batches(work)
        return [row for b in batches for row in bank.forward(pixels[[i for _, i in b]], [slots[task] for task, _ in b])]

    yield Contender(run, partial(_merged, adapters, backbone), memory, {"last_added_s": round(add_s, 4)})


@contextmanager
def peft(method: str, spec: Spec) -> Iterator[Contender]:
    """LoRA in mixed batches, LoKr task by task."""
    from peft import LoKrConfig, LoraConfig, get_peft_model  # slow, and only these two need it

    from .accuracy_methods import karst_count, lokr_rank, lora_ranks

    backbone, pixels = spec.load()
    budget = karst_count(backbone, CONFIG)
    ranks, rank = lora_ranks(backbone.sites, budget), lokr_rank(backbone.sites, budget)

    def config() -> Any:
        if method == "LoRA":
            return LoraConfig(
                target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks, init_lora_weights=False
            )
        return LoKrConfig(
            r=rank, alpha=rank, decompose_factor=CONFIG.factor, init_weights=False, target_modules=list(ranks)
        )

    get_peft_model(backbone.clone(), config())  # what peft loads when it is first used is not the adapters'
    before = Memory.now()
    torch.manual_seed(1)
    model = get_peft_model(backbone.clone(), config(), adapter_name="t0").eval().requires_grad_(False)
    layers: dict[str, Any] = {site.name: model.base_model.model.get_submodule(site.name) for site in backbone.sites}
    for task in range(1, spec.size - 1):
        model.peft_config[f"t{task}"] = config()
        for layer in layers.values():
            _copy_adapter(layer, f"t{task}")
    notes: dict[str, Any] = {
        "numbers": sum(p.numel() for name, p in model.named_parameters() if ".t0." in f"{name}."),
    }
    if spec.size > 1:
        began = time.perf_counter()
        model.add_adapter(f"t{spec.size - 1}", config(), low_cpu_mem_usage=False)
        notes["last_added_s"] = round(time.perf_counter() - began, 4)
        model.requires_grad_(False)
    weights = torch.randn(spec.size, CLASSES, backbone.width) * 0.05
    biases = torch.randn(spec.size, CLASSES, 1) * 0.05
    memory = Memory.now() - before

    def run_mixed(work: Work) -> list[Tensor]:
        answers: list[Tensor] = []
        for batch in spec.batches(work):
            tasks, images = map(list, zip(*batch, strict=True))
            pooled = model(pixels[images], adapter_names=[f"t{task}" for task in tasks])
            answers += torch.baddbmm(biases[tasks], weights[tasks], pooled[:, :, None])[:, :, 0]
        return answers

    def run_by_task(work: Work) -> list[Tensor]:
        def one(task: int, images: list[int]) -> Tensor:
            model.set_adapter(f"t{task}", inference_mode=True)
            return torch.addmm(biases[task].T, model(pixels[images]), weights[task].T)

        return [row for batch in spec.batches(work) for row in _by_task(batch, one)]

    def merged(task: int, image: Tensor) -> Tensor:
        body = copy.deepcopy(backbone.model)
        for name, layer in layers.items():
            body.get_submodule(name).weight.add_(layer.get_delta_weight(f"t{task}"))
        return torch.addmm(biases[task].T, features(body, image), weights[task].T)

    yield Contender(run_mixed if method == "LoRA" else run_by_task, merged, memory, notes)


@contextmanager
def ray_serve(spec: Spec) -> Iterator[Contender]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}  # as karst-hub has it
    import ray
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers need not find this script
    backbone, _ = spec.load()
    adapters = spec.karst()
    size = sum(t.numel() * t.element_size() for t in adapters[0].merge(backbone).state_dict().values())
    room = min(spec.memory_gb * 1e9, psutil.virtual_memory().available - 2 * RESERVE)
    models = min(spec.size, int(room / size))
    if models < 1:
        raise TooLargeError(f"one merged model has {size / 1e6:.0f} MB, and {room / 1e6:.0f} MB are to be had")

    class Replica:
        def __init__(self) -> None:
            backbone, self.pixels = spec.load()
            self.passes = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(spec.threads,))
            self.originals = [adapter.merge(backbone) for adapter in spec.karst()]

        @serve.multiplexed(max_num_models_per_replica=models)
        async def model(self, model_id: str) -> nn.Module:
            return copy.deepcopy(self.originals[int(model_id) % len(self.originals)])

        @serve.batch(max_batch_size=spec.batch, batch_wait_timeout_s=0.01)
        async def __call__(self, images: list[int]) -> list[Any]:
            model = await self.model(serve.get_multiplexed_model_id())
            loop = asyncio.get_running_loop()
            return list(await loop.run_in_executor(self.passes, self.forward, model, images))

        @torch.inference_mode()
        def forward(self, model: nn.Module, images: list[int]) -> Any:
            return model(self.pixels[images]).numpy()

        def memory(self) -> Memory:
            return Memory.now()

    try:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=256 * 1024**2,
            _node_ip_address="127.0.0.1",
        )
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(max_ongoing_requests=2 * IN_FLIGHT, ray_actor_options={"num_cpus": 1})(Replica)
        handle = serve.run(deployment.bind(), name="peers", route_prefix=None)

        def run(work: Work) -> list[Tensor]:
            answers, waiting = [], deque[Any]()
            for task, image in work:
                if len(waiting) == IN_FLIGHT:
                    answers.append(waiting.popleft().result())
                waiting.append(handle.options(multiplexed_model_id=str(task)).remote(image))
            return [torch.from_numpy(row.copy()) for row in (*answers, *(call.result() for call in waiting))]

        before = handle.memory.remote().result()
        run([(task, 0) for task in range(spec.size)])
        memory = handle.memory.remote().result() - before
        notes = {"models_kept": models, "in_flight": IN_FLIGHT, "model_mb": round(size / 1e6, 1)}
        yield Contender(run, partial(_merged, adapters, backbone), memory, notes)
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


@contextmanager
def processes(spec: Spec) -> Iterator[Contender]:
    backbone, pixels = spec.load()
    adapters = spec.karst()
    models = [pickle.dumps(adapter.merge(backbone)) for adapter in adapters]
    context = multiprocessing.get_context("forkserver")  # what importing torch takes is shared by all of them
    context.set_forkserver_preload(["adapters"])
    with ExitStack() as stack:
        pipes: list[Any] = []

        def add() -> Memory:
            pipe, other = context.Pipe()
            process = context.Process(target=_task_process, args=(other, spec.threads), daemon=True)
            process.start()
            other.close()
            stack.callback(process.join, 10)
            stack.callback(pipe.close)  # it ends when nobody can ask it any more
            pipe.send_bytes(models[len(pipes) % len(models)])
            pipe.send(pixels[: spec.batch].numpy())
            pipes.append(pipe)
            return pipe.recv()

        memory = add()
        need, free = (spec.size - 1) * memory.private, psutil.virtual_memory().available
        if need > free - RESERVE:
            raise TooLargeError(
                f"{spec.size} processes need {spec.size * memory.private / 1e9:.1f} GB ({memory.private / 1e6:.0f} MB "
                f"each that nobody shares), and {free / 1e9:.1f} GB were free"
            )
        for _ in range(1, spec.size):
            memory += add()

        def one(task: int, images: list[int]) -> Tensor:
            pipes[task].send(pixels[images].numpy())
            return torch.from_numpy(pipes[task].recv())

        def run(work: Work) -> list[Tensor]:
            return [row for batch in spec.batches(work) for row in _by_task(batch, one)]

        yield Contender(run, partial(_merged, adapters, backbone), memory)


CONTENDERS: dict[str, Callable[[Spec], AbstractContextManager[Contender]]] = {
    "ours": ours,
    "LoRA": partial(peft, "LoRA"),
    "LoKr": partial(peft, "LoKr"),
    "Serve": ray_serve,
    "processes": processes,
}


def main() -> None:
    """Measure every size, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=BACKBONE, help="a timm name, or demo; weights are random")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="numbers of adapters")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, 2 or more")
    parser.add_argument("--images", type=int, default=64, help="images of a round")
    parser.add_argument("--batch", type=int, default=32, help="most images of a batch")
    parser.add_argument("--memory-gb", type=float, default=6.0, help="what Serve's models may take")
    parser.add_argument("--setup-limit", type=float, default=300, help="seconds that a contender has to be ready")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}: quartiles need it")
    threads = torch.get_num_threads()
    print(f"{threads} torch threads for every contender")

    torch.manual_seed(0)
    backbone = load_backbone(options.backbone, pretrained=False)
    data = tuple(random_adapter(backbone, CONFIG, seed=seed, classes=CLASSES).data for seed in range(DISTINCT))
    rows = []
    try:
        for size in options.sizes:
            spec = Spec(options.backbone, data, size, options.batch, options.images, threads, options.memory_gb)
            rows.append(measure(spec, options.contenders, options.rounds, options.setup_limit))
    except RuntimeError as error:
        raise SystemExit(f"stopped: {error}") from None
    result = {
        "machine": machine(),
        "backbone": options.backbone,
        "batch": options.batch,
        "images": options.images,
        "rounds": options.rounds,
        "memory_gb": options.memory_gb,
        "rows": rows,
    }
    Console().print(table(result))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


def measure(spec: Spec, names: list[str], rounds: int, limit_s: float) -> dict[str, Any]:
    """All contenders of one size.

    Raises:
        RuntimeError: one of them failed, or gives other answers than merged models.
    """
    with ExitStack() as stack:
        hosts: dict[str, Host] = {}
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            host = Host(name, spec)
            stack.callback(host.close)
            found[name] = host.ready(limit_s)
            if found[name]["reason"] is None:
                hosts[name] = host
            print(f"{spec.size} adapters, {name}: {found[name]['reason'] or 'ready'}")
        numbers = track(range(WARM_UP_ROUNDS + rounds), f"{spec.size} adapters")
        times = [{name: host.round(number) for name, host in hosts.items()} for number in numbers][WARM_UP_ROUNDS:]
    for name, entry in found.items():
        timed = name in hosts
        entry["images_per_s"] = spread([spec.images / taken[name] for taken in times]) if timed else None
        ratio = timed and "ours" in hosts
        entry["time_to_ours"] = spread([taken[name] / taken["ours"] for taken in times]) if ratio else None
    return {"adapters": spec.size, "contenders": found}


class Host:
    """A contender in a process of its own, seen from outside."""

    def __init__(self, name: str, spec: Spec) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_host, args=(other, name, spec))
        self._process.start()
        other.close()

    def ready(self, limit_s: float) -> dict[str, Any]:
        """Wait until it is set up and its answers are right; `reason` says why it never will be.

        Raises:
            RuntimeError: it failed, or its answers are wrong.
        """
        reason, deadline = None, time.monotonic() + limit_s
        while reason is None and not self._pipe.poll(0.5):
            free = psutil.virtual_memory().available
            if time.monotonic() > deadline:
                reason = f"not ready after {limit_s:.0f} s ({free / 1e9:.1f} GB of memory were free)"
            elif free < RESERVE / 2:
                reason = f"memory ran out: {free / 1e9:.1f} GB were free"
        if reason is None:
            try:
                found: dict[str, Any] = self._pipe.recv()
            except EOFError:
                self._process.join()
                raise RuntimeError(f"{self._name} ended with {self._process.exitcode}") from None
            if "failed" in found:
                raise RuntimeError(f"{self._name}: {found['failed']}")
            if found["reason"] is None:
                return found
            reason = found["reason"]
        self.close(patience_s=0)
        return {"reason": reason, "memory_mb": None, "setup_s": None, "largest_difference": None, "notes": {}}

    def round(self, number: int) -> float:
        """Seconds."""
        self._pipe.send(number)
        if not self._pipe.poll(ROUND_LIMIT_S):
            raise RuntimeError(f"{self._name}: a round took more than {ROUND_LIMIT_S} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self._name} ended within a round") from None

    def close(self, patience_s: float = 60) -> None:
        """End it with everything that it started."""
        try:
            first = psutil.Process(self._process.pid)
            tree = [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            tree = []
        self._pipe.close()  # it ends when it sees that
        self._process.join(patience_s)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()


def table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    title = f"{result['backbone']}, batches of {result['batch']}, {result['machine']['threads']} threads"
    out = Table("adapters", "", title=title, box=box.SIMPLE_HEAD)
    for heading in ("images / s", "time / ours", "MB added"):
        out.add_column(heading, justify="right", no_wrap=True)
    out.add_column("")
    for row in result["rows"]:
        for name, entry in row["contenders"].items():
            speed, ratio, memory = entry["images_per_s"], entry["time_to_ours"], entry["memory_mb"]
            out.add_row(
                str(row["adapters"]),
                name,
                f"{speed['median']:.1f}" if speed else "-",
                f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else "-",
                f"{memory['private']:.0f}" if memory else "-",
                entry["reason"] or ", ".join(f"{key} {value}" for key, value in entry["notes"].items()),
            )
    return out


def _host(pipe: Any, name: str, spec: Spec) -> None:
    """A contender's process: set up, check, then a round for every number."""
    began = time.perf_counter()
    with suppress(EOFError, BrokenPipeError):  # nobody listens any more: the end
        try:
            with CONTENDERS[name](spec) as contender, torch.inference_mode():
                setup_s = time.perf_counter() - began
                difference = _check(contender, spec)
                found = {"reason": None, "memory_mb": contender.memory.mb(), "setup_s": round(setup_s, 2)}
                pipe.send(found | {"largest_difference": difference, "notes": contender.notes})
                while True:
                    work = spec.work(pipe.recv())
                    began = time.perf_counter()
                    contender.run(work)
                    pipe.send(time.perf_counter() - began)
        except TooLargeError as error:
            pipe.send({"reason": str(error)})
        except (EOFError, BrokenPipeError):
            raise
        except Exception:
            pipe.send({"failed": traceback.format_exc()})


def _check(contender: Contender, spec: Spec) -> float:
    """The largest difference to merged models: the first tasks and the last, two images of the first.

    Raises:
        MismatchError: it is above `TOLERANCE`.
    """
    tasks = [*range(min(spec.size, 6)), spec.size - 1, 0]
    _, pixels = spec.load()
    work = [(task, i % spec.images) for i, task in enumerate(tasks)]
    difference = max(
        float((found - contender.merged(task, pixels[image : image + 1])[0]).abs().max())
        for found, (task, image) in zip(contender.run(work), work, strict=True)
    )
    if not difference <= TOLERANCE:
        raise MismatchError(f"answers differ from merged models by {difference:.1e}, allowed are {TOLERANCE:.0e}")
    return difference


def _by_task(batch: Work, one: Callable[[int, list[int]], Tensor]) -> list[Tensor]:
    """The answers of a batch, each task's images at once."""
    places: dict[int, list[int]] = {}
    for place, (task, _) in enumerate(batch):
        places.setdefault(task, []).append(place)
    answers = {
        place: row
        for task, own in places.items()
        for place, row in zip(own, one(task, [batch[place][1] for place in own]), strict=True)
    }
    return [answers[place] for place in range(len(batch))]


def _merged(adapters: list[Adapter], backbone: Backbone, task: int, image: Tensor) -> Tensor:
    return adapters[task % len(adapters)].merge(backbone)(image)


def _copy_adapter(layer: Any, name: str) -> None:
    """What peft's `add_adapter` leaves in a layer, made from the first adapter's and with numbers of its own."""
    for part in (*layer.adapter_layer_names, *layer.other_param_names):
        held = getattr(layer, part)
        if hasattr(held, "keys") and "t0" in held:
            held[name] = copy.deepcopy(held["t0"])
            own = held[name]
            for parameter in own.parameters() if isinstance(own, nn.Module) else [own]:
                if isinstance(parameter, Tensor):
                    parameter.data = parameter[..., torch.randperm(parameter.shape[-1])].contiguous()


def _task_process(pipe: Any, threads: int) -> None:
    """A task's own process: a merged model, then pixels -> logits until the pipe closes."""
    gc.freeze()  # what the import left stays shared
    torch.set_num_threads(threads)
    model = pickle.loads(pipe.recv_bytes())
    measured = False
    with suppress(EOFError), torch.inference_mode():
        while True:
            logits = model(torch.from_numpy(pipe.recv()))
            pipe.send(logits.numpy() if measured else Memory.now())
            measured = True


if __name__ == "__main__":
    main()
