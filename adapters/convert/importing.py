"""Parts that every importer of a foreign format shares.

They read tensor files, find the classifier and the tuned norm layers, and build the `Adapter`. `peft.py` and
`official.py` interpret the tensors' names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from ..backbone import Backbone, first_line
from ..checkpoints import PICKLED_SUFFIXES, has_suffix, load_pickled, not_finite, state_dict_in
from ..data.images import preprocess_of
from ..format.errors import AdapterError, Problem, file_error
from ..format.file import Adapter
from ..method import kronecker
from ..method.config import KarstConfig
from ..short_repr import short_repr


@dataclass(frozen=True)
class KroneckerLayer:
    """dW of one layer, as `kronecker.delta` takes it: C (N, p, q), A (N, S, a, r), B (N, r, b), and its gain."""

    c: Tensor
    a: Tensor
    b: Tensor
    gain: float

    __repr__ = short_repr


@dataclass
class ImportedTensors:
    """The contents of a foreign file.

    Attributes:
        layers: site -> its dW.
        others: tensors under their `karst/1` names: head, re-scaling, norms.
        ignored: number of tensors that are not the adapter's: the backbone's weights, and buffers.
        notes: remarks for the report.
    """

    layers: dict[str, KroneckerLayer] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    ignored: int = 0
    notes: list[str] = field(default_factory=list)

    __repr__ = short_repr


def build_adapter(
    backbone: Backbone,
    imported: ImportedTensors,
    labels: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None = None,
) -> Adapter:
    """Return one exact `karst/1` adapter of layers that may differ in rank, gain and number of kernels.

    Kernels that a layer lacks are zeros. The file has one gain, so where layers differ in it, C is multiplied by it.

    Args:
        labels: K names, in the order of the head's rows.
        preprocess: timm data config of the source's images; None takes the backbone's own.

    Raises:
        AdapterError: layers, head or labels are missing, or tensors do not fit the backbone.
    """
    problems = []
    if not imported.layers:
        problems.append(Problem("file", "has no adapted layer; choose a file with adapter tensors"))
    if "head.weight" not in imported.others or "head.bias" not in imported.others:
        problems.append(
            Problem("head", "the source has no classifier (weight and bias); give it with --head FILE.safetensors")
        )
    if labels is None:
        problems.append(Problem("labels", "the source has no class names; give them with --labels FILE"))
    if problems or labels is None:
        raise AdapterError(problems)
    layers = imported.layers.values()
    kernels = max(len(layer.c) for layer in layers)
    gains = {layer.gain for layer in layers}
    gain = gains.pop() if len(gains) == 1 else 1.0
    if gain <= 0:
        gain = 1.0
    tensors = dict(imported.others)
    for name, layer in imported.layers.items():
        c = layer.c if layer.gain == gain else (layer.c.double() * layer.gain).to(layer.c.dtype)
        for part, tensor in (("karst_c", c), ("karst_a", layer.a), ("karst_b", layer.b)):
            missing = tensor.new_zeros(kernels - len(tensor), *tensor.shape[1:])
            tensors[f"{name}.{part}"] = torch.cat([tensor, missing])
    try:
        config = KarstConfig(
            kernels=kernels,
            rank=max(layer.b.shape[1] for layer in layers),
            factor=_factor(backbone, imported.layers),
            gain=gain,
            rescale=_rescale(imported.others),
            norms=any(name.endswith(".norm_weight") for name in imported.others),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(
            [Problem(str(first["loc"][0]), f"would be {first['input']}, which karst/1 does not allow: {first['msg']}")]
        ) from error
    adapter = Adapter.create(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()},
        config=config,
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        labels=labels,
        preprocess=preprocess if preprocess is not None else preprocess_of(backbone, background=None),
    )
    adapter.check(backbone)
    return adapter


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file or a torch pickle (weights only), on the CPU.

    Raises:
        AdapterError: the suffix is unknown, the file does not exist or is unreadable, or the pickle has code.
    """
    pickled = has_suffix(path, PICKLED_SUFFIXES)
    if path.suffix != ".safetensors" and not pickled:
        raise file_error(f"{path}: the file must end in one of .safetensors, {', '.join(PICKLED_SUFFIXES)}")
    if not path.is_file():
        raise file_error(f"{path}: no such file")
    try:
        if not pickled:
            return dict(safetensors.torch.load_file(path))
        found = load_pickled(path)
    except Exception as error:  # damaged files raise many kinds
        raise file_error(f"{path}: cannot be read as tensors only: {first_line(error)}") from error
    try:
        found = state_dict_in(found, ("state_dict", "model"))
    except ValueError as error:
        raise file_error(f"{path}: {error}") from error
    return {str(name): value for name, value in found.items()}


def not_finite_problems(state: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each tensor with NaN or infinite numbers."""
    advice = "has NaN or infinite numbers, so the training diverged; convert an earlier checkpoint"
    return [Problem(name, advice) for name in not_finite(state)]


def read_labels(path: Path) -> list[str]:
    """Return class names from a file: a JSON list of strings, or one name per line without blank lines.

    Raises:
        AdapterError: the file does not exist, is not UTF-8, or has other JSON.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise file_error(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise file_error(f"{path}: is not UTF-8 text; expected one label per line, or a JSON list") from error
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        found: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise file_error(f"{path}: starts with [ but is not valid JSON ({error})") from error
    if not all(isinstance(label, str) for label in found):
        raise file_error(f"{path}: must be a JSON list of strings")
    return [str(label) for label in found]


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        AdapterError: the file does not exist or is not valid JSON.
    """
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise file_error(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise file_error(f"{path}: is not valid JSON ({error})") from error


def read_preprocess(path: Path) -> dict[str, Any]:
    """Return the JSON object of a preprocess file; `Adapter.create` validates its fields.

    Raises:
        AdapterError: the file does not exist or is not a JSON object.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise file_error(f"{path}: must be a JSON object, as `karst-hub inspect` shows it under preprocess")
    return found


def read_head(path: Path) -> dict[str, Tensor]:
    """Return a classifier, by its `karst/1` names, from a file with `weight` (K, D) and `bias` (K,).

    Raises:
        AdapterError: the file is unreadable or has other tensors.
    """
    found = read_tensors(path)
    if set(found) != {"weight", "bias"} or not all(isinstance(t, Tensor) for t in found.values()):
        raise file_error(f"{path}: has the tensors {sorted(found)[:5]}, expected exactly weight (K, D) and bias (K,)")
    return {f"head.{name}": tensor for name, tensor in found.items()}


def classifier_name(backbone: Backbone) -> str:
    """Return the module path of the classifier in a model of this kind: `head`, or `head.fc` (Swin).

    Raises:
        AdapterError: the model has two classifiers (a distilled DeiT).
    """
    model = backbone.clone()
    model.reset_classifier(1)
    classifier = model.get_classifier()
    if isinstance(classifier, tuple):
        raise file_error(
            f"backbone {backbone.name!r} has {len(classifier)} classifiers, an adapter has one; use another backbone"
        )
    return str(next(name for name, module in model.named_modules() if module is classifier))


def take_model_weights(backbone: Backbone, state: Mapping[str, Any], imported: ImportedTensors) -> list[Problem]:
    """Add the head and tuned norms of a state dict to `imported.others`, and count the rest in `imported.ignored`.

    Returns:
        Problems: frozen weights that differ from the backbone's, norm layers that it lacks, and unknown tensors, which
        may have been trained.
    """
    problems: list[Problem] = []
    heads = {f"{path}.{part}": f"head.{part}" for path in ("head", classifier_name(backbone)) for part in _PARTS}
    frozen = backbone.model.state_dict()
    buffers = {name for name, _ in backbone.model.named_buffers()}
    norms = {norm.name for norm in backbone.norms}
    tuned: dict[str, None] = {}  # in the order of the file; the order of a set would depend on the process
    for name, value in state.items():
        path, _, part = name.rpartition(".")
        if not isinstance(value, Tensor):
            imported.ignored += 1
        elif name in heads:
            imported.others[heads[name]] = value
        elif name not in frozen:
            if "norm" in path.rpartition(".")[2] and part in _PARTS:
                problems.append(Problem(name, f"backbone {backbone.name!r} has no such norm layer; remove it"))
            elif value.is_floating_point() and name not in buffers:
                problems.append(
                    Problem(
                        name,
                        f"is neither a weight of backbone {backbone.name!r} nor a known part of an adapter, and may "
                        "have been trained; remove it if the model does not use it, and give another classifier with "
                        "--head",
                    )
                )
            imported.ignored += 1
        elif value.shape != frozen[name].shape:
            found, right = tuple(value.shape), tuple(frozen[name].shape)
            problems.append(
                Problem(
                    name,
                    f"has shape {found}, but backbone {backbone.name!r} has {right}; give the source's own backbone",
                )
            )
        elif path in norms and not torch.equal(value, frozen[name].to(value.dtype)):
            tuned[path] = None
        else:
            if not torch.allclose(value.float(), frozen[name].to(value.dtype).float(), rtol=1e-3, atol=1e-6):
                problems.append(
                    Problem(
                        name,
                        f"differs from backbone {backbone.name!r}; give the weights that the source was trained on",
                    )
                )
            imported.ignored += 1
    for path in tuned:
        for part in _PARTS:  # a file may have only one of the two
            imported.others[f"{path}.norm_{part}"] = state.get(f"{path}.{part}", frozen[f"{path}.{part}"]).float()
    return problems


_PARTS = ("weight", "bias")


def _rescale(others: Mapping[str, Tensor]) -> Any:
    sizes = {t.numel() for name, t in others.items() if name.endswith(("scale", "shift"))}
    return "none" if not sizes else "scalar" if sizes == {1} else "channel"


def _factor(backbone: Backbone, layers: Mapping[str, KroneckerLayer]) -> int:
    """Return the factor that gives each layer the sides of its C, or the largest side where no factor does."""
    sites = {site.name: site for site in backbone.sites}
    sides = {side for layer in layers.values() for side in layer.c.shape[1:]}

    def fits(factor: int) -> bool:
        return all(
            kronecker.shapes(sites[name].d_in, sites[name].d_out, sites[name].splits, kernels=1, rank=1, factor=factor)[
                0
            ][1:]
            == layer.c.shape[1:]
            for name, layer in layers.items()
        )

    return next(filter(fits, sorted(sides)), max(sides))
