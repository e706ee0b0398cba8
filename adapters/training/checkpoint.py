"""What a training leaves behind so that it can go on after Ctrl-C, a kill or a power cut.

One file, written whole at the end of every epoch: the trained numbers, the optimiser and the schedule, the best epoch
so far, the history, and what it belongs to. Random numbers need no place in it: every epoch draws its own from the
recipe's seed and its number (`train.py`), so that a training that went on ends in the same bits.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from ..data.images import DataError, Pixels, preprocess_of
from ..format.file import write_atomically
from ..method.karst import KarstModel

FORMAT = "karst-checkpoint/1"


def identity(
    model: KarstModel, recipe: dict[str, Any], devices: int, train: Pixels, validation: Pixels | None
) -> dict[str, Any]:
    """What a checkpoint belongs to: going on with anything else would be another training."""
    return {
        "format": FORMAT,
        "fingerprint": model.backbone.fingerprint,
        "config": model.config.model_dump(mode="json"),
        "recipe": json.loads(json.dumps(recipe)),
        "number of devices": devices,
        "preprocessing": json.loads(json.dumps(preprocess_of(model.backbone))),
        "training images": _digest(train),
        "validation images": _digest(validation) if validation is not None else None,
    }


def save(path: Path, own: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a checkpoint so that it is there completely or not at all.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"identity": json.dumps(own), "state": state}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint that belongs to this very training.

    Raises:
        DataError: no such file, no checkpoint, or one of another training; the message says in what they differ.
    """
    try:
        # With weights only: a checkpoint runs no code, whoever made it.
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, state = json.loads(content["identity"]), content["state"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no checkpoint to go on from; start without --resume") from error
    except Exception as error:  # damaged pickles raise whatever comes first
        raise DataError(f"{path}: not a checkpoint of a training; delete it and start anew") from error
    different = [name for name in own if found.get(name) != own[name]]
    if different:
        raise DataError(
            f"{path}: belongs to another training, with another {', '.join(different)}; "
            "give the same options as then, or delete it and start anew"
        )
    return state


def _digest(pixels: Pixels) -> str:
    """sha256 (hex) over the files' bytes, targets and labels; the files may lie elsewhere and stay the same."""
    images = pixels.images
    digest = hashlib.sha256(json.dumps([list(images.targets), list(images.labels)]).encode())
    for i in range(len(images)):
        digest.update(pixels.digest(i))
    return digest.hexdigest()
