"""Both clients with datasets and trainings: from images on a disk to answers."""

import asyncio
from pathlib import Path

import pytest

from hub.client.async_client import AsyncClient
from hub.client.client import Client
from hub.errors import Conflict, NotFound
from tests.support.hub_app import Hub
from tests.support.models import coloured_noise, png

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}


def test_client_adds_labels_lists_trains_and_classifies(hub: Hub, url: str, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path, COLOURS, count=70, seed=0)
    with Client(url, hub.key) as client:
        with pytest.raises(NotFound):
            client.images.add("colours", png(1))
        client.create_task("colours", promote="always")
        with pytest.raises(Conflict, match="no labelled image"):
            client.train("colours")
        for label in COLOURS:
            added = client.images.add("colours", sorted((folder / label).iterdir()), label=label)
            assert added.counts.added == 70
            assert added.added[0].name == "0.png"
        again = client.images.add("colours", sorted((folder / "red").iterdir()), label="red")
        assert (again.counts.added, again.counts.already_there) == (0, 70)
        assert {count.label: count.train + count.test for count in client.images.info("colours").labels} == {
            "red": 70,
            "blue": 70,
        }
        page = client.images.list("colours", label="red", count=50)
        assert (len(page.images), page.next is None) == (50, False)
        image = page.images[0]
        assert client.images.label("colours", image.digest, "blue", split="test").label == "blue"
        assert client.images.label("colours", image.digest, None).label is None
        file = client.images.download("colours", image.digest, tmp_path / "one.png")
        assert file.read_bytes() == (folder / "red" / image.name).read_bytes()
        client.images.delete("colours", image.digest)
        assert client.images.rename_label("colours", "red", "rot").label == "rot"
        training = client.train("colours")
        assert client.trainings("colours").trainings == [training]
        assert client.training("colours", training.id).version == 1
        reply = client.classify("colours", folder / "blue" / "3.png")
        assert reply.predictions[0][0].label == "blue"
        used = client.task_usage("colours", days=2)
        assert (len(used.days), used.total.by_label, used.total.by_version) == (2, {"blue": 1}, {"1": 1})


def test_async_client_does_the_same(hub: Hub, url: str, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path, COLOURS, count=5, seed=0)

    async def use() -> None:
        async with AsyncClient(url, hub.key) as client:
            await client.create_task("colours")
            for label in COLOURS:
                await client.images.add("colours", sorted((folder / label).iterdir()), label=label, split="train")
            assert (await client.images.info("colours")).images == 10
            training = await client.train("colours")
            assert training.state == "done"
            reply = await client.classify("colours", folder / "blue" / "3.png")
            assert reply.predictions[0][0].label == "blue"

    asyncio.run(use())


@pytest.mark.slow
def test_clients_wait_for_a_job_cancel_one_and_compare_versions(
    hub: Hub, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = coloured_noise(tmp_path / "images", COLOURS, count=12, seed=0)
    with Client(url, hub.key) as client:
        client.create_task("colours")
        for label in COLOURS:
            client.images.add("colours", sorted((folder / label).iterdir()), label=label)
        client.train("colours")
        done = client.train("colours", recipe="karst", budget_s=5, progress=True)
        assert (done.state, done.version) == ("done", 2)
        assert "running" in capsys.readouterr().err or done.seconds < 2
        page = client.training_report("colours", done.id, tmp_path / "report.html")
        assert page.read_text().startswith("<!doctype html>")
        found = client.compare("colours", a=1, b="latest")
        assert (found.a.version, found.b.version) == (1, 2)
        queued = client.train("colours", recipe="auto", budget_s=600, wait=False)
        assert queued.state == "queued"
        assert client.cancel_training("colours", queued.id).state == "cancelled"

    async def use() -> None:
        async with AsyncClient(url, hub.key) as client:
            done = await client.train("colours", recipe="auto", budget_s=5)
            assert (done.state, done.version) == ("done", 3)
            queued = await client.train("colours", recipe="auto", budget_s=600, wait=False)
            waiting = asyncio.create_task(client.train("colours", recipe="auto", budget_s=600))
            await asyncio.sleep(0.5)
            for training in (await client.trainings("colours")).trainings:
                await client.cancel_training("colours", training.id)
            with pytest.raises(Conflict, match="was cancelled"):
                await waiting
            assert (await client.training("colours", queued.id)).state == "cancelled"

    asyncio.run(use())


def test_both_clients_review_images_and_confirm_them(hub: Hub, url: str, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path, COLOURS, count=6, seed=0)
    with Client(url, hub.key) as client:
        client.create_task("colours")
        client.images.add("colours", folder / "red" / "0.png", label="red")
        client.images.add("colours", sorted((folder / "blue").iterdir()))
        assert client.images.duplicates("colours", count=5).considered == 7
        queue = client.review("colours", count=3)
        assert (queue.kind, queue.considered, len(queue.images)) == ("unlabelled", 6, 3)
        given = client.feedback("colours", queue.images[0].image.digest, "blue")
        assert (given.image.label, given.correct) == ("blue", None)
        with pytest.raises(NotFound):
            client.feedback("colours", "0" * 64, "blue")

    async def use() -> None:
        async with AsyncClient(url, hub.key) as client:
            assert (await client.images.duplicates("colours")).groups == []
            queue = await client.review("colours")
            assert queue.considered == 5
            for row in queue.images:
                await client.feedback("colours", row.image.digest, "blue")
            assert (await client.review("colours")).images == []
            assert (await client.review("colours", kind="errors")).kind == "errors"

    asyncio.run(use())
