"""Classified images that task owners keep, in Redis: their answers, their number per day, and their expiry.

Keys, besides those in `index`:

    t:{tenant}:data:{task}:kept  zset    kept image without a label -> when it expires, in milliseconds since 1970
    t:{tenant}:data:{task}:info  hash    kept_day (days since 1970), kept_images (of that day)
    kept                         set     `tenant:task` of each dataset with such images
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ...dataset_schemas import KeptAnswer
from ..audit import Actor
from ..redis.connection import RegistryConnection, as_texts
from ..redis.scripts import KEPT
from .entries import use_of
from .files import StoredName
from .index import DEFAULT_LIMITS

KEEPER = Actor("", "kept images", "hub", "the hub itself")


@dataclass(frozen=True)
class KeptImage:
    """A classified image to keep.

    Attributes:
        expires: milliseconds since 1970; the image is removed then unless it has a label.
    """

    digest: str
    name: str
    size_bytes: int
    expires: int
    answer: KeptAnswer


class KeptImages:
    """Atomic changes of kept images. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def keep(self, tenant: str, task: str, images: Sequence[KeptImage], per_day: int) -> list[str]:
        """Add images to a task's dataset, without labels. An image that is there already stays as it is.

        Returns:
            The status of each image: `added`, `there`, or the reason of a refusal: `day` (the day has its images),
            `limit` (of the tenant), `removing` (the store is removing an old copy), `gone` (the task does not exist).
        """
        body = [
            {
                "digest": image.digest,
                "label": "",
                "fold": "",
                "split": "",
                "used": use_of(image.digest, "auto"),
                "size": image.size_bytes,
                "name": image.name,
                "kept": image.expires,
                "answer": image.answer.model_dump(exclude_none=True),
            }
            for image in images
        ]
        reply = await self._connection.change(
            KEPT,
            "keep",
            tenant=tenant,
            task=task,
            entry=KEEPER.entry(tenant, "image.keep", task=task),
            images=body,
            per_day=per_day,
            limits=DEFAULT_LIMITS,
            patience_s=0,
        )
        if reply.outcome != "done":
            return ["gone"] * len(images)
        return [found["status"] for found in json.loads(reply.text)]

    async def datasets(self) -> list[tuple[str, str]]:
        """Return tenant and task of each dataset with kept images that have no label."""
        names = as_texts(await self._connection.execute(self._redis.smembers("karst:kept")))
        pairs = [name.partition(":") for name in names]
        return [(tenant, task) for tenant, _, task in pairs]

    async def expire(self, tenant: str, task: str, count: int) -> tuple[int, list[StoredName]]:
        """Remove at most `count` images whose time is over.

        Returns:
            The number of removed images, and the files that no dataset uses any more.
        """
        entry = KEEPER.entry(tenant, "image.expire", task=task)
        reply = await self._connection.change(KEPT, "expire", tenant=tenant, task=task, entry=entry, count=count)
        return reply.number, [StoredName("", digest) for digest in reply.names]
