"""Bytes of a reply of the Open Inference Protocol, known before the images are computed."""

import json
from collections.abc import Sequence

from ...registry.versions import ServedVersion
from ...services.label_sets import require_small_reply
from .oip_tensors import OutputFormat

NUMBER_BYTES = 24  # of a number in JSON, with its comma


def require_small_outputs(formats: Sequence[OutputFormat], version: ServedVersion, images: int) -> None:
    """Refuse a call whose reply would be a large multiple of its request.

    Raises:
        InvalidRequest: the outputs of a version for these images have more than `MAX_REPLY_BYTES`.
    """
    if images > 1:
        image_bytes = sum(_image_bytes(output, version.labels) for output in formats)
        remedy = "request the best classes only: probabilities with the parameter classification"
        require_small_reply([image_bytes] * images, "outputs", remedy)


def _image_bytes(output: OutputFormat, labels: Sequence[str]) -> int:
    """Return the most bytes of an output for one image."""
    if output.name in ("typicality", "unknown"):
        return NUMBER_BYTES
    if output.name == "labels":
        return (
            sum(len(label.encode(errors="replace")) + 4 for label in labels) if output.binary else _json_bytes(labels)
        )
    if output.classes:
        sizes = sorted((_json_bytes(label) for label in labels), reverse=True)[: output.classes]
        return sum(sizes) + NUMBER_BYTES * len(sizes)
    return (4 if output.binary else NUMBER_BYTES) * len(labels)


def _json_bytes(value: str | Sequence[str]) -> int:
    return len(json.dumps(value))
