"""Files of datasets in the store: which are in use, which may be removed, and which images still need features.

Keys:

    images             hash    digest of an image -> number of datasets that hold it
    snapshots          hash    digest of a snapshot -> number of trainings that used it
    reports            hash    digest of a report -> number of trainings that have it
    pending            zset    image without features -> time in seconds since 1970 from which a gateway may take it
    feature-key        string  key of the features that every image has, or gets
    image-gc:{digest}  string  token of the gateway that removes the file
    dropped            set     names of the hashes with the images of deleted datasets
    dropped-number     string  number of the last one
    staged-datasets    zset    `tenant:name` of a dataset of an unfinished import -> time of its last change, in seconds
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from ..redis.connection import RegistryConnection, as_hash, as_optional_text
from ..redis.scripts import DATASETS

CLAIM_S = 60  # how long a gateway may take to remove a file
KEYS_PER_READ = 1000
FEATURE_KEY = "karst:feature-key"


class StoredName(NamedTuple):
    """A file of a dataset: an image, (`s:`) a snapshot, or (`r:`) a report of a training."""

    kind: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> "StoredName":
        """Return the name that Redis has for a file."""
        kind, colon, digest = text.rpartition(":")
        return cls(kind + colon, digest)


class DatasetFiles:
    """The part of the registry that knows which files datasets use. Methods raise `Unavailable` without Redis."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def any_images(self) -> bool:
        """Return whether any dataset has an image."""
        return bool(await self._connection.execute(self._redis.exists("karst:images")))

    async def drain(self, count: int) -> tuple[list[StoredName], bool]:
        """Take about `count` images of deleted datasets off the list.

        Returns:
            The files that no dataset uses any more, and whether more images are left.
        """
        reply = await self._connection.change(DATASETS, "drain", count=count)
        return [StoredName.parse(name) for name in reply.names], reply.created

    @asynccontextmanager
    async def claimed(self, name: StoredName) -> AsyncIterator[bool]:
        """Hold a claim on a file, so that no dataset can begin to use it. Yield False if one uses it."""
        token = secrets.token_hex(8)
        claim = {"digest": name.digest, "token": token}
        reply = await self._connection.change(DATASETS, "claim", kind=name.kind, duration_s=CLAIM_S, **claim)
        if reply.outcome != "done":
            yield False
            return
        try:
            yield True
        finally:
            await self._connection.change(DATASETS, "end_claim", **claim)

    async def lease_pending(self, count: int, duration_s: int) -> Sequence[str]:
        """Return images that need features. No other gateway gets them within `duration_s`."""
        return (await self._connection.change(DATASETS, "lease_pending", count=count, duration_s=duration_s)).names

    async def note_features(self, digests: Sequence[str], *, present: bool = True) -> None:
        """Note that images have their features, or need new ones."""
        if digests:
            await self._connection.change(DATASETS, "note_features", digests=list(digests), present=present)

    async def use_feature_key(self, key: str) -> bool:
        """Note the key of the current features. If it is another one, every image needs new features.

        Returns:
            Whether the key is another one.
        """
        if as_optional_text(await self._connection.execute(self._redis.get(FEATURE_KEY))) == key:
            return False
        cursor = 0
        while True:
            command = self._redis.hscan("karst:images", cursor, count=KEYS_PER_READ)
            cursor, found = await self._connection.execute(command)
            await self.note_features(list(as_hash(found)), present=False)
            if cursor == 0:
                break
        # Last: a gateway that stops before this line leaves the work to the next one.
        await self._connection.execute(self._redis.set(FEATURE_KEY, key))
        return True
