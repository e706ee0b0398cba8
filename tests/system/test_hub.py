"""The product as a user has it: `karst-hub` commands, a real Ray cluster, a real Redis, real HTTP."""

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from adapters import load_backbone
from hub.client.client import Client
from hub.errors import InvalidAdapter, InvalidImage, NotFound, TooLarge, Unauthenticated, Unavailable
from hub.local.hub import free_port
from tests.support.hub_process import KARST_HUB, Served, serve
from tests.support.models import bomb_png, png, random_adapter

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def served(home) -> Iterator[Served]:
    hub = serve(home, free_port(), HUB_BATCH_WAIT_MS="10")
    yield hub
    hub.process.poll() is None and hub.stop()


@pytest.fixture(scope="module")
def key(served) -> str:
    assert served.key is not None
    assert served.key.startswith("kh_")
    return served.key


@pytest.fixture(scope="module")
def adapters():
    backbone = load_backbone("demo")
    return [
        random_adapter(backbone, seed=i, classes=4 + i, labels=[f"{i}-{k}" for k in range(4 + i)]) for i in range(4)
    ]


@pytest.fixture
def client(served, key) -> Iterator[Client]:
    with Client(served.url, key) as client:
        yield client


def test_fifty_requests_at_once_over_three_tasks_share_passes(served, key, client, adapters) -> None:
    for i in range(3):
        client.register(f"task{i}", adapters[i].data)
    alone = {(t, n): client.classify(f"task{t}", [png(n)]).predictions[0] for t in range(3) for n in range(4)}
    tasks_in_pass = []

    def one(i: int) -> None:
        task, image = i % 3, i % 4
        with Client(served.url, key, on_response=lambda r: tasks_in_pass.append(int(r.headers["x-batch-tasks"]))) as c:
            answer = c.classify(f"task{task}", [png(image)])
        assert (answer.task, answer.digest) == (f"task{task}", adapters[task].digest)
        assert {p.label for p in answer.predictions[0]} <= set(adapters[task].labels)
        for got, want in zip(answer.predictions[0], alone[task, image], strict=True):
            assert got.label == want.label
            assert got.score == pytest.approx(want.score, abs=1e-4)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(one, range(50)))
    assert len(tasks_in_pass) == 50
    assert max(tasks_in_pass) > 1


def test_many_images_in_one_call_come_back_in_order(client, adapters) -> None:
    client.register("task0", adapters[0].data)
    alone = [client.classify("task0", [png(i)], top_k=1).predictions[0][0].label for i in range(8)]
    many = client.classify("task0", [png(i % 8) for i in range(64)], top_k=1)
    assert [p[0].label for p in many.predictions] == alone * 8
    inputs = [("task0", png(i)) for i in range(8)]
    assert [r.predictions[0].label for r in client.classify_inputs(inputs, top_k=1).results] == alone


def test_bad_input_over_the_wire(served, client, adapters) -> None:
    client.register("task0", adapters[0].data)
    before = client.tasks(), client.task("task0")
    for image, kind in (
        (b"text", InvalidImage),
        (b"", InvalidImage),
        (png()[:500], InvalidImage),
        (bomb_png(), TooLarge),
    ):
        with pytest.raises(kind):
            client.classify("task0", [image])
    with pytest.raises(InvalidAdapter, match="truncated"):
        client.register("task0", adapters[0].data[:-1])
    with pytest.raises(NotFound, match="there is no task 'nothing'"):
        client.classify("nothing", [png()])
    with Client(served.url, "kh_wrong") as stranger, pytest.raises(Unauthenticated):
        stranger.tasks()
    with Client("http://127.0.0.1:9", "kh_x") as lost, pytest.raises(Unavailable, match="no hub answers"):
        lost.tasks()
    assert (client.tasks(), client.task("task0")) == before


def test_versions_and_unregistering(client, adapters) -> None:
    first = client.register("life", adapters[0].data, alias="stable")
    assert (first.version, client.register("life", adapters[0].data).version) == (1, 1)
    assert client.register("life", adapters[1].data).version == 2
    assert client.classify("life", [png()]).digest == adapters[1].digest
    assert client.classify("life", [png()], version="stable").digest == adapters[0].digest
    client.set_alias("life", "stable", 2)
    client.delete_version("life", 1)
    with pytest.raises(NotFound):
        client.classify("life", [png()], version="1")
    client.delete_task("life")
    with pytest.raises(NotFound):
        client.classify("life", [png()])


def test_train_inspect_register_classify_on_the_command_line(served, key, tmp_path) -> None:
    for label, colour in (("blue", (30, 40, 200)), ("red", (200, 40, 30))):
        folder = tmp_path / "data" / label
        folder.mkdir(parents=True)
        (tmp_path / "test" / label).mkdir(parents=True)
        for i in range(12):
            path = folder / f"{i}.png" if i < 8 else tmp_path / "test" / label / f"{i}.png"
            Image.new("RGB", (16, 16), tuple(c + i for c in colour)).save(path)
    adapter = tmp_path / "colours.safetensors"
    environment = os.environ | {"HUB_BACKBONE": "demo", "HUB_URL": served.url, "HUB_KEY": key}

    def karst_hub(*arguments: str) -> dict:
        done = subprocess.run(
            [str(KARST_HUB), *arguments, "--json"], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    data, test = str(tmp_path / "data"), str(tmp_path / "test")
    trained = karst_hub("train", data, "-o", str(adapter), "--test", test, "--epochs", "12", "--batch-size", "4")
    assert trained["test_accuracy"] == 1.0
    assert karst_hub("inspect", str(adapter))["labels"] == ["blue", "red"]
    assert karst_hub("register", "colours", str(adapter))["digest"] == trained["digest"]
    assert "colours" in [task["task"] for task in karst_hub("tasks")["tasks"]]
    answer = karst_hub("classify", "colours", f"{test}/red/8.png", f"{test}/blue/9.png")
    assert [p[0]["label"] for p in answer["predictions"]] == ["red", "blue"]


def test_a_second_hub_is_refused_where_the_first_runs(served, home, tmp_path) -> None:
    port = httpx.URL(served.url).port
    for other_home, message in ((home, "another hub runs in"), (tmp_path, f"cannot listen on 127.0.0.1:{port}")):
        environment = os.environ | {"HUB_BACKBONE": "demo", "HUB_HOME": str(other_home), "HUB_PORT": str(port)}
        done = subprocess.run([str(KARST_HUB), "serve"], env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr


def test_a_backbone_that_cannot_be_loaded_is_one_line(tmp_path) -> None:
    environment = os.environ | {"HUB_BACKBONE": "nonsense", "HUB_HOME": str(tmp_path), "HUB_PORT": str(free_port())}
    done = subprocess.run([str(KARST_HUB), "serve"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "error: cannot load pretrained weights of backbone" in done.stderr
    assert "'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_restart_keeps_everything_and_shows_no_key_again(served, key, home, adapters) -> None:
    with Client(served.url, key) as client:
        client.register("kept", adapters[3].data, alias="stable")
        before = client.tasks()
        answer = client.classify("kept", [png()], version="stable")
    served.stop()
    assert all(key not in p.read_text(errors="replace") for p in home.rglob("*") if p.is_file())  # nowhere in clear
    again = serve(
        home, free_port(), HUB_HAPROXY="false"
    )  # and over Serve's stock proxy, which is the switch's other side
    try:
        assert again.key is None
        with Client(again.url, key) as client:
            assert client.tasks() == before
            got = client.classify("kept", [png()], version="stable")
        assert got.digest == answer.digest
        assert [p.label for p in got.predictions[0]] == [p.label for p in answer.predictions[0]]
    finally:
        again.stop()
