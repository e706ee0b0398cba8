"""Many adapters on one machine: ours beside peft, Ray Serve's multiplexing, and one process per task.

    python -m benchmarks.peers [--sizes 1 8 64 512] [--backbone NAME] [--rounds 5] [--contenders ours LoRA ...]

The size is the number of tasks of each contender. Each task has its own adapter and head. Every contender classifies
the same images in every round. Their tasks follow each other round robin, and a round continues after the last one.

* ours: `Bank.forward` of mixed batches; KARST with N = 2 and rank 8, a slot for every adapter.
* LoRA: peft's mixed batches (`adapter_names=`), on the same layers with the ranks nearest to as many parameters.
* LoKr: peft's, with ranks by the same rule. It has no mixed batches: each task in a batch takes one `set_adapter` and
  one pass.
* Serve: merged models in one replica, `@serve.multiplexed` and `@serve.batch`, `IN_FLIGHT` concurrent calls. It keeps
  as many models as fit `--memory-gb`, and it loads one by a copy within memory. A call has the index of an image.
* processes: one process with a merged model per task. They run one after another, through pipes, with all images of a
  task in one batch.

The benchmark copies the first peft adapter within every layer, because `add_adapter` slows down as adapters
accumulate. The last one comes from `add_adapter`, and `last_added_s` is its time. Before it measures, the benchmark
compares some answers of every contender with those of merged models.

Every contender runs in a process of its own, with the same number of torch threads. The contenders take turns in every
round, so other load on the machine affects them equally. A ratio is the median over rounds of the ratio within a round.
Memory is the memory that the adapters add to a backbone in use: `private` is not shared with another process,
`resident` is RSS. The processes of tasks count whole, Ray's own processes do not count. A contender that cannot be set
up has nulls and a reason.
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
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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

CONFIG = KarstConfig(kernels=2, rank=8)
CLASSES = 10
DISTINCT = 8  # number of different KARST adapters; task t has number t % DISTINCT
IN_FLIGHT = 64
TOLERANCE = 1e-3
ROUND_LIMIT_S = 900
RESERVE = 1.5e9  # bytes of memory to leave free
OUTPUT = Path(__file__).parent / "results" / "peers.json"

Work = list[tuple[int, int]]  # (task, image)


class TooLargeError(RuntimeError):
    """A contender that is too large for this machine; the message gives the reason."""


class Spec(NamedTuple):
    """Input of every contender of one size."""

    options: argparse.Namespace
    files: list[bytes]  # number of KARST adapters
    size: int
    threads: int

    def load(self) -> tuple[Backbone, Tensor, list[Adapter]]:
        """Return the same backbone, pixels (images, 3, H, W) and KARST adapters in every process, after one use."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        backbone = load_backbone(self.options.backbone, pretrained=False)
        pixels = torch.randn(self.options.images, *backbone.input_size)
        with torch.inference_mode():
            features(backbone.model, pixels[: self.options.batch])
        return backbone, pixels, [Adapter.read(data) for data in self.files]

    def batches(self, work: Work) -> list[Work]:
        return [work[i : i + self.options.batch] for i in range(0, len(work), self.options.batch)]


class Contender(NamedTuple):
    """A contender that is ready."""

    run: Callable[[Work], list[Tensor]]  # returns the answers in the order of the work
    merged: Callable[[int, Tensor], Tensor]  # returns a task's answers from its merged model
    memory: Tensor  # as `memory_mb`
    notes: dict[str, Any]


@contextmanager
def ours(spec: Spec) -> Iterator[Contender]:
    backbone, pixels, adapters = spec.load()
    before = memory_mb()
    bank = Bank(backbone, slots=spec.size, max_rank=CONFIG.rank, max_kernels=CONFIG.kernels)
    slots = [bank.put(adapters[task % DISTINCT]) for task in range(spec.size - 1)]
    began = time.perf_counter()
    slots.append(bank.put(adapters[(spec.size - 1) % DISTINCT]))
    notes = {"last_added_s": round(time.perf_counter() - began, 4)}

    def one_batch(batch: Work) -> list[Tensor]:
        return bank.forward(pixels[[image for _, image in batch]], [slots[task] for task, _ in batch])

    def run(work: Work) -> list[Tensor]:
        return [row for batch in spec.batches(work) for row in one_batch(batch)]

    yield Contender(run, partial(_merged, backbone, adapters), memory_mb() - before, notes)


@contextmanager
def peft(method: str, spec: Spec) -> Iterator[Contender]:
    """Set up LoRA in mixed batches, or LoKr task by task."""
    from peft import LoKrConfig, LoraConfig, get_peft_model  # slow to import, and the other contenders do not need it

    from .accuracy_methods import karst_count, lokr_rank, lora_ranks

    backbone, pixels, _ = spec.load()
    budget = karst_count(backbone, CONFIG)
    ranks, rank = lora_ranks(backbone.sites, budget), lokr_rank(backbone.sites, budget)

    def config() -> Any:  # random values everywhere, so that every part of an adapter changes the answers
        if method == "LoRA":
            same: dict[str, Any] = {"rank_pattern": ranks, "alpha_pattern": ranks}
            return LoraConfig(target_modules=list(ranks), init_lora_weights=False, **same)
        same = {"r": rank, "alpha": rank, "decompose_factor": CONFIG.factor}
        return LoKrConfig(target_modules=list(ranks), init_weights=False, **same)

    get_peft_model(
        backbone.clone(), config()
    )  # otherwise memory that peft allocates at first use would count as the adapters'
    before = memory_mb()
    model = get_peft_model(backbone.clone(), config(), adapter_name="t0").eval()
    layers: dict[str, Any] = {name: model.base_model.model.get_submodule(name) for name in ranks}
    notes: dict[str, Any] = {"numbers": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    for task in range(1, spec.size - 1):
        model.peft_config[f"t{task}"] = config()
        for layer in layers.values():
            _copy_adapter(layer, f"t{task}")
    if spec.size > 1:
        began = time.perf_counter()
        model.add_adapter(f"t{spec.size - 1}", config())
        notes["last_added_s"] = round(time.perf_counter() - began, 4)
    model.requires_grad_(False)
    weights = torch.randn(spec.size, CLASSES, backbone.width) * 0.05
    biases = torch.randn(spec.size, CLASSES, 1) * 0.05

    def run_mixed(work: Work) -> list[Tensor]:
        answers: list[Tensor] = []
        for batch in spec.batches(work):
            tasks = [task for task, _ in batch]
            pooled = model(pixels[[image for _, image in batch]], adapter_names=[f"t{task}" for task in tasks])
            answers += torch.baddbmm(biases[tasks], weights[tasks], pooled[:, :, None])[:, :, 0]
        return answers

    def one(task: int, images: list[int]) -> Tensor:
        model.set_adapter(f"t{task}", inference_mode=True)
        return torch.addmm(biases[task].T, model(pixels[images]), weights[task].T)

    def merged(task: int, image: Tensor) -> Tensor:
        body = copy.deepcopy(backbone.model)
        for name, layer in layers.items():
            body.get_submodule(name).weight.add_(layer.get_delta_weight(f"t{task}"))
        return torch.addmm(biases[task].T, features(body, image), weights[task].T)

    run = run_mixed if method == "LoRA" else partial(_task_by_task, spec, one)
    yield Contender(run, merged, memory_mb() - before, notes)


@contextmanager
def ray_serve(spec: Spec) -> Iterator[Contender]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}  # as in karst-hub
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "ServeController"  # Ray's message at every stop of Serve
    import ray  # reads the environment
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # otherwise Ray's workers would have to find this script
    backbone, _, adapters = spec.load()
    size = sum(t.numel() * t.element_size() for t in adapters[0].merge(backbone).state_dict().values())
    room = min(spec.options.memory_gb * 1e9, psutil.virtual_memory().available - 2 * RESERVE)
    kept = min(spec.size, int(room / size))
    if kept < 1:
        raise TooLargeError(f"one merged model has {size / 1e6:.0f} MB, and {room / 1e6:.0f} MB are to be had")

    class Replica:
        def __init__(self) -> None:
            backbone, self.pixels, adapters = spec.load()
            self.passes = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(spec.threads,))
            self.originals = [adapter.merge(backbone) for adapter in adapters]

        @serve.multiplexed(max_num_models_per_replica=kept)
        async def model(self, model_id: str) -> nn.Module:
            return copy.deepcopy(self.originals[int(model_id) % DISTINCT])

        @serve.batch(max_batch_size=spec.options.batch, batch_wait_timeout_s=0.01)
        async def __call__(self, images: list[int]) -> list[Any]:
            model = await self.model(serve.get_multiplexed_model_id())
            loop = asyncio.get_running_loop()
            return list(await loop.run_in_executor(self.passes, self.forward, model, images))

        @torch.inference_mode()
        def forward(self, model: nn.Module, images: list[int]) -> Any:
            return model(self.pixels[images]).numpy()

        async def memory(self) -> Tensor:
            return memory_mb()

    async def ask(work: Work) -> list[Tensor]:
        room = asyncio.Semaphore(IN_FLIGHT)

        async def one(task: int, image: int) -> Tensor:
            async with room:
                return torch.tensor(await handle.options(multiplexed_model_id=str(task)).remote(image))

        return await asyncio.gather(*(one(task, image) for task, image in work))

    async def memory() -> Tensor:
        return await handle.memory.remote()

    loop = asyncio.new_event_loop()  # Serve's updates arrive on it between the calls, too
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def on_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

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
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(max_ongoing_requests=2 * IN_FLIGHT, ray_actor_options={"num_cpus": 1})(Replica)
        handle = serve.run(deployment.bind(), name="peers", route_prefix=None)
        before = on_loop(memory())
        on_loop(ask([(task, 0) for task in range(spec.size)]))
        added = on_loop(memory()) - before
        notes = {"models_kept": kept, "model_mb": round(size / 1e6, 1)}
        yield Contender(lambda work: on_loop(ask(work)), partial(_merged, backbone, adapters), added, notes)
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


@contextmanager
def processes(spec: Spec) -> Iterator[Contender]:
    backbone, pixels, adapters = spec.load()
    models = [pickle.dumps(adapter.merge(backbone)) for adapter in adapters]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adapters"])  # all processes share torch's memory
    pipes: list[Any] = []
    memory = torch.zeros(2)
    with ExitStack() as stack:
        for task in range(spec.size):
            pipe, other = context.Pipe()
            process = context.Process(target=_task_process, args=(other, spec.threads), daemon=True)
            process.start()
            other.close()
            stack.callback(process.join, 10)
            stack.callback(pipe.close)  # a closed pipe ends the process
            pipe.send_bytes(models[task % DISTINCT])
            pipe.send(pixels[: spec.options.batch].numpy())
            pipes.append(pipe)
            memory += pipe.recv()
            one_gb, free_gb = float(memory[0]) / len(pipes) / 1e3, psutil.virtual_memory().available / 1e9
            if (spec.size - len(pipes)) * one_gb > free_gb - RESERVE / 1e9:
                need = f"{spec.size} processes need {spec.size * one_gb:.1f} GB ({1e3 * one_gb:.0f} MB each)"
                raise TooLargeError(f"{need}; with {len(pipes)} of them {free_gb:.1f} GB were free")

        def one(task: int, images: list[int]) -> Tensor:
            pipes[task].send(pixels[images].numpy())
            return torch.from_numpy(pipes[task].recv())

        yield Contender(partial(_task_by_task, spec, one), partial(_merged, backbone, adapters), memory, {})


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
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="a timm name, or demo; weights are random")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 64, 512], help="numbers of adapters")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, 2 or more; one more goes before them")
    parser.add_argument("--images", type=int, default=64, help="images of a round")
    parser.add_argument("--batch", type=int, default=32, help="most images of a batch")
    parser.add_argument("--memory-gb", type=float, default=6.0, help="what Serve's models may take")
    parser.add_argument("--setup-limit", type=float, default=300, help="seconds that a contender has to be ready")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}: quartiles need it")
    print(f"{torch.get_num_threads()} torch threads for every contender")
    torch.manual_seed(0)
    backbone = load_backbone(options.backbone, pretrained=False)
    files = [random_adapter(backbone, CONFIG, seed=seed, classes=CLASSES).data for seed in range(DISTINCT)]
    result = {"machine": machine(), **{k: v for k, v in vars(options).items() if k != "output"}, "rows": []}
    try:
        for size in options.sizes:
            result["rows"].append(measure(Spec(options, files, size, torch.get_num_threads())))
            # after each size, because a larger one may not finish
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    except RuntimeError as error:
        raise SystemExit(f"stopped: {error}") from None
    Console().print(table(result))
    print(f"written to {options.output}")


def measure(spec: Spec) -> dict[str, Any]:
    """Measure all contenders of one size.

    Raises:
        RuntimeError: one of them failed, or its answers differ from those of merged models.
    """
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        hosts: dict[str, Host] = {}
        for name in spec.options.contenders:
            host = Host(name, spec)
            stack.callback(host.close)
            found[name] = host.ready(spec.options.setup_limit)
            if found[name]["reason"] is None:
                hosts[name] = host
            print(f"{spec.size} adapters, {name}: {found[name]['reason'] or 'ready'}", flush=True)
        numbers = track(range(1 + spec.options.rounds), f"{spec.size} adapters")
        times = [{name: host.round(number) for name, host in hosts.items()} for number in numbers][1:]
    for name, entry in found.items():
        taken = [(one[name], one.get("ours")) for one in times if name in one]
        entry["images_per_s"] = spread([spec.options.images / own for own, _ in taken]) if taken else None
        ratios = [own / base for own, base in taken if base is not None]
        entry["time_to_ours"] = spread(ratios) if ratios else None
    return {"adapters": spec.size, "contenders": found}


class Host:
    """A contender's process, seen from outside."""

    def __init__(self, name: str, spec: Spec) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_host, args=(other, name, spec))
        self._process.start()
        other.close()

    def ready(self, limit_s: float) -> dict[str, Any]:
        """Wait until it is set up and its answers are checked; `reason` says why it cannot run.

        Raises:
            RuntimeError: it failed, or its answers are wrong.
        """
        found: dict[str, Any] = {}
        deadline = time.monotonic() + limit_s
        while not found and not self._pipe.poll(min(0.5, limit_s)):
            free = psutil.virtual_memory().available
            if free < RESERVE / 2:
                found["reason"] = f"memory ran out in setting up: {free / 1e9:.1f} GB were free"
            elif time.monotonic() >= deadline:
                found["reason"] = f"not ready after {limit_s:.0f} s; {free / 1e9:.1f} GB of memory were free"
        found = found or self._receive()
        if found["reason"] is not None:
            self.close(patience_s=0)
        return {"memory_mb": None, "setup_s": None, "largest_difference": None, "notes": {}} | found

    def round(self, number: int) -> float:
        """Run one round and return its seconds.

        Raises:
            RuntimeError: it failed, or took too long.
        """
        self._pipe.send(number)
        if not self._pipe.poll(ROUND_LIMIT_S):
            raise RuntimeError(f"{self._name}: a round took more than {ROUND_LIMIT_S} s")
        return self._receive()

    def close(self, patience_s: float = 60) -> None:
        """End it and all processes that it started."""
        tree: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._process.pid)
            tree = [first, *first.children(recursive=True)]
        self._pipe.close()  # it ends when the pipe closes
        self._process.join(patience_s)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            found = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"the process of {self._name} is gone") from None
        if isinstance(found, str):
            raise RuntimeError(f"{self._name}: {found}")
        return found


def table(result: dict[str, Any]) -> Table:
    """Print the result."""
    title = f"{result['backbone']}, batches of {result['batch']}, {result['machine']['threads']} threads"
    out = Table("adapters", "", title=title, box=box.SIMPLE_HEAD)
    for heading in ("images / s", "time / ours", "MB added", "last added s"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        for name, entry in row["contenders"].items():
            speed, ratio, memory = entry["images_per_s"], entry["time_to_ours"], entry["memory_mb"]
            out.add_row(
                str(row["adapters"]),
                name,
                f"{speed['median']:.1f}" if speed else "-",
                f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else "-",
                f"{memory['private']:.0f}" if memory else "-",
                str(entry["notes"].get("last_added_s", "")),
            )
    return out


def memory_mb() -> Tensor:
    """Return this process's private and resident memory, after a return of freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return torch.tensor([sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Rss"]]) * 1024 / 1e6


def _host(pipe: Any, name: str, spec: Spec) -> None:
    """Run a contender's process: set up, check, then one round per number received. A string is a failure."""
    began = time.perf_counter()
    with suppress(EOFError, OSError):  # the parent closed the pipe
        try:
            with CONTENDERS[name](spec) as contender, torch.inference_mode():
                found: dict[str, Any] = {"reason": None, "setup_s": round(time.perf_counter() - began, 2)}
                private, resident = contender.memory.tolist()
                found["memory_mb"] = {"private": round(private, 1), "resident": round(resident, 1)}
                pipe.send(found | {"largest_difference": _check(contender, spec), "notes": contender.notes})
                while True:
                    start = pipe.recv() * spec.options.images
                    work = [((start + i) % spec.size, i) for i in range(spec.options.images)]
                    began = time.perf_counter()
                    contender.run(work)
                    pipe.send(time.perf_counter() - began)
        except TooLargeError as error:
            pipe.send({"reason": str(error)})
        except EOFError:
            raise
        except Exception:
            pipe.send(traceback.format_exc())


def _check(contender: Contender, spec: Spec) -> float:
    """Return the largest difference to merged models over the first and last tasks, and two images of the first.

    Raises:
        RuntimeError: it is above `TOLERANCE`.
    """
    work = [(task, i % spec.options.images) for i, task in enumerate([*range(min(spec.size, 6)), spec.size - 1, 0])]
    pixels = spec.load()[1]
    pairs = zip(contender.run(work), work, strict=True)
    errors = [(found - contender.merged(task, pixels[[image]])[0]).abs().max() for found, (task, image) in pairs]
    if not (error := float(torch.stack(errors).max())) <= TOLERANCE:
        raise RuntimeError(f"answers differ from merged models' by {error:.1e}, allowed are {TOLERANCE:.0e}")
    return error


def _task_by_task(spec: Spec, one: Callable[[int, list[int]], Tensor], work: Work) -> list[Tensor]:
    """Return the answers of `one`, which takes all images of one task in a batch."""
    answers: list[Tensor] = []
    for batch in spec.batches(work):
        found: dict[int, Tensor] = {}
        for wanted in dict.fromkeys(task for task, _ in batch):
            places = [place for place, (task, _) in enumerate(batch) if task == wanted]
            found |= zip(places, one(wanted, [batch[place][1] for place in places]), strict=True)
        answers += [found[place] for place in range(len(batch))]
    return answers


def _merged(backbone: Backbone, adapters: list[Adapter], task: int, image: Tensor) -> Tensor:
    return adapters[task % DISTINCT].merge(backbone)(image)


def _copy_adapter(layer: Any, name: str) -> None:
    """Add to a layer what `add_adapter` would: the first adapter's parts, with their values in another order."""
    for part in (*layer.adapter_layer_names, *layer.other_param_names):
        held = getattr(layer, part)
        if hasattr(held, "keys") and "t0" in held:
            own = held[name] = copy.deepcopy(held["t0"])
            for numbers in own.parameters() if isinstance(own, nn.Module) else [own]:
                if isinstance(numbers, Tensor):
                    numbers.data = numbers[..., torch.randperm(numbers.shape[-1])].detach()


def _task_process(pipe: Any, threads: int) -> None:
    """Run a task's process: take a merged model, send its memory after one batch, answer until the pipe closes."""
    gc.freeze()  # keeps shared memory shared
    torch.set_num_threads(threads)
    model = pickle.loads(pipe.recv_bytes())
    with suppress(EOFError), torch.inference_mode():
        model(torch.from_numpy(pipe.recv()))
        pipe.send(memory_mb())
        while True:
            pipe.send(model(torch.from_numpy(pipe.recv())).numpy())


if __name__ == "__main__":
    main()
