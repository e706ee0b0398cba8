"""Training checkpoints, from which a training resumes after Ctrl-C, a kill or a power failure.

One file, replaced atomically at the end of every epoch. It holds the parameters, the optimiser, the schedule, the best
epoch, the history, and the identity of the training. Random state is not stored: each epoch is seeded from the recipe
and its number (`devices.seed_epoch`), so that a resumed training ends with the same bits.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from ..data.errors import DataError
from ..data.image_set import ImageTensors
from ..data.images import preprocess_of
from ..format.atomic_write import write_atomically
from ..method.karst import KarstModel
from .recipe import Recipe

FORMAT = "karst-checkpoint/1"


def training_identity(
    model: KarstModel, recipe: Recipe, devices: int, train: ImageTensors, validation: ImageTensors | None
) -> dict[str, Any]:
    """Return everything that must be equal for a training to resume from a checkpoint, as JSON types."""
    return {
        "format": FORMAT,
        "fingerprint": model.backbone.fingerprint,
        "config": model.config.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "number of devices": devices,
        "preprocessing": json.loads(json.dumps(preprocess_of(model.backbone))),
        "training images": _digest(train),
        "validation images": _digest(validation) if validation is not None else None,
    }


def save_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a checkpoint. A reader sees the complete old or new file.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"identity": json.dumps(identity), "state": state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the state in a checkpoint of the training with this identity.

    Raises:
        DataError: the file does not exist, is not a checkpoint, or belongs to another training. The message names the
            differences.
    """
    try:
        # weights_only refuses pickled code, which a crafted file could run otherwise.
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, state = json.loads(content["identity"]), dict[str, Any](content["state"])
    except FileNotFoundError as error:
        raise DataError(f"{path}: no checkpoint to resume from; start without --resume") from error
    except Exception as error:  # a damaged pickle raises almost any exception
        raise DataError(f"{path}: not a training checkpoint; delete the file and start without --resume") from error
    different = [name for name in identity if found.get(name) != identity[name]]
    if different:
        raise DataError(
            f"{path}: the checkpoint belongs to another training: different {', '.join(different)}; "
            "repeat the options of that training, or delete the file and start without --resume"
        )
    return state


def _digest(tensors: ImageTensors) -> str:
    """Return the sha256 (hex) of the image bytes, targets and labels. File paths do not count."""
    images = tensors.images
    digest = hashlib.sha256(json.dumps([list(images.targets), list(images.labels)]).encode())
    for i in range(len(images)):
        digest.update(tensors.digest(i))
    return digest.hexdigest()
