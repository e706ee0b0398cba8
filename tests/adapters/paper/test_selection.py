"""Selection of the best epoch: by validation accuracy, the later of equals, the last without validation images."""

import pytest
import torch

from adapters.paper.selection import BestEpoch, EpochResult


@pytest.mark.parametrize(
    ("val_accuracies", "selected"),
    [((0.5, 0.75, 0.6), 2), ((0.5, 0.5), 2), ((0.9, 0.5, 0.9, 0.8), 3), ((None, None, None), 3)],
)
def test_best_epoch_keeps_the_parameters_when_a_later_epoch_is_worse(
    val_accuracies: tuple[float | None, ...], selected: int
) -> None:
    best, parameters = BestEpoch(), {"w": torch.zeros(1)}
    for number, val_accuracy in enumerate(val_accuracies, 1):
        parameters["w"].fill_(number)  # the optimiser changes parameters in place
        best.update(EpochResult(number, 1.0, 0.5, val_accuracy), parameters)
    assert best.result.number == selected
    assert best.parameters["w"].item() == selected
