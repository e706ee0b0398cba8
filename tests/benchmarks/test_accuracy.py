"""The benchmarks of training (accuracy, answers, train_step) on the demo architecture.

The accuracy benchmark is fair to all methods and resumable, and its report says what came out. `answers` measures
targets. `train_step` times equal work.
"""

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adapters import Backbone, load_backbone
from adapters.backbone import features
from adapters.data.checks import check_dataset
from adapters.data.datasets import read_dataset
from adapters.data.images import normalise_for, preprocess_of
from adapters.training.instant import InstantHead, fit_head
from benchmarks import (
    accuracy,
    accuracy_frozen,
    accuracy_methods,
    accuracy_report,
    accuracy_results,
    answers,
    answers_report,
    frozen_prefix,
    train_step,
)
from benchmarks.accuracy_methods import ADAPTERS, HEADS, INSTANT, KARST, METHODS, OTHERS, PAPER, TRAINED, VARIANTS
from benchmarks.accuracy_tasks import (
    BINS,
    TASKS,
    TEST,
    VALIDATION,
    TaskError,
    balanced_accuracy,
    chosen_for_test,
    further_images,
    load_task,
    sprite_image,
)

pytestmark = pytest.mark.slow

CLASSES = 10
DRAWN = ["digits", "count", "orientation", "location"]  # the tasks that need no other package


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("demo", pretrained=False)


@pytest.fixture
def pixels(backbone: Backbone) -> torch.Tensor:
    return torch.randn(2, *backbone.input_size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def head(backbone: Backbone) -> InstantHead:
    """An instant head of ten classes that differ; classes without a difference would give a head of zeros."""
    targets = torch.arange(4 * CLASSES) % CLASSES
    x = 0.1 * torch.randn(len(targets), backbone.width, generator=torch.Generator().manual_seed(0))
    x[:, :CLASSES] += nn.functional.one_hot(targets).float()
    return fit_head(x, targets, CLASSES)


@pytest.mark.parametrize("name", DRAWN)
def test_a_task_has_test_images_of_every_class(name: str) -> None:
    task = load_task(name)
    assert task.pixels(task.test[:3]).shape == (3, 3, 32, 32)
    assert task.images.dtype == torch.uint8
    assert 0.9 * TEST <= len(task.test) <= TEST
    counts = task.targets[task.test].bincount()
    assert len(counts) == task.classes
    assert counts.min() == counts.max()


def test_the_test_part_takes_no_more_than_a_third_of_a_rare_class() -> None:
    targets = torch.tensor([0] * 900 + [1] * 60)
    chosen = chosen_for_test(targets)
    assert targets[chosen].bincount().tolist() == [TEST // 2, 20]


def test_training_validation_and_test_images_are_distinct_and_training_sets_are_nested() -> None:
    task = load_task("count")
    small, large = task.draw(10, 1), task.draw(100, 1)
    assert task.targets[small.train].bincount().tolist() == [10] * task.classes
    assert task.targets[small.validation].bincount().tolist() == [VALIDATION] * task.classes
    for draw in (small, large):
        whole = torch.cat([draw.train, draw.validation, task.test])
        assert len(whole.unique()) == len(whole)
    assert set(small.train.tolist()) < set(large.train.tolist())
    assert torch.equal(small.train, task.draw(10, 1).train)
    assert not torch.equal(small.train, task.draw(10, 2).train)


def test_further_images_are_none_of_the_task() -> None:
    task, further = load_task("count"), further_images("count")
    assert further is not None
    assert further.classes == task.classes
    known = {image.numpy().tobytes() for image in task.images}
    assert not known & {image.numpy().tobytes() for image in further.images}
    assert further_images("digits") is None


def test_balanced_accuracy_gives_each_class_the_same_weight() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    assert balanced_accuracy(torch.tensor([True, True, True, False]), targets) == 0.5
    assert balanced_accuracy(torch.tensor([False, False, True, True]), targets) == pytest.approx(2 / 3)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(TaskError, match="no task 'flowers'; the tasks are digits"):
        load_task("flowers")


def test_the_labels_of_sprites_are_what_is_drawn() -> None:
    task = load_task("location")
    x = torch.arange(32.0)
    white = task.images[:, 0].float()
    centre = (white * x).sum((1, 2)) / white.sum((1, 2)) / 32
    expected = 0.2 + 0.6 * (task.targets + 0.5) / BINS
    assert (centre - expected).abs().max() < 0.3 / BINS + 0.06  # half a bin; a heart's centre of mass is off its middle


def test_a_sprite_turns_with_its_angle() -> None:
    def drawn(angle: float) -> np.ndarray:
        return np.asarray(sprite_image(np.random.default_rng(0), 0.5, angle))

    assert np.array_equal(drawn(0.3), drawn(0.3))
    assert not np.array_equal(drawn(0.3), drawn(0.3 + math.pi / BINS))


@pytest.mark.parametrize("method", METHODS)
def test_methods_start_from_the_frozen_backbone(
    method: str, backbone: Backbone, pixels: torch.Tensor, head: InstantHead
) -> None:
    settings = METHODS[method]
    torch.manual_seed(3)
    model: Any = accuracy_methods.build(settings, backbone, CLASSES, head).eval()
    if settings.head == "instant":
        torch.testing.assert_close(model.head.weight.detach(), head.weight * settings.head_scale)
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels), model.head(features(backbone.model, pixels)))


@pytest.mark.parametrize("method", TRAINED)
def test_training_never_changes_the_backbone(
    method: str, backbone: Backbone, pixels: torch.Tensor, head: InstantHead
) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    task = load_task("digits")
    model, loss = accuracy.fit(method, backbone, task, task.draw(5, 0).train, head, 1e-2, seed=0, steps=2)
    assert loss > 0
    with torch.inference_mode():
        assert isinstance(model.head, nn.Module)
        changed = model(pixels) - model.head(features(backbone.model, pixels))
    assert changed.abs().max() > 1e-4  # not the head alone was trained
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_peers_have_as_many_numbers_as_karst(backbone: Backbone) -> None:
    counts = {
        m: accuracy_methods.trainable(accuracy_methods.build(METHODS[m], backbone, CLASSES)) for m in (*ADAPTERS, PAPER)
    }
    assert counts[KARST] == counts[PAPER] == accuracy_methods.karst_count(backbone)
    for method in ("LoRA", "LoKr"):
        assert abs(counts[method] / counts[KARST] - 1) < 0.05, method


def test_the_lokr_rank_is_the_nearest_to_the_budget(backbone: Backbone) -> None:
    for budget in (20_000, 40_000):
        model = accuracy_methods.lokr(backbone, budget)
        made = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert abs(made / budget - 1) < 0.1


def test_bias_tuning_trains_every_bias_and_nothing_else(backbone: Backbone) -> None:
    model = accuracy_methods.bias_tuned(backbone)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in backbone.model.named_parameters() if name.endswith("bias")}


def test_groups_have_the_rates_of_the_method(backbone: Backbone, head: InstantHead) -> None:
    settings = VARIANTS["rate of B x 4"]
    model = accuracy_methods.build(settings, backbone, CLASSES, head)
    groups = accuracy_methods.parameter_groups(settings, model, 1e-3, 0.01)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(rates) == len(named)
    assert {rates[id(p)] for name, p in named.items() if name.endswith(".b")} == {4e-3}
    assert {rates[id(p)] for name, p in named.items() if name.endswith(".a")} == {1e-3}
    size = float(head.weight.square().mean().sqrt())
    assert rates[id(named["head.weight"])] == pytest.approx(0.01 * size)


def test_orthogonal_kernels_start_orthogonal_and_as_large(backbone: Backbone) -> None:
    model: Any = accuracy_methods.build(VARIANTS["orthogonal kernels"], backbone, CLASSES)
    layer = next(iter(model.layers.values()))
    rows = layer.c.detach().flatten(1)
    products = rows @ rows.T
    assert abs(float(products[0, 1])) < 1e-4 * float(products[0, 0])
    plain: Any = next(iter(accuracy_methods.build(METHODS[KARST], backbone, CLASSES).modules()))
    usual = next(iter(plain.layers.values())).c.detach().square().mean()
    assert float(layer.c.detach().square().mean() / usual) == pytest.approx(1, rel=0.5)


def test_the_schedule_rises_and_falls() -> None:
    factors = [accuracy.rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1, abs=1e-2)
    assert 9 <= factors.index(max(factors)) <= 10
    assert factors[-1] == pytest.approx(0.05, abs=1e-2)


def test_batches_pass_over_all_images_in_a_new_order_each_time() -> None:
    train = torch.arange(100, 120)
    taken = torch.cat(list(accuracy.batches(train, 5, seed=0, size=8)))
    assert taken[:20].sort().values.tolist() == taken[20:].sort().values.tolist() == train.tolist()
    assert not torch.equal(taken[:20], taken[20:])
    assert len(next(accuracy.batches(train[:3], 1, seed=0, size=8))) == 8


def test_equal_cells_give_equal_numbers(backbone: Backbone, head: InstantHead) -> None:
    task = load_task("digits")
    train = task.draw(5, 0).train
    one, two = (accuracy.fit(KARST, backbone, task, train, head, 4e-3, seed=0, steps=2)[0] for _ in range(2))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


@pytest.mark.parametrize("method", HEADS[1:])
@pytest.mark.parametrize("per_class", [2, 30])
def test_methods_without_training_recognise_separate_classes(method: str, per_class: int) -> None:
    y = torch.arange(3).repeat_interleave(per_class)
    x = torch.eye(3)[y] + 0.01 * torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(accuracy_frozen.head_only(method, x, y, torch.eye(3)), torch.arange(3))
    with pytest.raises(ValueError, match="method 'KARST' is not one of linear probe, kNN"):
        accuracy_frozen.head_only(KARST, x, y, x)


def search_rows(validation: dict[tuple[str, float], float]) -> list[dict[str, Any]]:
    """Cells of the search, with these accuracies."""
    return [
        {"method": m, "rate": rate, "task": task, "per_class": accuracy.SEARCH_PER_CLASS, "seed": 0, "validation": v}
        for (m, rate), v in validation.items()
        for task in accuracy.SEARCH_TASKS
    ]


def test_the_search_takes_the_best_mean_and_of_equals_the_lowest() -> None:
    low, high = METHODS[KARST].rates
    assert accuracy.selected_rate(search_rows({(KARST, low): 0.5, (KARST, high): 0.6}), KARST) == high
    assert accuracy.selected_rate(search_rows({(KARST, low): 0.6, (KARST, high): 0.6}), KARST) == low
    assert accuracy.selected_rate(search_rows({(KARST, high): 0.6}), KARST) is None
    assert accuracy.selected_rate(search_rows({(KARST, low): 0.5, (KARST, high): 0.6})[:-1], KARST) is None


def test_every_method_is_in_a_stage_and_has_two_rates() -> None:
    assert set(ADAPTERS) | set(OTHERS) == set(TRAINED)
    assert all(len(set(method.rates)) == 2 for method in METHODS.values())
    assert set(accuracy.SEARCH_TASKS) < set(TASKS)
    for name, method in VARIANTS.items():
        assert method != METHODS[KARST], name


@pytest.fixture
def small(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmark small: drawn tasks at 32 pixels, the demo architecture, two steps, few cells."""
    tasks = {name: TASKS[name] for name in ("digits", "count")}
    stages = {
        "search": accuracy.search((KARST, "LoRA")),
        "25": accuracy.table(accuracy.SEARCH_PER_CLASS, 0, (KARST, "LoRA"), tuple(tasks)),
        "heads": accuracy.heads(0),
        "variants": accuracy.search(("gain 1",)),
    }

    @cache
    def frozen(name: str) -> torch.Tensor:
        task = load_task(name)
        with torch.inference_mode():
            return features(backbone.model, normalise_for(backbone, task.pixels(torch.arange(len(task.targets)))))

    def further(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        task = further_images(name)
        if task is None:
            return frozen(name)[:0], torch.empty(0, dtype=torch.long)
        few = torch.arange(80)
        with torch.inference_mode():
            return features(backbone.model, normalise_for(backbone, task.pixels(few))), task.targets[few]

    monkeypatch.setattr(answers, "further_features", further)
    for module in (accuracy, accuracy_report, accuracy_results, answers, answers_report):
        monkeypatch.setattr(module, "TASKS", tasks)
    for module in (accuracy, accuracy_report):
        monkeypatch.setattr(module, "PER_CLASS", (accuracy.SEARCH_PER_CLASS,))
    for module in (accuracy, answers):
        monkeypatch.setattr(module, "backbone", lambda: backbone)
        monkeypatch.setattr(module, "frozen_features", frozen)
    monkeypatch.setattr(accuracy, "STAGES", stages)
    monkeypatch.setattr(accuracy, "SEEDS", (0,))
    monkeypatch.setattr(accuracy, "STEPS", 2)
    monkeypatch.setattr(accuracy, "load_task", lambda name, _side_px: load_task(name))
    monkeypatch.setattr(answers, "DRAWS", 2)
    monkeypatch.setattr(answers, "MANY_DRAWS", 3)


@pytest.mark.usefixtures("small")
def test_run_is_measured_once_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands as they are typed, with the fewest steps: run, resume, report."""
    output, worth = tmp_path / "out.json", tmp_path / "answers.json"
    command = ["accuracy", "--workers", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--stages", "search"])
    accuracy.main()
    first = json.loads(output.read_text())["cells"]
    assert [(c["method"], c["rate"]) for c in first] == [(m, r) for m in (KARST, "LoRA") for r in METHODS[m].rates]
    monkeypatch.setattr(sys, "argv", [*command, "--stages", *accuracy.STAGES])
    accuracy.main()
    cells = json.loads(output.read_text())["cells"]
    assert cells[: len(first)] == first
    assert len(cells) == len(first) + 2 + 2 * len(HEADS) + 2
    accuracy.main()
    assert json.loads(output.read_text())["cells"] == cells

    monkeypatch.setattr(sys, "argv", ["answers", "--only", "answers", "foreign", "share", "--output", str(worth)])
    answers.main()
    lines = answers.bars(json.loads(worth.read_text()))
    assert len(lines) == 1 + 2 * 2 + 2 + 1

    monkeypatch.setattr(
        sys, "argv", ["report", "--results", str(output), "--answers", str(worth), "--docs", str(tmp_path)]
    )
    accuracy_report.main()
    text = (tmp_path / "accuracy.md").read_text()
    assert (tmp_path / "img" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for line in (*lines, *accuracy_report.targets(accuracy_results.read(output))):
        assert line in text
    assert "- Trained, 25 images a class, seed 0: 4 of 12 cells." in text


def results(accuracies: dict[str, list[int]], gain: float = 0.1) -> accuracy_results.Results:
    """One task with 100 test images; a method's list is the numbers of the images that it recognises."""
    low = METHODS[KARST].rates[0]
    cells = []
    for method, found in accuracies.items():
        right = np.zeros(104, bool)
        right[found] = True
        cells.append(
            {
                "method": method,
                "task": "count",
                "per_class": accuracy.SEARCH_PER_CLASS,
                "seed": 0,
                "rate": None if method in HEADS else low,
                "accuracy": len(found) / 100,
                "gain": gain,
                "error": 0.05,
                "right": np.packbits(right).tobytes().hex(),
            }
        )
    return accuracy_results.Results({"cells": cells}, dict.fromkeys(TRAINED, low))


@pytest.mark.parametrize(
    ("karst", "verdict"),
    [
        (range(60), "holds"),
        (range(59), "does not hold"),  # no image that only KARST recognises: the difference has little noise
        (range(10, 69), "holds within the noise"),
    ],
)
def test_the_targets_are_computed_from_paired_differences(karst: range, verdict: str) -> None:
    found = results({KARST: list(karst), INSTANT: list(range(60)), "LoRA": list(range(60))})
    instant, _auto, lora = accuracy_report.targets(found)
    assert f"KARST at least instant on count: **{verdict}** ({len(karst) - 60:+.1f} points" in instant
    assert f"KARST at least LoRA in the mean over 1 tasks: **{verdict}**" in lora


@pytest.mark.parametrize(("gain", "expected"), [(0.1, 40.0), (0.04, 60.0)])
def test_auto_is_karst_only_if_it_is_better_on_validation_images(gain: float, expected: float) -> None:
    found = results({KARST: list(range(40)), INSTANT: list(range(60))}, gain)
    assert found.accuracy(accuracy_results.AUTO, "count", accuracy.SEARCH_PER_CLASS, 0) == expected


def test_a_report_without_a_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(json.dumps({"cells": []}))
    with pytest.raises(accuracy_results.ReportError, match="the search of the learning rate is not complete for KARST"):
        accuracy_results.read(path)


def test_perfect_probabilities_have_no_calibration_error() -> None:
    probabilities = torch.tensor([[0.8, 0.2]] * 10)
    weights = torch.full((10,), 0.1, dtype=torch.float64)
    targets = torch.tensor([0] * 8 + [1] * 2)
    assert answers.calibration_error(probabilities, targets, weights) == pytest.approx(0, abs=1e-6)
    assert answers.calibration_error(probabilities, torch.zeros(10).long(), weights) == pytest.approx(0.2)


def test_draws_of_answers_leave_the_other_images_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "DRAWS", 2)
    targets = load_task("count").targets
    (one, others), (two, _) = answers.draws("count", 20)
    assert targets[one].bincount().tolist() == [20] * 8
    assert torch.cat([one, others]).sort().values.tolist() == list(range(len(targets)))
    assert not torch.equal(one, two)


def test_the_command_of_the_recipe_instant_is_timed() -> None:
    row = answers.command()
    assert row["images"] == 200
    assert row["cpu_seconds"] > 0
    assert "3 s after the imports" in answers.bars({"command": row})[0]


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


def test_a_step_with_cached_outputs_of_frozen_blocks_takes_less_than_one_without(
    backbone: Backbone, tmp_path: Path
) -> None:
    answers.write_images(tmp_path, "count", 2, 32)
    images = check_dataset(read_dataset(tmp_path), preprocess_of(backbone)).train
    last = (f"blocks.{len(backbone.model.blocks) - 1}.*",)
    row = frozen_prefix.measure(backbone, images, batch=16, rounds=5, sites=last)
    ms = {name: found["median"] for name, found in row["ms"].items()}
    assert ms["cached"] < ms["computed"] < ms["all blocks"]
    assert row["of_all_blocks"]["all blocks"]["median"] == 1
