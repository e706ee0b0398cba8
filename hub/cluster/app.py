"""Composition of the hub on Ray Serve: settings -> the Serve application."""

import logging
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig

from ..api.app import create_app
from ..registry.startup import UnfitRegistry, check_registry
from ..settings import Settings
from ..storage.store import Store
from ..worker.prewarming import Prewarming
from ..worker.replica import Worker
from .autoscaling import replica_options
from .gateway import Gateway
from .ray_compat import cpus_of_this_node, frequent_polls, ray_metrics
from .request_router import RendezvousRouter

logger = logging.getLogger(__name__)

NAME = "karst-hub"
GATEWAY_REQUESTS = 4096  # concurrent requests per gateway; most wait in their tenant's queue and cost only memory
WORKER_REQUESTS = 4096  # concurrent calls per worker; they wait in the worker's fair queue
QUEUED_REQUESTS = 512  # calls that wait for a worker in one gateway; the gateway refuses more with 503
ROUTING_STATS_S = 5.0  # interval of the workers' reports of resident adapters
DRAIN_TIMEOUT_S = 60.0  # for the accepted requests of a replica that stops
LOGGING = {"enable_access_log": False}  # an access log line costs more time than the hub's work on a call


def build(settings: Settings) -> serve.Application:
    """Return the Serve application of a hub: `hub.cluster.app:build` for `serve run` and in a Serve config file.

    Args:
        settings: Serve makes them of `args:` in a config file, or of `key=value` on its command line. All others come
            from the environment of the node where Serve builds the application. `redis_url` and `store_url` are
            required, since every node uses both. `device="auto"` is resolved on that node too: set `cuda` if that node
            has no GPU and the workers' nodes have one.

    The registry is checked as `karst-hub serve` does it. A Redis that does not answer yet is only logged: gateways wait
    for it, and Serve would not build a failed application again.

    Raises:
        ValueError: `redis_url` or `store_url` is not set, or a hub cannot use that registry.
    """
    if settings.redis_url is None or settings.store_url is None:
        raise ValueError("redis_url and store_url are required: every node of the cluster uses them")
    try:
        check_registry(settings.redis_url)
    except UnfitRegistry as error:
        if not error.may_pass:
            raise
        logger.warning("the registry does not answer, and the hub starts without it: %s", error)
    return application(settings)


def application(settings: Settings) -> serve.Application:
    """Return the Serve application of a hub whose registry was checked."""
    prewarming = Prewarming(str(settings.redis_url), settings.pinned)
    store = Store(str(settings.store_url))
    workers = serve.deployment(**worker_options(settings))(Worker).bind(
        settings, store, prewarming, partial(_workers_per_node, settings.max_workers), ray_metrics
    )
    gateway = serve.deployment(**gateway_options(settings))(Gateway)
    training = settings.training_cpus, settings.training_gpus
    return gateway.bind(partial(create_app, settings), workers, settings.min_workers == 0, *training)


def worker_options(settings: Settings) -> dict[str, Any]:
    """Return the Serve deployment options of the workers."""
    on_gpu = settings.torch_device.startswith("cuda")
    delays = settings.scale_up_s, settings.scale_down_s
    return {
        "name": "worker",
        # Calls wait at the worker, since only its fair queue knows which tenant is next.
        "max_ongoing_requests": WORKER_REQUESTS,
        "max_queued_requests": QUEUED_REQUESTS,
        "request_router_config": RequestRouterConfig(
            request_router_class=RendezvousRouter,  # type: ignore[arg-type]  # Ray's stubs declare every field a dict
            request_routing_stats_period_s=ROUTING_STATS_S,  # type: ignore[arg-type]
        ),
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 1 if on_gpu else 0},
        "graceful_shutdown_timeout_s": DRAIN_TIMEOUT_S,
        "logging_config": LOGGING,
        **replica_options(settings.min_workers, settings.max_workers, *delays, by_passes=True),
    }


def gateway_options(settings: Settings) -> dict[str, Any]:
    """Return the Serve deployment options of the gateways."""
    delays = settings.scale_up_s, settings.scale_down_s
    return {
        "name": "gateway",
        "max_ongoing_requests": GATEWAY_REQUESTS,
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": DRAIN_TIMEOUT_S,
        "logging_config": LOGGING,
        **replica_options(settings.min_gateways, settings.max_gateways, *delays),
    }


def _workers_per_node(max_workers: int) -> int:
    """Return the number of workers that Ray may place on this node; they share its CPU cores."""
    return max(1, min(max_workers, cpus_of_this_node()))


def deploy(settings: Settings) -> None:
    """Deploy the hub on the local cluster once Serve has its controller; return when a worker has its backbone.

    Raises:
        RuntimeError: a deployment does not start; the text has the deployments' messages with their tracebacks.
    """
    try:
        with frequent_polls():
            serve.run(application(settings), name=NAME, route_prefix="/")
    except RayError as error:
        raise RuntimeError(str(error)) from error
    except RuntimeError as error:  # its text has no reason; the deployments' messages have it
        deployments = serve.status().applications[NAME].deployments.values()
        raise RuntimeError("\n".join([str(error), *(d.message for d in deployments)])) from error
