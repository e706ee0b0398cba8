"""Conversion from and to other tools, by way of an `Adapter`.

Sources: a `karst/1` file, a peft LoKr folder (`peft.py`), an official-style checkpoint (`official.py`).
Targets: `karst/1`, a peft LoKr or LoRA folder (`peft_export.py`), and the merged model as a timm checkpoint or ONNX
(`export.py`).
An inexact conversion is refused with a reason, except a LoRA of a chosen rank, which reports its error.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from torch import Tensor

from ..backbone import DEMO_NAME, Backbone
from ..format.atomic_write import write_atomically
from ..format.errors import AdapterError, Problem, file_error
from ..format.file import Adapter
from ..format.metadata import FORMAT
from ..format.names import TYPICALITY_PREFIX
from ..serving.limits import BankLimits
from .export import to_onnx, to_timm
from .importing import ImportedTensors, build_adapter, read_head, read_labels, read_preprocess
from .official import read_official
from .peft import CONFIG, WEIGHTS, read_lokr
from .peft_export import lokr_files, lora_files

TARGETS = ("karst", "lokr", "lora", "timm", "onnx")
Kind = Literal["karst/1 file", "peft LoKr folder", "official checkpoint"]
LABELS, PREPROCESS = "labels.json", "preprocess.json"
_HUB_FACTOR = 8  # of all banks in a hub


def convert(
    source: Path,
    output: Path,
    to: str,
    backbone: Backbone,
    *,
    labels: Path | None = None,
    head: Path | None = None,
    preprocess: Path | None = None,
    multiplier: float | None = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """Read one source and write one target atomically.

    Args:
        source: `detect_kind` recognises its kind.
        output: a file, which is replaced; for `lokr` and `lora` a folder, which must not exist.
        to: one of `TARGETS`.
        backbone: the source's own backbone, in float32 on the CPU.
        labels: file of class names for `read_labels`; required where the source has none.
        head: file of a classifier for `read_head`, instead of the source's.
        preprocess: JSON file of the timm data config of the source's images. None takes the `preprocess.json` that
            an earlier export wrote beside the source, or else the backbone's own; the report has it.
        multiplier: of an official checkpoint; None is 1.
        rank: of a LoRA; None is exact.

    Returns:
        A JSON-able report of the source and the target.

    Raises:
        AdapterError: the source is invalid, the target cannot hold it, or an option does not apply.
        ModuleNotFoundError: the target is ONNX, and its packages are not installed.
        OSError: the output cannot be written.
    """
    kind = detect_kind(source)
    files = {"labels": labels, "head": head, "preprocess": preprocess}
    _check_options(kind, to, source, output, files, multiplier=multiplier, rank=rank)
    adapter, imported = _read(kind, source, backbone, files, 1.0 if multiplier is None else multiplier)
    report: dict[str, Any] = {"source": kind, "to": to, "output": str(output), "labels": adapter.num_classes}
    if imported is not None:
        report |= {"ignored": imported.ignored, "preprocess": adapter.preprocess}
        report |= {"notes": imported.notes} if imported.notes else {}
    if to == "karst":
        adapter.write(output)
        return report | {
            "digest": adapter.digest,
            "config": adapter.config.model_dump(mode="json"),
            "serving": _serving(adapter, backbone),
        }
    if left_out := _left_out(adapter, to):
        report["left_out"] = left_out
    if to == "lokr":
        config, tensors = lokr_files(adapter, backbone)
        report |= {"rank": config["r"], "decompose_factor": config["decompose_factor"]}
        _write_folder(output, config, tensors, adapter, "the same numbers as the adapter, without approximation")
        return report
    if to == "lora":
        config, tensors, errors = lora_files(adapter, backbone, rank)
        report |= {
            "rank": max(errors.ranks.values()),
            "exact": not errors.cut,
            "error": errors.overall,
            "largest_error": errors.largest,
            "largest_error_layer": errors.largest_layer,
        }
        how = "cut by its singular values" if errors.cut else "exact except for float32 rounding"
        _write_folder(
            output,
            config,
            tensors,
            adapter,
            f"rank {report['rank']}, {how}; relative Frobenius error of dW {errors.overall:.2e} over all layers, "
            f"at most {errors.largest:.2e} in one layer ({errors.largest_layer})",
        )
        return report
    data, difference = (to_timm if to == "timm" else to_onnx)(adapter, backbone)
    write_atomically(output, data)
    return report | {"bytes": len(data), "largest_relative_difference": difference}


def detect_kind(source: Path) -> Kind:
    """Return the kind of a source: a folder with `adapter_config.json`, a `karst/1` file, or else official.

    Raises:
        AdapterError: the source does not exist, is a folder without a config, or an unreadable safetensors file.
    """
    if source.is_dir():
        if not (source / CONFIG).is_file():
            raise file_error(f"{source}: has no {CONFIG}; expected a peft folder, or a file")
        return "peft LoKr folder"
    if not source.is_file():
        raise file_error(f"{source}: no such file or folder")
    if source.suffix != ".safetensors":
        return "official checkpoint"
    try:
        with safetensors.safe_open(source, "pt") as opened:
            metadata = opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise file_error(f"{source}: not a valid safetensors file: {error}") from error
    return "karst/1 file" if metadata.get("format") == FORMAT else "official checkpoint"


def _check_options(
    kind: Kind,
    to: str,
    source: Path,
    output: Path,
    files: Mapping[str, Path | None],
    *,
    multiplier: float | None,
    rank: int | None,
) -> None:
    """Check the options of `convert`.

    Raises:
        AdapterError: an option has no effect for this source and target, or a target is invalid.
    """
    problems = []
    if to not in TARGETS:
        problems.append(Problem("--to", f"is {to!r}; expected one of {', '.join(TARGETS)}"))
    if kind == "karst/1 file":
        if to == "karst":
            problems.append(
                Problem("--to", f"is karst, but the source is a {FORMAT} file already; choose another target")
            )
        problems += [
            Problem(f"--{name}", f"does not apply, since a {FORMAT} file has its own; leave it out")
            for name, file in files.items()
            if file
        ]
    if any(path is not None and output.resolve() == path.resolve() for path in (source, *files.values())):
        problems.append(Problem("--out", f"{output} is an input file; write to another path"))
    if multiplier is not None and kind != "official checkpoint":
        problems.append(
            Problem("--multiplier", f"applies to official checkpoints, but the source is a {kind}; leave it out")
        )
    elif multiplier is not None and not 0 < multiplier < math.inf:
        problems.append(Problem("--multiplier", f"is {multiplier}, expected a positive number"))
    if rank is not None and to != "lora":
        problems.append(Problem("--rank", "applies to --to lora only; leave it out"))
    elif rank is not None and rank < 1:
        problems.append(Problem("--rank", f"is {rank}, expected at least 1"))
    if to in ("karst", "timm") and output.suffix != ".safetensors":  # timm chooses its reader by the suffix
        problems.append(Problem("--out", f"{output} must end in .safetensors"))
    if to == "onnx" and output.suffix != ".onnx":
        problems.append(Problem("--out", f"{output} must end in .onnx"))
    if to in ("lokr", "lora") and output.exists():
        problems.append(Problem("--out", f"{output} exists; choose a new folder"))
    if problems:
        raise AdapterError(problems)


def _read(
    kind: Kind, source: Path, backbone: Backbone, files: Mapping[str, Path | None], multiplier: float
) -> tuple[Adapter, ImportedTensors | None]:
    """Return the source as an adapter, and the tensors that were read of a foreign source."""
    if kind == "karst/1 file":
        adapter = Adapter.read(source)
        adapter.check(backbone)
        return adapter, None
    labels, preprocess, head = files["labels"], files["preprocess"], files["head"]
    if kind == "peft LoKr folder":
        imported = read_lokr(source, backbone)
        labels = labels or _if_file(source / LABELS)
        preprocess = preprocess or _if_file(source / PREPROCESS)
    else:
        imported = read_official(source, backbone, multiplier)
    if head is not None:
        imported.others |= read_head(head)
    adapter = build_adapter(
        backbone,
        imported,
        read_labels(labels) if labels is not None else None,
        read_preprocess(preprocess) if preprocess is not None else None,
    )
    return adapter, imported


def _left_out(adapter: Adapter, to: str) -> list[str]:
    """Return the names of the adapter's parts that a target other than `karst` cannot hold."""
    names = [name for name in sorted(adapter.tensors) if name.startswith(TYPICALITY_PREFIX)]
    if adapter.coverage is not None and to in ("lokr", "lora"):
        names.append("coverage")
    return names


def _if_file(path: Path) -> Path | None:
    """Return the path of a file that an earlier export wrote, or None where it does not exist."""
    return path if path.is_file() else None


def _serving(adapter: Adapter, backbone: Backbone) -> str:
    """Return the settings that a hub needs to serve the adapter, or why no hub can."""
    config = adapter.config
    try:
        BankLimits(backbone.info(), max_rank=config.rank, max_kernels=config.kernels, factor=_HUB_FACTOR).check(adapter)
    except AdapterError as error:
        return f"no hub can serve it ({error}); export it with --to timm or --to onnx"
    return f"a hub with HUB_MAX_KERNELS of at least {config.kernels} and HUB_MAX_RANK of at least {config.rank}"


def _write_folder(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter: Adapter, how: str
) -> None:
    """Write a peft folder atomically."""
    files = {
        CONFIG: json.dumps(config, indent=2).encode(),
        WEIGHTS: safetensors.torch.save(dict(tensors), metadata={"format": "pt"}),
        LABELS: json.dumps(list(adapter.labels), ensure_ascii=False, indent=2).encode(),
        PREPROCESS: json.dumps(adapter.preprocess, indent=2).encode(),
        "README.md": _readme(config, adapter, how).encode(),
    }
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        for name, data in files.items():
            write_atomically(temporary / name, data)
        temporary.chmod(0o755)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _readme(config: Mapping[str, Any], adapter: Adapter, how: str) -> str:
    if adapter.backbone == DEMO_NAME:  # timm does not know the name
        imports = "import timm\nfrom adapters.backbone import DEMO_CHECKPOINT, create_model"
        base = f"""base = create_model("demo", num_classes={adapter.num_classes})
timm.models.load_checkpoint(base, str(DEMO_CHECKPOINT), strict=False)"""
    else:
        imports = "import timm"
        base = f"base = timm.create_model({adapter.backbone!r}, pretrained=True, num_classes={adapter.num_classes})"
    return f"""# {config["peft_type"]} of a KARST adapter

From adapter {adapter.digest}: {how}.

```python
{imports}
from peft import PeftModel

{base}
model = PeftModel.from_pretrained(base, "this folder").eval()
```

The base must have exactly the weights that the adapter was trained on (fingerprint {adapter.fingerprint}).
`{LABELS}` has the class names in the order of the logits, `{PREPROCESS}` the size and normalisation of images.
"""
