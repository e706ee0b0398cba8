"""Numbers that another tool trained -> an `Adapter`: what every reader of a foreign format shares.

It reads tensor files, finds the classifier and the tuned norm layers, and puts Kronecker layers together; what a
tensor's name means is `peft_files.py`'s and `official.py`'s to say.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from ..backbone import Backbone, first_line
from ..data.images import preprocess_of
from ..format.errors import AdapterError, Problem, file_error
from ..format.file import Adapter
from ..method import kronecker
from ..method.config import KarstConfig

_PICKLED = (".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Layer:
    """dW of one layer, as `kronecker.delta` takes it: C (N, p, q), A (N, S, a, r), B (N, r, b), and its own gain."""

    c: Tensor
    a: Tensor
    b: Tensor
    gain: float


@dataclass
class Numbers:
    """What was found in a foreign file.

    Attributes:
        layers: site -> its dW.
        others: tensors under their `karst/1` names: head, re-scaling, norms.
        ignored: how many of the file's tensors say nothing of the adapter, such as the backbone's own weights.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    ignored: int = 0


def assemble(
    backbone: Backbone,
    numbers: Numbers,
    labels: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None = None,
) -> Adapter:
    """One `karst/1` adapter of layers that may differ in rank, gain and number of kernels; nothing is approximated.

    Kernels that a layer lacks are zeros. The file has one gain: where layers differ in it, C carries it.

    Args:
        labels: K names, in the order of the head's rows.
        preprocess: what the source's images went through; None takes the backbone's own data config.

    Raises:
        AdapterError: no layers, no head, no labels, or numbers that do not fit the backbone.
    """
    problems = []
    if not numbers.layers:
        problems.append(Problem("file", "has no adapted layer in it"))
    if "head.weight" not in numbers.others or "head.bias" not in numbers.others:
        problems.append(
            Problem("head", "the source has no classifier (weight and bias); give it with --head FILE.safetensors")
        )
    if labels is None:
        problems.append(Problem("labels", "the source has no class names; give them with --labels FILE"))
    if problems or labels is None:
        raise AdapterError(problems)
    layers = numbers.layers.values()
    kernels = max(len(layer.c) for layer in layers)
    gains = {layer.gain for layer in layers}
    gain = gains.pop() if len(gains) == 1 else 1.0
    if gain <= 0:
        gain = 1.0
    tensors = dict(numbers.others)
    for name, layer in numbers.layers.items():
        c = layer.c if layer.gain == gain else (layer.c.double() * layer.gain).to(layer.c.dtype)
        for part, tensor in (("karst_c", c), ("karst_a", layer.a), ("karst_b", layer.b)):
            missing = tensor.new_zeros(kernels - len(tensor), *tensor.shape[1:])
            tensors[f"{name}.{part}"] = torch.cat([tensor, missing])
    try:
        config = KarstConfig(
            kernels=kernels,
            rank=max(layer.b.shape[1] for layer in layers),
            factor=_factor(backbone, numbers.layers),
            gain=gain,
            rescale=_rescale(numbers.others),
            norms=any(name.endswith(".norm_weight") for name in numbers.others),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(
            [Problem(str(first["loc"][0]), f"would be {first['input']}, which no adapter may have: {first['msg']}")]
        ) from error
    adapter = Adapter.create(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()},
        config=config,
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        labels=labels,
        preprocess=preprocess if preprocess is not None else preprocess_of(backbone),
    )
    adapter.check(backbone)
    return adapter


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file or of a torch pickle (weights only); on the CPU.

    Raises:
        AdapterError: another suffix, not there, not readable, or code in the pickle.
    """
    if path.suffix != ".safetensors" and path.suffix not in _PICKLED:
        raise file_error(f"{path}: the file must end in one of .safetensors, {', '.join(_PICKLED)}")
    if not path.is_file():
        raise file_error(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise whatever comes first
        raise file_error(f"{path}: cannot be read as tensors only: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise file_error(f"{path}: holds a {type(found).__name__}, expected a dictionary of tensors (a state dict)")
    for key in ("state_dict", "model"):  # what training loops wrap a state dict in
        if isinstance(found.get(key), Mapping):
            found = found[key]
    return {str(name): value for name, value in found.items()}


def read_labels(path: Path) -> list[str]:
    """Class names from a file: a JSON list of strings, or one name a line (blank lines are skipped).

    Raises:
        AdapterError: not there, not UTF-8, or JSON of another kind.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise file_error(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise file_error(f"{path}: is not UTF-8 text; expected one label a line, or a JSON list") from error
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise file_error(f"{path}: starts with [ but is not valid JSON ({error})") from error
    if not all(isinstance(label, str) for label in found):
        raise file_error(f"{path}: must be a JSON list of strings")
    return found


def read_json(path: Path) -> Any:
    """
    Raises:
        AdapterError: not there, or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise file_error(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise file_error(f"{path}: is not valid JSON ({error})") from error


def read_preprocess(path: Path) -> dict[str, Any]:
    """A JSON object as adapter files have it under `preprocess`; `Adapter.create` checks what is in it.

    Raises:
        AdapterError: not there, or not a JSON object.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise file_error(f"{path}: must be a JSON object, as `karst-hub inspect` shows it under preprocess")
    return found


def read_head(path: Path) -> dict[str, Tensor]:
    """A classifier from a file with `weight` (K, D) and `bias` (K,), under its `karst/1` names.

    Raises:
        AdapterError: not readable, or other tensors in it.
    """
    found = read_tensors(path)
    if set(found) != {"weight", "bias"} or not all(isinstance(t, Tensor) for t in found.values()):
        raise file_error(f"{path}: must have exactly the tensors weight (K, D) and bias (K,), not {sorted(found)[:5]}")
    return {f"head.{name}": tensor for name, tensor in found.items()}


def classifier_name(backbone: Backbone) -> str:
    """Where a model of this kind has its classifier when it has one: `head`, or `head.fc` (Swin).

    Raises:
        AdapterError: it has two (a distilled DeiT).
    """
    model = backbone.clone()
    model.reset_classifier(1)
    classifier = model.get_classifier()
    if isinstance(classifier, tuple):
        raise file_error(f"backbone {backbone.name!r} has {len(classifier)} classifiers; an adapter has one head")
    return next(name for name, module in model.named_modules() if module is classifier)


def take_own_weights(backbone: Backbone, state: Mapping[str, Any], numbers: Numbers) -> list[Problem]:
    """Sort the tensors that have a name of the model itself: its head, tuned norms, frozen weights, and the rest.

    Changes `numbers`: head and tuned norms go to `others`, the rest is counted in `ignored`.

    Returns:
        Frozen weights that are not this backbone's, and norm layers that it does not have.
    """
    problems: list[Problem] = []
    heads = {f"{path}.{part}": f"head.{part}" for path in ("head", classifier_name(backbone)) for part in _PARTS}
    frozen = backbone.model.state_dict()
    norms = {norm.name for norm in backbone.norms}
    tuned = set()
    for name, value in state.items():
        path, _, part = name.rpartition(".")
        if not isinstance(value, Tensor):
            numbers.ignored += 1
        elif name in heads:
            numbers.others[heads[name]] = value
        elif name not in frozen:
            if "norm" in path.rpartition(".")[2] and part in _PARTS:
                problems.append(Problem(name, f"backbone {backbone.name!r} has no such norm layer"))
            numbers.ignored += 1
        elif value.shape != frozen[name].shape:
            found, right = tuple(value.shape), tuple(frozen[name].shape)
            problems.append(Problem(name, f"has shape {found}, but backbone {backbone.name!r} has {right} there"))
        elif path in norms and not torch.equal(value, frozen[name].to(value.dtype)):
            tuned.add(path)
        else:
            if not torch.allclose(value.float(), frozen[name].to(value.dtype).float(), rtol=1e-3, atol=1e-6):
                problems.append(
                    Problem(name, f"differs from backbone {backbone.name!r}: the source was trained on other weights")
                )
            numbers.ignored += 1
    for path in tuned:
        for part in _PARTS:  # a file may have only one of the two
            numbers.others[f"{path}.norm_{part}"] = state.get(f"{path}.{part}", frozen[f"{path}.{part}"]).float()
    return problems


_PARTS = ("weight", "bias")


def _rescale(others: Mapping[str, Tensor]) -> Any:
    sizes = {t.numel() for name, t in others.items() if name.endswith(("scale", "shift"))}
    return "none" if not sizes else "scalar" if sizes == {1} else "channel"


def _factor(backbone: Backbone, layers: Mapping[str, Layer]) -> int:
    """The factor that gives every layer the sides of its C, or, if there is none, the largest side."""
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
