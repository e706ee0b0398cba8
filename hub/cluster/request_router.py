"""Serve's request router of the workers, one in each gateway; `rendezvous` decides.

A gateway chooses the worker of a call before it sends the call, so that calls to one worker leave together
(`worker_links`). It asks `known_workers`, and pins the send to that worker.

Serve's consistent-hash router sends all calls of an adapter to one worker until that worker refuses, and a worker
refuses only after thousands of calls. The busiest tasks would overload their worker.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .ray_compat import PendingRequestIndex, pause_between_rounds, queue_length, session_id
from .rendezvous import WorkerReport, known_workers

PINNED = "worker:"  # prefix of a routing key: the worker of this name, any other only if that one takes no calls


class RendezvousRouter(PendingRequestIndex, RequestRouter):
    """Routes calls by their adapter. The routing key, see `RoutingTable.route`, is the call's session id."""

    def initialize_state(self, **_kwargs: object) -> None:
        self._workers = known_workers()
        self._workers.update([])

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the running workers and their reports; Serve calls this when either changes."""
        super().update_replicas(replicas)
        self._workers.update([_report(r) for r in replicas])

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
        replicas = {r.replica_id.unique_id: r for r in candidate_replicas}
        if key.startswith(PINNED):
            pinned = replicas.pop(key.removeprefix(PINNED), None)
            return [group for group in ([pinned] if pinned else [], list(replicas.values())) if group]
        groups = self._workers.table.route(key, replicas, lambda name: queue_length(self, replicas[name]))
        return [[replicas[name] for name in group] for group in groups]


def _report(replica: RunningReplica) -> WorkerReport:
    stats = replica.routing_stats
    batch = int(stats["batch"]) if "batch" in stats else None
    return WorkerReport(replica.replica_id.unique_id, frozenset(stats.get("digests", ())), batch)
