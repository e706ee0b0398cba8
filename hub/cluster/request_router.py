"""Serve's request router of the workers, one in each gateway; `rendezvous` decides.

A gateway chooses the worker of a call before it sends the call, so that calls to one worker leave together
(`worker_links`). It asks `KNOWN_WORKERS`, and pins the send to that worker.

Serve's consistent-hash router sends all calls of an adapter to one worker until that worker refuses, and a worker
refuses only after thousands of calls. The busiest tasks would overload their worker.
"""

from collections.abc import Callable, Collection

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from ..worker_api import ROUTING_DIGEST_CHARS
from .ray_compat import PendingRequestIndex, pause_between_rounds, queue_length, session_id
from .rendezvous import RoutingTable, WorkerReport

PINNED = "worker:"  # prefix of a routing key: the worker of this name, any other only if that one takes no calls


class KnownWorkers:
    """Running workers of the deployment that a process calls, as its router last heard of them."""

    def __init__(self) -> None:
        self.names: Collection[str] = ()
        self.table: RoutingTable[str] = RoutingTable(ROUTING_DIGEST_CHARS)

    def update(self, reports: Collection[WorkerReport]) -> None:
        """Replace the workers and their reports."""
        found = {report.name: report for report in reports}
        self.table.update(found)
        self.names = found.keys()

    def choose(self, key: str, load: Callable[[str], int], without: Collection[str] = ()) -> str | None:
        """Return the best worker for a call; None if there is none.

        Args:
            key, load: as in `RoutingTable.route`.
            without: workers that get no calls.
        """
        candidates = [name for name in self.names if name not in without] if without else self.names
        if not candidates:
            return None
        best = self.table.route(key, candidates, load)[0]
        return best[0] if len(best) == 1 else min(best, key=load)


# Serve creates the router of a process itself, so nothing can be passed to it.
KNOWN_WORKERS = KnownWorkers()


class RendezvousRouter(PendingRequestIndex, RequestRouter):
    """Routes calls by their adapter. The routing key, see `RoutingTable.route`, is the call's session id."""

    def initialize_state(self, **_kwargs: object) -> None:
        self._workers = KNOWN_WORKERS
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
