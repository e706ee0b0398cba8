"""Reference for a hub's speed: the frozen backbone alone, in a process that sleeps between calls."""

import asyncio
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.models import save_for_hf

from adapters import Adapter, Backbone, Bank, KarstConfig, Slot, load_backbone
from adapters.backbone import DEMO_NAME, create_model, features
from adapters.data.images import normalise_for, preprocess_of
from hub.concurrency import ActiveTenants, TenantThreads
from hub.services.decoding.decoder import ImageDecoder
from hub.settings import Settings

from .common import random_adapter

P = ParamSpec("P")
T = TypeVar("T")


class Process:
    """Process that runs one function at a time. It ends with the process that started it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_answer, args=(theirs,), daemon=True).start()
        theirs.close()

    def ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function of this module, or another importable function without state here, and raise its error."""
        self.send(function, *args, **kwargs)
        return self.receive()

    def send(self, function: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """Start the same call without waiting; `receive` returns the result."""
        self._pipe.send((function, args, kwargs))

    def receive(self) -> Any:
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result


def _answer(pipe: Connection) -> None:
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            result = error
        pipe.send(result)


def prepare(name: str, folder: Path) -> str:
    """Return the backbone's name for a hub. A timm model gets random weights, in a folder that timm opens."""
    if name != DEMO_NAME:
        torch.manual_seed(0)
        save_for_hf(create_model(name), str(folder), safe_serialization=True)
        name = f"local-dir:{folder}"
    _backbone(name)
    return name


def side(name: str) -> int:
    """Return the side of the backbone's input, in pixels."""
    return _backbone(name).input_size[1]


def random_adapters(name: str, count: int) -> list[bytes]:
    """Return the files of random adapters."""
    return [random_adapter(_backbone(name), KarstConfig(), seed=seed).data for seed in range(count)]


def forward_ms(name: str) -> float:
    """Return the milliseconds of one pass over one image, with the fastest number of threads."""
    torch.set_num_threads(_quickest_threads(name))
    return _pass_ms(_backbone(name), 1)


def quickest_batch(name: str, most: int, seconds: float) -> int:
    """Return the power of two up to `most` with the most images per second; on a CPU it is not the largest batch."""
    sizes = [2**k for k in range(most.bit_length())]
    return max(sizes, key=lambda size: images_per_second(name, size, seconds / len(sizes)))


@torch.inference_mode()
def images_per_second(name: str, batch: int, seconds: float) -> float:
    """Return the images per second of full batches over `seconds`, with one thread per core."""
    torch.set_num_threads(os.cpu_count() or 1)
    backbone = _backbone(name)
    pixels = torch.zeros(batch, *backbone.input_size)
    return batch * times_per_second(lambda: features(backbone.model, pixels), seconds)


def decode_ms(name: str, data: bytes) -> float:
    """Return the milliseconds to decode an image with the gateway's own code, in a thread as in the gateway."""
    began = time.perf_counter()
    _decoded(name, [data], 1)
    return 1e3 * (time.perf_counter() - began)


def work_per_second(name: str, files: Sequence[bytes], data: Sequence[bytes], batch: int, seconds: float) -> float:
    """Return the images per second that one process without HTTP decodes and classifies with these adapters in turn.

    This is the work that every hub has to do. Full batches run for `seconds`, with one thread per core for both parts.
    """
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    backbone = _backbone(name)
    bank, slots = _bank(name, tuple(files))
    encoded = [data[i % len(data)] for i in range(batch)]
    own = [slots[i % len(slots)] for i in range(batch)]

    def work() -> None:
        pixels = torch.from_numpy(np.stack(_decoded(name, encoded, threads)))
        bank.forward(normalise_for(backbone, pixels), own)

    return batch * times_per_second(work, seconds)


def pictures(side_px: int, count: int) -> Sequence[bytes]:
    """Return small images as PNG, larger ones like photographs: JPEG of quality 90 with gradients and grain."""
    out = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        tiny = side_px <= 64
        width, height = (side_px, side_px) if tiny else rng.integers(side_px, side_px * 4 // 3, 2)
        x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
        wave = np.stack([np.sin(2 * np.pi * (rng.uniform(0.5, 3) * x + rng.uniform(0.5, 3) * y)) for _ in range(3)], -1)
        pixels = np.clip(128 + 90 * wave + rng.normal(0, 8, wave.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG" if tiny else "JPEG", quality=90)
        out.append(buffer.getvalue())
    return out


@lru_cache(maxsize=1)
def _backbone(name: str) -> Backbone:
    return load_backbone(name)


@lru_cache
def _quickest_threads(name: str) -> int:
    taken: dict[int, float] = {}
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        taken[threads] = min(_pass_ms(_backbone(name), 1) for _ in range(9))
    return min(taken, key=taken.__getitem__)


def times_per_second(work: Callable[[], object], seconds: float) -> float:
    """Return the calls per second over `seconds`, after one warm-up call."""
    work()
    times, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        work()
        times += 1
    return times / taken


@lru_cache(maxsize=1)
def _bank(name: str, files: tuple[bytes, ...]) -> tuple[Bank, list[Slot]]:
    bank = Bank(_backbone(name), slots=len(files))
    return bank, [bank.put(Adapter.read(file)) for file in files]


def _decoded(name: str, data: Sequence[bytes], threads: int) -> list[np.ndarray]:
    """Decode with the gateway's own code, in threads as in the gateway."""
    loop, images = _decoder(threads)
    preprocess = preprocess_of(_backbone(name))

    async def decode() -> list[np.ndarray]:
        named = [(str(i), one, preprocess) for i, one in enumerate(data)]
        return await images.decode("tenant", named, await images.sizes("tenant", data))

    return loop.run_until_complete(decode())


@lru_cache
def _decoder(threads: int) -> tuple[asyncio.AbstractEventLoop, ImageDecoder]:
    limits = Settings()
    executor = ThreadPoolExecutor(threads)
    # The gateway decodes one image fewer at a time for one tenant than for all tenants.
    decoder = ImageDecoder(
        executor,
        executor,
        TenantThreads(executor, threads, threads),
        ActiveTenants(),
        threads=threads + 1,
        cores=os.cpu_count() or 1,
        max_bytes=limits.max_image_bytes,
        max_pixels=limits.max_image_pixels,
    )
    return asyncio.new_event_loop(), decoder


@torch.inference_mode()
def _pass_ms(backbone: Backbone, batch: int) -> float:
    pixels = torch.zeros(batch, *backbone.input_size)
    began = time.perf_counter()
    features(backbone.model, pixels)
    return 1e3 * (time.perf_counter() - began)
