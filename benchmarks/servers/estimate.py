"""An estimate of the hub's images per second: its passes, and what a call costs an empty application on Ray Serve."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from adapters import Bank, ImageTasks
from adapters.serving.frozen_forms import measure_forms

from ..bare import times_per_second
from ..beside import EMPTY, hub_beside_empty
from ..cores import busy_s
from ..load import closed_loop, ok, request
from .inputs import DISTINCT, Inputs

LANES = 2  # batches at once


def bank_rate(inputs: Inputs, tasks: int, seconds: float = 2.0) -> float:
    """Return the images per second of the hub's bank, as a worker computes batches of several calls.

    Two threads compute at once. Each has half of the cores and half of the callers' images, of different tasks.
    """
    batch, config = inputs.model.callers // LANES, inputs.config
    threads = max(1, (os.cpu_count() or 1) // LANES)
    with ThreadPoolExecutor(LANES, initializer=torch.set_num_threads, initargs=(threads,)) as lanes:
        forms = lanes.submit(measure_forms, inputs.backbone, batch).result()
        kernels = max(1, config.kernels)
        bank = Bank(inputs.backbone, slots=DISTINCT, max_rank=config.rank, max_kernels=kernels, forms=forms)
        slots = [bank.put(inputs.adapter(number)) for number in range(min(tasks, DISTINCT))]
        own = [ImageTasks([slots[i % len(slots)]]) for i in range(batch)]

        def run() -> float:
            pixels = torch.zeros(batch, *inputs.backbone.input_size)
            return batch * times_per_second(lambda: bank.score_images(pixels, own), seconds)

        return sum(lane.result() for lane in [lanes.submit(run) for _ in range(LANES)])


def call_ms(inputs: Inputs) -> float:
    """Return the milliseconds of a core for a call without a hub: an empty application on Ray Serve, and decoding."""
    began = time.thread_time()
    for number in range(len(inputs.images)):
        inputs.decode(number)
    decode_ms = 1e3 * (time.thread_time() - began) / len(inputs.images)
    return decode_ms + _empty_call_ms(inputs.size_px, inputs.model.callers, tuple(inputs.images))


@lru_cache
def _empty_call_ms(size_px: int, callers: int, images: tuple[bytes, ...], seconds: float = 5.0) -> float:
    """Return the same for the empty application alone. A hub with the demo backbone idles beside it."""
    with hub_beside_empty(size_px, backbone="demo") as hub:
        calls = [request("POST", EMPTY + "/", image, content_type="application/octet-stream") for image in images]
        closed_loop(hub.address, calls, callers, 1.0)
        began_s = busy_s()
        replies = [ok(reply) for reply in closed_loop(hub.address, calls, callers, seconds)]
        return 1e3 * (busy_s() - began_s) / len(replies)
