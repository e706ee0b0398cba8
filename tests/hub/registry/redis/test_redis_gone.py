"""A gateway without Redis: cached tasks classify, changes are refused, and everything works when Redis is back."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
from httpx2 import Response
from starlette.testclient import TestClient

from adapters import Adapter, Backbone
from hub.local.embedded_redis import embedded_redis
from tests.support.hub_app import OCTETS, Hub, bearer, make_api, running
from tests.support.models import png, wait_until


def classify(gateway: TestClient, task: str = "flowers") -> Response:
    return gateway.post(f"/v1/tasks/{task}/classify", content=png())


@contextmanager
def gateway_with_cached_task(hub: Hub) -> Iterator[TestClient]:
    """Start a gateway that has cached task, key and tenant, and that no change event can reach any more.

    It starts after the changes. Otherwise a late event could drop the cached values.
    """
    api = make_api(hub.redis_url, hub.store_folder, hub.engine, redis_patience=1)
    with TestClient(api, headers=bearer(hub.key)) as gateway:
        wait_until(
            lambda: classify(gateway).status_code == 200 and bool(api.state.cache.cached_task("default", "flowers"))
        )
        assert classify(gateway).status_code == 200  # the first call could have cached the task without the key
        yield gateway


def test_a_gateway_classifies_with_cached_tasks_when_redis_is_stopped(
    backbone: Backbone, adapters: list[Adapter], tmp_path: Path
) -> None:
    server = ExitStack()
    url = server.enter_context(embedded_redis(tmp_path))
    with server, running(url, backbone, tmp_path / "store", redis_patience=1) as hub:
        hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
        with gateway_with_cached_task(hub) as gateway:

            def register() -> Response:
                return gateway.post("/v1/tasks/flowers/versions", content=adapters[1].data, headers=OCTETS)

            server.close()
            stored = hub.stored()
            assert classify(gateway).json()["version"] == 1
            for reply in (
                register(),
                classify(gateway, "unknown"),
                gateway.get("/v1/tasks"),
                gateway.delete("/v1/tasks/flowers"),
            ):
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
                assert reply.json()["detail"].startswith("The registry (Redis) does not answer")
            assert gateway.get("/v1/tasks", headers={"authorization": "Bearer kh_new"}).status_code == 503
            assert hub.stored() == stored

            with embedded_redis(tmp_path):  # the same data, from its append-only file
                wait_until(lambda: register().status_code in (200, 201))
                assert classify(gateway).json()["version"] == 2
                assert [v["version"] for v in gateway.get("/v1/tasks/flowers").json()["versions"]] == [1, 2]


def test_a_change_at_one_gateway_reaches_another_gateway(
    empty_redis: str, backbone: Backbone, adapters: list[Adapter], tmp_path: Path
) -> None:
    with running(empty_redis, backbone, tmp_path / "store", redis_patience=1) as one, one.another_gateway() as two:
        for i in range(2):
            one.http.post("/v1/tasks/flowers/versions", content=adapters[i].data, headers=OCTETS)
            number = i + 1
            wait_until(lambda: bool(classify(two).json().get("version") == number))  # noqa: B023 (called at once)
        one.http.delete("/v1/tasks/flowers")
        wait_until(lambda: classify(two).status_code == 404)


def test_a_gateway_classifies_with_cached_tasks_when_redis_hangs(
    backbone: Backbone, adapters: list[Adapter], tmp_path: Path
) -> None:
    with embedded_redis(tmp_path) as url, running(url, backbone, tmp_path / "store", redis_patience=1) as hub:
        hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
        with gateway_with_cached_task(hub) as gateway:
            with redis.Redis.from_url(url) as client:
                server = client.info()["process_id"]
            os.kill(server, signal.SIGSTOP)
            try:
                for _ in range(30):
                    assert classify(gateway).status_code == 200
                reply = gateway.get("/v1/tasks")
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
            finally:
                os.kill(server, signal.SIGCONT)
            wait_until(lambda: gateway.get("/v1/tasks").status_code == 200)
