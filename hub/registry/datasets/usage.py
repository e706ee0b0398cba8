"""Counts of the answers of tasks in Redis, by day, version and label.

Keys, besides those in `index`:

    t:{tenant}:data:{task}:usage  hash    day (days since 1970) -> JSON of a `UsageDay`; b -> bytes of all days
    t:{tenant}:usage_bytes        string  bytes of all days of all tasks
    usage-calls:{gateway}         string  number of the gateway's last call of `add`; expires after a day

A task keeps `RETENTION_DAYS` days at most, and fewer where its records or the tenant's reach a limit of bytes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from ...admission.quotas import USAGE_BYTES, USAGE_LABELS, USAGE_TASK_BYTES, USAGE_VERSIONS
from ..redis.connection import READ_TIMEOUT_S, RegistryConnection, as_optional_texts, tenant_key
from ..redis.scripts import USAGE

RETENTION_DAYS = 400
OTHER = "other"  # name of all labels or versions beyond a limit
TENTHS = 10  # classes of typicality, each a tenth wide


class VersionCounts(BaseModel):
    """Counts of one version. The members have short names, as every day of every task has them.

    Attributes:
        n: images.
        l: label -> images with this label as the best one.
        h: images by tenth of typicality.
        m, t: images with a typicality, and the sum of these.
        u: unknown images.
    """

    model_config = ConfigDict(extra="ignore")

    n: int = 0
    l: dict[str, int] = {}  # noqa: E741 (the stored name)
    h: list[int] = [0] * TENTHS
    m: int = 0
    t: float = 0.0
    u: int = 0


class UsageDay(BaseModel):
    """Counts of a task on one day.

    Attributes:
        v: version -> its counts.
        k, c, r: kept images, confirmed answers, corrected answers.
    """

    model_config = ConfigDict(extra="ignore")

    v: dict[str, VersionCounts] = {}
    k: int = 0
    c: int = 0
    r: int = 0


class DayName(NamedTuple):
    """A day of a task, in days since 1970 (UTC)."""

    tenant: str
    task: str
    day: int


class UsageRegistry:
    """Counts of answers. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def add(self, gateway: str, number: int, days: Mapping[DayName, UsageDay]) -> None:
        """Add a gateway's counts in one atomic step. Counts of tasks that do not exist are dropped.

        Args:
            number: larger than that of the gateway's last call. A repeated call with the same number adds nothing.
        """
        await self._connection.call(
            USAGE,
            "add",
            gateway=gateway,
            number=number,
            days=[name._asdict() | counts.model_dump() for name, counts in days.items()],
            retention_days=RETENTION_DAYS,
            max_labels=USAGE_LABELS,
            max_versions=USAGE_VERSIONS,
            max_task_bytes=USAGE_TASK_BYTES,
            max_tenant_bytes=USAGE_BYTES,
        )

    async def read(self, tenant: str, task: str, days: Sequence[int]) -> dict[int, str]:
        """Return the counts of days, in days since 1970, as texts for `parsed`. A day without counts is left out."""
        key = tenant_key(tenant, f"data:{task}:usage")
        command = self._redis.hmget(key, [str(day) for day in days])
        texts = as_optional_texts(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        return {day: text for day, text in zip(days, texts, strict=True) if text}


def parsed(texts: Mapping[int, str]) -> dict[int, UsageDay]:
    """Return the counts of days from their texts, up to 4 MiB in all."""
    return {day: UsageDay.model_validate_json(text) for day, text in texts.items()}
