"""A Ray cluster on this machine alone.

No torch: the process of `karst-hub serve` imports this module and lasts as long as the hub.
"""

import logging
from pathlib import Path
from typing import Any

import ray

from ..settings import Settings
from .ray_compat import LOOPBACK, local_cluster_options, small_head

OBJECT_STORE_BYTES = 256 * 1024**2  # images are passed by value; Ray's object store is hardly used


def start(settings: Settings, folder: Path) -> str:
    """Start the cluster, and return the address of its GCS.

    The variables of `local.ray_environment` must be set before this module is imported: Ray reads them at import.

    Args:
        folder: the hub's private folder, for Ray's sockets and logs.
    """
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


def start_serve(settings: Settings, address: str) -> None:
    """Start Serve's controller and proxies on the cluster at this address, from another process.

    Args:
        address: of the cluster's GCS, as `start` returned it.

    Raises:
        RuntimeError, TimeoutError: Serve's proxies do not start.
    """
    from ray import serve  # see `stop`

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # HAProxy listens on the hub's address and has its certificate; the gateways behind it stay on loopback.
    http_options: dict[str, Any] = {"host": LOOPBACK if settings.haproxy else settings.host, "port": settings.port}
    if settings.tls_cert is not None and not settings.haproxy:
        http_options |= {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    serve.start(http_options=http_options)


def stop() -> None:
    """Drain and stop the hub, and stop the cluster of `start`."""
    if ray.is_initialized():  # otherwise Serve would start a cluster in order to stop it
        from ray import serve  # 60 MB that a running hub's command does not need

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray has no types here
        ray.shutdown()
