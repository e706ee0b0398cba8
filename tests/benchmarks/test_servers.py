"""The comparison of servers: what a run still has to measure, what does not fit, and the page from its result."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.load import Reply
from benchmarks.servers import report
from benchmarks.servers.__main__ import FORMS, key, middle, wanted
from benchmarks.servers.estimate import bank_rate
from benchmarks.servers.inputs import MODELS, Inputs
from benchmarks.servers.sides import SIDES, Side, missing

MEASURED = {
    "images_per_s": 100.0,
    "bare_images_per_s": 200.0,
    "p50_ms": 20.0,
    "p99_ms": 40.0,
    "alone_p50_ms": 10.0,
    "pss_mb": 2000.0,
    "add_ms": 15.0,
    "date": "2026-01-01T00:00:00+00:00",
}
MACHINE = {"cpu": "a processor", "cores": 2, "torch": "2", "date": "2026-01-01T00:00:00+00:00"}


def row(contender: str, tasks: int, **own: object) -> dict[str, object]:
    return {"contender": contender, "model": "vit_s14", "form": "merged", "tasks": tasks, **own}


def test_stopped_run_measures_only_the_missing_sizes() -> None:
    options = Namespace(
        again=False, models=["vit_s14"], forms=["merged", "heads"], sizes=[1, 8], contenders=["karst-hub", "FastAPI"]
    )
    there = [row("karst-hub", 1, **MEASURED), row("karst-hub", 8, **MEASURED), row("FastAPI", 1, **MEASURED)]
    assert [(name, form, sizes) for name, _, form, sizes in wanted(there, options)] == [
        ("FastAPI", "merged", [8]),
        ("karst-hub", "heads", [8]),
        ("FastAPI", "heads", [8]),
    ]
    assert len({key(one) for one in there}) == 3


def test_contenders_in_turns_have_the_round_with_the_median_speed() -> None:
    def rounds(contender: str, speeds: list[float], **own: object) -> dict[str, object]:
        found = [row(contender, 1, **MEASURED | own | {"images_per_s": speed}) for speed in speeds]
        return middle(found)

    own, rival = (
        rounds("karst-hub", [60.0, 90.0, 80.0], bank_images_per_s=120.0, call_ms=2.5, cores=2),
        rounds("LitServe", [100.0, 90.0, 120.0]),
    )
    assert (own["images_per_s"], own["rounds_images_per_s"]) == (80.0, [60.0, 90.0, 80.0])
    assert middle([row("LitServe", 1, **MEASURED), row("LitServe", 1, reason="failed")])["reason"] == "failed"
    page = report.report({"machine": MACHINE, "rows": [own, rival]})
    assert "0.80 of LitServe (0.60 to 1.00 in 3 rounds): **does not hold**" in page
    assert "; estimate 1.04 |" in page  # 1 / (1 / 120 + 0.0025 / 2) images/s, of 100
    faster = report.report({"machine": MACHINE, "rows": [own, {**rival, "bare_images_per_s": 400.0}]})
    assert "**undecided**" in faster
    assert "; estimate" not in faster  # it is of the hub's hour


def test_bank_computes_the_tasks_of_both_forms_without_a_server(tmp_path: Path) -> None:
    for form in FORMS:
        assert bank_rate(Inputs(MODELS["tiny"], form, tmp_path), tasks=3, seconds=0.05) > 0


def test_rival_is_named_with_the_error_when_it_is_not_installed(tmp_path: Path) -> None:
    assert "install.sh" in (missing("LitServe", tmp_path) or "")
    assert missing("karst-hub", tmp_path) is None


def test_page_shows_the_code_of_each_rival_and_says_which_target_does_not_hold() -> None:
    slow = MEASURED | {"images_per_s": 80.0}
    lost = row("BentoML", 8, reason="out of memory: 8 models of 99 MB")
    rows = [row("karst-hub", 1, **slow), row("FastAPI", 1, **MEASURED), row("karst-hub", 8, **MEASURED)]
    page = report.report({"machine": MACHINE, "rows": [*rows, row("FastAPI", 8, **slow), lost]})
    assert "0.80 of FastAPI: **does not hold**" in page
    assert "1.25 of FastAPI: holds" in page
    assert "out of memory: 8 models of 99 MB" in page
    assert all(f"### {name}" in page for name in SIDES)
    assert "class Classifier(ls.LitAPI)" in page


@pytest.mark.parametrize(
    ("own", "bare", "verdict"),
    [(1.1, 0.5, "holds"), (1.1, 2.0, "undecided"), (0.9, 0.5, "undecided"), (0.9, 2.0, "does not hold")],
)
def test_page_decides_nothing_when_faster_cores_could_explain_the_result(own: float, bare: float, verdict: str) -> None:
    """The hub has `own` times the rival's images/s, on cores of `bare` times the speed."""
    hub = {"images_per_s": own * 100, "bare_images_per_s": bare * 200}
    rows = [row("karst-hub", 8, **MEASURED | hub), row("FastAPI", 8, **MEASURED)]
    page = report.report({"machine": MACHINE, "rows": rows})
    assert {found for found in ("undecided", "does not hold", "holds") if found in page} == {verdict}


@pytest.mark.parametrize("name", [name for name in SIDES if name != "karst-hub"])
def test_call_of_each_rival_has_the_bytes_of_task_and_image(name: str, tmp_path: Path) -> None:
    side: Side = SIDES[name](Inputs(MODELS["tiny"], "heads", tmp_path), tmp_path, tmp_path, 1)
    head, _, body = side.message(7, b"an image").partition(b"\r\n\r\n")
    assert b"task7" in head + body
    assert b"content-length: %d\r\n" % len(body) in head
    assert b"an image" in body or b"YW4gaW1hZ2U=" in body


def test_answers_of_triton_and_others_are_label_and_score(tmp_path: Path) -> None:
    inputs = Inputs(MODELS["tiny"], "heads", tmp_path)
    triton = {"outputs": [{"name": "label", "data": ["class 1"]}, {"name": "score", "data": [0.5]}]}
    bento = [{"label": "class 1", "score": 0.5}]
    for name, found in (("PyTriton", triton), ("BentoML", bento), ("FastAPI", bento[0])):
        side = SIDES[name](inputs, tmp_path, tmp_path, 1)
        assert side.answer(Reply(200, 1.0, 1.0, b"", json.dumps(found).encode())) == ("class 1", 0.5)
