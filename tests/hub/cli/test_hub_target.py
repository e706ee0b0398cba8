"""`karst-hub train` beside a hub: it trains for the hub's backbone, and refuses another one before it trains."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from adapters import BackboneError, load_backbone
from hub.cli.main import app
from hub.local.ports import free_port
from tests.support.asgi import listening
from tests.support.hub_app import OCTETS, Hub, running
from tests.support.image_sets import write_digits

Train = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "data", 0, 8)


@pytest.fixture
def train(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Function that trains digits.safetensors by the recipe `instant`, without HUB_BACKBONE."""
    monkeypatch.delenv("HUB_BACKBONE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*options: str, images: Path = data) -> Result:
        arguments = ["train", str(images), "-o", str(tmp_path / "digits.safetensors"), *options]
        if "--recipe" not in options:
            arguments += ["--recipe", "instant"]
        return CliRunner().invoke(app, arguments)

    return run


@pytest.fixture
def known(hub: Hub, url: str, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, with its URL and its owner's key in the environment."""
    monkeypatch.setenv("HUB_URL", url)
    monkeypatch.setenv("HUB_KEY", hub.key)
    return hub


def test_train_takes_the_hub_s_backbone_when_none_is_given(known: Hub, train: Train, tmp_path: Path) -> None:
    done = train("--json")
    assert done.exit_code == 0, done.stderr
    assert "serves demo" in done.stderr
    assert "32 x 32 pixels" in done.stderr
    assert "in_use" not in json.loads(done.stdout)
    data = (tmp_path / "digits.safetensors").read_bytes()
    assert known.http.post("/v1/tasks/digits/versions", content=data, headers=OCTETS).status_code == 201


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backbone", "vit_base_patch16_224"), "the backbone is vit_base_patch16_224 (--backbone or HUB_BACKBONE)"),
        (("--image-size", "64"), "the image size is 64 (--image-size or HUB_IMAGE_SIZE)"),
        (("--recipe", "karst", "--kernels", "5"), "--kernels 5: the hub at "),
        (("--recipe", "karst", "--rank", "9"), "--rank 9: the hub at "),
        (("--recipe", "karst", "--factor", "4"), "--factor 4: the hub at "),
    ],
)
def test_train_refuses_an_option_at_once_when_the_hub_would_refuse_the_adapter(
    known: Hub, train: Train, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = train(*options, images=tmp_path / "absent")
    assert done.exit_code == 2
    assert f"error: {message}" in done.stderr


def test_train_refuses_hub_backbone_when_the_hub_serves_another(
    known: Hub, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_BACKBONE", "vit_base_patch16_224")
    done = train()
    assert done.exit_code == 2
    assert "serves demo without a checkpoint file" in done.stderr
    assert "unset HUB_URL" in done.stderr


def test_train_says_that_the_hub_does_not_answer_and_goes_on(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HUB_URL", address)
    monkeypatch.setenv("HUB_KEY", "kh_any")
    done = train("--backbone", "demo")
    assert done.exit_code == 0, done.stderr
    assert f"warning: the backbone of the hub at {address} is unknown: no hub answers" in done.stderr
    assert (tmp_path / "digits.safetensors").exists()


@pytest.mark.parametrize(
    ("key", "message"), [("", "HUB_KEY is not set"), ("kh_wrong", "the backbone of the hub at http")]
)
def test_train_warns_and_goes_on_when_the_key_is_missing_or_unknown(
    known: Hub, train: Train, monkeypatch: pytest.MonkeyPatch, key: str, message: str
) -> None:
    monkeypatch.setenv("HUB_KEY", key)
    done = train("--backbone", "demo")
    assert done.exit_code == 0, done.stderr
    assert "warning: " in done.stderr
    assert message in done.stderr


@pytest.fixture
def with_checkpoint(empty_redis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub with the demo architecture and weights of its own; the path of these weights."""
    torch.manual_seed(3)
    own = load_backbone("demo", pretrained=False)
    file = tmp_path / "own-weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in own.model.state_dict().items()}, file)
    with (
        running(empty_redis, own, tmp_path / "store", checkpoint=Path("/srv/own-weights.safetensors")) as hub,
        listening(hub.another_gateway().app) as url,
    ):
        monkeypatch.setenv("HUB_URL", url)
        monkeypatch.setenv("HUB_KEY", hub.key)
        yield file


def test_train_names_the_hub_s_checkpoint_when_the_local_weights_differ(with_checkpoint: Path, train: Train) -> None:
    done = train()
    assert isinstance(done.exception, BackboneError)
    assert "'demo' have the fingerprint" in str(done.exception)
    assert "from its file own-weights.safetensors; copy that file and name it with --checkpoint" in str(done.exception)
    assert "training images" not in done.stderr
    right = train("--checkpoint", str(with_checkpoint))
    assert "training images" in right.stderr


@pytest.mark.parametrize("task", ["digits", "other"])
def test_train_shows_the_accuracy_of_the_version_in_use(known: Hub, train: Train, tmp_path: Path, task: str) -> None:
    first: dict[str, Any] = json.loads(train("--json").stdout)
    data = (tmp_path / "digits.safetensors").read_bytes()
    known.http.post(f"/v1/tasks/{task}/versions", content=data, headers=OCTETS)
    options = () if task == "digits" else ("--task", task)  # by default the name of the file
    found = json.loads(train("--json", "--overwrite", *options).stdout)["in_use"]
    assert found["name"] == f"version 1 of {task}"
    assert found["accuracy"] == first["leave_one_out_accuracy"]
    assert found["images"] == 24
    assert f"in use: version 1 of {task}, 24 left-out images" in (tmp_path / "digits.report/report.html").read_text()
    assert f"version 1 of {task}: 100.0% of 24 left-out images" in train("--overwrite", *options).stdout
