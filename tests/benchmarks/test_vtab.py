"""The VTAB and few-shot benchmark on a miniature data root: the real command, a real Ray; and its averages by hand."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters import DataError, KarstModel
from adapters.data.datasets import read_dataset
from adapters.data.image_set import ImageSet, ImageTensors
from adapters.paper.train import train_model
from adapters.training.inference import accuracy
from benchmarks import vtab, vtab_miniature
from benchmarks.vtab_protocol import (
    FEW_SHOT_SETS,
    GROUPS,
    SEEDS,
    SHOTS,
    VTAB_TASKS,
    Plan,
    _backbone,
    _best,
    few_shot_summary,
    few_shot_trials,
    run_trial,
    vtab_summary,
    vtab_trials,
)

pytestmark = pytest.mark.slow

LRS = ["--lr", "1e-3", "2e-2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("miniature")
    vtab_miniature.make(root)
    return root


def arguments(protocol: str, root: Path, out: Path, *more: str) -> list[str]:
    data = root / ("vtab" if protocol == "vtab" else "fewshot")
    return [protocol, "--data", str(data), "--out", str(out), "--backbone", "demo", "--epochs", "1", *more]


def plan(protocol: str, *more: str) -> Plan:
    options: argparse.Namespace = vtab._options(arguments(protocol, Path("nowhere"), Path("nowhere"), *more))
    return vtab._plan(options)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on two logical CPUs; one thread each."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.vtab", *arguments],
        cwd=vtab.REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_trial_is_the_protocol(root: Path) -> None:
    """The same again by hand: choose on train800 / val200, train on train800val200, test once."""
    (trial,) = vtab_trials(root / "vtab", ["dtd"])
    chosen_plan = plan("vtab", *LRS)
    result = run_trial(chosen_plan, trial, "cpu")

    backbone = _backbone("demo", None, "cpu")
    preprocess = result["preprocess"]
    lists, last = read_dataset(trial.source), read_dataset(trial.source, final=True)
    assert lists.validation is not None
    assert last.test is not None
    assert (len(lists.train), len(lists.validation), len(last.train), len(last.test)) == (16, 4, 20, 8)

    def trained(images: ImageSet, lr: float) -> KarstModel:
        recipe = chosen_plan.recipe.model_copy(update={"lr": lr, "epochs": 1})
        return train_model(backbone, ImageTensors(images, preprocess), chosen_plan.config, recipe).model

    by_hand = {
        lr: accuracy(trained(lists.train, lr), ImageTensors(lists.validation, preprocess)) for lr in (1e-3, 2e-2)
    }
    assert {found["lr"]: found["accuracy"] for found in result["validation"]} == by_hand
    best = max(by_hand, key=by_hand.__getitem__)
    assert result["chosen"] == {"lr": best, "epochs": 1}
    assert result["accuracy"] == accuracy(trained(last.train, best), ImageTensors(last.test, preprocess))
    assert result["images"] == {"train": 20, "test": 8}
    assert (preprocess["mean"], preprocess["std"], preprocess["crop_mode"]) == ([0.5] * 3, [0.5] * 3, "squash")
    assert (result["plan"]["config"]["kernels"], result["plan"]["config"]["rank"]) == (8, 8)
    assert result["plan"]["fingerprint"] == backbone.fingerprint


@pytest.mark.parametrize("name", ["food-101", "stanford-cars"])  # whose paths start at images/, and at the folder
def test_a_few_shot_trial_takes_the_list_of_its_shots_and_seed(root: Path, name: str) -> None:
    trials = {(t.shots, t.seed): t for t in few_shot_trials(root / "fewshot", [name])}
    assert list(trials) == [(shots, seed) for shots in SHOTS for seed in SEEDS]
    result = run_trial(plan("fewshot", "--preset", "karst-vtab"), trials[2, 1], "cpu")
    assert result["trial"] == {"data_set": name, "shots": 2, "seed": 1}
    assert result["images"] == {"train": 4, "test": 8}
    assert result["validation"] is None  # one candidate: nothing to choose
    assert 0 <= result["accuracy"] <= 1


def test_the_command_skips_what_is_done_and_survives_a_failure(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = run_trial(plan("vtab"), vtab_trials(root / "vtab", ["dtd"])[0], "cpu")
    (out / "dtd.json").write_text(json.dumps(done))
    broken = root / "vtab" / "eurosat" / "images" / "test" / "000003.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    tasks = ["dtd", "eurosat", "kitti"]
    try:
        before = (out / "dtd.json").stat().st_mtime_ns
        ran = command(*arguments("vtab", root, out, "--tasks", *tasks))
    finally:
        broken.write_bytes(whole)
    assert ran.returncode == 1, ran.stderr
    assert "error: eurosat: DataError: " in ran.stderr
    assert "000003.png" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "3 trials, 1 of them done before" in ran.stdout
    assert sorted(path.name for path in out.iterdir()) == ["dtd.json", "kitti.json", "summary.json"]
    kitti = json.loads((out / "kitti.json").read_text())
    assert kitti["plan"] == done["plan"]
    assert f"{100 * kitti['accuracy']:.2f}" in ran.stdout
    assert json.loads((out / "summary.json").read_text())["results"] == 2

    after = {name: (out / name).stat().st_mtime_ns for name in ("dtd.json", "kitti.json")}
    assert after["dtd.json"] == before
    again = command(*arguments("vtab", root, out, "--tasks", "dtd", "kitti"))
    assert again.returncode == 0, again.stderr
    assert "2 trials, 2 of them done before" in again.stdout
    assert {name: (out / name).stat().st_mtime_ns for name in after} == after


def test_results_of_another_plan_are_not_mixed_in(root: Path, tmp_path: Path) -> None:
    (trial,) = vtab_trials(root / "vtab", ["dtd"])
    one = plan("vtab")
    result = {"plan": one.described(), "accuracy": 0.5, "lists": trial.digest()}
    (tmp_path / "dtd.json").write_text(json.dumps(result))
    found = vtab._result(tmp_path, one, trial)
    assert found is not None
    assert found["accuracy"] == 0.5
    for other, what in (
        (plan("vtab", *LRS), "lrs"),
        (plan("vtab", "--preset", "karst-fewshot"), "config"),
        (dataclasses.replace(one, fingerprint="0" * 64), "fingerprint"),
    ):
        with pytest.raises(DataError, match=f"made with another {what}"):
            vtab._result(tmp_path, other, trial)
    (tmp_path / "dtd.json").write_text(json.dumps(result | {"lists": "0" * 64}))
    with pytest.raises(DataError, match=r"made with other lists than .*dtd has now"):
        vtab._result(tmp_path, one, trial)
    (tmp_path / "dtd.json").write_text("{}")
    with pytest.raises(DataError, match="no result"):
        vtab._result(tmp_path, one, trial)


def test_all_of_it_is_planned(root: Path) -> None:
    assert len(vtab_trials(root)) == len(set(VTAB_TASKS)) == 19
    assert [len(tasks) for tasks in GROUPS.values()] == [7, 4, 8]
    trials = few_shot_trials(root)
    assert len(trials) == len({t.name for t in trials}) == 75
    (root / "named" / "fgvc_aircraft").mkdir(parents=True)
    assert few_shot_trials(root / "named", ["fgvc-aircraft"])[0].source.name == "fgvc_aircraft"


def test_both_vtab_averages() -> None:
    accuracies = dict.fromkeys(GROUPS["natural"], 0.8) | dict.fromkeys(GROUPS["specialized"], 0.6)
    accuracies |= {task: 0.1 * i for i, task in enumerate(GROUPS["structured"])}  # mean 0.35
    found = vtab_summary(accuracies)
    assert found["groups"] == pytest.approx({"natural": 0.8, "specialized": 0.6, "structured": 0.35})
    assert found["mean_of_groups"] == pytest.approx((0.8 + 0.6 + 0.35) / 3)
    assert found["mean_of_tasks"] == pytest.approx((7 * 0.8 + 4 * 0.6 + 8 * 0.35) / 19)
    del accuracies["kitti"]
    found = vtab_summary(accuracies)
    assert found["groups"]["structured"] is None
    assert found["groups"]["natural"] == pytest.approx(0.8)
    assert (found["mean_of_groups"], found["mean_of_tasks"]) == (None, None)


def test_few_shot_averages() -> None:
    accuracies = {
        (name, shots, seed): shots / 100 + i / 10 + seed / 1000
        for i, name in enumerate(FEW_SHOT_SETS)
        for shots in SHOTS
        for seed in SEEDS
    }
    found = few_shot_summary(accuracies)
    assert found["sets"]["fgvc-aircraft"] == pytest.approx({shots: shots / 100 + 0.001 for shots in SHOTS})
    assert found["mean_of_sets"] == pytest.approx({shots: shots / 100 + 0.2 + 0.001 for shots in SHOTS})
    del accuracies["food-101", 4, 2]
    found = few_shot_summary(accuracies)
    assert found["sets"]["food-101"][4] is None
    assert found["mean_of_sets"][4] is None
    assert found["mean_of_sets"][8] is not None


def test_the_first_of_the_best_is_chosen_and_never_one_that_ran_away() -> None:
    assert _best([0.5, 0.7, 0.7]) == 1
    assert _best([None, 0.0, None]) == 1


def test_tables_show_every_average() -> None:
    results: dict[str, dict[str, Any]] = {
        task: {"accuracy": 0.5, "chosen": {"lr": 1e-3, "epochs": 100}} for task in VTAB_TASKS if task != "kitti"
    }
    table = vtab._vtab_table(results, vtab_summary({task: found["accuracy"] for task, found in results.items()}))
    values = dict(zip(table.columns[0]._cells, table.columns[1]._cells, strict=True))
    assert values["dtd"] == values["mean of natural"] == "50.00"
    assert values["kitti"] == values["mean of structured"] == values["mean over 19 data sets"] == "not complete"
    assert len(values) == 19 + 3 + 2
