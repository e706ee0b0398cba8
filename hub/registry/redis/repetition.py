"""Background loops around the registry."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ...errors import HubError

logger = logging.getLogger(__name__)


async def repeat(step: Callable[[], Awaitable[None]], interval_s: float, name: str, level: int) -> None:
    """Run a step around the registry until the task is cancelled. A failed step is logged, and the next one follows.

    Args:
        level: of the log line for an error of the hub, such as an unavailable registry.
    """
    while True:
        try:
            await step()
        except HubError as error:
            logger.log(level, "%s failed, next try in %g s: %s", name, interval_s, error)
        except Exception:
            logger.exception("%s failed, next try in %g s", name, interval_s)
        await asyncio.sleep(interval_s)
