"""What the hub does for a caller: classify, register, list, delete. No HTTP, no Ray: routes call it, tests too."""

import asyncio
import base64
import random
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Protocol, TypeVar

import numpy as np

from adapters import Adapter, AdapterError, BankLimits

from .answers import Answer, Pass
from .cache import RegistryCache
from .errors import FieldProblem, InvalidAdapter, InvalidImage
from .images import Images
from .registry import Registry, Task
from .schemas import LATEST, Classified, Input, Prediction, Registered, Result, TaskInfo, TaskSummary, VersionInfo
from .store import Store
from .tiers import invalid_adapter
from .turns import Turns

T = TypeVar("T")
TENANT_IMAGES = 128  # of one tenant that are decoded or at the workers at once; the others are bytes until then
CHUNK_BYTES = 2 * 1024**2  # of pixels in one call to a worker; by-value messages to a replica stop at 4 MiB


class Workers(Protocol):
    """The workers as the service sees them; the gateway puts Ray Serve behind it."""

    async def classify(self, tenant: str, digest: str, images: Sequence[np.ndarray]) -> list[Answer]:
        """Probabilities for images of one adapter, from a worker that is likely to hold it, in the tenant's turn."""

    async def prefetch(self, digest: str) -> None:
        """Tell that worker that the adapter will be asked for; never fails."""

    async def limits(self) -> BankLimits:
        """What the workers' banks accept."""


class Service:
    """The hub's work, for any caller. `tenant` is the caller's own in every method."""

    def __init__(
        self,
        *,
        registry: Registry,
        cache: RegistryCache,
        store: Store,
        images: Images,
        workers: Workers,
        executor: Executor,
        max_adapter_bytes: int,
    ) -> None:
        self._registry = registry
        self._cache = cache
        self._store = store
        self._images = images
        self._workers = workers
        self._executor = executor
        self._max_adapter_bytes = max_adapter_bytes
        self._turns = Turns(TENANT_IMAGES)
        self._limits: BankLimits | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def classify(
        self, tenant: str, name: str, version: str, images: Sequence[tuple[str, bytes]], top_k: int
    ) -> tuple[Classified, list[Pass]]:
        """Classify images with one task.

        Args:
            version: a number or an alias.
            images: (field name for errors, encoded bytes).

        Returns:
            The reply, and how each image was computed.

        Raises:
            NotFound: no such task or version.
            InvalidImage, TooLarge: an image that cannot be used.
            Unavailable: no worker, or the adapter cannot be loaded for now.
        """
        chosen = _choose(await self._cache.task(tenant, name), version)
        async with self._turns.turn(tenant, len(images)):
            pixels = await self._images.pixels(tenant, [(field, data, chosen.preprocess) for field, data in images])
            answers = await self._ask(tenant, chosen.digest, pixels)
        body = Classified(
            task=name,
            version=chosen.version,
            digest=chosen.digest,
            predictions=[best(chosen.labels, answer.probabilities, top_k) for answer in answers],
        )
        return body, [answer.computed for answer in answers]

    async def classify_inputs(
        self, tenant: str, inputs: Sequence[Input], top_k: int
    ) -> tuple[list[Result], list[Pass]]:
        """One image each for several tasks, in one go; raises what `classify` raises, naming the input."""
        encoded = await self._off_loop(decode_base64, [(f"inputs.{i}.image", x.image) for i, x in enumerate(inputs)])
        chosen = [_choose(await self._cache.task(tenant, x.task), x.version) for x in inputs]
        # Images of one adapter go to a worker together; their answers come back to their own places.
        members = defaultdict(list)
        for i, c in enumerate(chosen):
            members[c.digest].append(i)
        async with self._turns.turn(tenant, len(inputs)):
            pixels = await self._images.pixels(
                tenant, [(field, data, c.preprocess) for (field, data), c in zip(encoded, chosen, strict=True)]
            )
            groups = await together(self._ask(tenant, d, [pixels[i] for i in at]) for d, at in members.items())
        answers = dict(zip(chain(*members.values()), chain(*groups), strict=True))
        results = [
            Result(
                task=x.task,
                version=c.version,
                digest=c.digest,
                predictions=best(c.labels, answers[i].probabilities, top_k),
            )
            for i, (x, c) in enumerate(zip(inputs, chosen, strict=True))
        ]
        return results, [answers[i].computed for i in range(len(inputs))]

    async def register(self, tenant: str, name: str, data: bytes, alias: str | None) -> tuple[Registered, bool]:
        """Check an adapter file, keep it and make it a version of a task; the same bytes again are the same version.

        Returns:
            The version, and whether it is new.

        Raises:
            InvalidAdapter: the file breaks the format or does not fit the backbone.
            Unavailable: store, registry or workers are away; nothing was registered.
        """
        adapter = await self._off_loop(self._check, await self.limits(), data)
        await self._registry.ping()  # a registry that is away now would leave an orphan in the store
        await self._off_loop(self._store.put, adapter.digest, data)
        version = VersionInfo(
            version=0,  # the registry gives the number
            digest=adapter.digest,
            labels=list(adapter.labels),
            backbone=adapter.backbone,
            fingerprint=adapter.fingerprint,
            config=adapter.config.model_dump(),
            preprocess=adapter.preprocess,
            metrics=adapter.metrics,
            size_bytes=len(data),
            registered=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        aliases = [LATEST] if alias in (None, LATEST) else [LATEST, alias]
        kept, created = await self._registry.register(tenant, name, version, aliases)
        self._cache.forget(tenant, name)
        prefetch = asyncio.create_task(self._workers.prefetch(adapter.digest))
        self._background.add(prefetch)  # the loop itself keeps no task alive
        prefetch.add_done_callback(self._background.discard)
        return Registered(task=name, **kept.model_dump()), created

    async def tasks(self, tenant: str) -> list[TaskSummary]:
        return [task.summary() for task in await self._registry.tasks(tenant)]

    async def task(self, tenant: str, name: str) -> TaskInfo:
        return (await self._registry.task(tenant, name)).info()

    async def version(self, tenant: str, name: str, reference: str) -> VersionInfo:
        """One version by its number or an alias that points at one."""
        return _choose(await self._registry.task(tenant, name), reference)

    async def file(self, tenant: str, name: str, reference: str) -> tuple[VersionInfo, bytes]:
        """A version with its adapter file."""
        version = await self.version(tenant, name, reference)
        return version, await self._off_loop(self._store.get, version.digest)

    async def set_alias(self, tenant: str, name: str, alias: str, targets: dict[int, int]) -> TaskInfo:
        task = await self._registry.set_alias(tenant, name, alias, targets)
        self._cache.forget(tenant, name)
        return task.info()

    async def delete_task(self, tenant: str, name: str) -> None:
        await self._registry.delete_task(tenant, name)
        self._cache.forget(tenant, name)

    async def delete_version(self, tenant: str, name: str, number: int) -> None:
        await self._registry.delete_version(tenant, name, number)
        self._cache.forget(tenant, name)

    async def limits(self) -> BankLimits:
        """What the workers accept, asked once.

        Raises:
            Unavailable: no worker has its backbone yet.
        """
        if self._limits is None:
            self._limits = await self._workers.limits()
        return self._limits

    async def ready(self) -> None:
        """
        Raises:
            Unavailable: no worker answers.
        """
        await self._workers.limits()

    async def _ask(self, tenant: str, digest: str, pixels: Sequence[np.ndarray]) -> list[Answer]:
        size = max(1, CHUNK_BYTES // max(p.nbytes for p in pixels))
        chunks = [pixels[i : i + size] for i in range(0, len(pixels), size)]
        answers = await together(self._workers.classify(tenant, digest, chunk) for chunk in chunks)
        return [answer for chunk in answers for answer in chunk]

    def _check(self, limits: BankLimits, data: bytes) -> Adapter:
        try:
            adapter = Adapter.read(data, max_bytes=self._max_adapter_bytes)
            limits.check(adapter)
        except AdapterError as error:
            raise invalid_adapter(error) from error
        return adapter

    async def _off_loop(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


async def together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first failure ends the others, which nobody wants any more, and is raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def best(labels: Sequence[str], probabilities: np.ndarray, top_k: int) -> list[Prediction]:
    """The `top_k` likeliest labels, best first; equal scores in the order of the labels.

    Raises:
        InvalidAdapter: the adapter's numbers overflow, so that there are no probabilities.
    """
    if not np.isfinite(probabilities).all():
        raise InvalidAdapter("the adapter's numbers overflow on this image; train it anew and register that")
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [Prediction(label=labels[i], score=float(probabilities[i])) for i in order]


def decode_base64(images: Sequence[tuple[str, str]]) -> list[tuple[str, bytes]]:
    """Base64 text -> bytes; a `data:` URL's header is skipped.

    Raises:
        InvalidImage: not base64; names the field.
    """
    out = []
    for field, text in images:
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        try:
            out.append((field, base64.b64decode(encoded, validate=True)))
        except ValueError as error:  # binascii.Error, or a character that is not ASCII
            message = f"not base64 (RFC 4648, section 4): {error}"
            raise InvalidImage(f"{field}: {message}", [FieldProblem(field, message)]) from error
    return out


def _choose(task: Task, reference: str) -> VersionInfo:
    """The version of a number or alias; an alias with several versions is drawn by weight."""
    targets = task.targets(reference)
    numbers = list(targets)
    number = numbers[0] if len(numbers) == 1 else random.choices(numbers, list(targets.values()))[0]  # noqa: S311
    return task.versions[number]
