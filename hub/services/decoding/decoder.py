"""Image decoding: a request's bytes to checked, preprocessed pixels, in a thread pool."""

import asyncio
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any, TypeGuard, TypeVar

import numpy as np

from adapters import ImageError, ImageTooLargeError
from adapters.data.formats.sizes import header_pixels
from adapters.data.images import WHITE, background_of, decode_image, needed_px, pixels_of
from adapters.data.transform import pixel_transform, resize_of

from ...admission.quotas import BYTES_PER_IMAGE, PIXELS_PER_IMAGE
from ...concurrency import REST_RATIO, ActiveTenants, TenantConcurrencyLimit, TenantThreads, TenantTurns, run_blocking
from ...errors import InvalidImage, TooLarge
from .jobs import DecodeJobs, Group, too_slow
from .processes import DecodeProcesses

DECODE_TIMEOUT_S = 10.0
SLOW_S = 0.25  # photos of cameras take less
# A JPEG scan costs the sender a few bytes and the decoder a pass over the whole image: 10 MB of scans would take hours.
# Cameras and libraries write about ten.
MAX_JPEG_SCANS = 100
# Starts of files whose size may need more than a look at their first bytes: TIFF, GIF, JPEG, PNG, WebP, BMP.
PARSED_FORMATS = (b"II", b"MM", b"GIF8", b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM")
BOX = b"ftyp"  # at byte 4 of an AVIF or a HEIC
THUMBNAIL_PX = 192

Preprocess = Mapping[str, Any]
Decode = Callable[..., Any]
T = TypeVar("T")


class ImageDecoder:
    """Decoder of images in a thread pool, within a hub's size limits, in turns by tenant.

    An image counts as one for each `PIXELS_PER_IMAGE` begun. A turn costs a tenant as much as its image counts, or one
    for a job of several small images. An image that counts as more than one is large. Processes of low priority decode
    large images and those of datasets, on the tenant's share of the cores beside other active tenants: otherwise they
    would slow the decodes of others, the event loop and the workers.
    """

    def __init__(
        self,
        executor: Executor,
        slow_executor: Executor,
        parse: TenantThreads,
        active: ActiveTenants,
        *,
        threads: int,
        cores: int,
        max_bytes: int,
        max_pixels: int,
        spare_threads: int = 0,
        timeout_s: float = DECODE_TIMEOUT_S,
        decode: Decode = decode_image,
        processes: DecodeProcesses | None = None,
    ) -> None:
        """
        Args:
            executor: thread pool with `threads + spare_threads` threads.
            slow_executor: as many threads of low priority, for large images and those of datasets.
            parse: thread pool that reads the sizes of images.
            active: active tenants of the gateway.
            cores: of the machine; a tenant's share is of these.
            threads: images decoded at the same time. One tenant gets one thread fewer, so no tenant uses all of them.
            max_bytes: size limit of an encoded image.
            max_pixels: limit of width times height.
            spare_threads: replacements for threads whose decode has timed out. Python cannot stop a running decode: it
                keeps its thread and its tenant's share until it ends, and a spare thread replaces it for others.
            timeout_s: time limit of one decode.
            decode: function that decodes, with the arguments of `adapters.data.images.decode_image`.
            processes: decode large images and those of datasets while a thread of low priority waits; None: the thread
                decodes.
        """
        self._slow_executor = slow_executor
        self._parse = parse
        self._active = active
        self._cores = cores
        tenant_threads = max(1, threads - 1)
        self._tenant_limit = TenantConcurrencyLimit(tenant_threads)
        self._large_limit = TenantConcurrencyLimit(partial(self._share, alone=cores - 1))  # another's first call
        self._dataset_limit = TenantConcurrencyLimit(partial(self._share, alone=tenant_threads))
        self._tenant_threads = tenant_threads
        self._turns = TenantTurns(threads, threads)
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._spare_threads = spare_threads
        self._timeout_s = timeout_s
        self._decode_image = decode
        self._processes = processes
        self._running = 0
        self._jobs: DecodeJobs[np.ndarray] = DecodeJobs(
            partial(self._start, executor=executor), tenant_jobs=tenant_threads, timeout_s=timeout_s
        )

    @property
    def running(self) -> int:
        """Number of running jobs and large decodes, also of ended requests, and of shares that rest."""
        return self._running

    async def sizes(self, tenant: str, images: Sequence[bytes | np.ndarray]) -> list[int]:
        """Return as how many images each image counts, by the pixels in the file's header and by its bytes."""
        pixels = [None if isinstance(image, np.ndarray) else header_pixels(image) for image in images]
        parsed = {i: x for i, x in enumerate(images) if pixels[i] is None and self._is_parsed(x)}
        if parsed:  # in one call: each of many would wait for Python's interpreter lock
            found = await run_blocking(self._parse.of(tenant), lambda: [pixels_of(image) for image in parsed.values()])
            for i, count in zip(parsed, found, strict=True):
                pixels[i] = count
        by_pixels = [math.ceil(min(count or 0, self._max_pixels) / PIXELS_PER_IMAGE) for count in pixels]
        return list(map(max, map(_least, images), by_pixels))

    def _is_parsed(self, image: bytes | np.ndarray) -> TypeGuard[bytes]:
        """Return whether the size of an image needs its whole file."""
        if isinstance(image, np.ndarray) or len(image) > self._max_bytes:
            return False
        return image.startswith(PARSED_FORMATS) or image[4:8] == BOX

    async def decode(
        self,
        tenant: str,
        images: Sequence[tuple[str, bytes | np.ndarray, Preprocess]],
        sizes: Sequence[int],
        *,
        of_dataset: bool = False,
    ) -> list[np.ndarray]:
        """Decode and preprocess encoded images; check pixels that the client has preprocessed.

        Args:
            tenant: tenant whose share of the threads the images use.
            images: for each image its field name (for errors), its bytes or its pixels (3, H, W), uint8 or float32 in
                0..255, and its adapter's `preprocess`.
            sizes: result of `sizes` for these images.
            of_dataset: decode at low priority, since no client waits for an answer to these images.

        Returns:
            Arrays (3, H, W) in the order of `images`: uint8, or float32 for pixels that came as float32.

        Raises:
            TooLarge: an image exceeds the limit of bytes or pixels.
            InvalidImage: an image cannot be decoded or takes too long, or pixels do not fit the adapter.
        """
        self._active.note(tenant)
        begin = partial(self._begin, tenant, Group(), of_dataset)
        decodes = [begin(*image, size) for image, size in zip(images, sizes, strict=True)]
        try:
            return [await decode for decode in decodes]
        finally:  # after the error of the first wrong image nothing decodes the images behind it
            for decode in decodes:
                decode.cancel()
            await asyncio.gather(*decodes, return_exceptions=True)

    def _share(self, tenant: str, *, alone: int) -> int:
        """Return how many images of low priority a tenant decodes at the same time.

        Args:
            alone: the number while no other tenant is active.
        """
        others = self._active.others(tenant)
        share = self._cores // (1 + others) if others else alone
        return max(1, min(share, self._tenant_threads))

    async def thumbnail(self, tenant: str, field: str, image: bytes) -> bytes:
        """Return a JPEG of at most `THUMBNAIL_PX` on each side, without any metadata of the image.

        Raises:
            TooLarge, InvalidImage: as in `decode`.
        """
        self._active.note(tenant)
        (size,) = await self.sizes(tenant, [image])
        self._require_bytes(field, image)
        work = partial(self._thumbnail, field, image, size * PIXELS_PER_IMAGE)
        return await self._run_apart(tenant, field, size, work, of_dataset=True)

    def _begin(
        self,
        tenant: str,
        group: Group,
        of_dataset: bool,
        field: str,
        image: bytes | np.ndarray,
        preprocess: Preprocess,
        size: int,
    ) -> "asyncio.Future[np.ndarray]":
        """Start to decode an image of a call, or check its pixels; return the future of the pixels."""
        checked: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        try:
            if not isinstance(image, np.ndarray):
                self._require_bytes(field, image)
                apart = of_dataset or size > 1
                decode = partial(self._decode, field, image, size * PIXELS_PER_IMAGE, apart, preprocess)
                if apart:
                    return asyncio.ensure_future(self._run_apart(tenant, field, size, decode, of_dataset=of_dataset))
                return self._jobs.add(tenant, group, field, decode)
            checked.set_result(checked_pixels(field, image, preprocess))
        except Exception as error:
            checked.set_exception(error)
        return checked

    def _require_bytes(self, field: str, image: bytes) -> None:
        if len(image) > self._max_bytes:
            raise TooLarge.at(field, f"the image has {len(image)} bytes; the limit is {self._max_bytes}")

    async def _run_apart(self, tenant: str, field: str, size: int, work: Callable[[], T], *, of_dataset: bool) -> T:
        """Run work on a large image or one of a dataset at low priority, within the limits of time and the share.

        Args:
            field: name of the image's field, for errors.
            size: as how many images the image counts.
        """
        limits = [self._dataset_limit] if of_dataset else []
        if size > 1:
            limits.append(self._large_limit)
        decode = await self._start(
            tenant,
            work,
            executor=self._slow_executor,
            limits=limits,
            size=size,
            rests_from_s=0.0 if of_dataset else SLOW_S,
        )
        await asyncio.wait((decode,), timeout=self._timeout_s)
        if not decode.done():
            raise too_slow(field, self._timeout_s)
        return decode.result()

    async def _start(
        self,
        tenant: str,
        work: Callable[[], T],
        *,
        executor: Executor,
        limits: Sequence[TenantConcurrencyLimit] = (),
        size: int = 1,
        rests_from_s: float = math.inf,
    ) -> "asyncio.Future[T]":
        """Start work in a thread when it is the tenant's turn.

        Args:
            limits: of the tenant, besides its share of all threads.
            size: as how many images the work counts.
            rests_from_s: see `_hold`.
        """
        with ExitStack() as held:
            for limit in (*limits, self._tenant_limit):
                held.callback(await limit.hold(tenant))
            await self._turns.acquire(tenant, size)
            try:
                run = asyncio.get_running_loop().run_in_executor(executor, work)
            except RuntimeError:  # the gateway stops
                self._turns.release(tenant)
                raise
            self._hold(held.pop_all(), tenant, run, rests_from_s)
        return run

    def _hold(self, held: ExitStack, tenant: str, decode: "asyncio.Future[Any]", rests_from_s: float) -> None:
        """Hold the tenant's share and the thread until the decode ends, even if the request ends earlier.

        Otherwise a client that disconnects could start any number of decodes. After the timeout a spare thread replaces
        the decode's thread.

        Args:
            held: releases the tenant's share.
            rests_from_s: after a longer decode the tenant's share rests, beside other active tenants. Otherwise decodes
                one after another would take a whole core from the event loop and the workers.
        """
        loop, began_s, replaced = asyncio.get_running_loop(), time.monotonic(), False
        self._running += 1

        def replace() -> None:
            nonlocal replaced
            if self._spare_threads > 0:
                self._spare_threads -= 1
                replaced = True
                self._turns.release(tenant)

        def end(decode: "asyncio.Future[Any]") -> None:
            timer.cancel()
            if replaced:
                self._spare_threads += 1
            else:
                self._turns.release(tenant)
            taken_s = time.monotonic() - began_s
            if taken_s > rests_from_s and self._active.others(tenant):
                loop.call_later(REST_RATIO * taken_s, release)
            else:
                release()
            decode.cancelled() or decode.exception()  # otherwise asyncio logs an error that no request retrieved

        def release() -> None:
            self._running -= 1
            held.close()

        timer = loop.call_later(self._timeout_s, replace)
        decode.add_done_callback(end)

    def _decode(self, field: str, data: bytes, counted_pixels: int, apart: bool, preprocess: Preprocess) -> np.ndarray:
        options = {"needed_px": needed_px(preprocess), "background": background_of(preprocess)}
        image = self._opened(field, data, counted_pixels, apart, resize_of(preprocess), **options)
        pixels: np.ndarray = _transform(json.dumps(preprocess, sort_keys=True))(image)
        return pixels

    def _thumbnail(self, field: str, data: bytes, counted_pixels: int) -> bytes:
        resize = (THUMBNAIL_PX, "bicubic")
        options = {"needed_px": THUMBNAIL_PX, "background": WHITE}
        image = self._opened(field, data, counted_pixels, True, resize, **options)
        image.info.clear()  # otherwise the file would have the colour profile of the image
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return buffer.getvalue()

    def _opened(
        self,
        field: str,
        data: bytes,
        counted_pixels: int,
        apart: bool,
        resize: tuple[int, str] | None,
        **options: Any,
    ) -> Any:
        """Return a decoded image.

        Args:
            apart: decode in a process, if the resize is one that a process can do; the image is then already resized.
        """
        options["max_pixels"] = min(self._max_pixels, counted_pixels)
        try:
            if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
                raise ImageError(f"the JPEG has more than {MAX_JPEG_SCANS} scans; save it in a simpler form")
            if self._processes is None or resize is None or not apart:
                return self._decode_image(data, **options)
            shorter_px, interpolation = resize
            return self._processes.decode(
                data, timeout_s=self._timeout_s, shorter_px=shorter_px, interpolation=interpolation, **options
            )
        except ImageTooLargeError as error:
            if counted_pixels < self._max_pixels:  # otherwise an image could cost more than the tenant was charged
                raise InvalidImage.at(field, "the image is larger than its header claims; save it again") from error
            raise TooLarge.at(field, str(error)) from error
        except ImageError as error:
            raise InvalidImage.at(field, str(error)) from error


def _least(image: bytes | np.ndarray) -> int:
    """Return as how many images an image counts at least: a JPEG with many scans and an AVIF of many bytes are slow."""
    dense = not isinstance(image, np.ndarray) and (image.startswith(b"\xff\xd8") or image[4:8] == BOX)
    return math.ceil(len(image) / BYTES_PER_IMAGE) if dense else 1


def checked_pixels(field: str, pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Return preprocessed pixels unchanged, C-contiguous.

    Args:
        field: field name for errors.
        pixels: (3, H, W), uint8 or float32 in 0..255.
        preprocess: the adapter's `preprocess`; its `input_size` is [3, H, W].

    Raises:
        InvalidImage: another shape or dtype, or values out of range.
    """
    message = ""
    if list(pixels.shape) != list(preprocess["input_size"]):
        message = f"pixels have shape {list(pixels.shape)}; the adapter takes {list(preprocess['input_size'])}"
    elif pixels.dtype not in (np.uint8, np.float32):
        message = f"pixels have dtype {pixels.dtype}; send uint8 or float32"
    # NaN fails both comparisons.
    elif pixels.dtype == np.float32 and not (pixels.min() >= 0 and pixels.max() <= 255):
        message = "pixels must be in 0..255; send them before normalisation"
    if message:
        raise InvalidImage.at(field, message)
    return np.ascontiguousarray(pixels)


@lru_cache(maxsize=64)
def _transform(preprocess: str) -> Callable[..., Any]:
    return pixel_transform(json.loads(preprocess))
