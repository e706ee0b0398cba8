from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import Pipe
from pathlib import Path
from threading import Event, Thread

import pytest

from hub.cluster import local_cluster
from hub.local import deployer as deployer_module
from hub.local.deployer import Deployer
from hub.local.errors import StartError
from hub.settings import Settings


@pytest.mark.slow  # it imports torch and timm
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "nonsense"}, "nonsense"),
        ({"backbone": "demo", "checkpoint": Path("/no/such.safetensors")}, "such.safetensors"),
    ],
)
def test_deployer_names_a_backbone_that_cannot_be_loaded(values: dict[str, object], message: str) -> None:
    with Deployer(Settings().model_copy(update=values)) as deployer, pytest.raises(StartError, match=message):
        deployer.check_backbone()


def test_deployer_that_ends_early_is_an_error_with_its_status() -> None:
    with Deployer(Settings()) as deployer:
        deployer.process.kill()
        with pytest.raises(StartError, match="the process that deploys the hub ended with status -9"):
            deployer.check_backbone()


def test_deployer_ends_with_its_context() -> None:
    with Deployer(Settings()) as deployer:
        assert deployer.process.poll() is None

    assert deployer.process.poll() is not None


@pytest.mark.parametrize("failing", ["start_serve", "deploy"])
def test_the_first_failure_is_reported_while_the_other_step_goes_on(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Event()

    def step(name: str) -> Callable[..., None]:
        def run(*_settings: object) -> None:
            if name == failing:
                raise RuntimeError(f"{name} failed")
            assert end.wait(60)

        return run

    monkeypatch.setattr(deployer_module, "leave_out_tables", lambda: None)  # the other tests' process keeps its modules
    monkeypatch.setattr(local_cluster, "connect", lambda _address: None)
    monkeypatch.setattr(local_cluster, "start_serve", step("start_serve"))
    monkeypatch.setattr(local_cluster, "wait_for_controller", lambda _starting: None)
    monkeypatch.setattr(deployer_module, "_prepare", lambda *_: step("deploy"))
    ours, theirs = Pipe()
    process = Thread(target=deployer_module.main, args=(theirs,))
    process.start()
    try:
        ours.send(Settings())
        ours.send("an address")
        assert ours.poll(30)
        assert ours.recv() == f"{failing} failed"
        assert process.is_alive()  # the other step goes on
    finally:
        end.set()
        process.join(60)


def test_a_controller_is_not_awaited_after_serve_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cluster, "serve_has_controller", lambda: False)
    starting: Future[None] = Future()
    starting.set_exception(TimeoutError("no proxy"))
    with pytest.raises(TimeoutError, match="no proxy"):
        local_cluster.wait_for_controller(starting)
