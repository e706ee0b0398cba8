"""Recipe `instant`: a classifier head on the stored features of a snapshot's images.

The first fit of a gateway imports torch in its own thread: a gateway that fits nothing does without 300 MB.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapters.backbone_info import BackboneInfo
from adapters.data.errors import DataError
from adapters.evaluation.numbers import report_numbers

from ...concurrency import lower_priority
from ...errors import Conflict
from ..datasets.snapshots import Snapshot

if TYPE_CHECKING:
    from adapters.training.auto import Classifier

REPORT = "report.json"


def start_fit_thread() -> None:
    """Let the calling thread fit with one core, and only while classification leaves it one."""
    import torch  # before the priority falls: all threads would wait for an import that holds the interpreter lock

    torch.set_num_threads(1)
    lower_priority()


def fit_instant(
    snapshot: Snapshot, rows: Mapping[str, NDArray[np.float16]], backbone: BackboneInfo, extra: Mapping[str, str]
) -> "tuple[Classifier, bytes]":
    """Fit the instant head to the features of a snapshot. Return it with its report, a zip of `report.json`.

    Args:
        rows: (D,) of each image, by digest.
        extra: further figures for the metadata.

    Raises:
        Conflict: the images are too few.
    """
    import torch

    from adapters.training.auto import instant_from_features

    numbers = {label: i for i, label in enumerate(snapshot.labels)}
    parts = {}
    for use in ("train", "test"):
        images = [image for image in snapshot.images if image.use == use]
        if images:
            features = torch.from_numpy(np.stack([rows[image.digest] for image in images]).astype(np.float32))
            parts[use] = features, torch.tensor([numbers[image.label] for image in images])
    try:
        classifier = instant_from_features(
            *parts["train"], snapshot.labels, backbone, test=parts.get("test"), extra=extra
        )
    except DataError as error:
        raise Conflict(f"Cannot train: {error}.") from error
    names = [image.digest for image in snapshot.images if image.use == "train"]
    numbers = report_numbers(classifier, names, classifier.metrics)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(REPORT, json.dumps(numbers, ensure_ascii=False, allow_nan=False))
    return classifier, data.getvalue()
