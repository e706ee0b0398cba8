"""Back-test of a version: which kept images it would answer otherwise. No HTTP, no Ray."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from adapters.evaluation.intervals import accuracy_interval

from ...admission.authentication import Caller
from ...dataset_schemas import DatasetImage
from ...errors import Conflict
from ...registry.datasets.index import DatasetIndex
from ...usage_schemas import Backtest, BacktestImage, ChangedLabels, RightAnswers
from .answers import VersionAnswers

PAGE_IMAGES = 1000
SEARCHED_IMAGES = 20_000  # newest images of the dataset, among which the kept ones are
ENGINE_IMAGES = 200  # answered at most where workers compute the answers: a sample of the kept images
MAX_CHANGES = 100  # pairs of labels in a reply


class BacktestService:
    """Back-tests of versions of a caller's own tasks."""

    def __init__(self, index: DatasetIndex, answers: VersionAnswers) -> None:
        self._index = index
        self._answers = answers

    async def backtest(self, caller: Caller, name: str, a: str | None, b: str, last: int) -> Backtest:
        """Compare the answers of version `b` to the newest kept images with those of `a`, or with those of their time.

        Args:
            a: a version number or an alias; None: the answers that the callers got.
            b: a version number or an alias.
            last: number of kept images.

        Raises:
            NotFound: no such task, version or alias.
            Conflict: an alias points at several versions, or the task has kept no image.
            LimitReached: too many comparisons of the tenant wait, or a limit of classification.
            Unavailable: the registry, the store or the workers are unavailable.
        """
        task = caller.own_task(name)
        async with self._answers.of(caller, task, [b] if a is None else [a, b]) as versions:
            kept = await self._kept(caller.tenant, task, last)
            if not kept:
                raise Conflict("The task has kept no classified image. Set `keep` of the task, and classify images.")
            images = kept if versions.heads else _sample(kept, ENGINE_IMAGES)
            found = await versions.labels(images)
            if a is None:
                found = [{image.digest: image.answer.label for image in images if image.answer}, *found]
            return _backtest(
                task,
                None if a is None else versions.numbers[0],
                versions.numbers[-1],
                kept,
                images,
                found,
                await versions.trained(),
            )

    async def _kept(self, tenant: str, task: str, last: int) -> list[DatasetImage]:
        """Return the newest images that the hub has classified and kept."""
        found: list[DatasetImage] = []
        before = 0
        for _ in range(SEARCHED_IMAGES // PAGE_IMAGES):
            page = await self._index.page(
                tenant, task, label=None, unlabelled=False, use=None, before=before, count=PAGE_IMAGES
            )
            found += [image for image in page.images if image.answer is not None]
            if page.next is None or len(found) >= last:
                break
            before = int(page.next)
        return found[:last]


def _sample(images: Sequence[DatasetImage], count: int) -> list[DatasetImage]:
    """Return a sample in the same order. Equal images give equal samples, and a digest alone decides nothing else."""
    ranked = sorted(images, key=lambda image: hashlib.sha256(image.digest.encode()).digest())
    chosen = {image.digest for image in ranked[:count]}
    return [image for image in images if image.digest in chosen]


def _backtest(
    task: str,
    a: int | None,
    b: int,
    kept: Sequence[DatasetImage],
    images: Sequence[DatasetImage],
    found: Sequence[Mapping[str, str]],
    trained: set[str],
) -> Backtest:
    before, after = found
    answered = [image for image in images if image.digest in before and image.digest in after]
    if not answered:
        raise Conflict("None of the kept images can be read now.")
    changed = [image for image in answered if before[image.digest] != after[image.digest]]
    low, high = accuracy_interval(len(changed), len(answered))
    labelled = [image for image in answered if image.label is not None and image.digest not in trained]
    pairs = Counter((before[image.digest], after[image.digest]) for image in changed)
    return Backtest(
        task=task,
        a=a,
        b=b,
        images=len(answered),
        left_out=len(images) - len(answered),
        beyond_limit=len(kept) - len(images),
        changed=len(changed),
        share=round(len(changed) / len(answered), 4),
        interval=(round(low, 4), round(high, 4)),
        labelled=RightAnswers(
            images=len(labelled),
            a=sum(before[image.digest] == image.label for image in labelled),
            b=sum(after[image.digest] == image.label for image in labelled),
        ),
        changes=[ChangedLabels(a=x, b=y, images=count) for (x, y), count in pairs.most_common(MAX_CHANGES)],
        differ=[
            BacktestImage(
                digest=image.digest,
                name=image.name,
                added=image.added,
                label=image.label,
                a=before[image.digest],
                b=after[image.digest],
            )
            for image in changed
        ],
    )
