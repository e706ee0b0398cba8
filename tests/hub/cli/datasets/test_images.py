"""Commands `images` and `trainings` against the hub's application."""

from pathlib import Path

import pytest
from PIL import Image

from hub.cli.output import out
from tests.support.hub_app import Hub
from tests.support.models import coloured_noise, png, wait_until

from .conftest import COLOURS, Run, read


def test_a_folder_of_class_folders_becomes_a_task_that_answers(run: Run, hub: Hub, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=6, seed=0)
    assert "added: 12" in run("images", "add", "colours", folder).stdout
    labels = read(run("images", "info", "colours", "--json"))["labels"]
    assert {count["label"]: count["train"] + count["test"] for count in labels} == {"red": 6, "blue": 6}
    done = run("trainings", "start", "colours")
    assert done.exit_code == 0, done.output
    assert "colours version 1: 12 images" in done.stdout
    (training,) = read(run("trainings", "list", "colours", "--json"))["trainings"]
    assert read(run("trainings", "show", "colours", training["id"], "--json")) == training
    assert hub.http.get("/v1/tasks/colours").json()["labels"] == ["blue", "red"]


def test_a_second_run_sends_only_images_that_are_not_there(run: Run, hub: Hub, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=3, seed=0)
    run("images", "add", "colours", folder)
    (folder / "red" / "new.png").write_bytes(png(1))
    before = len(hub.http.get("/v1/tenants/default/audit").json()["entries"])
    counts = read(run("images", "add", "colours", folder, "--json"))["counts"]
    assert counts == {"added": 1, "moved": 0, "already_there": 6, "refused": 0}
    entries = hub.http.get("/v1/tenants/default/audit").json()["entries"][before:]
    assert [entry["detail"]["files"] for entry in entries] == [1]


def test_one_label_holds_for_all_files_and_moves_known_images(run: Run, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=2, seed=0)
    run("images", "add", "colours", folder)
    counts = read(run("images", "add", "colours", folder, "--label", "any", "--json"))["counts"]
    assert counts["moved"] == 4


def test_a_refused_image_is_listed_and_the_others_are_added(run: Run, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=2, seed=0)
    (folder / "red" / "notes.txt").write_text("no image")
    done = run("images", "add", "colours", folder)
    assert done.exit_code == 1
    assert "added: 4" in done.stdout
    assert "notes.txt" in done.stderr


def test_images_are_listed_labelled_renamed_and_deleted(run: Run, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=2, seed=0)
    run("images", "add", "colours", folder)
    page = read(run("images", "list", "colours", "--label", "red", "--count", "1", "--json"))
    assert page["next"] is not None
    digest = page["images"][0]["digest"]
    assert digest in run("images", "list", "colours").stdout
    assert read(run("images", "label", "colours", digest, "blue", "--split", "test", "--json"))["label"] == "blue"
    assert "merged to blue, 4 images" in run("images", "rename-label", "colours", "red", "blue").stdout
    assert run("images", "delete", "colours", digest).exit_code == 2
    assert "deleted" in run("images", "delete", "colours", digest, "--yes").stdout
    assert run("images", "label", "colours", digest, "x").exit_code == 1


def test_near_duplicates_are_listed_with_what_to_do(run: Run, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=6, seed=0)
    run("images", "add", "colours", folder)
    assert "groups of near-duplicates among 12 images: 0" in run("images", "duplicates", "colours").stdout
    for split, suffix in (("train", "bmp"), ("test", "tiff")):
        copy = tmp_path / f"{split}.{suffix}"
        Image.open(folder / "red" / "0.png").save(copy)
        assert run("images", "add", "colours", copy, "--label", "red", "--split", split).exit_code == 0
    done = run("images", "duplicates", "colours")
    assert "groups of near-duplicates among 14 images: 1" in done.stdout
    assert "train.bmp" in done.stdout
    assert "groups that both train and test: 1" in done.stderr
    assert read(run("images", "duplicates", "colours", "--json"))["groups"][0]["size"] == 3


def test_a_job_is_queued_shown_and_cancelled_and_versions_are_compared(run: Run, hub: Hub, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=12, seed=0)
    run("images", "add", "colours", folder)
    run("trainings", "start", "colours")
    queued = run("trainings", "start", "colours", "--recipe", "karst", "--budget", "600")
    assert queued.exit_code == 0, queued.output
    assert "is queued" in queued.stdout
    training = read(run("trainings", "list", "colours", "--json"))["trainings"][0]
    assert training["state"] in ("queued", "running")
    assert "is cancelled" in run("trainings", "cancel", "colours", training["id"]).stdout
    refused = run("trainings", "report", "colours", training["id"], "-o", tmp_path / "report.html")
    assert (refused.exit_code, (tmp_path / "report.html").exists()) == (1, False)
    compared = run("trainings", "compare", "colours", "1", "latest")
    assert compared.exit_code == 0, compared.output
    assert "neither is better" in compared.stdout
    assert read(run("trainings", "compare", "colours", "1", "latest", "--json"))["differing"] == 0


def test_lists_show_whole_digests_and_ids_on_a_narrow_terminal(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out, "width", 80)
    run("images", "add", "colours", coloured_noise(tmp_path / "colours", COLOURS, count=6, seed=0))
    run("trainings", "start", "colours")
    image = hub.http.get("/v1/tasks/colours/images").json()["images"][0]
    assert image["digest"] in run("images", "list", "colours").stdout
    training = hub.http.get("/v1/tasks/colours/trainings").json()["trainings"][0]
    assert training["id"] in run("trainings", "list", "colours").stdout


def test_an_image_of_the_review_queue_gets_its_true_label(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=2, seed=0)
    run("images", "add", "colours", folder)
    digest = read(run("images", "list", "colours", "--json"))["images"][0]["digest"]
    assert run("images", "label", "colours", digest).exit_code == 0
    monkeypatch.setattr(out, "width", 80)
    assert digest in run("review", "list", "colours").stdout
    assert f"{digest[:12]}: green" in run("review", "confirm", "colours", digest, "green").stdout
    assert read(run("review", "list", "colours", "--json"))["images"] == []
    assert read(run("review", "list", "colours", "--errors", "--json"))["kind"] == "errors"


def test_a_backtest_lists_kept_images_with_both_answers(run: Run, hub: Hub, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=6, seed=0)
    run("images", "add", "colours", folder)
    run("trainings", "start", "colours")
    assert run("trainings", "backtest", "colours").exit_code == 1  # no image is kept
    hub.http.put("/v1/tasks/colours", json={"keep": {"images": "all"}})
    hub.http.post("/v1/tasks/colours/classify", content=png(1), headers={"content-type": "image/png"})
    wait_until(lambda: run("trainings", "backtest", "colours").exit_code == 0)
    shown = run("trainings", "backtest", "colours").stdout
    assert "version 1 answers 0 of 1 kept images otherwise (0.0%; 95 % interval 0.0% to" in shown
    assert read(run("trainings", "backtest", "colours", "latest", "--a", "1", "--last", "5", "--json"))["a"] == 1


def test_usage_of_a_task_shows_its_answers_by_day_and_whether_images_drift(run: Run, hub: Hub, tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=6, seed=0)
    run("images", "add", "colours", folder)
    run("trainings", "start", "colours")
    assert run("classify", "colours", folder / "red").exit_code == 0
    shown = run("usage", "colours", "--days", "2").stdout
    assert "total" in shown
    assert "labels: " in shown
    assert "Version 1 has answered 6 images; 50 are needed" in shown
    found = read(run("usage", "colours", "--json"))
    assert (sum(found["total"]["by_label"].values()), len(found["days"])) == (6, 30)
    assert read(run("usage", "--json"))["used"]["tasks"] == 1
    assert run("usage", "--days", "2").exit_code == 2
