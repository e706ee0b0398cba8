"""The whole hub put together: settings -> the Serve application, and one Ray cluster on this machine to run it."""

import logging
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from ..api.app import create_app
from ..settings import Settings
from ..storage.store import Store
from ..worker.prewarming import Prewarming
from ..worker.replica import Worker
from .autoscaling import scale
from .gateway import Gateway
from .ray_compat import ray_metrics
from .request_router import OwnersRouter

NAME = "karst-hub"
GATEWAY_REQUESTS = 4096  # at once in one gateway, most of them in their tenant's line; they cost memory only
WORKER_REQUESTS = 4096  # at once at one worker; they wait there, see `quotas.WORKER_IMAGES_QUEUED`
QUEUED_REQUESTS = 512  # waiting for workers in one gateway; more are told to come back
ROUTING_STATS_S = 5.0  # how often workers tell which adapters they hold
DRAIN_S = 60.0  # for what a replica that must go has accepted
LOGGING = {"enable_access_log": False}  # a line a call costs more than the call's own work
OBJECT_STORE_BYTES = 256 * 1024**2  # pixels go to workers by value; Ray's object store is hardly used


def build(settings: Settings) -> serve.Application:
    """The Serve application of a hub: `hub.cluster.app:build` for `serve run` and in a Serve config file.

    Args:
        settings: Serve makes them of `args:`, or of `key=value` on its command line; what is not there comes from the
            environment of the node where Serve builds the application, as always. `redis_url` and `store_url` must be
            set, since every node must reach both. `device="auto"` is decided on that node too: say `cuda` where it
            has no GPU and the workers' nodes have.

    Raises:
        ValueError: one of them is not set.
    """
    if settings.redis_url is None or settings.store_url is None:
        raise ValueError("redis_url and store_url must be set: every node of the cluster uses them")
    on_gpu = settings.torch_device.startswith("cuda")
    delays = settings.scale_up_s, settings.scale_down_s
    worker = serve.deployment(
        name="worker",
        # What waits, waits at the worker: only its batcher knows whose turn it is. More is refused by the gateways.
        max_ongoing_requests=WORKER_REQUESTS,
        max_queued_requests=QUEUED_REQUESTS,
        request_router_config=RequestRouterConfig(
            request_router_class=OwnersRouter,  # type: ignore[arg-type]  # its __init__ says that all are dicts
            request_routing_stats_period_s=ROUTING_STATS_S,  # type: ignore[arg-type]
        ),
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if on_gpu else 0},
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=LOGGING,
        **scale(settings.min_workers, settings.max_workers, *delays, passes=True),
    )(Worker)
    gateway = serve.deployment(
        name="gateway",
        max_ongoing_requests=GATEWAY_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=LOGGING,
        **scale(settings.min_gateways, settings.max_gateways, *delays),
    )(Gateway)
    prewarming = Prewarming(settings.redis_url, settings.pinned)
    workers_per_node = partial(_sharing, settings.max_workers)
    workers = worker.bind(settings, Store(settings.store_url), prewarming, workers_per_node, ray_metrics)
    return gateway.bind(partial(create_app, settings), workers, settings.min_workers == 0)


def _sharing(most_workers: int) -> int:
    """How many workers Ray may put on the node that this runs on."""
    here = ray.get_runtime_context().get_node_id()
    cpus = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, min(most_workers, int(cpus)))


def start(settings: Settings) -> None:
    """Start Ray on this machine alone, and the hub on it; returns when a worker has its backbone.

    `local.ray_environment` must be in the environment before this module is imported: Ray reads it at import.

    Raises:
        RuntimeError: a deployment does not start; the text has its messages, tracebacks included.
        TimeoutError: Serve's proxies do not start in time.
    """
    ray.init(
        address="local",
        num_cpus=settings.max_workers + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _metrics_export_port=settings.metrics_port,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # HAProxy listens where it is told and has the certificate; what stands behind it stays on the loopback interface.
    listening: dict[str, Any] = {"host": "127.0.0.1" if settings.haproxy else settings.host, "port": settings.port}
    if settings.tls_cert is not None and not settings.haproxy:
        listening |= {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    serve.start(http_options=listening)
    try:
        serve.run(build(settings), name=NAME, route_prefix="/")
    except RuntimeError as error:  # says that it failed; why stands in the deployments' messages
        deployments = serve.status().applications[NAME].deployments.values()
        raise RuntimeError("\n".join([str(error), *(d.message for d in deployments)])) from error


def stop() -> None:
    """Drain and stop what `start` started."""
    if ray.is_initialized():  # else Serve would start a cluster to stop it
        serve.shutdown()
        ray.shutdown()
