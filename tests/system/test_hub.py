"""The hub as a user runs it: `karst-hub serve`, a real Ray, a real Redis, real HTTP, and `karst-hub` commands."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import Barrier
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from adapters import Adapter, Backbone
from hub.cli.main import app
from hub.client.client import Client
from hub.errors import InvalidAdapter, InvalidImage, NotFound, TooLarge, Unauthenticated, Unavailable
from hub.local.errors import StartError
from hub.local.hub import local_hub
from hub.settings import Settings
from tests.support.models import bomb_png, png, random_adapter

from .conftest import SharedHub

ROUNDS = 5  # of 50 calls each; on a loaded machine the calls of one round may come one after another


def test_fifty_requests_at_once_over_three_tasks_share_batches(
    hub: SharedHub, client: Client, adapters: list[Adapter]
) -> None:
    for i in range(3):
        client.register(f"task{i}", adapters[i].data)
    images = [png(n) for n in range(16)]
    alone = [client.classify(f"task{t}", images).predictions for t in range(3)]
    tasks_in_batch: list[int] = []

    def note(response: httpx.Response) -> None:
        tasks_in_batch.append(int(response.headers["x-batch-tasks"]))

    def one(i: int) -> None:
        task = i % 3
        with Client(hub.url, hub.key, on_response=note) as c:
            start.wait()  # opening 50 connections takes longer than many batches
            answer = c.classify(f"task{task}", images)
        assert (answer.task, answer.digest) == (f"task{task}", adapters[task].digest)
        for predictions, expected in zip(answer.predictions, alone[task], strict=True):
            for got, want in zip(predictions, expected, strict=True):
                assert got.label == want.label
                assert got.score == pytest.approx(want.score, abs=1e-4)

    start = Barrier(50)
    for _ in range(ROUNDS):
        with ThreadPoolExecutor(50) as pool:
            list(pool.map(one, range(50)))
        if max(tasks_in_batch) > 1:
            break
    assert len(tasks_in_batch) % 50 == 0
    assert max(tasks_in_batch) > 1


def test_calls_are_answered_when_calls_that_left_with_them_fail_or_lose_their_clients(
    hub: SharedHub, client: Client, adapters: list[Adapter]
) -> None:
    digest = client.register("together", adapters[0].data).digest
    head = {"authorization": f"Bearer {hub.key}", "content-type": "application/octet-stream"}

    def one(i: int) -> int | str:
        connection = HTTPConnection(urlsplit(hub.url).netloc, timeout=60)
        task, body = ("together", png(i)) if i % 4 else ("missing", png(i))
        start.wait()
        connection.request("POST", f"/v1/tasks/{task}/classify", body, head)
        if i % 4 == 1:
            connection.close()
            return "gone"
        reply = connection.getresponse()
        found = json.loads(reply.read())
        connection.close()
        assert reply.status == (200 if i % 4 else 404)
        return str(found.get("digest", "missing"))

    start = Barrier(32)
    for _ in range(3):
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(one, range(32)))
        assert found == ["missing", "gone", digest, digest] * 8


def test_many_images_in_one_call_come_back_in_order(client: Client, adapters: list[Adapter]) -> None:
    client.register("task0", adapters[0].data)
    alone = [client.classify("task0", [png(i)], top_k=1).predictions[0][0].label for i in range(8)]
    many = client.classify("task0", [png(i % 8) for i in range(64)], top_k=1)
    assert [p[0].label for p in many.predictions] == alone * 8
    inputs = [("task0", png(i)) for i in range(8)]
    assert [r.predictions[0].label for r in client.classify_inputs(inputs, top_k=1).results] == alone


def test_one_image_with_many_tasks_answers_as_each_task_alone(
    client: Client, adapters: list[Adapter], backbone: Backbone
) -> None:
    """Through Ray, with heads, adapters of every block and adapters of the last block."""
    heads = [random_adapter(backbone, seed=i, kernels=0, rescale="none") for i in range(20)]
    late = [random_adapter(backbone, seed=50 + i, kernels=1, rank=2, sites=("blocks.5.*",)) for i in range(3)]
    for i, adapter in enumerate([*heads, *late, *adapters[:2]]):
        client.register(f"many{i}", adapter.data)
    names = [f"many{i}" for i in range(25)]
    alone = {name: client.classify(name, png(0), top_k=2).predictions[0] for name in names}
    for reply in (client.classify_tasks(png(0), names, top_k=2), client.classify_tasks(png(0), top_k=2)):
        found = {result.task: result.predictions for result in reply.results}
        for name in names:
            assert [p.label for p in found[name]] == [p.label for p in alone[name]]
            assert [p.score for p in found[name]] == pytest.approx([p.score for p in alone[name]], abs=1e-4)
    for name in names:
        client.delete_task(name)


def test_invalid_input_over_http_is_refused_and_changes_nothing(
    hub: SharedHub, client: Client, adapters: list[Adapter]
) -> None:
    client.register("task0", adapters[0].data)
    before = client.tasks(), client.task("task0")
    refused: Sequence[tuple[bytes, type[Exception]]] = (
        (b"text", InvalidImage),
        (b"", InvalidImage),
        (png()[:500], InvalidImage),
        (bomb_png(), TooLarge),
    )
    for image, kind in refused:
        with pytest.raises(kind):
            client.classify("task0", [image])
    with pytest.raises(InvalidAdapter, match="truncated"):
        client.register("task0", adapters[0].data[:-1])
    with pytest.raises(NotFound, match="task 'nothing'"):
        client.classify("nothing", [png()])
    with Client(hub.url, "kh_wrong") as unknown, pytest.raises(Unauthenticated):
        unknown.tasks()
    with Client("http://127.0.0.1:9", "kh_x", retry_s=0) as lost, pytest.raises(Unavailable):
        lost.tasks()
    assert (client.tasks(), client.task("task0")) == before


def test_versions_aliases_and_tasks_are_registered_moved_and_deleted(client: Client, adapters: list[Adapter]) -> None:
    first = client.register("life", adapters[0].data, alias="stable")
    assert (first.version, client.register("life", adapters[0].data).version) == (1, 1)
    assert client.register("life", adapters[1].data, labels_may_change=True).version == 2
    assert client.classify("life", [png()]).digest == adapters[1].digest
    assert client.classify("life", [png()], version="stable").digest == adapters[0].digest
    client.set_alias("life", "stable", 2)
    client.delete_version("life", 1)
    with pytest.raises(NotFound):
        client.classify("life", [png()], version="1")
    client.delete_task("life")
    with pytest.raises(NotFound):
        client.classify("life", [png()])


def test_commands_train_inspect_register_and_classify(
    hub: SharedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for label, colour in (("blue", (30, 40, 200)), ("red", (200, 40, 30))):
        for i in range(12):
            path = tmp_path / ("data" if i < 8 else "test") / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            red, green, blue = (value + i for value in colour)
            Image.new("RGB", (16, 16), (red, green, blue)).save(path)
    adapter = tmp_path / "colours.safetensors"
    for name, value in {"HUB_BACKBONE": "demo", "HUB_URL": hub.url, "HUB_KEY": hub.key}.items():
        monkeypatch.setenv(name, value)

    def karst_hub(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    data, test = str(tmp_path / "data"), str(tmp_path / "test")
    trained = karst_hub(
        "train", data, "-o", str(adapter), "--test", test, "--recipe", "paper", "--epochs", "12", "--batch-size", "4"
    )
    assert trained["test_accuracy"] == 1.0
    assert karst_hub("inspect", str(adapter))["labels"] == ["blue", "red"]
    assert karst_hub("register", "colours", str(adapter))["digest"] == trained["digest"]
    assert "colours" in [task["task"] for task in karst_hub("tasks")["tasks"]]
    answer = karst_hub("classify", "colours", f"{test}/red/8.png", f"{test}/blue/9.png")
    assert [p[0]["label"] for p in answer["predictions"]] == ["red", "blue"]


def test_second_hub_does_not_start_in_the_home_or_on_the_port_of_a_running_hub(hub: SharedHub, tmp_path: Path) -> None:
    port = httpx.URL(hub.url).port
    assert port is not None
    for home, message in ((hub.home, "Another hub runs in"), (tmp_path, f"Cannot listen on 127.0.0.1:{port}")):
        with pytest.raises(StartError, match=message), local_hub(Settings(backbone="demo", home=home, port=port)):
            pass
