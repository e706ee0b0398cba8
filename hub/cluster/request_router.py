"""Ray Serve's side of `owners`: the request router that every gateway has for the workers.

Serve's own consistent-hash router sends all calls of an adapter to one worker until that refuses, and a worker refuses
after thousands of calls; so the busiest tasks would make their worker a hot spot.
"""

import random
from weakref import WeakValueDictionary

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ..worker_api import ROUTING_DIGEST_CHARS
from .rendezvous import WARM, Owners, ranked

SAMPLE = 32  # workers that are looked at for a call, beside the owners; all, up to this many


class OwnersRouter(RequestRouter):
    """Sends a call to an owner of its adapter that has room. The adapter's digest is the call's `session_id`,
    with `owners.WARM` behind it where an owner could not load it."""

    def initialize_state(self, **_kwargs: object) -> None:
        self._owners: Owners[ReplicaID] = Owners({})
        self._resident: dict[ReplicaID, frozenset[str]] = {}
        self._batch = 1
        # By the identity of their metadata: Serve's own index is by `internal_request_id`, which all calls of one HTTP
        # request share, so that it would forget all but one of those that wait at the same time.
        self._pending: WeakValueDictionary[int, PendingRequest] = WeakValueDictionary()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve tells which workers there are, and what they told of themselves, when either changes."""
        super().update_replicas(replicas)
        if self._owners.workers != {r.replica_id for r in replicas}:
            self._owners = Owners({r.replica_id: r.replica_id.unique_id for r in replicas})
        self._resident = {r.replica_id: frozenset(r.routing_stats.get("digests", ())) for r in replicas}
        self._batch = int(min((r.routing_stats["batch"] for r in replicas if "batch" in r.routing_stats), default=1))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One worker after the other, best first; for a call of no adapter all of them, of which Serve takes the least
        busy one."""
        if pending_request is None:
            return [candidate_replicas]
        self._pending[id(pending_request.metadata)] = pending_request
        pending_request.routing_context.should_backoff = True  # between two rounds over all workers
        session = pending_request.metadata.session_id
        if not session or not candidate_replicas:
            return [candidate_replicas]
        digest = session.removesuffix(WARM)
        if digest != session and (holders := [r for r in candidate_replicas if self._holds(r.replica_id, digest)]):
            return [holders]
        replicas = {r.replica_id: r for r in candidate_replicas}
        owners = [owner for owner in self._owners.of(digest) if owner in replicas]  # others have just died
        seen = list(replicas) if len(replicas) <= SAMPLE else {*owners, *random.sample(list(replicas), SAMPLE)}
        # Unknown: this gateway sent nothing there for ten seconds. Serve asks the worker itself before it sends.
        loads = {name: self.replica_queue_len_cache.get(name) or 0 for name in seen}
        resident = {name for name in seen if self._holds(name, digest)}
        best = ranked(owners, loads, resident, self._batch)
        return [*([replicas[name]] for name in best), [replicas[name] for name in seen if name not in best]]

    def _holds(self, worker: ReplicaID, digest: str) -> bool:
        return digest[:ROUTING_DIGEST_CHARS] in self._resident.get(worker, ())

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: object | None = None
    ) -> PendingRequest | None:
        """The very call that a worker was chosen for; Serve asks this before it hands a chosen worker out."""
        found = self._pending.pop(id(request_metadata), None)
        return None if found is None or found.future.done() else found
