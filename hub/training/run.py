"""A training in this process: the images of a snapshot in, an adapter file and its report out.

The training runs on a thread, so that the caller can pass its progress on while it runs.
"""

import io
import json
import logging
import queue
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters import AdapterError, BackboneError, KarstConfig, fit, load_backbone
from adapters.data.checks import CheckedDataset
from adapters.data.datasets import DatasetSplits
from adapters.data.errors import DataError
from adapters.data.image_set import EncodedImage, ImageSet
from adapters.data.labels import sorted_labels
from adapters.evaluation.html_report import FILES
from adapters.method.config import ConfigError
from adapters.training.auto import Classifier
from adapters.training.auto_files import NotBetterThanChance
from adapters.training.progress import Watch

from ..dataset_schemas import TrainingProgress
from ..errors import Unavailable
from ..storage.store import IMAGES, Store
from .int8_agreement import with_int8_agreement
from .job import TrainingJob, TrainingResult

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5  # between two reports of progress within one stage
ADAPTER = "adapter.safetensors"
EXPECTED = (AdapterError, BackboneError, ConfigError, DataError, FloatingPointError, MemoryError)


def train(job: TrainingJob) -> Iterator[TrainingProgress | TrainingResult]:
    """Train, and yield the progress, then the result. torch has `job.threads` threads in this process from now on."""
    torch.set_num_threads(job.threads)
    items: queue.SimpleQueue[TrainingProgress | TrainingResult] = queue.SimpleQueue()
    thread = threading.Thread(target=_train, args=(job, items), name="training", daemon=True)
    thread.start()
    while True:
        item = items.get()
        yield item
        if isinstance(item, TrainingResult):
            return


def _train(job: TrainingJob, items: "queue.SimpleQueue[TrainingProgress | TrainingResult]") -> None:
    watch = _Progress(items)
    with tempfile.TemporaryDirectory(prefix="karst-training-") as folder:
        output = Path(folder) / ADAPTER
        try:
            adapter = _fit(job, output, watch)
            result = TrainingResult(adapter, _report(output), watch.warnings)
        except NotBetterThanChance as error:
            result = TrainingResult(None, _report(output), watch.warnings, error.reason)
        except EXPECTED as error:
            result = TrainingResult(None, None, watch.warnings, str(error) or type(error).__name__)
        except ImportError as error:
            text = f"the machine that trains lacks a package ({error.name}); install karst-hub[train] there"
            result = TrainingResult(None, None, watch.warnings, text)
        except Exception as error:
            logger.exception("training %s failed", job.id)
            text = f"internal error ({type(error).__name__}); the log of the machine that trained has it"
            result = TrainingResult(None, None, watch.warnings, text)
    items.put(result)


def _fit(job: TrainingJob, output: Path, watch: "_Progress") -> bytes:
    """Train, and return the adapter file.

    Raises:
        DataError, BackboneError, AdapterError, ConfigError, FloatingPointError: see `adapters.fit`.
    """
    watch.enter("loading the backbone")
    source = job.backbone
    backbone = load_backbone(source.name, source.checkpoint, device=source.device, image_size=source.image_size)
    default = KarstConfig()
    config = default.model_copy(
        update={"kernels": min(default.kernels, job.max_kernels), "rank": min(default.rank, job.max_rank)}
    )
    splits = _splits(job)
    trained = fit(
        splits,
        output,
        backbone=backbone,
        recipe="karst" if job.recipe == "karst" else "auto",
        config=config,
        budget_s=job.budget_s,
        skip_bad=True,
        max_pixels=job.max_pixels,
        fingerprint=job.fingerprint,
        metrics={"snapshot": job.snapshot_digest, "training": job.id},
        watch=watch,
    )
    adapter = trained.adapter
    if job.int8:
        watch.enter("comparing int8 with float32")
        try:
            adapter = with_int8_agreement(adapter, backbone, splits, job.max_pixels)
        except (BackboneError, DataError) as error:  # the adapter is whole without it
            watch.warnings += (f"the agreement of int8 with float32 was not measured: {error}",)
    return adapter.data


def _splits(job: TrainingJob) -> DatasetSplits:
    """Return the images of the snapshot; each is read from the store when it is needed."""
    store = Store(job.store_url, IMAGES)
    listed: list[tuple[str, str, str]] = [tuple(image) for image in json.loads(job.snapshot)["images"]]
    labels = sorted_labels(label for _, label, _ in listed)
    numbers = {label: i for i, label in enumerate(labels)}

    def images(use: str) -> ImageSet | None:
        own = [(digest, label) for digest, label, used in listed if used == use]
        if not own:
            return None
        sources = tuple(EncodedImage(digest, partial(_read, store, digest)) for digest, _ in own)
        return ImageSet(sources, tuple(numbers[label] for _, label in own), tuple(labels))

    train_images = images("train")
    if train_images is None:
        raise DataError("the snapshot has no image to train on")
    return DatasetSplits(train_images, test=images("test"))


def _read(store: Store, digest: str) -> bytes:
    try:
        return store.get(digest)
    except Unavailable as error:  # `adapters` knows files; the check of the images then leaves this one out
        raise OSError(error.detail) from error


def _report(output: Path) -> bytes | None:
    """Return the zip of the report that `fit` has written beside its output."""
    folder = output.with_name(f"{output.name.removesuffix('.safetensors')}.report")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            if (folder / name).exists():
                archive.writestr(name, (folder / name).read_bytes())
    return data.getvalue() if folder.exists() else None


class _Progress(Watch):
    """Callbacks of `fit` that report the progress."""

    def __init__(self, items: "queue.SimpleQueue[TrainingProgress | TrainingResult]") -> None:
        self.warnings: tuple[str, ...] = ()
        self._items = items
        self._now: dict[str, Any] = {}
        self._sent_at_s = 0.0
        self._karst_steps = self._karst_done = 0
        self._began_s = 0.0

    def enter(self, stage: str, steps: int = 0, **figures: float | None) -> None:
        """Report a new stage."""
        kept: Mapping[str, Any] = {name: self._now.get(name) for name in ("loss", "accuracy")}
        self._now = {"stage": stage, "step": 0, "steps": steps, **kept, **figures}
        self._send()

    def reading(self, images: int) -> None:
        self.enter("reading images", images)

    def image(self) -> None:
        self._advance()

    def checked(self, images: CheckedDataset) -> None:
        self.warnings = images.warnings
        self.enter("computing features")

    def instant(self, classifier: Classifier) -> None:
        self.enter("planning KARST", accuracy=round(classifier.held_out.accuracy, 4))

    def planned(self, steps: int, seconds: float) -> None:
        self._began_s, self._karst_steps = time.monotonic(), steps
        self.enter("KARST", steps, seconds_left=round(seconds, 1))

    def stepped(self, stage: str, loss: float) -> None:
        self._karst_done += 1
        spent_s = time.monotonic() - self._began_s
        left = max(self._karst_steps - self._karst_done, 0)
        self._now |= {"stage": f"KARST, {stage}", "loss": round(loss, 4)}
        self._now["seconds_left"] = round(spent_s / self._karst_done * left, 1)
        self._advance()

    def evaluated(self, stage: str, accuracy: float) -> None:
        self._now["accuracy"] = round(accuracy, 4)

    def _advance(self) -> None:
        self._now["step"] += 1
        if time.monotonic() - self._sent_at_s >= INTERVAL_S:
            self._send()

    def _send(self) -> None:
        self._sent_at_s = time.monotonic()
        self._items.put(TrainingProgress(**self._now))
