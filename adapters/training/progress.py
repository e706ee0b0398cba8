"""Progress of `fit` in a notebook and on a terminal, and the lines that the command line prints too."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from ..data.checks import CheckedDataset
from ..paper.devices import is_first_process
from ..paper.recipe import Recipe, steps_per_epoch
from ..paper.selection import EpochResult
from .auto import Classifier, InstantWatch

FEW_IMAGES = 5  # a class with fewer is named before training
NAMED_CLASSES = 5


class Watch(InstantWatch):
    """Progress callbacks of `fit`. Override any of them; each does nothing by default."""

    def using(self, backbone: str, origin: str) -> None:
        """Called before the backbone is loaded, with its name and a phrase about where the name is from."""

    def reading(self, images: int) -> None:
        """Called before the images are decoded, with their number."""

    def image(self) -> None:
        """Called after each decoded image."""

    def checked(self, images: CheckedDataset) -> None:
        """Called when the dataset has passed the checks. Show `images.warnings` to the user."""

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        """Called after each step of `paper`: epoch number from 1, the batch's mean loss and accuracy in [0, 1]."""

    def epoch(self, epoch: EpochResult) -> None:
        """Called after each epoch of the recipe `paper`."""


class ProgressBars(Watch):
    """Progress bars of tqdm, which are widgets in a notebook with ipywidgets and text elsewhere."""

    def __init__(self, recipe: Recipe | None) -> None:
        """
        Args:
            recipe: of a training by epochs; None: another one.
        """
        self._recipe = recipe
        self._bar: Any = None
        self._epoch_steps, self._epoch = 0, 1

    def close(self) -> None:
        """End the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def using(self, backbone: str, origin: str) -> None:
        self._say(f"backbone: {backbone} ({origin})")

    def reading(self, images: int) -> None:
        self._start("reading images", images, "images")

    def image(self) -> None:
        self._bar.update()

    def checked(self, images: CheckedDataset) -> None:
        self.close()
        for line in lines_about(images):
            self._say(line)
        if self._recipe is not None:
            self._epoch_steps = steps_per_epoch(len(images.train), self._recipe)
            self._start("training", self._epoch_steps * self._recipe.epochs, "steps")

    def instant(self, classifier: Classifier) -> None:
        self._say(line_about(classifier))

    def planned(self, steps: int, seconds: float) -> None:
        self._start("KARST", steps, "steps")

    def stepped(self, stage: str, loss: float) -> None:
        self._bar.set_postfix_str(f"{stage}, loss {loss:.3f}", refresh=False)
        self._bar.update()

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        if epoch != self._epoch:  # a resumed training starts at a later epoch
            self._epoch = epoch
            self._bar.update((epoch - 1) * self._epoch_steps - self._bar.n)
        self._bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}, training {accuracy:.1%}", refresh=False)
        self._bar.update()

    def epoch(self, epoch: EpochResult) -> None:
        if epoch.val_accuracy is not None:
            self._say(f"epoch {epoch.number}: loss {epoch.loss:.3f}, validation {epoch.val_accuracy:.1%}")

    def _start(self, text: str, total: int, unit: str) -> None:
        self.close()
        # On stdout, like the lines: a notebook shows stderr as an error.
        self._bar = tqdm(total=total, desc=text, unit=f" {unit}", file=sys.stdout)

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)


@contextmanager
def watching(given: Watch | None, recipe: Recipe | None, devices: int) -> Iterator[Watch]:
    """Yield the given callbacks; else progress bars in a notebook and on a terminal, and nothing elsewhere."""
    if given is not None or not (_is_notebook() or sys.stdout.isatty()) or not is_first_process(devices):
        yield given or Watch()
        return
    bars = ProgressBars(recipe)
    try:
        yield bars
    finally:
        bars.close()


def _is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython(), "kernel") if ipython is not None else False


def lines_about(images: CheckedDataset) -> list[str]:
    """Return what a user should know of the images before the training: warnings, files left out, counts."""
    lines = [f"warning: {warning}" for warning in images.warnings]
    lines += [f"left out: {files}" for files in images.left_out if not files.matters]  # the others are warnings
    count, validation, test = (len(part) if part else 0 for part in (images.train, images.validation, images.test))
    labels = images.train.images.labels
    lines.append(f"{count} training images, {validation} for validation, {test} held out; {len(labels)} classes")
    counts = Counter(images.train.images.targets)
    few = sorted((counts[k], k) for k in range(len(labels)) if counts[k] < FEW_IMAGES)
    lines += [f"warning: class {labels[k]!r} has only {own} images" for own, k in few[:NAMED_CLASSES]]
    height, width = images.train[0][0].shape[1:]
    return [*lines, f"the backbone sees {width} x {height} pixels"]


def line_about(classifier: Classifier) -> str:
    """Return how well the instant classifier did, and whether it is written."""
    low, high = classifier.held_out.interval
    end = "the adapter is written" if classifier.beats_chance else "not better than chance, so nothing is written"
    return (
        f"instant: {classifier.held_out.accuracy:.1%} of {len(classifier.held_out.targets)} left-out images are "
        f"right (95 % interval {low:.1%} to {high:.1%}; chance {classifier.chance:.1%}); {end}"
    )
