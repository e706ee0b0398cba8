from pathlib import Path

import pytest

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
