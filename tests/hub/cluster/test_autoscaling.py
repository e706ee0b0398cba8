"""How many workers there should be; that the Serve application is what the settings say; and what the gateway does
about workers that are not there."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hub.errors import InvalidAdapter, Unavailable
from hub.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, at import
SERVE_YAML = Path(__file__).parents[3] / "deploy" / "serve.yaml"


def context(images=(), batches=(), queued: float = 0) -> SimpleNamespace:
    metrics = {"images": dict(enumerate(images)), "batch": dict(enumerate(batches))}
    return SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued)


@pytest.mark.parametrize(
    ("images", "batches", "queued", "workers"),
    [
        ([], [], 0, 0),
        ([0, 0], [1, 32], 0, 0),
        ([0.01], [32], 0, 1),  # hardly anything, and yet not nothing
        ([48], [32], 0, 1),  # one batch computes, half a batch waits
        ([49], [32], 0, 2),
        ([96, 96], [32, 32], 0, 4),
        ([6], [1], 0, 4),  # a CPU that takes an image a pass
        ([6], [32], 0, 1),
        ([], [], 3, 2),
        ([16], [16], 8, 1),
        ([16], [16], 9, 2),
        ([3], [], 0, 2),  # a worker that says nothing of its batches
    ],
)
def test_workers_follow_the_passes_that_are_under_way(images, batches, queued, workers) -> None:
    from hub.cluster.autoscaling import by_passes

    assert by_passes(context(images, batches, queued)) == (workers, {})


def test_nothing_told_yet_asks_for_nothing() -> None:
    from hub.cluster.autoscaling import by_passes

    assert by_passes(SimpleNamespace(aggregated_metrics=None, total_queued_requests=0.0)) == (0, {})


def built(**settings):
    from hub.cluster.app import build

    chosen = Settings(backbone="demo", redis_url="redis://r", store_url="/s", device="cpu", **settings)
    gateway = build(chosen)
    return gateway._bound_deployment, gateway._bound_deployment.init_args[1]._bound_deployment


def test_by_default_there_is_one_of_each_and_no_autoscaling() -> None:
    for deployment in built():
        assert (deployment._deployment_config.autoscaling_config, deployment.num_replicas) == (None, 1)


def test_gateways_and_workers_scale_apart() -> None:
    gateway, worker = built(max_workers=4, min_gateways=2, max_gateways=3, scale_up_s=2, scale_down_s=7)
    for deployment, bounds in ((gateway, (2, 3, 2)), (worker, (1, 4, 1))):
        config = deployment._deployment_config.autoscaling_config
        assert (config.min_replicas, config.max_replicas, config.initial_replicas) == bounds
        assert (config.upscale_delay_s, config.downscale_delay_s) == (2, 7)
        assert config.metrics_interval_s < config.look_back_period_s
    assert worker._deployment_config.autoscaling_config.policy.policy_function == "hub.cluster.autoscaling.by_passes"
    assert gateway._deployment_config.autoscaling_config.policy.is_default_policy_function()
    router = worker._deployment_config.request_router_config.request_router_class
    assert router == "hub.cluster.request_router.OwnersRouter"


def test_from_zero_one_worker_starts_all_the_same() -> None:
    """A backbone that cannot be loaded must show at the start."""
    gateway, worker = built(min_workers=0)
    config = worker._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (0, 1, 1)
    assert gateway.init_args[2] is True


def test_serve_yaml_is_a_config_of_serve_and_its_arguments_are_settings(monkeypatch) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from hub.cluster import app

    monkeypatch.setenv("HUB_REDIS_URL", "redis://r")
    monkeypatch.setenv("HUB_STORE_URL", "/s")
    monkeypatch.setenv("HUB_DEVICE", "cpu")
    (config,) = ServeDeploySchema.model_validate(yaml.safe_load(SERVE_YAML.read_text())).applications
    assert (config.name, config.import_path) == (app.NAME, "hub.cluster.app:build")
    built = call_user_app_builder_with_args_if_necessary(app.build, config.args)
    scale = built._bound_deployment.init_args[1]._bound_deployment._deployment_config.autoscaling_config
    assert scale.max_replicas == config.args["max_workers"]
    for wrong in ({"max_worker": 2}, {"slots": "many"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            call_user_app_builder_with_args_if_necessary(app.build, wrong)


def test_without_registry_and_store_nothing_is_built() -> None:
    from hub.cluster.app import build

    with pytest.raises(ValueError, match="redis_url and store_url must be set"):
        build(Settings(backbone="demo"))


class Handle:
    """A deployment handle whose calls end as told, one after another."""

    def __init__(self, *outcomes) -> None:
        self.outcomes = list(outcomes)
        self.calls = 0
        self.asked_for: list[str] = []
        self.raised = True

    def options(self, *, session_id: str) -> "Handle":
        self.asked_for.append(session_id)
        return self

    def __getattr__(self, _method) -> "Handle":
        return self

    def remote(self, *_arguments) -> asyncio.Future:
        self.calls += 1
        future = asyncio.get_running_loop().create_future()
        outcome = self.outcomes.pop(0)
        if self.raised and isinstance(outcome, Exception):
            future.set_exception(outcome)
        elif outcome is not None:
            future.set_result(outcome)
        return future


def asked(handle: Handle, to_zero: bool = False, times: int = 1, method: str = "limits", *arguments) -> list:
    from hub.cluster.gateway import ServeWorkers

    async def ask() -> list:
        workers = ServeWorkers(handle, to_zero)
        return [await getattr(workers, method)(*arguments) for _ in range(times)]

    return asyncio.run(ask())


def test_a_call_whose_worker_died_goes_to_another(monkeypatch) -> None:
    import ray

    from hub.cluster import gateway

    monkeypatch.setattr(gateway, "PAUSE_S", 0.0)
    died = ray.exceptions.ActorDiedError(), ray.exceptions.ActorUnavailableError("gone", None)
    handle = Handle(*died, "answer")
    assert asked(handle, False, 1, "classify", "t", "d", [], 1.0) == ["answer"]
    handle = Handle(*died, *died)
    with pytest.raises(Unavailable, match="died"):
        asked(handle, False, 1, "classify", "t", "d", [], 1.0)
    assert handle.calls == gateway.TRIES == 3
    handle = Handle(Unavailable("the store is away"), "never")
    with pytest.raises(Unavailable, match="store"):
        asked(handle, False, 1, "classify", "t", "d", [], 1.0)


def test_what_one_worker_cannot_load_another_may_hold() -> None:
    away = Unavailable("the store is away")
    handle = Handle(away, ["answer"])
    # A value, not raised: see `Worker.answer`.
    handle.raised = False
    assert asked(handle, False, 1, "classify", "t", "d", [], 1.0) == [["answer"]]
    assert handle.asked_for == ["d", "d:warm"]
    handle = Handle(away, away)
    handle.raised = False
    with pytest.raises(Unavailable, match="store is away"):
        asked(handle, False, 1, "classify", "t", "d", [], 1.0)
    handle = Handle(InvalidAdapter("it does not fit"), "never")
    handle.raised = False
    with pytest.raises(InvalidAdapter):
        asked(handle, False, 1, "classify", "t", "d", [], 1.0)


def test_readiness_asks_a_worker_each_time_but_wakes_none_where_none_need_be(monkeypatch) -> None:
    from hub.cluster import gateway

    handle = Handle("a", "b")
    assert asked(handle, to_zero=False, times=2) == ["a", "b"]
    assert asked(Handle("a"), to_zero=True, times=2) == ["a", "a"]
    monkeypatch.setattr(gateway, "READY_S", 0.01)
    with pytest.raises(Unavailable, match="no worker answers"):
        asked(Handle(None), to_zero=False)
    monkeypatch.setattr(gateway, "COLD_S", 0.01)
    with pytest.raises(Unavailable, match="no worker answers"):
        asked(Handle(None), to_zero=True)
