"""Process of its own that loads the backbone as a check, and then deploys the hub on the local Ray cluster.

A deployment's classes import torch and timm. This process ends when the hub runs; otherwise they would take hundreds of
megabytes in the process of `karst-hub serve` for as long as the hub runs. Its imports and the check take their time
beside the start of Ray and Serve.
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread

from ..cluster.ray_compat import leave_out_tables
from ..observability import log_format
from ..settings import Settings
from .errors import StartError


class Deployer:
    """The process, as `karst-hub serve` sees it.

    A context: the process ends with it, or by itself within seconds after a deployment.
    """

    def __init__(self, settings: Settings) -> None:
        """Start the process; it loads the backbone."""
        self._deployed = False
        self._connection, theirs = Pipe()
        with theirs:
            # -P: a folder named `hub` in the working directory is not ours. A session of its own: Ctrl-C is for the
            # command, which then ends this process.
            command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
            self.process = subprocess.Popen(  # noqa: S603 (a fixed command)
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
            )
        self._connection.send(settings)

    def __enter__(self) -> "Deployer":
        return self

    def __exit__(self, *_error: object) -> None:
        self._connection.close()
        if self._deployed:  # it takes two seconds to leave the cluster, and the hub is ready
            Thread(target=self.process.wait, daemon=True).start()  # otherwise it would stay as a zombie
        else:
            self.kill()

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        self.process.kill()  # Ray would write a stack trace about a SIGTERM
        self.process.wait()

    def check_backbone(self) -> None:
        """Return when the backbone was loaded.

        Raises:
            StartError: it cannot be loaded.
        """
        if (problem := self._answer()) is not None:
            raise StartError(problem)

    def deploy(self, address: str) -> None:
        """Deploy the hub on the cluster at this address; return when it runs.

        Raises:
            StartError: the backbone cannot be loaded.
            RuntimeError: Ray Serve could not start the hub; the text may have tracebacks.
        """
        with suppress(ConnectionError):  # the process has ended, and `_answer` reports it
            self._connection.send(address)
        self.check_backbone()
        if (problem := self._answer()) is not None:
            raise RuntimeError(problem)
        self._deployed = True

    def _answer(self) -> str | None:
        """Return the next problem that the process reports, or None for a step that it finished."""
        with suppress(EOFError, ConnectionError):
            problem: str | None = self._connection.recv()
            return problem
        return f"the process that deploys the hub ended with status {self.process.wait()}"


def main(connection: Connection) -> None:
    """Check the backbone while Serve starts, and deploy while its proxies start.

    Answer the check and the rest with None or a problem.
    """
    settings: Settings = connection.recv()
    log_format.start(settings.log_format, settings.log_level)
    leave_out_tables()
    # Before the backbone: a thread that imports torch would delay this one.
    from ..cluster import local_cluster

    with ThreadPoolExecutor(3) as pool:
        prepared = pool.submit(_prepare, settings, connection)
        address = connection.recv()
        problem = None
        try:
            local_cluster.connect(address)
            serving = pool.submit(local_cluster.start_serve, settings)
            steps = [serving]
            if (deploy := prepared.result()) is not None:
                local_cluster.wait_for_controller(serving)
                steps.append(pool.submit(deploy, settings))
            # The other step may go on for minutes after one has failed; the command then kills this process.
            for step in wait(steps, return_when=FIRST_EXCEPTION).done:
                step.result()
        except (RuntimeError, TimeoutError, ValueError, OSError) as error:
            problem = str(error)
        if prepared.result() is not None:  # otherwise the command has its answer
            connection.send(problem)


def _prepare(settings: Settings, connection: Connection) -> Callable[[Settings], None] | None:
    """Check the backbone, answer, and return the function that deploys the hub, or None after a problem."""
    from adapters import BackboneError

    try:
        _check_backbone(settings)
    except BackboneError as error:
        connection.send(str(error))
        return None

    from ..cluster import app

    connection.send(None)
    return app.deploy


def _check_backbone(settings: Settings) -> None:
    """Load the backbone and drop it: a download is visible, and an error comes once. Ray would try three times.

    Raises:
        BackboneError: a worker could not serve it.
    """
    from adapters import load_backbone
    from adapters.serving.frozen_forms import check_int8

    backbone = load_backbone(settings.backbone, settings.checkpoint, image_size=settings.image_size)
    if settings.dtype == "int8":
        check_int8(backbone)


if __name__ == "__main__":
    with suppress(EOFError):  # the command has ended
        main(Connection(int(sys.argv[1])))
