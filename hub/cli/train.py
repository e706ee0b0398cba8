"""`karst-hub train`: `adapters.fit` with a progress bar."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from adapters import BackboneError, KarstConfig, Recipe, Watch, fit
from adapters.data.checks import CheckedDataset
from adapters.evaluation.outputs import checkpoint_file
from adapters.paper.devices import is_first_process
from adapters.paper.recipe import steps_per_epoch
from adapters.paper.selection import EpochResult
from adapters.training.auto import Classifier
from adapters.training.fit import DEFAULT_BUDGET_S, RecipeName
from adapters.training.progress import line_about, lines_about
from adapters.training.steps import KarstRecipe

from .hub_target import HubTarget

__all__ = ["DEFAULT_BUDGET_S", "KarstConfig", "KarstRecipe", "Recipe", "run"]


def silence_further_processes(console: Console, devices: int) -> None:
    """Make a console print nothing in the further processes of a training on several devices."""
    console.quiet = console.quiet or not is_first_process(devices)


def run(
    console: Console,
    data: Path,
    output: Path,
    *,
    recipe: Recipe | RecipeName,
    target: HubTarget | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run `adapters.fit` with the same arguments and a progress bar.

    Args:
        target: the hub whose backbone the adapter needs; None: any backbone.

    Returns:
        File, size in bytes, digest, number of labels, report folder, and the metrics of the file's metadata.

    Raises:
        DataError, BackboneError, AdapterError, ConfigError, FloatingPointError: See `adapters.fit`.
    """
    silence_further_processes(console, options.get("devices", 1))
    if target is not None:
        options |= {"fingerprint": target.backbone.fingerprint, "in_use": target.in_use}
    progress = progress_bar(console)
    bar = ProgressWatch(console, progress, recipe)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        bar.interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        fitted = fit(data, output, recipe=recipe, watch=bar, **options)
    except BackboneError as error:
        if target is None:
            raise
        raise BackboneError(f"{error}. {target.advice}") from error
    except KeyboardInterrupt:
        checkpoint = checkpoint_file(output)
        advice = f"continue with --resume (checkpoint of the last epoch: {checkpoint})"
        if isinstance(recipe, str):
            advice = f"{output} is the instant adapter" if bar.instant_written else "nothing was written"
        elif not checkpoint.exists():
            advice = "no checkpoint yet, since no epoch has ended; start again"
        progress.stop()
        console.print(f"interrupted; {advice}", soft_wrap=True)
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        if progress.live.is_started:
            progress.stop()
    return {
        "file": str(fitted.file),
        "bytes": len(fitted.adapter.data),
        "digest": fitted.adapter.digest,
        "labels": len(fitted.adapter.labels),
        **{n: v for n, v in fitted.metrics.items() if n != "classes" and not (n == "recipe" and isinstance(v, dict))},
        "report": str(fitted.report),
    }


class ProgressWatch(Watch):
    """Progress bars of one training: one for reading the images, one for the training steps."""

    def __init__(self, console: Console, progress: Progress, recipe: Recipe | str) -> None:
        self._console, self._progress, self._recipe = console, progress, recipe
        self._bar: TaskID
        self._step_images = self._epoch_images = 0
        self._number = 1
        self._validation = ""
        self.interrupted = False
        self.instant_written = False

    def reading(self, images: int) -> None:
        self._progress.start()
        self._bar = self._progress.add_task("reading images", total=images)

    def image(self) -> None:
        self._progress.advance(self._bar)

    def checked(self, images: CheckedDataset) -> None:
        for line in lines_about(images):
            self._console.print(line, soft_wrap=True)
        if isinstance(self._recipe, str):
            self._progress.update(self._bar, description="images read")
            return
        self._step_images = min(self._recipe.batch_size, len(images.train))
        self._epoch_images = steps_per_epoch(len(images.train), self._recipe) * self._step_images
        self._bar = self._progress.add_task("training", total=self._epoch_images * self._recipe.epochs)

    def instant(self, classifier: Classifier) -> None:
        self.instant_written = classifier.beats_chance
        self._console.print(line_about(classifier), soft_wrap=True)

    def planned(self, steps: int, seconds: float) -> None:
        self._console.print(f"KARST: {steps} steps, about {seconds:.0f} s", soft_wrap=True)
        self._bar = self._progress.add_task("KARST", total=steps)

    def stepped(self, stage: str, loss: float) -> None:
        if self.interrupted:  # Python drops an exception of the signal handler if a destructor is running
            raise KeyboardInterrupt
        self._progress.update(self._bar, advance=1, description=f"KARST, {stage}: loss {loss:.3f}")

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        if self.interrupted:  # Python drops an exception of the signal handler if a destructor is running
            raise KeyboardInterrupt
        if epoch != self._number:  # a resumed training starts at a later epoch
            self._number = epoch
            self._progress.update(self._bar, completed=(epoch - 1) * self._epoch_images)
        text = f"epoch {epoch}: loss {loss:.3f}, training {accuracy:.1%}{self._validation}"
        self._progress.update(self._bar, advance=self._step_images, description=text)

    def epoch(self, epoch: EpochResult) -> None:
        if epoch.val_accuracy is not None:
            self._validation = f", validation {epoch.val_accuracy:.1%}"
        self._progress.update(
            self._bar,
            description=f"epoch {epoch.number}: loss {epoch.loss:.3f}, training {epoch.train_accuracy:.1%}"
            + self._validation,
        )


class _Speed(ProgressColumn):
    """Column with the images per second of the last seconds."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} images/s")


def progress_bar(console: Console) -> Progress:
    """Return a progress display with description, bar, speed and remaining time."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        _Speed(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(),
        console=console,
    )
