"""Training jobs as Ray tasks: Ray finds a machine with free CPUs, and its autoscaler adds one if none has any."""

import os
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from ..dataset_schemas import TrainingProgress
from ..training.job import TrainingInterrupted, TrainingJob, TrainingResult

NICENESS = 19  # the lowest priority: classification goes first on a machine that does both
LACKS = "the machine that trains lacks the package {}; install karst-hub there with all its dependencies"


class RayTrainer:
    """Runs each job as a Ray task with CPUs (and a share of a GPU) of its own, never a worker's.

    The task belongs to the gateway that started it: it ends with its gateway.
    """

    def __init__(self, cpus: int, gpus: float) -> None:
        """
        Args:
            cpus, gpus: of one job.
        """
        options: dict[str, Any] = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_retries": 0,  # the registry's queue repeats an interrupted job
            "max_calls": 1,  # the process has the lowest priority, so it must serve nothing else afterwards
            "num_returns": "streaming",
            "scheduling_strategy": "SPREAD",
        }
        self._task = ray.remote(**options)(_train)

    async def run(self, job: TrainingJob) -> AsyncGenerator[TrainingProgress | TrainingResult, None]:
        """Yield the progress of a job, and its result last. To close the generator kills the job's process.

        Raises:
            TrainingInterrupted: the process ended without a result.
        """
        items: Any = self._task.remote(job)  # Ray's stubs know no generators
        ended = False
        try:
            async for reference in items:
                item = await reference
                ended = isinstance(item, TrainingResult)
                yield item
        except RayError as error:
            ended = True
            raise TrainingInterrupted(_reason(error)) from error
        finally:
            if not ended:
                ray.cancel(items, force=True)


def _train(job: TrainingJob) -> Iterator[TrainingProgress | TrainingResult]:
    os.nice(NICENESS)
    try:
        from ..training.run import train  # imports what trainings need, and a gateway does not
    except ImportError as error:
        yield TrainingResult(None, None, error=LACKS.format(error.name))
        return
    yield from train(job)


def _reason(error: RayError) -> str:
    """Return one line for the tenant. The gateway's log has the whole error."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its machine ran out of memory"
    if isinstance(error, ray.exceptions.NodeDiedError):
        return "its machine stopped"
    return "its process was killed"
