"""Training jobs in processes of this machine, in place of Ray tasks."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection

from hub.dataset_schemas import TrainingProgress
from hub.training.job import TrainingInterrupted, TrainingJob, TrainingResult
from hub.training.run import train

# Its server imports this module, and so torch, once; processes of jobs are copies of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


class ProcessTrainer:
    """A `Trainer` whose jobs run in a process each.

    Attributes:
        pids: process of each running job, by the training's id.
        starts: ids in the order of their starts.
    """

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        self.starts: list[str] = []

    def kill(self, id: str) -> None:
        """Kill the process of a running job."""
        os.kill(self.pids[id], signal.SIGKILL)

    async def run(self, job: TrainingJob) -> AsyncGenerator[TrainingProgress | TrainingResult, None]:
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_work, args=(job, sender), daemon=True)
        await asyncio.to_thread(process.start)  # the first start imports torch
        sender.close()
        assert process.pid is not None
        self.pids[job.id] = process.pid
        self.starts.append(job.id)
        try:
            while True:
                item = await asyncio.to_thread(receiver.recv)
                yield item
                if isinstance(item, TrainingResult):
                    return
        except EOFError as error:
            raise TrainingInterrupted("its process was killed") from error
        finally:
            self.pids.pop(job.id, None)
            process.kill()
            process.join()
            receiver.close()


def _work(job: TrainingJob, sender: "Connection[object, object]") -> None:
    for item in train(job):
        sender.send(item)
