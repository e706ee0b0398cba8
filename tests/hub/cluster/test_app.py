"""The Serve application of a hub follows its settings."""

import asyncio
from pathlib import Path

import pytest
from ray import serve

from hub.cluster.app import NAME, build, gateway_options, worker_options
from hub.cluster.request_router import RendezvousRouter
from hub.local.ports import free_port
from hub.settings import Settings
from tests.support.redis_servers import redis_server, two_servers

SETTINGS = Settings(backbone="demo", redis_url="redis://r", store_url="/s", device="cpu")


def changed(**values: object) -> Settings:
    return SETTINGS.model_copy(update=values)


def test_one_gateway_and_one_worker_run_by_default() -> None:
    for options in (gateway_options(SETTINGS), worker_options(SETTINGS)):
        assert options["num_replicas"] == 1
        assert "autoscaling_config" not in options


def test_gateways_and_workers_scale_separately() -> None:
    settings = changed(max_workers=4, min_gateways=2, max_gateways=3, scale_up_s=2, scale_down_s=7)
    gateways, workers = (o(settings)["autoscaling_config"] for o in (gateway_options, worker_options))
    assert (gateways.min_replicas, gateways.max_replicas) == (2, 3)
    assert (workers.min_replicas, workers.max_replicas) == (1, 4)
    assert workers.policy.policy_function == "hub.cluster.autoscaling.workers_for_load"
    assert gateways.policy.is_default_policy_function()


def test_calls_to_workers_use_the_hub_s_request_router() -> None:
    router = worker_options(SETTINGS)["request_router_config"]
    assert router.get_request_router_class() is RendezvousRouter


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 1), ("cuda:0", 1)])
def test_a_worker_reserves_a_gpu_when_its_device_is_cuda(device: str, gpus: int) -> None:
    assert worker_options(changed(device=device))["ray_actor_options"] == {"num_cpus": 1, "num_gpus": gpus}


def test_build_returns_an_application_of_valid_deployments() -> None:
    assert isinstance(build(changed(min_workers=0)), serve.Application)
    assert NAME == "karst-hub"


def test_build_refuses_a_redis_that_evicts(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as server:
        with pytest.raises(ValueError, match="maxmemory-policy of this Redis is allkeys-lru"):
            build(changed(redis_url=server.url))
        server.client.config_set("maxmemory-policy", "noeviction")
        assert isinstance(build(changed(redis_url=server.url)), serve.Application)


def test_build_refuses_a_replica(tmp_path: Path) -> None:
    with two_servers(tmp_path) as (first, second, _):
        with pytest.raises(ValueError, match="This server is a replica of"):
            build(changed(redis_url=second.url))
        assert isinstance(build(changed(redis_url=first.url)), serve.Application)


def test_build_refuses_a_wrong_password_without_showing_it(tmp_path: Path) -> None:
    with redis_server(tmp_path, password="right") as server:
        with pytest.raises(ValueError, match="Correct user and password") as caught:
            build(changed(redis_url=f"redis://:hunter2@127.0.0.1:{server.port}/0"))
        assert "hunter2" not in str(caught.value)


def test_build_only_logs_a_redis_that_does_not_answer_yet(caplog: pytest.LogCaptureFixture) -> None:
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    assert isinstance(build(changed(redis_url=url)), serve.Application)
    assert "the registry does not answer" in caplog.text
    assert "Connection refused" in caplog.text
    assert "hunter2" not in caplog.text


def test_build_runs_inside_an_event_loop(tmp_path: Path) -> None:
    async def main() -> None:
        build(changed(redis_url=server.url))

    with redis_server(tmp_path) as server:
        asyncio.run(main())


@pytest.mark.parametrize("missing", ["redis_url", "store_url"])
def test_build_fails_when_registry_or_store_is_not_set(missing: str) -> None:
    with pytest.raises(ValueError, match="redis_url and store_url are required"):
        build(changed(**{missing: None}))
