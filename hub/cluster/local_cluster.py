"""A Ray cluster on this machine alone.

No torch: the process of `karst-hub serve` imports this module and lasts as long as the hub.
"""

import logging
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ..settings import Settings
from .ray_compat import LOOPBACK, leave_out_tables, local_cluster_options, serve_has_controller, small_head

PAUSE_S = 0.05  # between two looks for Serve's controller
OBJECT_STORE_BYTES = 256 * 1024**2  # images are passed by value; Ray's object store is hardly used


def start(settings: Settings, folder: Path) -> str:
    """Start the cluster, and return the address of its GCS.

    The variables of `local.ray_environment` must be set before this module is imported: Ray reads them at import.

    Args:
        folder: the hub's private folder, for Ray's sockets and logs.
    """
    leave_out_tables()
    with small_head(metrics=settings.metrics_port is not None):
        ray.init(
            address="local",
            num_cpus=settings.max_workers + 1 + settings.max_trainings * settings.training_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            **local_cluster_options(settings.metrics_port, folder),
        )
    address: str = ray.get_runtime_context().gcs_address
    return address


def connect(address: str) -> None:
    """Connect this process, which is not the one of `start`, to the cluster at this address.

    Args:
        address: of the cluster's GCS, as `start` returned it.
    """
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def start_serve(settings: Settings) -> None:
    """Start Serve's controller and proxies; return when the proxies run.

    Raises:
        RuntimeError, TimeoutError: Serve's proxies do not start.
    """
    from ray import serve  # see `stop`

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # HAProxy listens on the hub's address and has its certificate; the gateways behind it stay on loopback.
    http_options: dict[str, Any] = {"host": LOOPBACK if settings.haproxy else settings.host, "port": settings.port}
    if settings.tls_cert is not None and not settings.haproxy:
        http_options |= {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    try:
        serve.start(http_options=http_options)
    except RayError as error:
        raise RuntimeError(str(error)) from error


def wait_for_controller(starting: Future[None]) -> None:
    """Return when Serve has its controller, seconds before its proxies run; it queues deployments until it runs.

    Args:
        starting: call of `start_serve` in a thread.

    Raises:
        RuntimeError, TimeoutError: of `start_serve`.
    """
    while not (starting.done() or serve_has_controller()):
        wait([starting], PAUSE_S)
    if starting.done():
        starting.result()


def stop() -> None:
    """Drain and stop the hub, and stop the cluster of `start`."""
    if ray.is_initialized():  # otherwise Serve would start a cluster in order to stop it
        from ray import serve  # 60 MB that a running hub's command does not need

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray has no types here
        ray.shutdown()
