"""What the hub does with tasks: classify, and tell of them. No HTTP, no Ray: routes call it, tests too."""

import asyncio
import hashlib
import random
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from adapters import BankLimits

from ..admission.authentication import Caller
from ..admission.rate_limits import Limiter
from ..concurrency import Turns
from ..errors import InvalidAdapter
from ..observability import request_context, tracing
from ..registry.cache import RegistryCache
from ..registry.models import Task, task_not_found
from ..registry.tasks import TaskRegistry
from ..schemas import Classified, Input, Prediction, Result, TaskInfo, TaskSummary, VersionInfo
from ..worker_api import Answer, PassStats, Workers
from .image_decoding import Images

T = TypeVar("T")
TENANT_IMAGES = 128  # of one tenant that are decoded or at the workers at once; the others are bytes until then
CHUNK_BYTES = 2 * 1024**2  # of pixels in one call to a worker; by-value messages to a replica stop at 4 MiB


class Service:
    """The hub's work, for any caller that has a tenant. A task's name is `task`, or `tenant:task` for any tenant's."""

    def __init__(
        self,
        *,
        registry: TaskRegistry,
        cache: RegistryCache,
        limiter: Limiter,
        images: Images,
        workers: Workers,
    ) -> None:
        self._registry = registry
        self._cache = cache
        self._limiter = limiter
        self._images = images
        self._workers = workers
        self._turns = Turns(TENANT_IMAGES)
        self._limits: BankLimits | None = None

    async def predict(
        self,
        who: Caller,
        name: str,
        version: str,
        images: Sequence[tuple[str, bytes | np.ndarray]],
        canary: str | None = None,
    ) -> tuple[VersionInfo, list[Answer]]:
        """Probabilities of images with one task.

        Args:
            version: a number or an alias.
            images: (field name for errors, encoded bytes or pixels as `Images.pixels` takes them).
            canary: where an alias stands for several versions, callers of the same key get the same one.

        Raises:
            NotFound: no such task or version.
            InvalidImage, TooLarge: an image that cannot be used.
            InvalidAdapter: the adapter's numbers overflow, so that there are no probabilities.
            LimitReached: a limit of the tenant.
            Unavailable: no worker, or the adapter cannot be loaded for now.
        """
        chosen = _choose(await self._visible(who, name), version, canary)
        request_context.note_task(name, chosen.version, chosen.digest)
        async with self._limiter.images(who.tenant, len(images)) as weight, self._turns.turn(who.tenant, len(images)):
            with tracing.span("decode", images=len(images)):
                pixels = await self._images.pixels(who.tenant, [(field, x, chosen.preprocess) for field, x in images])
            return chosen, await self._ask(who.tenant, name, chosen, pixels, weight)

    async def classify(
        self,
        who: Caller,
        name: str,
        version: str,
        images: Sequence[tuple[str, bytes]],
        top_k: int,
        canary: str | None = None,
    ) -> tuple[Classified, list[PassStats]]:
        """The best labels of images with one task, and how each was computed; raises what `predict` raises."""
        chosen, answers = await self.predict(who, name, version, images, canary)
        body = Classified(
            task=name,
            version=chosen.version,
            digest=chosen.digest,
            predictions=[best(chosen.labels, answer.probabilities, top_k) for answer in answers],
        )
        return body, [answer.computed for answer in answers]

    async def classify_inputs(
        self,
        who: Caller,
        inputs: Sequence[Input],
        images: Sequence[tuple[str, bytes]],
        top_k: int,
        canary: str | None = None,
    ) -> tuple[list[Result], list[PassStats]]:
        """One image each for several tasks, in one go; raises what `predict` raises, naming the input.

        Args:
            images: the inputs' encoded images, each with its field's name.
        """
        chosen = [_choose(await self._visible(who, x.task), x.version, canary) for x in inputs]
        # Images of one adapter go to a worker together; their answers come back to their own places.
        members = defaultdict(list)
        for i, c in enumerate(chosen):
            members[c.digest].append(i)
        async with self._limiter.images(who.tenant, len(inputs)) as weight, self._turns.turn(who.tenant, len(inputs)):
            with tracing.span("decode", images=len(inputs)):
                pixels = await self._images.pixels(
                    who.tenant, [(field, data, c.preprocess) for (field, data), c in zip(images, chosen, strict=True)]
                )
            groups = await together(
                self._ask(who.tenant, inputs[at[0]].task, chosen[at[0]], [pixels[i] for i in at], weight)
                for at in members.values()
            )
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

    async def tasks(self, who: Caller) -> list[TaskSummary]:
        """The caller's own tasks, then those that others share with it."""
        shared = await self._registry.shared_with(who.tenant)
        return [task.summary() for task in await self._registry.tasks(who.tenant)] + [
            task.summary().model_copy(update={"task": f"{owner}:{task.name}"}) for owner, task in shared
        ]

    async def task(self, who: Caller, name: str) -> TaskInfo:
        info = (await self._seen(who, name)).info()
        foreign = who.place(name)[0] != who.tenant
        return info.model_copy(update={"task": name, "sharing": None}) if foreign else info

    async def version(self, who: Caller, name: str, reference: str) -> VersionInfo:
        """One version by its number or an alias that points at one."""
        return _choose(await self._seen(who, name), reference)

    async def limits(self) -> BankLimits:
        """What the workers accept, asked once.

        Raises:
            Unavailable: no worker has its backbone yet.
        """
        if self._limits is None:
            self._limits = await self._workers.limits()
        return self._limits

    async def prefetch(self, digest: str) -> None:
        """Have the adapter brought to where it will be asked for; never fails."""
        await self._workers.prefetch(digest)

    async def ready(self) -> None:
        """
        Raises:
            Unavailable: no worker answers.
        """
        await self._workers.limits()

    async def _visible(self, who: Caller, name: str) -> Task:
        """The task to classify with, from memory where it is known.

        Raises:
            NotFound: no such task, or another tenant's that is not shared: both take one look at the registry.
        """
        owner, task = who.place(name)
        if owner != who.tenant:
            known = self._cache.cached_task(owner, task)
            if known is None or not known.sharing.allows(who.tenant):
                await self._must_be_shared(who, name)
        return await self._cache.task(owner, task)

    async def _seen(self, who: Caller, name: str) -> Task:
        """The task to tell of, from the registry; raises what `_visible` raises."""
        owner, task = who.place(name)
        if owner != who.tenant:
            await self._must_be_shared(who, name)
        return await self._registry.task(owner, task)

    async def _must_be_shared(self, who: Caller, name: str) -> None:
        if not (await self._registry.sharing(*who.place(name))).allows(who.tenant):
            raise task_not_found(name)

    async def _ask(
        self, tenant: str, task: str, chosen: VersionInfo, pixels: Sequence[np.ndarray], weight: float
    ) -> list[Answer]:
        request_context.note_task(task, chosen.version, chosen.digest)
        size = max(1, CHUNK_BYTES // max(p.nbytes for p in pixels))
        chunks = [pixels[i : i + size] for i in range(0, len(pixels), size)]
        answers = await together(self._workers.classify(tenant, chosen.digest, chunk, weight) for chunk in chunks)
        for answer in chain(*answers):
            if not np.isfinite(answer.probabilities).all():
                raise InvalidAdapter("the adapter's numbers overflow on this image; train it anew and register that")
        request_context.note_images(task, len(pixels))
        return [*chain(*answers)]


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
    """The `top_k` likeliest labels, best first; equal scores in the order of the labels."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [Prediction(label=labels[i], score=float(probabilities[i])) for i in order]


def _choose(task: Task, reference: str, canary: str | None = None) -> VersionInfo:
    """The version of a number or alias; of an alias with several versions by weight, at random or by `canary`.

    Versions share the numbers from 0 to the sum of their weights in order, so that a canary whose weight grows keeps
    those that it had.
    """
    targets = task.targets(reference)
    if len(targets) == 1:
        return task.versions[next(iter(targets))]
    total = sum(targets.values())
    if canary is None:
        at = random.randrange(total)  # noqa: S311
    else:
        at = int.from_bytes(hashlib.sha256(f"{task.name}/{canary}".encode()).digest()) * total >> 256
    for number, weight in targets.items():  # noqa: B007
        at -= weight
        if at < 0:
            break
    return task.versions[number]
