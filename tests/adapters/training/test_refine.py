"""Recipe `karst`: the comparison with the instant head, the plan, and what ends a training."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import Backbone, KarstConfig
from adapters.data.image_set import ImageTensors
from adapters.data.splitting import stratified_folds
from adapters.evaluation.intervals import paired_gain
from adapters.training.inference import pooled_features
from adapters.training.refine import HeldOut, refine
from adapters.training.steps import KarstRecipe, RefineWatch

QUICK = KarstRecipe(min_steps=10, passes=1, learning_rates=(3e-3,))


class Log(RefineWatch):
    """Record of the callbacks."""

    def __init__(self) -> None:
        self.planned_steps = 0
        self.stages: list[str] = []

    def planned(self, steps: int, seconds: float) -> None:
        self.planned_steps = steps
        assert seconds > 0

    def stepped(self, stage: str, loss: float) -> None:
        assert loss == loss
        self.stages.append(stage)


@pytest.fixture(scope="module")
def frozen(backbone: Backbone, train: ImageTensors) -> Tensor:
    return pooled_features(backbone, train)[0]


def test_every_image_is_held_out_once_and_scored_by_both(
    backbone: Backbone, train: ImageTensors, frozen: Tensor
) -> None:
    log = Log()
    found = refine(backbone, train, frozen, KarstConfig(kernels=1), QUICK, budget_s=600, watch=log)
    assert found.karst is not None
    assert sorted(found.instant.index.tolist()) == list(range(len(train)))
    assert torch.equal(found.karst.index, found.instant.index)
    assert found.karst.logits.shape == (len(train), 3)
    assert [point.step for point in found.curve] == [2, 4, 6, 8, 10]
    folds = ["fold 1 of 3", "fold 2 of 3", "fold 3 of 3"]
    assert [stage for stage, _ in itertools.groupby(log.stages)][:3] == folds
    assert log.planned_steps == 40
    assert "held-out images" in found.reason


def test_instant_head_stays_when_nothing_can_be_learned(
    backbone: Backbone, train: ImageTensors, frozen: Tensor
) -> None:
    recipe = QUICK.model_copy(update={"learning_rates": (1e-9,), "head_rate": 0.0})
    found = refine(backbone, train, frozen, KarstConfig(kernels=1), recipe, budget_s=600)
    assert found.model is None
    assert found.karst is not None
    assert found.karst.accuracy == found.instant.accuracy
    assert "not better" in found.reason


def test_diverging_learning_rate_is_ended_and_named(backbone: Backbone, train: ImageTensors, frozen: Tensor) -> None:
    recipe = QUICK.model_copy(update={"learning_rates": (1e7, 1e8)})
    found = refine(backbone, train, frozen, KarstConfig(kernels=1), recipe, budget_s=600)
    assert found.model is None
    assert found.diverged == (1e7, 1e8)
    assert "diverged" in found.reason


def test_short_budget_says_how_many_seconds_are_needed(backbone: Backbone, train: ImageTensors, frozen: Tensor) -> None:
    found = refine(backbone, train, frozen, KarstConfig(kernels=1), QUICK, budget_s=0.0)
    assert found.model is None
    assert found.karst is None
    assert "it needs about" in found.reason


def test_training_is_stopped_when_its_steps_become_slower_than_planned(
    backbone: Backbone, train: ImageTensors, frozen: Tensor
) -> None:
    now_s, log = [0.0], Log()

    def clock() -> float:
        now_s[0] += 0.001
        return now_s[0]

    class Slower(Log):
        def stepped(self, stage: str, loss: float) -> None:
            log.stages.append(stage)
            now_s[0] += 200.0

    found = refine(
        backbone,
        train,
        frozen,
        KarstConfig(kernels=1),
        QUICK,
        budget_s=600,
        watch=Slower(),
        clock=clock,
    )
    assert len(log.stages) == 4  # the fourth step ends after 800 of at most 660 seconds
    assert found.model is None
    assert found.karst is None
    assert "stopped at the end of the budget of 600 s" in found.reason


def test_validation_set_is_the_one_fold(
    backbone: Backbone, train: ImageTensors, held_out: ImageTensors, frozen: Tensor
) -> None:
    found = refine(
        backbone,
        train,
        frozen,
        KarstConfig(kernels=1),
        QUICK,
        budget_s=600,
        validation=held_out,
        frozen_validation=pooled_features(backbone, held_out)[0],
    )
    assert found.instant.index.tolist() == list(range(len(train), len(train) + len(held_out)))


def test_folds_hold_classes_in_proportion_and_keep_single_images() -> None:
    targets = torch.tensor([0] * 9 + [1] * 4 + [2])
    folds = list(stratified_folds(targets, 3, seed=0))
    assert sorted(torch.cat([held for _, held in folds]).tolist()) == list(range(13))
    for kept, held in folds:
        assert set(kept.tolist()).isdisjoint(held.tolist())
        assert 14 - 1 in kept
        assert int((targets[held] == 0).sum()) == 3


def test_gain_is_within_one_error_when_it_is_noise() -> None:
    before = np.arange(100) % 2 == 0
    gain, error = paired_gain(before, np.roll(before, 1))
    assert abs(gain) <= error
    gain, error = paired_gain(before, np.ones(100, dtype=bool))
    assert gain > 5 * error


def test_accuracy_of_held_out_scores() -> None:
    scores = HeldOut(torch.arange(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    assert scores.accuracy == 0.5
