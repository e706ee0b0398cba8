"""Classification of images with a tenant's tasks, and descriptions of those tasks. No HTTP, no Ray."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from adapters import BankLimits

from ..admission.authentication import Caller
from ..admission.quotas import IMAGES_DECODED
from ..admission.rate_limits import RateLimiter
from ..concurrency import TenantConcurrencyLimit, TenantReads
from ..coroutines import gather_or_cancel
from ..errors import InvalidAdapter
from ..observability import request_context, tracing
from ..registry.cache import RegistryCache
from ..registry.models import Task, choose_version, task_not_found
from ..registry.task_reads import TaskOrder
from ..registry.tasks import TaskRegistry
from ..registry.versions import ServedVersion, StoredVersion
from ..schemas import Classified, Input, Result, TaskInfo, TaskList
from ..worker_api import MAX_SEND_BYTES, Answer, PassStats, Workers
from .datasets.keeping import Keeper
from .decoding.decoder import ImageDecoder
from .label_sets import best, require_small_labels, require_small_sets, threshold_of
from .predictions import Predicted, result_of
from .usage.counter import UsageCounter

OVERFLOW = "the adapter's numbers overflow on this image; train the adapter again and register the new file"


class ClassificationService:
    """Classification for a caller. A task name is `task` for the caller's own, or `tenant:task` for any tenant's."""

    def __init__(
        self,
        *,
        registry: TaskRegistry,
        cache: RegistryCache,
        limiter: RateLimiter,
        decoder: ImageDecoder,
        workers: Workers,
        keeper: Keeper,
        reads: TenantReads,
        usage: UsageCounter,
    ) -> None:
        """
        Args:
            reads: turns of reads of tasks with their versions, of up to half a megabyte each.
        """
        self._registry = registry
        self._cache = cache
        self._limiter = limiter
        self._decoder = decoder
        self._workers = workers
        self._keeper = keeper
        self._usage = usage
        self.images = TenantConcurrencyLimit(IMAGES_DECODED)  # decoded or at workers, of all kinds of calls
        self._reads = reads
        self._limits: BankLimits | None = None

    async def predict(
        self,
        caller: Caller,
        name: str,
        version: str,
        images: Sequence[tuple[str, bytes | np.ndarray]],
        canary: str | None = None,
        coverage: float | None = None,
        *,
        check: Callable[[ServedVersion, int], None] | None = None,
    ) -> Predicted:
        """Return the version used and the answer to each image.

        The task's usage counts the answers, and its dataset may keep the images.

        Args:
            version: a version number or an alias.
            images: pairs of field name (for errors) and encoded bytes, or pixels as `ImageDecoder.decode` accepts them.
            canary: key of the caller's choice. If an alias has several versions, equal keys give equal versions.
            coverage: of the label sets; None: no sets.
            check: refuses the version and the number of images before any work, if the reply would be too large.

        Raises:
            NotFound: no such task or version.
            InvalidRequest: the version cannot make label sets of this coverage, or `check` refuses the call.
            InvalidImage, TooLarge: an image is not usable.
            InvalidAdapter: the adapter's numbers overflow, so there are no probabilities.
            LimitReached: a limit of the tenant.
            Unavailable: no worker answers, or the adapter cannot be loaded in time.
        """
        found, predicted = await self._predict(caller, name, version, images, canary, coverage, check=check)
        return await self.answered(caller, name, found, predicted, [x for _, x in images])

    async def test(
        self, caller: Caller, name: str, version: str, images: Sequence[tuple[str, bytes | np.ndarray]]
    ) -> Predicted:
        """Return what `predict` does, for a test of a version: in idle turns of the workers, and not kept or counted.

        Raises:
            HubError: any error of `predict`.
        """
        _, predicted = await self._predict(caller, name, version, images, idle=True)
        return predicted

    async def _predict(
        self,
        caller: Caller,
        name: str,
        version: str,
        images: Sequence[tuple[str, bytes | np.ndarray]],
        canary: str | None = None,
        coverage: float | None = None,
        *,
        check: Callable[[ServedVersion, int], None] | None = None,
        idle: bool = False,
    ) -> tuple[Task, Predicted]:
        """Return the task, and what `predict` returns."""
        found = await self.visible(caller, name)
        owner, _ = caller.resolve(name)
        chosen = await self._cache.version(owner, found, choose_version(found, version, canary))
        threshold = threshold_of(name, chosen, coverage)
        if check is not None:
            check(chosen, len(images))
        request_context.note_task(name, chosen.version, chosen.digest)
        tenant, count = caller.tenant, len(images)
        sizes = await self._decoder.sizes(tenant, [x for _, x in images])
        async with self._limiter.images(tenant, count, sum(sizes)) as weight, self.images.acquire(tenant, sum(sizes)):
            with tracing.span("decode", images=count), request_context.timed("decode"):
                pixels = await self._decoder.decode(
                    tenant, [(field, x, chosen.preprocess) for field, x in images], sizes
                )
            answers = await self._compute(tenant, name, chosen, pixels, weight, idle=idle)
        return found, Predicted(chosen, answers, found.settings.unknown_below, threshold)

    async def answered(
        self, caller: Caller, name: str, task: Task, predicted: Predicted, images: Sequence[bytes | np.ndarray]
    ) -> Predicted:
        """Count answers that the caller is about to get, and keep the images that the task's owner wants."""
        owner, _ = caller.resolve(name)
        request_context.note_answers(name, sum(predicted.unknown or ()), predicted.typicality or ())
        if owner == caller.tenant:  # no tenant sees how much another one uses a task
            self._usage.answered(owner, task.name, predicted)
        kept = await self._keeper.take(owner, task.name, task.settings.keep, predicted, images)
        return predicted if kept is None else replace(predicted, kept=kept)

    async def classify(
        self,
        caller: Caller,
        name: str,
        version: str,
        images: Sequence[tuple[str, bytes]],
        top_k: int,
        canary: str | None = None,
        coverage: float | None = None,
    ) -> tuple[Classified, list[PassStats]]:
        """Return the `top_k` labels of each image, and the forward pass that computed it.

        Args:
            coverage: of the label sets in the reply; None: no sets.

        Raises:
            HubError: any error of `predict`.
            InvalidRequest: the reply would be too large.
        """

        def check(chosen: ServedVersion, count: int) -> None:
            require_small_labels([chosen.labels] * count, top_k)

        task, predicted = await self._predict(caller, name, version, images, canary, coverage, check=check)
        require_small_sets(predicted.sets or ())
        predicted = await self.answered(caller, name, task, predicted, [x for _, x in images])
        chosen, answers = predicted.version, predicted.answers
        body = Classified(
            task=name,
            version=chosen.version,
            digest=chosen.digest,
            predictions=[best(chosen.labels, answer.probabilities, top_k) for answer in answers],
            typicality=predicted.typicality,
            unknown=predicted.unknown,
            sets=predicted.sets,
            image=predicted.kept,
        )
        return body, [answer.computed for answer in answers]

    async def classify_inputs(
        self,
        caller: Caller,
        inputs: Sequence[Input],
        images: Sequence[tuple[str, bytes]],
        top_k: int,
        canary: str | None = None,
        coverage: float | None = None,
    ) -> tuple[list[Result], list[PassStats]]:
        """Classify one image each with several tasks in one call.

        Args:
            images: pairs of field name (for errors) and encoded bytes, one per input.
            coverage: of the label sets in the reply; None: no sets.

        Raises:
            HubError: any error of `predict`; its field names the input.
            InvalidRequest: the reply would be too large.
        """
        tasks = [await self.visible(caller, x.task) for x in inputs]
        chosen = [
            await self._cache.version(caller.resolve(x.task)[0], task, choose_version(task, x.version, canary))
            for task, x in zip(tasks, inputs, strict=True)
        ]
        thresholds = [threshold_of(x.task, c, coverage) for x, c in zip(inputs, chosen, strict=True)]
        require_small_labels([c.labels for c in chosen], top_k)
        # One call per adapter: a worker batches the images of one call at once. Results return to the inputs' order.
        members = defaultdict(list)
        for i, c in enumerate(chosen):
            members[c.digest].append(i)
        tenant, count = caller.tenant, len(inputs)
        sizes = await self._decoder.sizes(tenant, [x for _, x in images])
        async with self._limiter.images(tenant, count, sum(sizes)) as weight, self.images.acquire(tenant, sum(sizes)):
            with tracing.span("decode", images=count), request_context.timed("decode"):
                pixels = await self._decoder.decode(
                    tenant,
                    [(field, data, c.preprocess) for (field, data), c in zip(images, chosen, strict=True)],
                    sizes,
                )
            groups = await gather_or_cancel(
                self._compute(tenant, inputs[at[0]].task, chosen[at[0]], [pixels[i] for i in at], weight)
                for at in members.values()
            )
        answers = dict(zip(chain(*members.values()), chain(*groups), strict=True))
        found = [
            Predicted(c, [answers[i]], task.settings.unknown_below, threshold)
            for i, (task, c, threshold) in enumerate(zip(tasks, chosen, thresholds, strict=True))
        ]
        require_small_sets(chain(*(one.sets or () for one in found)))
        results = []
        for x, task, one, (_, data) in zip(inputs, tasks, found, images, strict=True):
            results.append(result_of(x.task, await self.answered(caller, x.task, task, one, [data]), top_k))
        return results, [answers[i].computed for i in range(len(inputs))]

    async def tasks(self, caller: Caller, limit: int, cursor: str, search: str, order: TaskOrder) -> TaskList:
        """Return a page of the tasks that the caller may use and whose names contain `search`; see `TaskReads.page`."""
        async with self._reads.turn(caller.tenant):
            page = self._registry.page(caller.tenant, limit, cursor, lambda n: search in n and caller.may_use(n), order)
            found, next_cursor = await page
        return TaskList(tasks=found, next=next_cursor)

    async def task(self, caller: Caller, name: str, limit: int, after: int) -> str:
        """Return a task with a page of its versions, as the JSON of `TaskInfo`.

        Args:
            limit: number of versions. A page may have fewer, since its size is bounded too.
            after: number of the last version of the previous page; 0 for the first page.

        Raises:
            NotFound: the caller sees no such task.
        """
        return await self.describe(caller, name, await self._described(caller, name), limit, after)

    async def describe(self, caller: Caller, name: str, task: Task, limit: int, after: int = 0) -> str:
        """Return a task that the caller may see, as `task` does. Only its owner sees with which tenants it is shared.

        Raises:
            NotFound: a version was deleted in the meantime.
        """
        owner, _ = caller.resolve(name)
        numbers = [number for number in task.digests if number > after]
        async with self._reads.turn(caller.tenant):
            page = await self._registry.versions(owner, task, numbers[:limit])
        info = TaskInfo(
            task=name if owner != caller.tenant else task.name,
            labels=await self._labels(owner, task),
            versions=[],
            aliases={alias: dict(targets) for alias, targets in task.aliases.items()},
            sharing=None if owner != caller.tenant else task.sharing,
            unknown_below=task.settings.unknown_below,
            promote=task.settings.promote,
            keep=task.settings.keep,
            next=str(page[-1].number) if page and page[-1].number != numbers[-1] else None,
        )
        # Inside of JSON strings all quotes are escaped, so this member is the only place of its text.
        versions = ",".join(stored.json for stored in page if stored.text)
        return info.model_dump_json().replace('"versions":[]', f'"versions":[{versions}]', 1)

    async def version(self, caller: Caller, name: str, reference: str, canary: str | None = None) -> StoredVersion:
        """Return one version.

        Args:
            reference: a version number or an alias.
            canary: see `predict`.

        Raises:
            NotFound: the caller sees no such task or version.
        """
        task, number = await self.find(caller, name, reference, canary)
        async with self._reads.turn(caller.tenant):
            return await self._registry.version(caller.resolve(name)[0], task, number)

    async def served(
        self, caller: Caller, name: str, reference: str, canary: str | None = None
    ) -> tuple[list[int], ServedVersion]:
        """Return the numbers of all versions of a task, and what a classification needs of one of them.

        Raises:
            NotFound: the caller sees no such task or version.
        """
        task, number = await self.find(caller, name, reference, canary)
        return [*task.digests], await self._cache.version(caller.resolve(name)[0], task, number)

    async def find(self, caller: Caller, name: str, reference: str, canary: str | None = None) -> tuple[Task, int]:
        """Return a task, and the number of one of its versions. The registry reads no version for this.

        Raises:
            NotFound: the caller sees no such task or version.
        """
        task = await self._described(caller, name)
        return task, choose_version(task, reference, canary)

    async def limits(self) -> BankLimits:
        """Return the limits of the workers' banks; cached after the first reply.

        Raises:
            Unavailable: no worker has loaded its backbone yet.
        """
        if self._limits is None:
            self._limits = await self._workers.limits()
        return self._limits

    async def prefetch(self, digest: str) -> None:
        """Ask the worker that will serve the adapter to load it. Never raises."""
        await self._workers.prefetch(digest)

    async def ready(self) -> None:
        """Check that a worker answers.

        Raises:
            Unavailable: no worker answers.
        """
        await self._workers.limits()

    async def visible(self, caller: Caller, name: str) -> Task:
        """Return the task to classify with, from the cache if possible.

        Raises:
            NotFound: no such task, or it is not shared with the caller. Both cases do the same work; otherwise the
                response time would reveal which tasks other tenants have.
            Forbidden: the key is bound to other tasks.
        """
        caller.require_task(name)
        owner, task = caller.resolve(name)
        if owner != caller.tenant:
            known = self._cache.cached_task(owner, task)
            if known is None or not known.is_shared_with(caller.tenant):
                await self._require_shared(caller, name)
        return await self._cache.task(owner, task)

    async def _labels(self, owner: str, task: Task) -> list[str]:
        """Return the labels of the current version; those of the settings for a task without versions."""
        if not task.digests:
            return list(task.settings.labels)
        return (await self._cache.version(owner, task, task.current)).labels

    async def _described(self, caller: Caller, name: str) -> Task:
        """Return the task to describe, always from the registry; raises what `visible` raises."""
        caller.require_task(name)
        owner, task = caller.resolve(name)
        if owner != caller.tenant:
            await self._require_shared(caller, name)
        return await self._registry.task(owner, task)

    async def _require_shared(self, caller: Caller, name: str) -> None:
        if not await self._registry.is_shared(*caller.resolve(name), caller.tenant):
            raise task_not_found(name)

    async def _compute(
        self,
        tenant: str,
        task: str,
        chosen: ServedVersion,
        pixels: Sequence[np.ndarray],
        weight: float,
        *,
        idle: bool = False,
    ) -> list[Answer]:
        request_context.note_task(task, chosen.version, chosen.digest)
        size = max(1, MAX_SEND_BYTES // max(p.nbytes for p in pixels))
        chunks = [pixels[i : i + size] for i in range(0, len(pixels), size)]
        answers = await gather_or_cancel(
            self._workers.classify(tenant, chosen.digest, chunk, weight, idle=idle) for chunk in chunks
        )
        for answer in chain(*answers):
            if not np.isfinite(answer.probabilities).all():
                raise InvalidAdapter(OVERFLOW)
        request_context.note_images(task, len(pixels))
        return [*chain(*answers)]
