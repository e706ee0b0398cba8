"""A call whose result the client waits for: a training that the hub runs as a job."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...dataset_schemas import ENDED, TrainingInfo
from ...errors import Conflict
from ..transport import Call

PAUSE_S = 1.0  # between two looks at a training


@dataclass(frozen=True)
class TrainingCall:
    """The start of a training, and the calls that follow it to its end.

    Attributes:
        progress: whether to show a progress bar; None: in a notebook and on a terminal.
    """

    first: Call[TrainingInfo]
    again: Callable[[TrainingInfo], Call[TrainingInfo]]
    wait: bool
    progress: bool | None

    def following(self, training: TrainingInfo) -> Call[TrainingInfo] | None:
        """Return the next call; None if the training has ended or the caller does not wait."""
        return self.again(training) if self.wait and training.state not in ENDED else None

    def result(self, training: TrainingInfo) -> TrainingInfo:
        """Return a training that has ended with a version, or for which the caller does not wait.

        Raises:
            Conflict: the training has failed or was cancelled.
        """
        if self.wait and training.state != "done":
            raise Conflict(f"Training {training.id} of task {training.task!r} {_end_of(training)}")
        return training

    @contextmanager
    def bar(self) -> Iterator[Callable[[TrainingInfo], None]]:
        """Show a progress bar. Yield a function that shows the state of a training."""
        if not self.wait:
            yield lambda _training: None
            return
        from tqdm.auto import tqdm  # a client that does not wait starts faster without it

        with tqdm(total=0, disable=None if self.progress is None else not self.progress, unit=" steps") as bar:

            def show(training: TrainingInfo) -> None:
                now = training.progress
                bar.set_description_str(training.state if now is None else now.stage, refresh=False)
                if now is not None:
                    figures = {"loss": now.loss, "accuracy": now.accuracy, "seconds left": now.seconds_left}
                    shown = ", ".join(f"{name} {value:g}" for name, value in figures.items() if value is not None)
                    bar.set_postfix_str(shown, refresh=False)
                    bar.total, bar.n = now.steps or None, now.step
                bar.refresh()

            yield show


def _end_of(training: TrainingInfo) -> str:
    return "was cancelled." if training.state == "cancelled" else f"has failed: {training.error}"
