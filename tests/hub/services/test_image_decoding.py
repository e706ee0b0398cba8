"""Images in a bounded pool: what takes too long is refused, keeps its tenant's turn, and holds up nobody else."""

import asyncio
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

import hub.services.image_decoding
from hub.errors import InvalidImage, TooLarge
from hub.services.image_decoding import MAX_JPEG_SCANS, Images
from tests.support.models import PREPROCESS, encoded, png

SLOW = b"slow"
BROKEN = b"broken"


class Slow:
    """In place of the decoder: the bytes `SLOW` take until `go`; how many of them are at it."""

    def __init__(self, decode: Callable[..., Image.Image]) -> None:
        self._decode = decode
        self.go = threading.Event()
        self.running = 0

    def __call__(self, data: bytes, **options) -> Image.Image:
        if data.startswith(SLOW):
            self.running += 1
            self.go.wait(10)
            self.running -= 1
            data = png()
        return self._decode(data, **options)


@pytest.fixture
def slow(monkeypatch) -> Iterator[Slow]:
    slow = Slow(hub.services.image_decoding.decode_image)
    monkeypatch.setattr(hub.images, "decode_image", slow)
    yield slow
    slow.go.set()


@contextmanager
def images(at_once: int = 2, spare: int = 0, **options) -> Iterator[Images]:
    with ThreadPoolExecutor(at_once + spare) as executor:
        limits = {"max_bytes": 100_000, "max_pixels": 1_000_000, "decode_s": 0.2} | options
        yield Images(executor, at_once=at_once, spare=spare, **limits)


async def one(images: Images, tenant: str, data: bytes | np.ndarray, field: str = "body") -> np.ndarray:
    [pixels] = await images.pixels(tenant, [(field, data, PREPROCESS)])
    return pixels


def run(use: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(8):
            await use()

    asyncio.run(within())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_pixels_come_in_order_and_the_first_bad_image_is_named() -> None:
    async def use() -> None:
        with images() as pool:
            alone = [await one(pool, "a", png(i)) for i in range(5)]
            together = await pool.pixels("a", [(f"images.{i}", png(i), PREPROCESS) for i in range(5)])
            for got, want in zip(together, alone, strict=True):
                assert (got.dtype, got.shape) == (np.uint8, (3, 8, 8))
                assert (got == want).all()
            with pytest.raises(InvalidImage, match=r"^images.1: not an image") as refusal:
                await pool.pixels("a", [("images.0", png(), PREPROCESS), ("images.1", b"x", PREPROCESS)])
            assert refusal.value.errors[0].field == "images.1"
            with pytest.raises(TooLarge, match="100001 bytes, but at most 100000"):
                await one(pool, "a", bytes(100_001))

    run(use)


def test_a_decode_that_takes_too_long_is_refused_while_it_goes_on(slow) -> None:
    async def use() -> None:
        with images() as pool:
            with pytest.raises(InvalidImage, match=r"^body: the image took more than 0.2 s to decode"):
                await one(pool, "a", SLOW)
            assert slow.running == 1
            slow.go.set()

    run(use)


def test_its_tenant_waits_for_it_and_no_other_does(slow) -> None:
    async def use() -> None:
        with images(at_once=2) as pool:
            with pytest.raises(InvalidImage):
                await one(pool, "bomber", SLOW)
            own = asyncio.create_task(one(pool, "bomber", png()))
            for _ in range(20):
                await one(pool, "other", png())
            assert not own.done()  # one tenant has one thread fewer than there are, and it is still busy
            slow.go.set()
            await own

    run(use)


def test_no_tenant_takes_all_threads(slow) -> None:
    async def use() -> None:
        with images(at_once=4, decode_s=5) as pool:
            bombs = [asyncio.create_task(one(pool, "bomber", SLOW)) for _ in range(20)]
            await until(lambda: slow.running == 3)
            for _ in range(20):
                await one(pool, "other", png())
            assert slow.running == 3
            slow.go.set()
            await asyncio.gather(*bombs)

    run(use)


def test_spare_threads_work_in_the_place_of_those_that_take_too_long(slow) -> None:
    async def use() -> None:
        with images(at_once=2, spare=2) as pool:
            for tenant in ("first", "second", "third"):
                with pytest.raises(InvalidImage):
                    await one(pool, tenant, SLOW)
            assert slow.running == 3
            assert pool._spare == 0
            await one(pool, "other", png())  # the one thread that is left
            slow.go.set()
            await until(lambda: pool._spare == 2)
            assert pool._threads._value == 2

    run(use)


def test_who_goes_away_leaves_the_line_but_not_a_running_decode(slow) -> None:
    async def use() -> None:
        with images(at_once=2, decode_s=5) as pool:
            running = asyncio.create_task(one(pool, "a", SLOW))
            waiting = asyncio.create_task(one(pool, "a", SLOW))
            await until(lambda: slow.running == 1)
            for task in (running, waiting):
                task.cancel()
            await asyncio.wait((running, waiting))
            assert running.cancelled()
            assert waiting.cancelled()
            again = asyncio.create_task(one(pool, "a", png()))
            await asyncio.sleep(0.05)
            assert not again.done()
            assert slow.running == 1  # a client that comes and goes starts no second decode
            slow.go.set()
            await again
            await until(lambda: not pool._turns._lines)
            assert pool._threads._value == 2

    run(use)


def test_a_decode_that_fails_late_is_nobody_s_complaint(slow, caplog) -> None:
    async def use() -> None:
        with images(max_pixels=1) as pool:  # fails after `go`
            with pytest.raises(InvalidImage, match="took more than"):
                await one(pool, "a", SLOW)
            slow.go.set()
            await until(lambda: not pool._holding)

    run(use)
    assert not caplog.records


def test_preprocessed_pixels_pass_through() -> None:
    async def use() -> None:
        with images() as pool:
            for dtype in (np.uint8, np.float32):
                pixels = np.arange(3 * 8 * 8).reshape(3, 8, 8).astype(dtype)
                got = await one(pool, "a", pixels)
                assert got.dtype == dtype
                assert (got == pixels).all()
            turned = np.zeros((8, 8, 3), np.uint8).transpose(2, 0, 1)
            assert (await one(pool, "a", turned)).flags.c_contiguous

    run(use)


WRONG_PIXELS = {
    "shape": (np.zeros((8, 8, 3), np.uint8), r"pixels of shape \[8, 8, 3\], but the adapter takes \[3, 8, 8\]"),
    "size": (np.zeros((3, 8, 9), np.uint8), r"pixels of shape \[3, 8, 9\], but the adapter takes \[3, 8, 8\]"),
    "axes": (np.zeros((), np.uint8), r"pixels of shape \[\]"),
    "dtype": (np.zeros((3, 8, 8), np.float64), "pixels of dtype float64, but uint8 or float32 is needed"),
    "object": (np.full((3, 8, 8), "x", object), "pixels of dtype object"),
    "NaN": (np.full((3, 8, 8), np.nan, np.float32), "pixels outside of 0..255"),
    "infinity": (np.full((3, 8, 8), np.inf, np.float32), "pixels outside of 0..255"),
    "negative": (np.full((3, 8, 8), -0.1, np.float32), "pixels outside of 0..255"),
    "normalised": (np.full((3, 8, 8), 255.1, np.float32), "pixels outside of 0..255"),
}


@pytest.mark.parametrize(("pixels", "message"), WRONG_PIXELS.values(), ids=WRONG_PIXELS.keys())
def test_preprocessed_pixels_that_do_not_fit_are_named(pixels, message) -> None:
    async def use() -> None:
        with images() as pool, pytest.raises(InvalidImage, match=f"^pixels.3: {message}") as refusal:
            await one(pool, "a", pixels, "pixels.3")
        assert refusal.value.errors[0].field == "pixels.3"

    run(use)


def test_a_jpeg_of_very_many_scans_is_not_decoded(slow) -> None:
    jpeg = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    scans = jpeg.count(b"\xff\xda")
    assert 5 < scans < MAX_JPEG_SCANS
    start = jpeg.rindex(b"\xff\xda")
    more = jpeg[:-2] + jpeg[start:-2] * (MAX_JPEG_SCANS - scans + 1) + jpeg[-2:]
    header = struct.pack(">H", 0xFFD8)
    assert more.startswith(header)

    async def use() -> None:
        with images() as pool:
            assert (await one(pool, "a", jpeg)).shape == (3, 8, 8)
            with pytest.raises(InvalidImage, match="a JPEG of more than 100 scans"):
                await one(pool, "a", more)

    run(use)
