"""Index of a task's images in Redis. Every change is one atomic script, publishes an event and leaves an audit entry.

Keys below `t:{tenant}:data:{task}:`, where a use is `train`, `test` or `*` for both:

    images                 hash    digest -> JSON of a record, see `lua/datasets.lua`
    names, labels          hash    label -> its id; id -> label
    folds, fold-of         hash    label without case, spaces and Unicode form -> id; id -> this spelling
    merged                 hash    id of a label with many images -> id of the label that it was merged into
    at:{use}               zset    digest -> place in the order of arrival
    at:{use}={id}          zset    the same for the images of one label; without an id for unlabelled images
    info                   hash    last (place), last_label (id), images, bytes
    trainings              hash    id -> JSON of a `Training`
    training-heads         hash    id -> JSON of what the Lua scripts read of it; older hubs wrote none
    training-order         zset    id -> time in milliseconds since 1970

A record holds a list of labels, for tasks with several per image. A list page reads one range of one sorted set.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from ...admin_schemas import TenantLimits
from ...admission.quotas import DATASET_LABELS
from ...concurrency import TenantReads
from ...coroutines import in_steps
from ...dataset_schemas import MAX_PAGE_IMAGES, DatasetImage, ImagePage, KeptAnswer, LabelCount, Split, Use
from ...errors import HubError, LimitReached, NotFound
from ...field_types import folded_label
from ..audit import Actor
from ..models import task_not_found
from ..redis.connection import READ_TIMEOUT_S, RegistryConnection, as_hash, as_optional_text, tenant_key
from ..redis.scripts import DATASETS, ChangeReply
from ..tenants import tenant_not_found
from .entries import AddStatus, DatasetContent, ListedImage, NewImage, StoredRecord, use_of

T = TypeVar("T")
SHARED: dict[str, Any] = {text: text for text in ("auto", "train", "test")}  # one object each for all images
PART_FIELDS = 500  # of a hash that is read whole, in one read
PART_LABELS = 200  # counted in one read
DEFAULT_LIMITS = {name: TenantLimits.model_fields[name].default for name in ("images", "image_bytes")}
NOUNS = {"images": "images in datasets", "image_bytes": "bytes of images in datasets"}


class DatasetIndex:
    """Reads and atomic changes of datasets. Every method raises `Unavailable` if Redis does not answer.

    Every change raises `NotFound` if the task does not exist, and `Unauthenticated` if the actor's key was revoked.
    """

    def __init__(self, connection: RegistryConnection, reads: TenantReads) -> None:
        """
        Args:
            reads: turns of every read whose size the tenant decides.
        """
        self._connection = connection
        self._redis = connection.redis
        self._reads = reads

    async def check_room(self, by: Actor, tenant: str, task: str) -> None:
        """Check that the tenant may add images to this task.

        Raises:
            LimitReached: the limit of images or of their bytes.
        """
        await self._change("check_room", by, tenant, task, "image.add", {}, limits=DEFAULT_LIMITS)

    async def add(
        self,
        by: Actor,
        tenant: str,
        task: str,
        images: Sequence[NewImage],
        details: Mapping[str, Any],
        *,
        audited: bool = False,
        patience_s: int = 0,
    ) -> tuple[list[AddStatus], bool]:
        """Add images, or move known ones to another label or split, in one step.

        Args:
            details: of the audit entry.
            audited: an earlier step of the same request has written the entry.
            patience_s: time in which the sending gateway computes the features of new images itself.

        Returns:
            The status of each image, and whether anything was changed.
        """
        body = [
            {
                "digest": image.digest,
                "label": image.label or "",
                "fold": folded_label(image.label or ""),
                "split": image.split or "",
                "used": use_of(image.digest, image.split or "auto"),
                "size": image.size_bytes,
                "name": image.name,
            }
            for image in images
        ]
        reply = await self._change(
            "add",
            by,
            tenant,
            task,
            "image.add",
            details,
            images=body,
            limits=DEFAULT_LIMITS,
            max_labels=DATASET_LABELS,
            audited=audited,
            patience_s=patience_s,
        )
        return [_status(found) for found in json.loads(reply.text)], reply.created

    async def change(
        self,
        by: Actor,
        tenant: str,
        task: str,
        digests: Sequence[str],
        *,
        label: str | None,
        relabel: bool,
        split: Split | None,
    ) -> tuple[int, list[str]]:
        """Change label and split of images, in one step.

        Args:
            digests: at least one, each once.
            relabel: whether to set the label; a label of None then removes it.

        Returns:
            The number of images that changed, and the digests that the dataset does not have.

        Raises:
            NotFound: the dataset has none of the images.
            LimitReached: the dataset has the maximum number of labels.
        """
        details: dict[str, Any] = {"digest": digests[0]} if len(digests) == 1 else {"images": len(digests)}
        details |= ({"label": label} if relabel else {}) | ({"split": split} if split else {})
        reply = await self._change(
            "change",
            by,
            tenant,
            task,
            "image.change",
            details,
            digests=list(digests),
            label=(label or "") if relabel else None,
            fold=folded_label(label or ""),
            split=split or "",
            used=[use_of(digest, split or "auto") for digest in digests],
            max_labels=DATASET_LABELS,
        )
        return reply.number, list(reply.names)

    async def remove(self, by: Actor, tenant: str, task: str, digest: str) -> bool:
        """Remove an image. Return whether no dataset holds its file any more.

        Raises:
            NotFound: the dataset has no such image.
        """
        details = {"digest": digest}
        reply = await self._change("remove", by, tenant, task, "image.delete", details, digests=[digest])
        return digest in reply.names

    async def rename_label(self, by: Actor, tenant: str, task: str, label: str, new: str) -> bool:
        """Rename a label. Return whether it was merged into a label that existed.

        Raises:
            NotFound: the dataset has no such label.
        """
        details = {"label": label, "to": new}
        reply = await self._change(
            "rename_label",
            by,
            tenant,
            task,
            "label.rename",
            details,
            old=label,
            label=new,
            fold=folded_label(new),
            max_labels=DATASET_LABELS,
        )
        return reply.created

    async def page(
        self, tenant: str, task: str, *, label: str | None, unlabelled: bool, use: Use | None, before: int, count: int
    ) -> ImagePage:
        """Return images, newest first.

        Args:
            label: only images with this label.
            unlabelled: only images without a label.
            before: cursor of the page; 0 starts at the newest image.
        """
        asked = {"label": "" if unlabelled else label, "used": use or "*", "before": before, "count": count}
        async with self._reads.turn(tenant):
            found = await self._read("page", tenant, task, **asked)
            rows = json.loads(found.text) or []
            images = [_image(row["digest"], row["labels"], row["record"]) for row in rows]
        return ImagePage(images=images, next=str(rows[-1]["record"]["n"]) if len(rows) == count else None)

    async def newest(
        self, tenant: str, task: str, *, label: str | None = None, unlabelled: bool = False, limit: int
    ) -> list[DatasetImage]:
        """Return the newest images, `limit` at most, read in pages; see `page`."""
        images: list[DatasetImage] = []
        before = 0
        while len(images) < limit:
            count = min(MAX_PAGE_IMAGES, limit - len(images))
            page = await self.page(
                tenant, task, label=label, unlabelled=unlabelled, use=None, before=before, count=count
            )
            images += page.images
            if page.next is None:
                break
            before = int(page.next)
        return images

    async def find(self, tenant: str, task: str, digest: str) -> DatasetImage:
        """Return one image.

        Raises:
            NotFound: the dataset has no such image.
        """
        row = json.loads((await self._read("find", tenant, task, digest=digest)).text)
        return _image(digest, row["labels"], row["record"])

    async def describe(self, tenant: str, task: str) -> DatasetContent:
        """Return the numbers of images by label and use.

        Raises:
            NotFound: the task does not exist.
        """
        labels = await self._hash(tenant, task, "labels", str)
        ids, counts = ["", *labels], []
        for start in range(0, len(ids), PART_LABELS):
            async with self._reads.turn(tenant):
                part = ids[start : start + PART_LABELS]
                found = json.loads((await self._read("describe", tenant, task, ids=part)).text)
                for id, (train, test) in zip(part, found["counts"], strict=True):
                    counts.append(LabelCount(label=labels.get(id), train=train, test=test))
        unlabelled, *labelled = counts
        labelled.sort(key=lambda count: str(count.label))
        return DatasetContent(found["images"], found["bytes"], labelled, unlabelled)

    async def count(self, tenant: str, task: str, label: str) -> LabelCount:
        """Return the number of images of one label.

        Raises:
            NotFound: the task does not exist.
        """
        command = self._redis.hget(tenant_key(tenant, f"data:{task}:names"), label)
        id = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        if id is None:
            return LabelCount(label=label, train=0, test=0)
        found = json.loads((await self._read("describe", tenant, task, ids=[id])).text)
        (train, test), *_ = found["counts"]
        return LabelCount(label=label, train=train, test=test)

    async def all(self, tenant: str, task: str) -> list[ListedImage]:
        """Return every image, in no order. An image that is changed meanwhile is listed as before or as after it."""
        # Texts are parsed part by part into what is listed: whole records of 200,000 images would take 220 MB.
        images = await self._hash(tenant, task, "images", _listed)
        labels = await self._labels(tenant, task)

        def listed(item: tuple[str, ListedImage]) -> ListedImage:
            return item[1]._replace(digest=item[0], label=labels(item[1].label or ""))

        return await in_steps(listed, images.items())

    async def records(self, tenant: str, task: str) -> list[StoredRecord]:
        """Return every image as it is stored, in no order; none for a task that does not exist.

        The images come in parts, each in the tenant's turn, so a large dataset delays no call of other tenants.
        """
        records = await self._hash(tenant, task, "images", json.loads)
        labels = await self._labels(tenant, task)
        return await in_steps(lambda item: StoredRecord(*item, labels(_label_id(item[1]))), records.items())

    async def _labels(self, tenant: str, task: str) -> Callable[[str], str | None]:
        """Return the function from a label's id in a record to the label. Read the records before it."""
        labels, merged = [await self._hash(tenant, task, name, str) for name in ("labels", "merged")]

        def label(id: str) -> str | None:
            while id in merged:
                id = merged[id]
            return labels.get(id)

        return label

    async def _hash(self, tenant: str, task: str, name: str, parse: Callable[[str], T]) -> dict[str, T]:
        """Return the parsed values of a hash of the dataset, read in parts."""
        found: dict[str, T] = {}
        cursor = 0
        while True:
            async with self._reads.turn(tenant):
                command = self._redis.hscan(tenant_key(tenant, f"data:{task}:{name}"), cursor, count=PART_FIELDS)
                cursor, part = await self._connection.execute(command, timeout_s=READ_TIMEOUT_S)
                found |= {field: parse(value) for field, value in as_hash(part).items()}
            if cursor == 0:
                return found

    async def _read(self, function: str, tenant: str, task: str, **argument: Any) -> ChangeReply:
        text = await self._connection.call(
            DATASETS, function, timeout_s=READ_TIMEOUT_S, tenant=tenant, task=task, **argument
        )
        return _checked(ChangeReply.model_validate_json(text), tenant, task, **argument)

    async def _change(
        self,
        function: str,
        by: Actor,
        tenant: str,
        task: str,
        action: str,
        details: Mapping[str, Any],
        **argument: Any,
    ) -> ChangeReply:
        entry = by.entry(tenant, action, task=task, **details)
        reply = await self._connection.change(DATASETS, function, tenant=tenant, task=task, entry=entry, **argument)
        return _checked(reply, tenant, task, **argument)


def _label_id(record: Mapping[str, Any]) -> str:
    return str(record["l"][0]) if record["l"] else ""  # Lua writes an empty list as {}


def _listed(text: str) -> ListedImage:
    """Return the image of a record's text, without its digest, and with its label's id in place of the label."""
    record = json.loads(text)
    return ListedImage("", record["name"], sys.intern(_label_id(record)), SHARED[record["s"]], SHARED[record["u"]])


def image_not_found(digest: str) -> NotFound:
    """Return the same error for an image that does not exist and for one of another tenant."""
    return NotFound.at("digest", f"the dataset has no image {digest}")


def limit_error(limit: str, maximum: int) -> LimitReached:
    """Return the error of a tenant's limit on datasets."""
    message = f"too many {NOUNS[limit]} (limit {maximum}); delete some or ask an admin to raise it"
    return LimitReached.at(limit, message, retry_after_s=60)


def labels_full() -> HubError:
    """Return the error of a dataset with too many labels."""
    message = f"too many labels in this dataset (limit {DATASET_LABELS}); merge some"
    return LimitReached.at("label", message, retry_after_s=60)


def _checked(reply: ChangeReply, tenant: str, task: str, **argument: Any) -> ChangeReply:
    match reply.outcome:
        case "done":
            return reply
        case "absent":
            raise task_not_found(task)
        case "no_image":
            raise image_not_found(str(argument.get("digest") or argument["digests"][0]))
        case "no_label":
            raise NotFound.at("label", f"the dataset has no label {argument['old']!r}")
        case "limit":
            raise limit_error(reply.limit, reply.maximum)
        case "labels_full":
            raise labels_full()
    raise tenant_not_found(tenant)


def _status(found: Mapping[str, Any]) -> AddStatus:
    error = ""
    if found["status"] == "limit":
        error = limit_error(found["limit"], int(found["maximum"])).errors[0].message
    elif found["status"] == "labels":
        error = labels_full().errors[0].message
    return AddStatus(found["status"], found.get("before"), found.get("similar"), error)


def _image(digest: str, labels: Sequence[str], record: Mapping[str, Any]) -> DatasetImage:
    labels = list(labels or ())  # Lua writes an empty list as {}
    return DatasetImage(
        digest=digest,
        label=labels[0] if labels else None,
        labels=labels,
        split=record["s"],
        use=record["u"],
        name=record["name"],
        size_bytes=int(record["size"]),
        added=_time(record["at"]),
        answer=KeptAnswer(**record["p"]) if record.get("p") else None,
        expires=_time(record["k"]) if record.get("k") and not labels else None,
    )


def _time(ms: float) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
