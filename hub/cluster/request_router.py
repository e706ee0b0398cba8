"""Serve's request router of the workers, one in each gateway; `rendezvous` decides.

Serve's consistent-hash router sends all calls of an adapter to one worker until that worker refuses, and a worker
refuses only after thousands of calls. The busiest tasks would overload their worker.
"""

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ..worker_api import ROUTING_DIGEST_CHARS
from .ray_compat import PendingRequestIndex, pause_between_rounds, queue_length, session_id
from .rendezvous import RoutingTable, WorkerReport


class RendezvousRouter(PendingRequestIndex, RequestRouter):
    """Routes calls by their adapter. The routing key, see `RoutingTable.route`, is the call's session id."""

    def initialize_state(self, **_kwargs: object) -> None:
        self._table: RoutingTable[ReplicaID] = RoutingTable(ROUTING_DIGEST_CHARS)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the running workers and their reports; Serve calls this when either changes."""
        super().update_replicas(replicas)
        self._table.update({r.replica_id: _report(r) for r in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return one worker after the other, best first.

        A call without an adapter gets all workers; Serve takes the least loaded one.
        """
        if pending_request is None:
            return [candidate_replicas]
        self.add_pending(pending_request)
        pause_between_rounds(pending_request)
        key = session_id(pending_request)
        if not key or not candidate_replicas:
            return [candidate_replicas]
        replicas = {r.replica_id: r for r in candidate_replicas}
        groups = self._table.route(key, replicas, lambda replica: queue_length(self, replica))
        return [[replicas[replica_id] for replica_id in group] for group in groups]


def _report(replica: RunningReplica) -> WorkerReport:
    stats = replica.routing_stats
    batch = int(stats["batch"]) if "batch" in stats else None
    return WorkerReport(replica.replica_id.unique_id, frozenset(stats.get("digests", ())), batch)
