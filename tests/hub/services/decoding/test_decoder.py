"""Image decoding in a thread pool: a slow decode is refused, keeps its tenant's share, and delays no other tenant."""

import asyncio
import io
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters.data.images import decode_image
from hub.admission.quotas import BYTES_PER_IMAGE
from hub.concurrency import LOW_PRIORITY, REST_RATIO, ActiveTenants, TenantThreads, lower_priority
from hub.errors import InvalidImage, TooLarge
from hub.services.decoding.decoder import MAX_JPEG_SCANS, ImageDecoder
from hub.services.decoding.processes import DecodeProcesses
from tests.support.event_loop import run, until
from tests.support.models import PREPROCESS, bomb_png, encoded, png

SLOW = b"slow"


class SlowDecode:
    """Decoder that takes the bytes `SLOW` until `go` is set, and counts how many of them run."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = 0
        self._lock = threading.Lock()

    def __call__(self, data: bytes, **options: Any) -> Any:
        if data.startswith(SLOW):
            self._add(1)
            self.go.wait(10)
            self._add(-1)
            data = png()
        return decode_image(data, **options)

    def _add(self, n: int) -> None:
        with self._lock:
            self.running += n


@pytest.fixture
def slow() -> Iterator[SlowDecode]:
    slow = SlowDecode()
    yield slow
    slow.go.set()


@contextmanager
def decoder(threads: int = 2, spare_threads: int = 0, **options: Any) -> Iterator[ImageDecoder]:
    count = threads + spare_threads
    with ThreadPoolExecutor(count) as executor, ThreadPoolExecutor(count, initializer=lower_priority) as large:
        limits: dict[str, Any] = {"max_bytes": 100_000, "max_pixels": 1_000_000, "timeout_s": 0.2} | options
        counts: dict[str, Any] = {"threads": threads, "cores": threads, "spare_threads": spare_threads}
        yield ImageDecoder(executor, large, TenantThreads(executor, 1, 1), ActiveTenants(), **counts, **limits)


async def one(images: ImageDecoder, tenant: str, data: bytes | np.ndarray, field: str = "body") -> np.ndarray:
    [pixels] = await several(images, tenant, [(field, data, PREPROCESS)])
    return pixels


async def several(
    images: ImageDecoder, tenant: str, sent: Sequence[tuple[str, bytes | np.ndarray, dict[str, Any]]]
) -> list[np.ndarray]:
    return await images.decode(tenant, sent, await images.sizes(tenant, [data for _, data, _ in sent]))


async def assert_all_threads_free(images: ImageDecoder, slow: SlowDecode, threads: int) -> None:
    """Two tenants together can use every thread at once, which no leaked share or thread would allow."""
    await until(lambda: images.running == 0)
    slow.go.clear()
    tasks = [asyncio.create_task(one(images, f"tenant {i % 2}", SLOW)) for i in range(threads + 2)]
    await until(lambda: slow.running == threads)
    slow.go.set()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_pixels_are_in_order_and_the_error_names_the_first_bad_image() -> None:
    async def use() -> None:
        with decoder(timeout_s=5) as images:
            single = [await one(images, "a", png(i)) for i in range(5)]
            batch = await several(images, "a", [(f"images.{i}", png(i), PREPROCESS) for i in range(5)])
            for got, want in zip(batch, single, strict=True):
                assert got.dtype == np.uint8
                assert got.shape == (3, 8, 8)
                assert (got == want).all()
            with pytest.raises(InvalidImage, match=r"^images.1: not an image") as refusal:
                await several(images, "a", [("images.0", png(), PREPROCESS), ("images.1", b"x", PREPROCESS)])
            assert refusal.value.errors[0].field == "images.1"
            with pytest.raises(TooLarge, match=r"^body: the image has 100001 bytes; the limit is 100000$"):
                await one(images, "a", bytes(100_001))

    run(use)


def test_slow_decode_is_refused_while_it_runs_on(slow: SlowDecode) -> None:
    async def use() -> None:
        with decoder(decode=slow) as images:
            with pytest.raises(InvalidImage, match=r"^body: the image took more than 0.2 s to decode"):
                await one(images, "a", SLOW)
            assert slow.running == images.running == 1
            slow.go.set()

    run(use)


def test_tenant_waits_for_its_slow_decode_and_no_other_tenant_does(slow: SlowDecode) -> None:
    async def use() -> None:
        with decoder(threads=2, decode=slow) as images:
            with pytest.raises(InvalidImage):
                await one(images, "bomber", SLOW)
            own = asyncio.create_task(one(images, "bomber", png()))
            for _ in range(20):
                await one(images, "other", png())
            assert not own.done()  # a tenant gets one thread fewer than all, and it is busy
            slow.go.set()
            await own

    run(use)


def test_tenant_never_uses_all_threads(slow: SlowDecode) -> None:
    async def use() -> None:
        with decoder(threads=4, timeout_s=5, decode=slow) as images:
            bombs = [asyncio.create_task(one(images, "bomber", SLOW)) for _ in range(20)]
            await until(lambda: slow.running == 3)
            for _ in range(20):
                await one(images, "other", png())
            assert slow.running == 3
            slow.go.set()
            await asyncio.gather(*bombs)

    run(use)


def test_spare_threads_replace_those_of_slow_decodes(slow: SlowDecode) -> None:
    async def use() -> None:
        with decoder(threads=2, spare_threads=2, decode=slow) as images:
            for tenant in ("first", "second", "third"):
                with pytest.raises(InvalidImage):
                    await one(images, tenant, SLOW)
            assert slow.running == 3
            await one(images, "other", png())  # the last thread
            slow.go.set()
            await assert_all_threads_free(images, slow, 2)
            slow.go.clear()
            for tenant in ("first", "second", "third"):  # both spare threads are free again
                with pytest.raises(InvalidImage):
                    await one(images, tenant, SLOW)
            await one(images, "other", png())
            slow.go.set()

    run(use)


def test_cancelled_request_leaves_the_queue_but_not_its_running_decode(slow: SlowDecode) -> None:
    async def use() -> None:
        with decoder(threads=2, timeout_s=5, decode=slow) as images:
            running = asyncio.create_task(one(images, "a", SLOW))
            queued = asyncio.create_task(one(images, "a", SLOW))
            await until(lambda: slow.running == 1)
            for task in (running, queued):
                task.cancel()
            await asyncio.wait((running, queued))
            assert running.cancelled()
            assert queued.cancelled()
            again = asyncio.create_task(one(images, "a", png()))
            for _ in range(20):
                await one(images, "other", png())
            assert not again.done()
            assert slow.running == 1  # a client that reconnects starts no second decode
            slow.go.set()
            await again
            await assert_all_threads_free(images, slow, 2)

    run(use)


def test_late_failure_logs_nothing(slow: SlowDecode, caplog: pytest.LogCaptureFixture) -> None:
    async def use() -> None:
        with decoder(max_pixels=1, decode=slow) as images:  # fails after `go`
            with pytest.raises(InvalidImage, match="took more than"):
                await one(images, "a", SLOW)
            slow.go.set()
            await until(lambda: images.running == 0)

    run(use)
    assert not caplog.records


def test_preprocessed_pixels_pass_unchanged() -> None:
    async def use() -> None:
        with decoder() as images:
            for dtype in (np.uint8, np.float32):
                pixels = np.arange(3 * 8 * 8).reshape(3, 8, 8).astype(dtype)
                got = await one(images, "a", pixels)
                assert got.dtype == dtype
                assert (got == pixels).all()
            turned = np.zeros((8, 8, 3), np.uint8).transpose(2, 0, 1)
            assert (await one(images, "a", turned)).flags.c_contiguous

    run(use)


WRONG_PIXELS = {
    "shape": (np.zeros((8, 8, 3), np.uint8), r"pixels have shape \[8, 8, 3\]; the adapter takes \[3, 8, 8\]"),
    "size": (np.zeros((3, 8, 9), np.uint8), r"pixels have shape \[3, 8, 9\]; the adapter takes \[3, 8, 8\]"),
    "axes": (np.zeros((), np.uint8), r"pixels have shape \[\]"),
    "dtype": (np.zeros((3, 8, 8), np.float64), "pixels have dtype float64; send uint8 or float32"),
    "object": (np.full((3, 8, 8), "x", object), "pixels have dtype object"),
    "NaN": (np.full((3, 8, 8), np.nan, np.float32), "pixels must be in 0..255"),
    "infinity": (np.full((3, 8, 8), np.inf, np.float32), "pixels must be in 0..255"),
    "negative": (np.full((3, 8, 8), -0.1, np.float32), "pixels must be in 0..255"),
    "normalised": (np.full((3, 8, 8), 255.1, np.float32), "pixels must be in 0..255"),
}


@pytest.mark.parametrize(("pixels", "message"), WRONG_PIXELS.values(), ids=WRONG_PIXELS.keys())
def test_pixels_that_do_not_fit_the_adapter_are_refused(pixels: np.ndarray, message: str) -> None:
    async def use() -> None:
        with decoder() as images, pytest.raises(InvalidImage, match=f"^pixels.3: {message}") as refusal:
            await one(images, "a", pixels, "pixels.3")
        assert refusal.value.errors[0].field == "pixels.3"

    run(use)


def test_jpeg_with_very_many_scans_is_refused() -> None:
    jpeg = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    scans = jpeg.count(b"\xff\xda")
    assert 5 < scans < MAX_JPEG_SCANS
    start = jpeg.rindex(b"\xff\xda")
    more = jpeg[:-2] + jpeg[start:-2] * (MAX_JPEG_SCANS - scans + 1) + jpeg[-2:]
    header = struct.pack(">H", 0xFFD8)
    assert more.startswith(header)

    async def use() -> None:
        with decoder() as images:
            assert (await one(images, "a", jpeg)).shape == (3, 8, 8)
            with pytest.raises(InvalidImage, match="the JPEG has more than 100 scans"):
                await one(images, "a", more)

    run(use)


@pytest.mark.parametrize(("more", "colour"), [({}, [0, 0, 0]), ({"background": [0, 200, 0]}, [0, 200, 0])])
def test_decode_shows_the_adapter_s_background_when_an_image_is_transparent(
    more: dict[str, Any], colour: list[int]
) -> None:
    """An adapter without a background sees the colour under the transparent pixels, as it was trained."""
    drawing = encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG")

    async def use() -> None:
        with decoder() as images:
            [pixels] = await several(images, "a", [("body", drawing, PREPROCESS | more)])
            assert pixels.reshape(3, -1).mean(axis=1).tolist() == colour

    run(use)


def test_image_counts_once_for_each_two_megapixels_begun_in_every_format() -> None:
    async def use() -> None:
        with decoder(max_pixels=50_000_000, max_bytes=100_000_000) as images:
            for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"):
                files = [encoded(Image.new("RGB", size), kind) for size in ((2000, 1000), (2001, 1000), (8, 8))]
                assert await images.sizes("a", files) == [1, 2, 1], kind
            assert await images.sizes("a", [bomb_png(), b"no image", b"II*\0", np.zeros((3, 8, 8), np.uint8)]) == [
                25,
                1,
                1,
                1,
            ]

    run(use)


def test_image_is_refused_when_it_is_larger_than_it_was_counted() -> None:
    async def use() -> None:
        with decoder(max_pixels=50_000_000, timeout_s=5) as images:
            image = encoded(Image.new("RGB", (2001, 1000)), "PNG")
            with pytest.raises(InvalidImage, match=r"^body: the image is larger than its header claims"):
                await images.decode("a", [("body", image, PREPROCESS)], [1])
            assert len(await images.decode("a", [("body", image, PREPROCESS)], [2])) == 1

    run(use)


def test_tenant_decodes_large_images_on_its_share_of_the_cores_when_others_are_active(slow: SlowDecode) -> None:
    async def use() -> None:
        with decoder(threads=4, timeout_s=5, decode=slow) as images:

            def large(tenant: str, number: int) -> list[asyncio.Task[list[np.ndarray]]]:
                sent = [("body", SLOW, PREPROCESS)]
                return [asyncio.create_task(images.decode(tenant, sent, [25])) for _ in range(number)]

            alone = large("a", 4)
            await until(lambda: slow.running == 3)  # of four threads
            beside = large("b", 1)
            await until(lambda: slow.running == 4)
            slow.go.set()
            await asyncio.gather(*alone, *beside)
        slow.go.clear()
        active = ActiveTenants()
        active.note("b")
        with ThreadPoolExecutor(4) as executor:
            limits: dict[str, Any] = {"threads": 4, "cores": 4, "max_bytes": 100_000, "max_pixels": 1_000_000}
            images = ImageDecoder(executor, executor, TenantThreads(executor, 1, 1), active, decode=slow, **limits)
            both = large("a", 4)
            await until(lambda: slow.running == 2)
            await asyncio.sleep(0.05)
            assert slow.running == 2
            slow.go.set()
            await asyncio.gather(*both)

    run(use)


def test_decodes_for_a_dataset_rest_when_another_tenant_is_active() -> None:
    starts, taken_s = [], 0.1

    def decode(data: bytes, **options: Any) -> Any:
        starts.append(time.monotonic())
        time.sleep(taken_s)
        return decode_image(data, **options)

    async def use() -> None:
        active = ActiveTenants()
        active.note("b")
        with ThreadPoolExecutor(4) as executor:
            limits: dict[str, Any] = {"threads": 2, "cores": 2, "max_bytes": 100_000, "max_pixels": 1_000_000}
            images = ImageDecoder(executor, executor, TenantThreads(executor, 1, 1), active, decode=decode, **limits)
            sent = [("body", png(), PREPROCESS)] * 2
            await images.decode("a", sent, [1, 1], of_dataset=True)
            await until(lambda: images.running == 0)
        assert starts[1] - starts[0] >= (1 + REST_RATIO) * taken_s

    run(use)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_threads_of_low_priority_decode_large_images_and_those_of_datasets() -> None:
    priorities = []

    def decode(data: bytes, **options: Any) -> Any:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return decode_image(data, **options)

    async def use() -> None:
        with decoder(max_pixels=50_000_000, timeout_s=5, decode=decode) as images:
            for size, of_dataset in ((1, False), (2, False), (1, False), (1, True)):
                await images.decode("a", [("body", png(), PREPROCESS)], [size], of_dataset=of_dataset)

    own = os.getpriority(os.PRIO_PROCESS, 0)
    run(use)
    low = max(own, LOW_PRIORITY)
    assert priorities == [own, low, own, low]


def test_images_behind_a_wrong_one_are_not_decoded() -> None:
    decoded = []

    def decode(data: bytes, **options: Any) -> Any:
        decoded.append(data)
        return decode_image(data, **options)

    async def use() -> None:
        with decoder(timeout_s=5, decode=decode) as images:
            sent = [(f"images.{i}", b"no image" if i else png(), PREPROCESS) for i in range(64)]
            with pytest.raises(InvalidImage, match=r"^images\.1: "):
                await several(images, "a", sent)
            await until(lambda: images.running == 0)
        assert len(decoded) < 10

    run(use)


def test_process_decodes_an_image_when_it_is_large_or_of_a_dataset() -> None:
    image = encoded(Image.effect_mandelbrot((2000, 1100), (-2, -1, 1, 1), 20).convert("RGB"), "PNG")
    decoded = []

    def decode(data: bytes, **options: Any) -> Any:
        decoded.append(len(data))
        return decode_image(data, **options)

    async def use() -> None:
        limits: dict[str, Any] = {"max_pixels": 50_000_000, "max_bytes": 10_000_000, "timeout_s": 60.0}
        processes = DecodeProcesses()
        with (
            decoder(decode=decode, **limits) as threads,
            decoder(decode=decode, processes=processes, **limits) as images,
        ):
            wanted = await one(threads, "a", image)
            assert (await one(images, "a", image) == wanted).all()
            assert len(decoded) == 1
            squashed = PREPROCESS | {"crop_mode": "squash"}  # no resize that a process can do
            await several(images, "a", [("body", image, squashed), ("body", png(), PREPROCESS)])
            assert len(decoded) == 3
            await images.decode("a", [("body", png(), PREPROCESS)], [1], of_dataset=True)
            assert len(decoded) == 3
            small = Image.open(io.BytesIO(await images.thumbnail("a", "body", image)))
            assert (small.size, len(decoded)) == ((192, 106), 3)
            with pytest.raises(InvalidImage, match=r"^body: the image cannot be decoded"):
                await one(images, "a", image[:9000])
        processes.close()

    asyncio.run(use())


def test_a_jpeg_or_avif_of_many_bytes_counts_more_than_by_its_pixels() -> None:
    """An AVIF of 2 megapixels and 7.5 MB decodes ten times as long as a PNG, a JPEG of 100 scans five times."""

    async def use() -> None:
        small = Image.new("RGB", (8, 8))
        with decoder() as images:
            for kind, size in {"JPEG": 3, "AVIF": 3, "PNG": 1, "BMP": 1}.items():
                files = [encoded(small, kind), encoded(small, kind) + bytes(2 * BYTES_PER_IMAGE)]
                assert await images.sizes("a", files) == [1, size], kind

    run(use)
