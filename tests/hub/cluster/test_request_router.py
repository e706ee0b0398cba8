"""The request router of the workers in Serve's own classes; `test_rendezvous.py` tests its decisions."""

import asyncio
import subprocess
import sys

from ray.serve.config import RequestRouterConfig

from hub.cluster.rendezvous import RESIDENT_ONLY, RendezvousHash, known_workers
from hub.cluster.request_router import PINNED, RendezvousRouter
from tests.support.serve import Replica, assigned, pending_call, running, running_router, update

DIGEST = f"{7:064x}"
GATEWAY = """
import asyncio, sys
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource
from tests.support.serve import WORKER, Replica, update
from hub.cluster.rendezvous import known_workers

async def route():
    router = cloudpickle.loads(sys.stdin.buffer.read())(
        WORKER, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    router.initialize_state()
    await update(router, Replica("w7"))

asyncio.run(route())
print(*known_workers().names)
"""


def test_serve_assigns_a_call_to_an_owner_of_its_adapter() -> None:
    async def route() -> None:
        replicas = [Replica(f"w{i}") for i in range(5)]
        router = await running_router(*replicas)
        first, second = RendezvousHash({r.replica_id: r.replica_id.unique_id for r in replicas}).owners(DIGEST)
        assert await assigned(router, pending_call(DIGEST)) == [first.unique_id]
        router.on_send_request(first)
        assert await assigned(router, pending_call(DIGEST)) == [second.unique_id]

    asyncio.run(route())


def test_serve_assigns_a_call_to_the_owner_that_reports_the_adapter() -> None:
    async def route() -> None:
        names = [f"w{i}" for i in range(5)]
        _, second = RendezvousHash({name: name for name in names}).owners(DIGEST)
        router = await running_router(*(Replica(name) for name in names))
        await update(router, *(Replica(name, *([DIGEST[:16]] if name == second else [])) for name in names))
        assert await assigned(router, pending_call(DIGEST)) == [second]

    asyncio.run(route())


def test_serve_assigns_a_repeated_call_to_a_worker_that_reports_the_adapter() -> None:
    async def route() -> None:
        router = await running_router(Replica("w0"), Replica("w1", DIGEST[:16]), Replica("w2"))
        calls = [pending_call(DIGEST + RESIDENT_ONLY) for _ in range(4)]
        assert await assigned(router, *calls) == ["w1"] * 4

    asyncio.run(route())


def test_a_call_without_an_adapter_is_offered_to_all_workers() -> None:
    async def route() -> None:
        replicas = running(Replica("w0"), Replica("w1"))
        router = await running_router()
        assert await router.choose_replicas(replicas, pending_call()) == [replicas]
        assert await router.choose_replicas(replicas, None) == [replicas]
        assert await router.choose_replicas([], pending_call(DIGEST)) == [[]]

    asyncio.run(route())


def test_a_pinned_call_goes_to_its_worker_and_to_others_only_when_that_one_is_gone() -> None:
    async def route() -> None:
        replicas = running(Replica("w0"), Replica("w1"), Replica("w2"))
        router = await running_router()
        groups = await router.choose_replicas(replicas, pending_call(PINNED + "w1"))
        assert groups == [[replicas[1]], [replicas[0], replicas[2]]]
        groups = await router.choose_replicas([replicas[0], replicas[2]], pending_call(PINNED + "w1"))
        assert groups == [[replicas[0], replicas[2]]]
        assert await router.choose_replicas([replicas[1]], pending_call(PINNED + "w1")) == [[replicas[1]]]

    asyncio.run(route())


def test_a_gateway_knows_the_workers_that_its_router_knows() -> None:
    async def route() -> None:
        router = await running_router(Replica("w0"), Replica("w1", DIGEST[:16]))
        assert known_workers().choose(DIGEST + RESIDENT_ONLY, lambda _: 0) == "w1"
        assert known_workers().choose(DIGEST, lambda _: 0, ["w1"]) == "w0"
        assert known_workers().choose(DIGEST, lambda _: 0, ["w0", "w1"]) is None
        await update(router, Replica("w2"))
        assert known_workers().choose(DIGEST, lambda _: 0) == "w2"

    asyncio.run(route())


def test_a_gateway_knows_the_workers_when_serve_copies_the_router_into_its_process() -> None:
    config = RequestRouterConfig(request_router_class=RendezvousRouter)  # type: ignore[arg-type]
    copy = config.get_serialized_request_router_cls()
    assert copy is not None
    found = subprocess.run([sys.executable, "-c", GATEWAY], input=copy, capture_output=True, check=True, timeout=120)
    assert found.stdout.decode().split() == ["w7"]
