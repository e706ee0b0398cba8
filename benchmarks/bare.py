"""What a hub is compared with, in a process of its own that sleeps unless it is asked: the frozen backbone alone."""

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
from hub.services.image_decoding import ImageDecoder
from hub.settings import Settings

from .common import random_adapter

P = ParamSpec("P")
T = TypeVar("T")


class Process:
    """Computes what it is asked, one thing at a time; ends with whoever started it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_answer, args=(theirs,), daemon=True).start()
        theirs.close()

    def ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A function of this module or of another that needs no state here; raises what it raises."""
        self.send(function, *args, **kwargs)
        return self.receive()

    def send(self, function: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """The same without waiting; `receive` has the result."""
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
    """The name by which a hub loads the backbone: a timm model gets random weights, in a folder that timm opens."""
    if name != DEMO_NAME:
        torch.manual_seed(0)
        save_for_hf(create_model(name), str(folder), safe_serialization=True)
        name = f"local-dir:{folder}"
    _backbone(name)
    return name


def side(name: str) -> int:
    """Of the backbone's images, in pixels."""
    return _backbone(name).input_size[1]


def random_adapters(name: str, count: int) -> list[bytes]:
    """Adapter files."""
    return [random_adapter(_backbone(name), KarstConfig(), seed=seed).data for seed in range(count)]


def forward_ms(name: str) -> float:
    """One pass over one image, with as many threads as are quickest."""
    torch.set_num_threads(_quickest_threads(name))
    return _pass_ms(_backbone(name), 1)


def quickest_batch(name: str, most: int, seconds: float) -> int:
    """The size of batch, of powers of two up to `most`, that gives most images a second; on a CPU not the largest."""
    sizes = [2**k for k in range(most.bit_length())]
    return max(sizes, key=lambda size: images_per_second(name, size, seconds / len(sizes)))


@torch.inference_mode()
def images_per_second(name: str, batch: int, seconds: float) -> float:
    """Full batches one after another for some seconds, with a thread a core."""
    torch.set_num_threads(os.cpu_count() or 1)
    backbone = _backbone(name)
    pixels = torch.zeros(batch, *backbone.input_size)
    return batch * _times_per_second(lambda: features(backbone.model, pixels), seconds)


def decode_ms(name: str, data: bytes) -> float:
    """An encoded image -> pixels, by the gateway's own code and in a thread as there."""
    began = time.perf_counter()
    _decoded(name, [data], 1)
    return 1e3 * (time.perf_counter() - began)


def work_per_second(name: str, files: Sequence[bytes], data: Sequence[bytes], batch: int, seconds: float) -> float:
    """Images a second that are decoded and classified with these adapters by turns, in one process without HTTP: what
    any hub has to do. Full batches for some seconds, with a thread a core for both."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    backbone = _backbone(name)
    bank, slots = _bank(name, tuple(files))
    encoded = [data[i % len(data)] for i in range(batch)]
    own = [slots[i % len(slots)] for i in range(batch)]

    def work() -> None:
        pixels = torch.from_numpy(np.stack(_decoded(name, encoded, threads)))
        bank.forward(normalise_for(backbone, pixels), own)

    return batch * _times_per_second(work, seconds)


def pictures(side_px: int, count: int) -> Sequence[bytes]:
    """Tiny ones as PNG; larger ones as photographs come: JPEG of quality 90, gradients and grain, of several sizes."""
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


def _times_per_second(work: Callable[[], object], seconds: float) -> float:
    """Over and over for some seconds, after once to warm up."""
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
    """By the gateway's own code, in threads as there."""
    loop, images = _decoder(threads)
    preprocess = preprocess_of(_backbone(name))
    return loop.run_until_complete(images.decode("tenant", [(str(i), one, preprocess) for i, one in enumerate(data)]))


@lru_cache
def _decoder(threads: int) -> tuple[asyncio.AbstractEventLoop, ImageDecoder]:
    limits = Settings()
    executor = ThreadPoolExecutor(threads)
    # Of one tenant one image fewer is decoded at a time than of all.
    decoder = ImageDecoder(
        executor, threads=threads + 1, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels
    )
    return asyncio.new_event_loop(), decoder


@torch.inference_mode()
def _pass_ms(backbone: Backbone, batch: int) -> float:
    pixels = torch.zeros(batch, *backbone.input_size)
    began = time.perf_counter()
    features(backbone.model, pixels)
    return 1e3 * (time.perf_counter() - began)
