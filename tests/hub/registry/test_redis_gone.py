"""With Redis gone, known tasks are classified from memory and changes are refused; with Redis back, all goes on."""

import os
import signal
import time

import redis

from hub.local.embedded_redis import embedded_redis
from tests.support.hub_app import OCTETS, running
from tests.support.models import png, wait_until


def test_redis_gone_and_back(backbone, adapters, tmp_path) -> None:
    server = embedded_redis(tmp_path)
    url = server.__enter__()
    with running(url, backbone, tmp_path / "store") as hub:

        def register(i: int):
            return hub.http.post("/v1/tasks/flowers/versions", content=adapters[i].data, headers=OCTETS)

        def classify(task: str = "flowers"):
            return hub.http.post(f"/v1/tasks/{task}/classify", content=png())

        assert register(0).status_code == 201
        wait_until(lambda: classify().json()["version"] == 1 and hub.remembers("flowers"))
        server.__exit__(None, None, None)
        stored = hub.stored()

        assert classify().json()["version"] == 1
        for answer in (
            register(1),
            classify("unknown"),
            hub.http.get("/v1/tasks"),
            hub.http.delete("/v1/tasks/flowers"),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            assert answer.json()["detail"].startswith("the registry does not answer")
        assert hub.http.get("/v1/tasks", headers={"authorization": "Bearer kh_new"}).status_code == 503
        assert hub.stored() == stored

        with embedded_redis(tmp_path):  # the same data, from its append-only file
            wait_until(lambda: register(1).status_code in (200, 201))
            assert classify().json()["version"] == 2
            assert [v["version"] for v in hub.http.get("/v1/tasks/flowers").json()["versions"]] == [1, 2]


def test_a_change_elsewhere_reaches_this_gateway(empty_redis, backbone, adapters, tmp_path) -> None:
    with running(empty_redis, backbone, tmp_path / "store") as one, one.another_gateway() as two:
        for i in range(2):
            one.http.post("/v1/tasks/flowers/versions", content=adapters[i].data, headers=OCTETS)
            wait_until(lambda i=i: two.post("/v1/tasks/flowers/classify", content=png()).json().get("version") == i + 1)
        one.http.delete("/v1/tasks/flowers")
        wait_until(lambda: two.post("/v1/tasks/flowers/classify", content=png()).status_code == 404)


def test_a_redis_that_hangs_holds_up_nobody(backbone, adapters, tmp_path) -> None:
    with embedded_redis(tmp_path) as url, running(url, backbone, tmp_path / "store") as hub:
        hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
        wait_until(lambda: hub.http.post("/v1/tasks/flowers/classify", content=png()).status_code == 200)
        wait_until(lambda: hub.remembers("flowers"))
        with redis.Redis.from_url(url) as client:
            server = client.info()["process_id"]
        os.kill(server, signal.SIGSTOP)
        try:
            began = time.monotonic()
            for _ in range(30):
                assert hub.http.post("/v1/tasks/flowers/classify", content=png()).status_code == 200
            assert time.monotonic() - began < 20  # not 5 s for each
            answer = hub.http.get("/v1/tasks")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        finally:
            os.kill(server, signal.SIGCONT)
        wait_until(lambda: hub.http.get("/v1/tasks").status_code == 200)
