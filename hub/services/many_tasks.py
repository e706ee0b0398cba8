"""One image and many tasks: every head on the frozen features shares one row of a forward pass.

A call counts as what it costs: one image for the row that its heads share, one for each task that adapts the backbone,
and one for each `ANSWERS_PER_IMAGE` answers begun, beyond the first.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..admission.authentication import Caller
from ..admission.quotas import ANSWERS_PER_IMAGE
from ..admission.rate_limits import RateLimiter
from ..coroutines import gather_or_cancel
from ..errors import HubError, InvalidAdapter, InvalidRequest, NotFound
from ..observability import request_context, tracing
from ..registry.cache import RegistryCache
from ..registry.models import Task, choose_version
from ..registry.versions import ServedVersion
from ..schemas import LATEST, MAX_IMAGES, MAX_TASKS, Results, SkippedTask, TasksBody
from ..worker_api import Answer, PassStats, TaskAnswers, Workers
from .classification import OVERFLOW, ClassificationService
from .decoding.decoder import ImageDecoder
from .label_sets import require_small_labels, require_small_sets, threshold_of
from .predictions import Predicted, result_of

TASKS_PER_CALL = 16  # that adapt the backbone, in one call to a worker, on average
STEP = 64  # tasks after which other requests of the gateway have a turn


@dataclass(frozen=True)
class _Chosen:
    """A task that classifies the image."""

    name: str
    owner: str
    task: Task
    version: ServedVersion
    threshold: float | None


@dataclass(frozen=True)
class _Call:
    """One call to a worker."""

    digests: Sequence[str]
    preprocess: str  # its key
    key: str


class ManyTasksService:
    """Classification of one image with many tasks for a caller."""

    def __init__(
        self,
        classification: ClassificationService,
        *,
        cache: RegistryCache,
        limiter: RateLimiter,
        decoder: ImageDecoder,
        workers: Workers,
    ) -> None:
        self._classification = classification
        self._cache = cache
        self._limiter = limiter
        self._decoder = decoder
        self._workers = workers

    async def classify(
        self,
        caller: Caller,
        sent: TasksBody,
        image: bytes,
        top_k: int,
        canary: str | None = None,
        coverage: float | None = None,
    ) -> tuple[Results, list[PassStats]]:
        """Return the answers of the version `latest` of each task, in the order of the names.

        `*` means the tenant's own tasks that the key may use. Those that cannot answer are named with the reason:
        a task without a version or without data for label sets, an adapter that does not fit or overflows. In a list
        of names each of these is an error of the call.

        Args:
            image: an encoded image.
            canary, coverage: as in `ClassificationService.predict`.

        Raises:
            HubError: any error of `ClassificationService.predict`.
            NotFound: a name of the list, or `*` for a key without any task.
            InvalidRequest: a task is named twice, no task of `*` can answer, the tasks cost more than `MAX_IMAGES`
                passes, or the reply would be too large.
        """
        skipped: dict[str, str] = {}
        chosen = await self._choose(caller, sent, canary, coverage, skipped if sent.every else None)
        calls, images = _calls(caller.tenant, [x.version for x in chosen])
        require_small_labels([x.version.labels for x in chosen], top_k, "tasks")
        request_context.note_several_tasks()
        answers = await self._compute(caller.tenant, calls, chosen, image, images)

        found: list[tuple[_Chosen, Predicted]] = []
        for x in chosen:
            answer = answers[x.version.digest]
            if isinstance(answer, Answer) and not np.isfinite(answer.probabilities).all():
                answer = InvalidAdapter(OVERFLOW)
            if isinstance(answer, InvalidAdapter):
                if not sent.every:
                    raise InvalidAdapter.at("tasks", f"task {x.name!r} cannot answer: {answer.detail}")
                skipped[x.name] = answer.detail
            else:
                found.append((x, Predicted(x.version, [answer], x.task.settings.unknown_below, x.threshold)))
        if not found:
            raise _none_can_answer(skipped)
        require_small_sets(chain(*(one.sets or () for _, one in found)), "tasks")
        results = []
        for i, (x, one) in enumerate(found):
            if i % STEP == STEP - 1:
                await asyncio.sleep(0)
            request_context.note_images(x.name, 1)
            answered = await self._classification.answered(caller, x.name, x.task, one, [image])
            results.append(result_of(x.name, answered, top_k))
        passes = {id(one.answers[0].computed): one.answers[0].computed for _, one in found}
        named = [SkippedTask(task=name, reason=reason) for name, reason in sorted(skipped.items())]
        return Results(results=results, skipped=named if sent.every else None), [*passes.values()]

    async def _choose(
        self,
        caller: Caller,
        sent: TasksBody,
        canary: str | None,
        coverage: float | None,
        skipped: dict[str, str] | None,
    ) -> list[_Chosen]:
        """Return the tasks with their versions.

        Args:
            skipped: gets the tasks that cannot answer; None: they are errors.
        """
        names = await self._every(caller) if sent.every else sent.tasks
        seen: set[tuple[str, str]] = set()
        chosen = []
        for i, name in enumerate(names):
            owner, task_name = caller.resolve(name)
            if (owner, task_name) in seen:
                raise InvalidRequest.at(f"tasks.{i}", f"task {name!r} is named twice; name it once")
            seen.add((owner, task_name))
            try:
                task = await self._classification.visible(caller, name)
                version = await self._cache.version(owner, task, choose_version(task, LATEST, canary))
                chosen.append(_Chosen(name, owner, task, version, threshold_of(name, version, coverage)))
            except (NotFound, InvalidRequest) as error:
                if skipped is None:
                    raise
                skipped[name] = error.reason
        if not chosen:
            raise _none_can_answer(skipped or {})
        return chosen

    async def _every(self, caller: Caller) -> Sequence[str]:
        names = [name for name in await self._cache.task_names(caller.tenant) if caller.may_use(name)]
        if len(names) > MAX_TASKS:
            message = f"* means {len(names)} tasks (limit {MAX_TASKS}); name at most {MAX_TASKS} of them in a call"
            raise InvalidRequest.at("tasks", message)
        return names

    async def _compute(
        self, tenant: str, calls: Sequence[_Call], chosen: Sequence[_Chosen], image: bytes, passes: int
    ) -> dict[str, Answer | InvalidAdapter]:
        """Return the answer of each adapter, by digest."""
        (size,) = await self._decoder.sizes(tenant, [image])
        different = {x.version.preprocess_key: x.version.preprocess for x in chosen}
        counted = passes + (size - 1) * len(different) + (len(chosen) - 1) // ANSWERS_PER_IMAGE
        async with (
            self._limiter.images(tenant, passes, counted) as weight,
            self._classification.images.acquire(tenant, counted),
        ):
            with tracing.span("decode", images=len(different)), request_context.timed("decode"):
                wanted = [("image", image, preprocess) for preprocess in different.values()]
                decoded = await self._decoder.decode(tenant, wanted, [size] * len(different))
            pixels = dict(zip(different, decoded, strict=True))
            found: Sequence[TaskAnswers] = await gather_or_cancel(
                self._workers.classify_tasks(tenant, call.digests, pixels[call.preprocess], weight, call.key)
                for call in calls
            )
        answers: dict[str, Answer | InvalidAdapter] = {}
        for part in found:
            answers |= part.answers()
            answers |= part.invalid
        return answers


def _calls(tenant: str, versions: Sequence[ServedVersion]) -> tuple[list[_Call], int]:
    """Return the calls to workers, and the forward passes of one image that they cost at most.

    All heads of one preprocessing are in one call. The other tasks are in as few calls as `TASKS_PER_CALL` allows, by
    the first bits of their digests: a new task moves no other to another call, and so to other workers.

    Raises:
        InvalidRequest: more than `MAX_IMAGES` passes.
    """
    heads: defaultdict[str, dict[str, None]] = defaultdict(dict)
    others: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for version in versions:
        (heads if version.config.is_head else others)[version.preprocess_key][version.digest] = None
    images = len(heads) + sum(map(len, others.values()))
    if images > MAX_IMAGES:
        message = (
            f"the {len(versions)} tasks cost {images} forward passes (limit {MAX_IMAGES}): one for each task that "
        )
        message += "adapts the backbone, and one for all others with the same preprocessing; name fewer tasks in a call"
        raise InvalidRequest.at("tasks", message)
    calls = []
    for preprocess in dict.fromkeys([*heads, *others]):
        bits = max(0, (len(others[preprocess]) - 1) // TASKS_PER_CALL).bit_length()
        parts: defaultdict[int, list[str]] = defaultdict(list, {0: [*heads[preprocess]]} if heads[preprocess] else {})
        for digest in others[preprocess]:
            parts[int(digest[:8], 16) >> (32 - bits)].append(digest)
        calls += [_Call(digests, preprocess, f"{tenant}/{part}") for part, digests in parts.items()]
    return calls, images


def _none_can_answer(skipped: Mapping[str, str]) -> HubError:
    if not skipped:
        return NotFound.at("tasks", "this key has no task; register an adapter file")
    name, reason = next(iter(skipped.items()))
    return InvalidRequest.at("tasks", f"none of the {len(skipped)} tasks can answer; {name!r}: {reason}")
