"""The benchmarks of training (accuracy, train_step) on the demo architecture with random weights.

The one is fair to all methods, resumable, and its report says what came out; the other times equal work.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adapters import Backbone, load_backbone
from adapters.backbone import features
from benchmarks import accuracy, accuracy_methods, accuracy_report, train_step
from benchmarks.accuracy_methods import ABLATION, CONFIGS, KARST, LEARNING_RATES, LINEAR, MAIN, METHODS
from benchmarks.accuracy_tasks import BINS, POOL, TASKS, TEST, TRAIN, TaskError, load_task, sprite_image

pytestmark = pytest.mark.slow

CLASSES = 10
TRAINED = METHODS[1:]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("demo", pretrained=False)


@pytest.fixture
def pixels(backbone: Backbone) -> torch.Tensor:
    return torch.randn(2, *backbone.input_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["digits", "count", "orientation", "location", "shapes"])
def test_a_task_has_a_pool_and_test_images_of_every_class(name: str) -> None:
    task = load_task(name)
    assert task.pool.images.shape == (POOL, 3, 32, 32)
    assert task.pool.images.dtype == torch.uint8
    assert 0 < len(task.test) <= TEST
    for part in (task.pool, task.test):
        assert part.targets.unique().tolist() == list(range(task.classes))


def test_training_validation_and_test_images_are_distinct() -> None:
    task = load_task("count")  # noise: no two drawings are equal
    train, validation = task.split(1)
    whole = torch.cat([train.images, validation.images, task.test.images]).flatten(1)
    assert len(train) == TRAIN
    assert len(whole.unique(dim=0)) == POOL + TEST
    again, _ = task.split(1)
    other, _ = task.split(2)
    assert torch.equal(train.images, again.images)
    assert not torch.equal(train.images, other.images)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(TaskError, match="no task 'flowers'; the tasks are digits"):
        load_task("flowers")


def test_the_labels_of_sprites_are_what_is_drawn() -> None:
    task = load_task("location")
    x = torch.arange(32.0)
    white = task.pool.images[:, 0].float()
    centre = (white * x).sum((1, 2)) / white.sum((1, 2)) / 32
    expected = 0.2 + 0.6 * (task.pool.targets + 0.5) / BINS
    assert (centre - expected).abs().max() < 0.3 / BINS + 0.06  # half a bin; a heart's centre of mass is off its middle


def test_a_sprite_turns_with_its_angle() -> None:
    def drawn(angle: float) -> np.ndarray:
        return np.asarray(sprite_image(np.random.default_rng(0), 0.5, angle))

    assert np.array_equal(drawn(0.3), drawn(0.3))
    assert not np.array_equal(drawn(0.3), drawn(0.3 + math.pi / BINS))


@pytest.mark.parametrize("method", TRAINED)
def test_methods_start_from_the_frozen_backbone_with_one_head(
    method: str, backbone: Backbone, pixels: torch.Tensor
) -> None:
    torch.manual_seed(3)
    model = accuracy_methods.build(method, backbone, CLASSES).eval()
    torch.manual_seed(3)
    head = nn.Linear(backbone.width, CLASSES)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels), head(features(backbone.model, pixels)))


@pytest.mark.parametrize("method", TRAINED)
def test_training_never_changes_the_backbone(method: str, backbone: Backbone, pixels: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    train, _ = load_task("digits").split(0)
    model, loss = accuracy.fit(method, backbone, CLASSES, train, accuracy.Setting(1e-2, None), seed=0, steps=2)
    assert loss > 0
    with torch.inference_mode():
        assert isinstance(model.head, nn.Module)
        changed = model(pixels) - model.head(features(backbone.model, pixels))
    assert changed.abs().max() > 1e-3  # not the head alone was trained
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_peers_have_as_many_numbers_as_karst(backbone: Backbone) -> None:
    ours = accuracy_methods.trainable(accuracy_methods.build(KARST, backbone, CLASSES))
    assert ours == accuracy_methods.karst_count(backbone)
    for method in ("LoRA", "LoKr"):
        theirs = accuracy_methods.trainable(accuracy_methods.build(method, backbone, CLASSES))
        assert abs(theirs / ours - 1) < 0.05, method


def test_the_lokr_count_is_what_peft_makes(backbone: Backbone) -> None:
    for budget in (20_000, 40_000):
        rank = accuracy_methods.lokr_rank(backbone.sites, budget)
        model = accuracy_methods.lokr(backbone, budget)
        made = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert made == sum(accuracy_methods._lokr_numbers(site, rank) for site in backbone.sites)


def test_bias_tuning_trains_every_bias_and_nothing_else(backbone: Backbone) -> None:
    model = accuracy_methods.bias_tuned(backbone)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in backbone.model.named_parameters() if name.endswith("bias")}


def test_the_schedule_rises_and_falls() -> None:
    factors = [accuracy.rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.01)
    assert max(factors) == factors[10] == pytest.approx(1)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)


def test_batches_pass_over_all_images_in_a_new_order_each_time() -> None:
    taken = list(accuracy.batches(70, 5, seed=0))
    assert [len(index) for index in taken] == [32] * 5
    assert len(torch.cat(taken[:2]).unique()) == 64
    assert not torch.equal(taken[0], taken[2])


def test_equal_runs_give_equal_numbers(backbone: Backbone) -> None:
    train, _ = load_task("digits").split(0)
    one, two = (
        accuracy.fit(KARST, backbone, CLASSES, train, accuracy.Setting(3e-3, 1.0), seed=0, steps=2)[0] for _ in range(2)
    )
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_the_search_takes_the_best_mean_and_of_equals_the_lowest() -> None:
    rows = [
        {"method": run.method, "lr": run.lr, "gain": run.gain, "steps": 5, "part": "validation", "accuracy": 0.5}
        for run in accuracy.search_runs("demo", 5)
    ]
    for row in rows:
        if (row["method"], row["lr"], row["gain"]) == ("LoRA", 3e-3, 1.0):
            row["accuracy"] = 0.6
    test = {"method": KARST, "lr": 1e-2, "gain": 1.0, "steps": 5, "part": "test", "accuracy": 1}
    chosen = accuracy.chosen_settings([*rows, test], 5)
    expected = {KARST: (1e-3, 0.125), "LoRA": (3e-3, 1.0), "LoKr": (1e-3, 0.125), "bias": (1e-3, None)}
    assert chosen == expected | {"full": (1e-4, None)}


def test_the_main_methods_come_before_the_ablation_and_variants_share_karsts_rate() -> None:
    chosen = {m: accuracy.Setting(lr, 1.0) for lr, m in enumerate((KARST, "LoRA", "LoKr", "bias", "full"), 1)}
    runs = list(accuracy.planned("demo", 5, chosen, list(METHODS), ["digits", "count"], [0, 1]))
    assert len(runs) == len(set(runs)) == len(METHODS) * 4
    assert {run.method for run in runs[: len(MAIN) * 4]} == set(MAIN)
    assert {run.lr for run in runs if run.method in CONFIGS} == {1.0}


def test_run_is_measured_once_and_reported(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command as it is typed, with the fewest steps: run, resume, report."""
    monkeypatch.setattr(accuracy, "SEARCH_TASKS", ("digits",))
    monkeypatch.setattr(accuracy, "PENALTIES", (1e-3, 1e-2))  # the quick ones
    monkeypatch.setattr(accuracy, "LEARNING_RATES", dict.fromkeys(LEARNING_RATES, (0.001,)))
    monkeypatch.setattr(accuracy, "_backbone", lambda _name: backbone)
    small = replace(load_task("digits"), test=load_task("digits").test[:50])
    monkeypatch.setattr(accuracy, "load_task", lambda _name: small)
    log, output = tmp_path / "log.jsonl", tmp_path / "out.json"
    command = ["accuracy", "--steps", "1", "--search-steps", "1", "--tasks", "digits", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", *MAIN, "--log", str(log), "--output", str(output)])
    accuracy.main()
    lines = log.read_text().splitlines()
    assert len(lines) == 5 + 3 + 2 * len(MAIN)  # three methods have two gains
    accuracy.main()
    assert log.read_text().splitlines() == lines

    monkeypatch.setattr(sys, "argv", ["report", "--results", str(output), "--docs", str(tmp_path)])
    accuracy_report.main()
    text = (tmp_path / "accuracy.md").read_text()
    assert "No task has runs of all variants" in text
    assert (tmp_path / "img" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for line in accuracy_report.bars(accuracy_report.read(output)):
        assert line in text


def results(scores: dict[str, float]) -> accuracy_report.Results:
    """One task, two seeds one point apart."""
    table = {(m, "digits", seed): score + seed - 0.5 for m, score in scores.items() for seed in (0, 1)}
    return accuracy_report.Results({"tasks": {"digits": {}}}, table, (0, 1))


@pytest.mark.parametrize(
    ("karst", "verdict"), [(80.0, "holds"), (79.5, "holds within the noise"), (79.0, "does not hold")]
)
def test_the_bars_are_computed(karst: float, verdict: str) -> None:
    lines = accuracy_report.bars(results({**dict.fromkeys(MAIN, 80.0), KARST: karst, LINEAR: 79.0}))
    assert (
        f"**{verdict}**. KARST minus LoRA is {karst - 80:+.2f} points, pooled standard error over seeds 0.71"
        in lines[0]
    )
    assert f"linear probe on digits: **{'holds' if karst > 79 else 'does not hold'}**" in lines[2]


def test_too_few_runs_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run = {"method": KARST, "task": "digits", "seed": 0, "accuracy": 0.5}
    path.write_text(json.dumps({"tasks": {"digits": {}}, "runs": [run]}))
    with pytest.raises(accuracy_report.ReportError, match=r"the seeds \(0,\); without two"):
        accuracy_report.read(path)
    path.write_text(json.dumps({"tasks": {"digits": {}}, "runs": [run, run | {"seed": 1}]}))
    with pytest.raises(accuracy_report.ReportError, match="no task has runs of linear probe, KARST"):
        accuracy_report.read(path)


def test_every_variant_differs_from_the_default_in_one_thing() -> None:
    default = CONFIGS[KARST].model_dump()
    for name in ABLATION:
        changed = {key for key, value in CONFIGS[name].model_dump().items() if value != default[key]}
        assert len(changed) == 1, name
    assert set(TASKS) >= set(accuracy.DEFAULT_TASKS)


def test_the_official_form_and_ours_are_equal_work(backbone: Backbone) -> None:
    row = train_step.measure(backbone, 2, batch=2, rounds=2)
    assert row["largest_difference"] < 1e-4
    assert row["parameters"]["ours"] == row["parameters"]["official"] == accuracy_methods.karst_count(backbone)
    assert set(row["ms"]) == {"ours", "official", "LoKr", "LoRA"}
    assert set(row["to_ours"]) == {"official", "LoKr", "LoRA"}


@pytest.mark.parametrize("part", ["a", "s2", "in_s1"])
def test_a_form_that_computes_something_else_is_not_timed(backbone: Backbone, part: str) -> None:
    ours: Any = train_step.contender("ours", backbone, 2)
    official: Any = train_step.contender("official", backbone, 2)
    with torch.no_grad():
        getattr(official.body.blocks[5].attn.proj.numbers, part).mul_(1.1)
    pixels, targets = train_step._batch(backbone, 2)
    with pytest.raises(train_step.MismatchError, match="the official form and ours differ by"):
        train_step.check(ours, official, backbone, pixels, targets)


def test_peak_memory_is_that_of_the_steps_however_large_this_process_is() -> None:
    ballast = torch.ones(1024**3, dtype=torch.uint8)
    assert len(ballast)
    assert 1 < train_step.memory_mb("demo", "ours", 2, 8) < 1000


def test_the_bars_of_a_step_are_computed() -> None:
    rows = [
        {"kernels": n, "to_ours": {"official": {"median": ratio, "q1": 1.0, "q3": 1.5}}}
        for n, ratio in ((2, 1.19), (4, 9.0), (8, 1.0))
    ]
    two, eight = train_step.bars(rows)
    assert "at least 1.2 times as fast as the official form: does not hold; 1.19 times" in two
    assert "at least 1.0 times as fast as the official form: holds; 1.00 times" in eight
