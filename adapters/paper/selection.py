"""Selection of the epoch whose parameters become the adapter.

The best epoch is selected on validation images, never on test images; the official KARST scripts select it on the test
split. Without validation images the last epoch is selected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor


@dataclass(frozen=True)
class EpochResult:
    """The results of one epoch.

    Attributes:
        number: from 1.
        loss: mean training loss.
        train_accuracy, val_accuracy: in [0, 1]; `val_accuracy` is None without validation images.
    """

    number: int
    loss: float
    train_accuracy: float
    val_accuracy: float | None


class BestEpoch:
    """The best epoch so far, with a copy of its parameters."""

    result: EpochResult
    parameters: dict[str, Tensor]

    def __init__(self) -> None:
        self._is_empty = True

    def update(self, result: EpochResult, parameters: Mapping[str, Tensor]) -> None:
        """Keep this epoch if it is the best so far. The later epoch wins a tie, and wins without validation images."""
        if self._is_empty or _is_better(result, self.result):
            self.set(result, {name: tensor.clone() for name, tensor in parameters.items()})

    def set(self, result: EpochResult, parameters: dict[str, Tensor]) -> None:
        """Replace the best epoch, for example by the one in a checkpoint."""
        self.result, self.parameters = result, parameters
        self._is_empty = False


def _is_better(result: EpochResult, best: EpochResult) -> bool:
    return result.val_accuracy is None or result.val_accuracy >= cast(float, best.val_accuracy)
