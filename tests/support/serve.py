"""Parts of Ray Serve that run without a cluster: a request router with replicas, and HAProxy's configuration.

All private interfaces of Ray that tests use are here and in `tests/hub/cluster/test_ray_compat.py`.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve._private.request_router.common import PendingRequest
from ray.serve.config import HTTPOptions
from ray.serve.request_router import RunningReplica

from hub.cluster.request_router import RendezvousRouter

WORKER = DeploymentID("worker")


class Replica(SimpleNamespace):
    """Running replica as a router sees it: a name, the reported adapters, and its queue."""

    def __init__(self, name: str, *digests: str, queued: int = 0) -> None:
        stats = {"digests": digests, "batch": 1} if digests else {}
        super().__init__(replica_id=ReplicaID(name, WORKER), routing_stats=stats, max_ongoing_requests=4096)
        self.queued = queued

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queued


async def running_router(*replicas: Replica) -> RendezvousRouter:
    """Return a router that knows these replicas and the lengths of their queues."""
    router = RendezvousRouter(WORKER, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.initialize_state()
    await update(router, *replicas)
    return router


async def update(router: RendezvousRouter, *replicas: Replica) -> None:
    """Give a router new replicas, and wait until it knows the lengths of their queues."""
    router.update_replicas(running(*replicas))
    probes = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*probes)


def running(*replicas: Replica) -> list[RunningReplica]:
    """Return the replicas with the type that Serve's interface has."""
    found: list[RunningReplica] = []
    found.extend(replicas)  # type: ignore[arg-type]  # the stand-in has what routers read
    return found


def pending_call(session_id: str = "", http_request: str = "one") -> PendingRequest:
    """Return a call that waits for a replica.

    Args:
        session_id: the call's routing key.
        http_request: id of the HTTP request that made the call.
    """
    metadata = RequestMetadata(request_id=http_request, internal_request_id=http_request, session_id=session_id)
    return PendingRequest(args=[], kwargs={}, metadata=metadata)


async def assigned(router: RendezvousRouter, *calls: PendingRequest) -> list[str]:
    """Return the names of the replicas that Serve assigns to calls that come at once."""
    async with asyncio.timeout(20):  # a call that Serve loses waits for ever
        chosen = await asyncio.gather(*(router._choose_replica_for_request(call) for call in calls))
    return [replica.replica_id.unique_id for replica in chosen]


def haproxy_api(
    folder: Path, port: int = 8000, ports: Sequence[int] = (30000, 30001), check_interval: str = "5s"
) -> HAProxyApi:
    """Return Ray's manager of HAProxy for a hub with gateways on these ports; its files are in the folder."""
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        health_check_inter=check_interval,
        http_options=HTTPOptions(host="127.0.0.1", port=port),
    )
    return HAProxyApi(config, backends(ports), config_file_path=str(folder / "haproxy.cfg"))


def backends(ports: Sequence[int]) -> dict[str, BackendConfig]:
    """Return the backend of a hub with gateways on these ports, as Ray's manager of HAProxy takes it."""
    gateways = [ServerConfig(f"gateway-{port - 30000}", "127.0.0.1", port) for port in ports]
    backend = BackendConfig(
        name="http-karst-hub",
        path_prefix="/",
        app_name="karst-hub",
        servers=gateways,
        fallback_server=ServerConfig("fallback", "127.0.0.1", 8500),
        ingress_deployment_name="gateway",
    )
    return {backend.name: backend}


def ray_haproxy_config(folder: Path) -> str:
    """Return the HAProxy configuration that Ray generates."""
    haproxy_api(folder)._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()
