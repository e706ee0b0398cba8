"""The recipe's limits, its steps per epoch and its learning rate schedule."""

from typing import Any

import numpy as np
import pytest
import torch

from adapters.paper.recipe import Recipe, learning_rate_schedule, steps_per_epoch


@pytest.mark.parametrize(("images", "steps"), [(3, 1), (33, 1), (64, 2)])
def test_steps_per_epoch_drops_the_partial_batch_when_there_is_a_full_one(images: int, steps: int) -> None:
    assert steps_per_epoch(images, Recipe(batch_size=32)) == steps


def learning_rates(recipe: Recipe, steps: int) -> list[float]:
    """The rate before each step, and the rate after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = learning_rate_schedule(optimizer, recipe, steps)
    rates = [float(schedule.get_last_lr()[0])]
    for _ in range(recipe.epochs * steps):
        optimizer.step()
        schedule.step()
        rates.append(float(schedule.get_last_lr()[0]))
    return rates


def test_learning_rate_warms_up_and_follows_a_cosine_when_the_recipe_is_the_paper_s() -> None:
    """From lr / 100 to lr over the warm-up epochs, then to lr / 10 (docs/method.md)."""
    rates = learning_rates(Recipe(epochs=10, warmup_epochs=2, lr=1.0), steps=5)
    warmup = np.linspace(0.01, 1, 11)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(41) / 40)) / 2
    np.testing.assert_allclose(rates, [*warmup[:10], *cosine], rtol=1e-6)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 10), (1, 0), (2, 10), (3, 0)])
def test_learning_rate_stays_between_its_limits_when_there_are_few_epochs(epochs: int, warmup: int) -> None:
    rates = learning_rates(Recipe(epochs=epochs, warmup_epochs=warmup, lr=1.0), steps=3)
    assert all(0.01 <= rate <= 1 for rate in rates)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("warmup_epochs", -1), ("batch_size", 0), ("lr", 0), ("drop_path", 1), ("seed", -1), ("steps", 5)],
)
def test_recipe_refuses_a_field_when_its_value_or_name_is_invalid(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Recipe(**{field: value})
