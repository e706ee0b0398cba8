"""The Serve application of a hub follows its settings."""

import pytest
from ray import serve

from hub.cluster.app import NAME, build, gateway_options, worker_options
from hub.cluster.request_router import RendezvousRouter
from hub.settings import Settings

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


@pytest.mark.parametrize("missing", ["redis_url", "store_url"])
def test_build_fails_when_registry_or_store_is_not_set(missing: str) -> None:
    with pytest.raises(ValueError, match="redis_url and store_url are required"):
        build(changed(**{missing: None}))
