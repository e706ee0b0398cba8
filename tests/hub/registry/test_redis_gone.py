"""A gateway without Redis: cached tasks classify, changes are refused, and everything works when Redis is back."""

import os
import signal
from pathlib import Path

import redis
from httpx2 import Response

from adapters import Adapter, Backbone
from hub.local.embedded_redis import embedded_redis
from tests.hub.conftest import OCTETS, running
from tests.support.models import png, wait_until


def test_a_gateway_classifies_with_cached_tasks_when_redis_is_stopped(
    backbone: Backbone, adapters: list[Adapter], tmp_path: Path
) -> None:
    server = embedded_redis(tmp_path)
    url = server.__enter__()
    with running(url, backbone, tmp_path / "store") as hub:

        def register(i: int) -> Response:
            return hub.http.post("/v1/tasks/flowers/versions", content=adapters[i].data, headers=OCTETS)

        def classify(task: str = "flowers") -> Response:
            return hub.http.post(f"/v1/tasks/{task}/classify", content=png())

        assert register(0).status_code == 201
        wait_until(lambda: classify().json()["version"] == 1 and hub.remembers("flowers"))
        server.__exit__(None, None, None)
        stored = hub.stored()

        assert classify().json()["version"] == 1
        for reply in (
            register(1),
            classify("unknown"),
            hub.http.get("/v1/tasks"),
            hub.http.delete("/v1/tasks/flowers"),
        ):
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
            assert reply.json()["detail"].startswith("The registry (Redis) does not answer")
        assert hub.http.get("/v1/tasks", headers={"authorization": "Bearer kh_new"}).status_code == 503
        assert hub.stored() == stored

        with embedded_redis(tmp_path):  # the same data, from its append-only file
            wait_until(lambda: register(1).status_code in (200, 201))
            assert classify().json()["version"] == 2
            assert [v["version"] for v in hub.http.get("/v1/tasks/flowers").json()["versions"]] == [1, 2]


def test_a_change_at_one_gateway_reaches_another_gateway(
    empty_redis: str, backbone: Backbone, adapters: list[Adapter], tmp_path: Path
) -> None:
    with running(empty_redis, backbone, tmp_path / "store") as one, one.another_gateway() as two:

        def classify() -> Response:
            return two.post("/v1/tasks/flowers/classify", content=png())

        for i in range(2):
            one.http.post("/v1/tasks/flowers/versions", content=adapters[i].data, headers=OCTETS)
            number = i + 1
            wait_until(lambda: bool(classify().json().get("version") == number))  # noqa: B023 (called at once)
        one.http.delete("/v1/tasks/flowers")
        wait_until(lambda: classify().status_code == 404)


def test_a_gateway_answers_at_once_when_redis_hangs(
    backbone: Backbone, adapters: list[Adapter], tmp_path: Path
) -> None:
    with embedded_redis(tmp_path) as url, running(url, backbone, tmp_path / "store") as hub:
        hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
        wait_until(lambda: hub.http.post("/v1/tasks/flowers/classify", content=png()).status_code == 200)
        wait_until(lambda: hub.remembers("flowers"))
        with redis.Redis.from_url(url) as client:
            server = client.info()["process_id"]
        os.kill(server, signal.SIGSTOP)
        try:
            for _ in range(30):
                assert hub.http.post("/v1/tasks/flowers/classify", content=png()).status_code == 200
            reply = hub.http.get("/v1/tasks")
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
        finally:
            os.kill(server, signal.SIGCONT)
        wait_until(lambda: hub.http.get("/v1/tasks").status_code == 200)
