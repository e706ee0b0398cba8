"""Reading of weight files: PyTorch files with tensors only, safetensors, and Google's `.npz`, into a timm model."""

import argparse
import logging
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from .timm_import import clean_state_dict
from .timm_models import BackboneError, first_line

PICKLED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
CHECKPOINT_SUFFIXES = (".safetensors", *PICKLED_SUFFIXES, ".npz")
_STATE_DICTS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order
_CLASSIFIERS = ("head.", "head_dist.", "fc_norm.", "classifier.")
_SHOWN = 5  # names in a message
_log = logging.getLogger(__name__)

# Values that training loops store beside the weights. Building one of these runs no code of the file.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")),
    np.float64(0).__reduce__()[0],  # numpy's `scalar`, whose module numpy 2 renamed
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
]


def has_suffix(path: Path, suffixes: Iterable[str]) -> bool:
    """Return whether a file's name ends in one of the suffixes, which may have two parts, such as `.pth.tar`."""
    return path.name.endswith(tuple(suffixes))


def load_pickled(path: Path) -> Any:
    """Return the contents of a PyTorch file, read with weights only, on the CPU.

    Raises:
        ValueError: the file has other Python objects than tensors and plain values, or is damaged. No code of the file
            has run.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise many kinds
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
            raise ValueError(
                f"weights only: not a PyTorch file, or a damaged one ({reason.splitlines()[0]})"
            ) from error
        raise ValueError(
            f"weights only: the file holds {found[1]}, a Python object and no tensor, which is not loaded, since a "
            "pickle can run code; save the state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error


def state_dict_in(found: Any, names: Iterable[str] = _STATE_DICTS) -> Mapping[str, Any]:
    """Return the state dict of a file's contents: the first of `names` that holds one, else the contents themselves.

    Raises:
        ValueError: the contents are no dictionary.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"holds a {type(found).__name__}, expected a dictionary of tensors (a state dict)")
    return next((found[name] for name in names if isinstance(found.get(name), Mapping)), found)


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that have NaN or infinite numbers."""
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def load_weights(model: Any, path: Path, *, resized: bool = False) -> None:
    """Load a checkpoint into a timm model without classifier. Log a warning if position embeddings are resampled.

    Args:
        resized: the caller has chosen the image size, so that resampling is no surprise and no warning.

    Raises:
        BackboneError: the file does not exist, is damaged, has NaN, or does not fit the model.
    """
    if not has_suffix(path, CHECKPOINT_SUFFIXES):
        raise BackboneError(f"checkpoint {path}: the file must end in one of {', '.join(CHECKPOINT_SUFFIXES)}")
    if not path.is_file():
        raise BackboneError(f"checkpoint {path}: no such file")
    try:
        missing, unexpected, resampled = (_load_npz if path.suffix == ".npz" else _load_state_dict)(model, path)
    except Exception as error:  # torch, numpy, zipfile and safetensors each raise their own
        raise BackboneError(f"checkpoint {path}: {first_line(error)}") from error
    stray = [name for name in unexpected if not name.startswith(_CLASSIFIERS)]
    if missing or stray:
        raise BackboneError(
            f"checkpoint {path} does not fit the model: missing {missing[:_SHOWN] or 'nothing'}, unexpected "
            f"{stray[:_SHOWN] or 'nothing'} ({len(missing)} missing and {len(stray)} unexpected in all)"
        )
    if wrong := not_finite(model.state_dict()):
        raise BackboneError(
            f"checkpoint {path}: NaN or infinite numbers in {', '.join(wrong[:_SHOWN])} ({len(wrong)} tensors in all); "
            "the training diverged; use an earlier checkpoint"
        )
    if resampled:
        _log.log(
            logging.INFO if resized else logging.WARNING,
            "checkpoint %s is of another image or patch size; these weights were resampled, so the features differ "
            "from those of its own size: %s",
            path,
            ", ".join(f"{name} from {_shape(was)} to {_shape(now)}" for name, was, now in resampled),
        )


Resampled = list[tuple[str, torch.Size, torch.Size]]  # name, shape in the file, shape in the model


def _load_state_dict(model: Any, path: Path) -> tuple[list[str], list[str], Resampled]:
    """Load safetensors or a PyTorch file.

    Returns:
        The model's parameters that the file lacks, the file's tensors that the model lacks, and those that timm's
        translation of foreign layouts has resampled.
    """
    pickled = has_suffix(path, PICKLED_SUFFIXES)
    found = state_dict_in(load_pickled(path) if pickled else safetensors.torch.load_file(path))
    state = {name: value for name, value in clean_state_dict(dict(found)).items() if isinstance(value, Tensor)}
    state = _without_prefix(model, state)
    to_timm = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # DINOv2, CLIP, other sizes
    translated = to_timm(dict(state), model) if to_timm else state
    resampled = [
        (name, state[name].shape, value.shape)
        for name, value in translated.items()
        if name in state and state[name].numel() != value.numel()
    ]
    floats = {name: value.float() if value.is_floating_point() else value for name, value in translated.items()}
    missing, unexpected = model.load_state_dict(floats, strict=False)
    return missing, unexpected, resampled


def _without_prefix(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix under which a training loop keeps the whole model, such as `model.` in Lightning's `.ckpt`.

    Raises:
        ValueError: the file has the whole model twice.
    """
    names = list(model.state_dict())
    if names[0] in state:
        return state
    prefixes = [name.removesuffix(names[0]) for name in state if name.endswith(f".{names[0]}")]
    whole = [prefix for prefix in prefixes if all(prefix + name in state for name in names)]
    if len(whole) > 1:
        raise ValueError(f"has the model's weights under {' and '.join(whole)}; save one of them alone")
    return {name.removeprefix(whole[0]): value for name, value in state.items()} if whole else state


def _load_npz(model: Any, path: Path) -> tuple[list[str], list[str], Resampled]:
    """Load Google's layout with timm's reader, which ignores missing parameters and surplus blocks.

    Returns:
        The model's parameters that the file did not set, the file's blocks that the model lacks, and the weights that
        timm's reader has resampled.
    """
    before = {name: parameter._version for name, parameter in model.named_parameters()}
    model.load_pretrained(str(path))
    missing = [name for name, parameter in model.named_parameters() if parameter._version == before[name]]
    with np.load(path) as archive:
        blocks = sorted({found[0] for found in map(re.compile(r".*encoderblock_\d+").match, archive.files) if found})
        resampled = [
            (name, torch.Size(archive[theirs].shape), ours.shape)
            for name, theirs in (
                ("pos_embed", "Transformer/posembed_input/pos_embedding"),
                ("patch_embed.proj.weight", "embedding/kernel"),
            )
            if theirs in archive.files and (ours := model.get_parameter(name)).numel() != archive[theirs].size
        ]
    unexpected = [name for name in blocks if int(name.rpartition("_")[2]) >= len(model.blocks)]
    return missing, unexpected, resampled


def _shape(size: torch.Size) -> str:
    return " x ".join(map(str, size))
