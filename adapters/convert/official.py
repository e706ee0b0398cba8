"""Import of checkpoints in the style of the paper's official code.

The published code cannot run and saves no weights, so users repaired it; docs/method.md lists the tensor names of such
repairs. The matrices are transposes of `karst/1`'s: dW = kron(w1, w2_a.T @ w2_b.T).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone, Site
from ..format.errors import AdapterError, Problem
from ..short_repr import short_repr
from .importing import ImportedTensors, KroneckerLayer, not_finite_problems, read_tensors, take_model_weights

_MODULE = re.compile(r"(?P<path>.+)\.(?P<name>attention|proj|fc1|fc2)_(?:ka|kar|karst|lokr)\.(?P<part>.+)")
_PART = re.compile(r"w1_group_1|alpha|w1_group\.\d{1,9}|w2_group_a\.\d{1,9}(\.\d)?|w2_group_b\.\d{1,9}")
_RESCALE = re.compile(r"(?P<path>.+)\.(?P<name>st_x|st_proj|st_h)_(?P<part>[sb])")
# Other names with these parts are adapter tensors of an unknown repair; they are refused instead of ignored.
_LIKE_AN_ADAPTER = re.compile(
    r"_(ka|kar|karst|lokr)(\.|$)|w[12]_group|(^|\.)st_|lokr_|lora_|(^|\.)(alpha|multiplier|lora_dim|group_num)$"
)
_LAYERS = {"attention": "qkv", "proj": "proj", "fc1": "fc1", "fc2": "fc2"}
_RESCALED = {"st_x": ("proj", "in_"), "st_proj": ("proj", ""), "st_h": ("fc2", "")}
_MAX_KERNELS = 256  # as in KarstConfig; otherwise a number in a name could allocate a list of any length


@dataclass
class _Group:
    """The tensors of one adapted layer, by the last part of their names, and the name that they share."""

    name: str
    parts: dict[str, Tensor] = field(default_factory=dict)

    __repr__ = short_repr


def read_official(path: Path, backbone: Backbone, multiplier: float = 1.0) -> ImportedTensors:
    """Return the tensors of an official-style checkpoint; gain = multiplier^2 * alpha / r, with alpha 1 by default.

    `module.` prefixes are removed. The backbone's weights in the file must equal the backbone's, except for tuned
    norms, which are kept. Frozen weights and values that are no tensors are counted as ignored.

    Args:
        path: `.pth`, `.pt`, `.bin`, `.pth.tar` or `.ckpt` (read with weights only), or `.safetensors`.
        multiplier: argument of the official layer, which no file stores.

    Raises:
        AdapterError: the file is unreadable or of another backbone, or a tensor is missing, has a wrong shape, or has
            an unknown name.
    """
    state = {name.removeprefix("module."): value for name, value in read_tensors(path).items()}
    sites = {site.name: site for site in backbone.sites}
    groups: dict[str, _Group] = {}
    imported, rest, problems = ImportedTensors(), {}, not_finite_problems(state)
    for name, value in state.items():
        module, rescale = _MODULE.fullmatch(name), _RESCALE.fullmatch(name)
        found = module or rescale
        if found is None or (module and not _PART.fullmatch(module["part"])):
            if _LIKE_AN_ADAPTER.search(name):
                problems.append(
                    Problem(
                        name,
                        "looks like an adapter tensor of an unknown repair; rename it (docs/convert.md) or remove it",
                    )
                )
            else:
                rest[name] = value
            continue
        layer = f"{found['path']}.{_LAYERS[found['name']] if module else _RESCALED[found['name']][0]}"
        if not isinstance(value, Tensor | int | float):
            problems.append(Problem(name, f"is a {type(value).__name__}, expected a tensor"))
        elif layer not in sites:
            problems.append(Problem(name, f"backbone {backbone.name!r} has no layer {layer!r} to adapt; remove it"))
        elif module:
            group = groups.setdefault(layer, _Group(name.removesuffix(f".{module['part']}")))
            if not name.startswith(f"{group.name}."):
                problems.append(
                    Problem(
                        name,
                        f"the same layer also has {group.name}.*; remove the tensors that are not used",
                    )
                )
            else:
                group.parts[module["part"]] = torch.as_tensor(value).float()
        else:
            part = _RESCALED[found["name"]][1] + {"s": "scale", "b": "shift"}[found["part"]]
            imported.others[f"{layer}.{part}"] = torch.as_tensor(value).float().reshape(-1)
            partner = name[:-1] + {"s": "b", "b": "s"}[name[-1]]
            if partner not in state:
                problems.append(Problem(partner, f"is missing, but {name} is present; store both or neither"))
    problems += take_model_weights(backbone, rest, imported)
    for layer, group in groups.items():
        read = _layer(sites[layer], group, multiplier)
        if isinstance(read, KroneckerLayer):
            imported.layers[layer] = read
        else:
            problems += read
    if problems:
        raise AdapterError(problems)
    return imported


def _layer(site: Site, group: _Group, multiplier: float) -> KroneckerLayer | list[Problem]:
    """Return the layer's C, A, B and gain, or the problems of its tensors."""
    parts: dict[str, Any] = dict(group.parts)
    alpha = parts.pop("alpha", torch.tensor(1.0))
    shared = parts.pop("w1_group_1", None)
    kernels = 1 + max((int(name.split(".")[1]) for name in parts), default=0)
    if kernels > _MAX_KERNELS:
        return [Problem(group.name, f"has {kernels} kernels, but at most {_MAX_KERNELS} are allowed")]
    if shared is not None:
        both = [name for name in parts if name.startswith("w1_group.")]
        if both:
            return [
                Problem(
                    f"{group.name}.w1_group_1",
                    f"is present beside {both[0]}; remove the one that the forward pass does not use",
                )
            ]
        parts |= {f"w1_group.{g}": shared for g in range(kernels)}
    splits = [f".{j}" for j in range(site.splits)] if site.splits > 1 else [""]
    wanted = {f"{name}.{g}" for name in ("w1_group", "w2_group_b") for g in range(kernels)}
    wanted |= {f"w2_group_a.{g}{j}" for g in range(kernels) for j in splits}
    problems = [
        Problem(f"{group.name}.{name}", "is missing; save the whole layer") for name in sorted(wanted - set(parts))
    ]
    problems += [
        Problem(
            f"{group.name}.{name}",
            f"does not belong to a layer with {site.splits} splits and {kernels} kernels; remove it",
        )
        for name in sorted(set(parts) - wanted)
    ]
    if alpha.numel() != 1:
        problems.append(Problem(f"{group.name}.alpha", f"has shape {tuple(alpha.shape)}, expected one number"))
    if problems:
        return problems
    problems = _shape_problems(site, group.name, parts)
    if problems:
        return problems
    rank = parts["w2_group_b.0"].shape[1]
    return KroneckerLayer(
        c=torch.stack([parts[f"w1_group.{g}"] for g in range(kernels)]),
        a=torch.stack([torch.stack([parts[f"w2_group_a.{g}{j}"].T for j in splits]) for g in range(kernels)]),
        b=torch.stack([parts[f"w2_group_b.{g}"].T for g in range(kernels)]),
        gain=multiplier**2 * alpha.item() / rank,
    )


def _shape_problems(site: Site, where: str, parts: Mapping[str, Tensor]) -> list[Problem]:
    """Return tensors of a wrong shape: w1 (p, q), w2_a (r, d_out/(S p)), w2_b (d_in/q, r), with p, q, r of kernel 0."""
    first_c, first_b = parts["w1_group.0"], parts["w2_group_b.0"]
    for name, tensor in (("w1_group.0", first_c), ("w2_group_b.0", first_b)):
        if tensor.ndim != 2 or 0 in tensor.shape:
            return [Problem(f"{where}.{name}", f"has shape {tuple(tensor.shape)}, expected a matrix")]
    (p, q), rank = first_c.shape, first_b.shape[1]
    if site.d_out % (site.splits * p) or site.d_in % q:
        return [
            Problem(
                f"{where}.w1_group.0",
                f"is {p} x {q}, which does not divide {site.d_out // site.splits} outputs and {site.d_in} inputs",
            )
        ]
    expected = {
        "w1_group": (p, q),
        "w2_group_a": (rank, site.d_out // (site.splits * p)),
        "w2_group_b": (site.d_in // q, rank),
    }
    return [
        Problem(f"{where}.{name}", f"has shape {tuple(tensor.shape)}, expected {expected[name.split('.')[0]]}")
        for name, tensor in parts.items()
        if tuple(tensor.shape) != expected[name.split(".")[0]]
    ]
