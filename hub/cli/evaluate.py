"""`karst-hub evaluate`: adapter files and image sets -> a table of accuracy, calibration and throughput."""

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters import (
    Adapter,
    AdapterError,
    Backbone,
    Bank,
    BankLimits,
    DataError,
    KarstConfig,
    Problem,
    load_backbone,
)
from adapters.data.datasets import read_split
from adapters.evaluation.evaluate import BATCH_SIZE, Outputs, bank_for, compare_merged, evaluate, scores
from adapters.serving.frozen_forms import check_int8

Pair = tuple[Path, Path]  # an adapter file and its images


def read_table(path: Path) -> list[Pair]:
    """Return the pairs of a CSV file with the columns `adapter` and `data`.

    Relative paths start at the folder of the CSV file.

    Raises:
        DataError: The file cannot be read, lacks a column, has no rows, or has a row with an empty field.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in ("adapter", "data") if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: no column {' and no '.join(missing)}; line 1 must be adapter,data")
            pairs = []
            for row in reader:
                adapter, data = row["adapter"], row["data"]
                if not adapter or not data:
                    raise DataError(
                        f"{path}, line {reader.line_num}: a field is empty; give an adapter file and its images"
                    )
                pairs.append((path.parent / adapter, path.parent / data))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error
    if not pairs:
        raise DataError(f"{path}: no rows; add one row per adapter")
    return pairs


def run(
    console: Console,
    pairs: Sequence[Pair],
    *,
    backbone: str,
    checkpoint: Path | None,
    image_size: int | None,
    device: str,
    dtype: str,
    merged: bool,
    seed: int,
    max_pixels: int,
) -> dict[str, Any]:
    """Evaluate every pair over one backbone.

    All adapters and image lists are checked before the first image is classified. With dtype `int8` all frozen layers
    that may be are int8, and each row also has `float32`: the agreement with the same adapter over float32.

    Returns:
        The values shared by all rows (`backbone`, `fingerprint`, `device`, `dtype`, `batch_size`, `seed`), and `rows`
        in the order of `pairs`.

    Raises:
        DataError: See `adapters.data.datasets.read_split`.
        BackboneError: See `load_backbone`; or `dtype` is `int8` and this machine cannot run it.
        AdapterError: See `BankLimits.check`. The message names the adapter file.
    """
    int8 = dtype == "int8"
    loaded = torch.float32 if int8 else getattr(torch, dtype)
    frozen = load_backbone(backbone, checkpoint, device=device, dtype=loaded, image_size=image_size)
    if int8:
        check_int8(frozen)
    configs, sets = [], []
    for path, data in pairs:  # otherwise an invalid file would end the run after hours
        adapter = _read_adapter(path, frozen)
        configs.append(adapter.config)
        sets.append(read_split(data, "test", adapter.labels))
        for files in sets[-1].left_out:
            console.print(f"{'warning: ' if files.matters else ''}left out: {files}", soft_wrap=True)
    exact_banks = _banks(frozen, configs)
    banks = _banks(frozen, configs, int8=True) if int8 else exact_banks
    rows = []
    with Progress(console=console, transient=True) as progress:
        for (path, data), images in progress.track(list(zip(pairs, sets, strict=True)), description="evaluating"):
            adapter = _read_adapter(
                path, frozen
            )  # a second read: all adapters of a table together may not fit into memory
            outputs = evaluate(banks[adapter.config.factor], adapter, images, max_pixels=max_pixels)
            row: dict[str, Any] = {"adapter": str(path), "digest": adapter.digest, "data": str(data)}
            row |= asdict(scores(outputs.logits, outputs.targets, adapter.labels, seed=seed))
            row["images_per_s"] = round(outputs.images_per_s, 1)
            exact = outputs
            if int8:
                exact = evaluate(exact_banks[adapter.config.factor], adapter, images, max_pixels=max_pixels)
                row["float32"] = _agreement(outputs, exact)
            if merged:
                agreement = compare_merged(frozen, adapter, images, exact, max_pixels=max_pixels)
                row["merged"] = asdict(agreement) | {"agrees": agreement.agrees}
            rows.append(row)
    return {
        "backbone": frozen.name,
        "fingerprint": frozen.fingerprint,
        "device": str(frozen.device),
        "dtype": dtype,
        "batch_size": BATCH_SIZE,
        "seed": seed,
        "rows": rows,
    }


def disagreements(report: dict[str, Any]) -> list[str]:
    """Return one line per adapter whose merged model disagrees with the unmerged one."""
    return [
        f"{row['adapter']}: merged and unmerged logits differ by up to {merged['largest_difference']:.3g} "
        f"(limit {merged['tolerance']:g} of the largest logit, {merged['largest_logit']:.3g}); "
        f"{merged['label_changes']} of {row['images']} labels change"
        for row in report["rows"]
        if (merged := row.get("merged")) and not merged["agrees"]
    ]


def tables(report: dict[str, Any]) -> list[Table]:
    """Return the report as tables: one row per pair, and with a single pair also one row per class."""
    rows = report["rows"]
    shared = (
        f"backbone {report['backbone']} ({report['fingerprint'][:12]}), {report['dtype']} on {report['device']}; "
        f"images/s of forward passes only, {report['batch_size']} images per pass"
    )
    table = Table(box=None, caption=shared, caption_justify="left")
    for name in ("adapter", "data"):
        table.add_column(name, overflow="fold")
    for name in ("images", "top-1", "95 % interval", "top-5", "ECE", "NLL", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["top1_interval"]
        cells = [Path(row["adapter"]).name, Path(row["data"]).name, str(row["images"])]
        cells += [f"{row['top1']:.1%}", f"{low:.1%} - {high:.1%}"]
        cells += ["-" if row["top5"] is None else f"{row['top5']:.1%}", f"{row['ece']:.3f}", f"{row['nll']:.3f}"]
        cells.append(f"{row['images_per_s']:.1f}")
        table.add_row(*cells)
    result = [table]
    if "merged" in rows[0]:
        result.append(Table("adapter", "merged logits differ by", "labels changed", box=None))
        for row in rows:
            changed = str(row["merged"]["label_changes"])
            result[-1].add_row(Path(row["adapter"]).name, f"{row['merged']['largest_difference']:.1e}", changed)
    if "float32" in rows[0]:
        result.append(
            Table("adapter", "same label", "top-1", "images/s", box=None, title="beside float32", title_justify="left")
        )
        for row in rows:
            exact = row["float32"]
            shown = f"{exact['same_labels']:.1%}", f"{exact['top1']:.1%}", f"{exact['images_per_s']:.1f}"
            result[-1].add_row(Path(row["adapter"]).name, *shown)
    if len(rows) == 1:
        result.append(Table("class", "top-1", box=None))
        for label, value in rows[0]["per_class"].items():
            result[-1].add_row(label, "no images" if value is None else f"{value:.1%}")
    return result


def _read_adapter(path: Path, backbone: Backbone) -> Adapter:
    """Read an adapter and check it against a bank of its own sizes. Errors name the file."""
    try:
        adapter = Adapter.read(path)
        own = adapter.config
        BankLimits(backbone.info(), max_rank=own.rank, max_kernels=own.kernels, factor=own.factor).check(adapter)
    except AdapterError as error:
        raise AdapterError([Problem(f"{path}: {p.where}", p.message) for p in error.problems]) from error
    return adapter


def _agreement(int8: Outputs, exact: Outputs) -> dict[str, float]:
    """Return the share of images with the same label in int8 as in float32, and float32's accuracy and speed."""
    labels = exact.logits.argmax(1)
    return {
        "same_labels": float((int8.logits.argmax(1) == labels).double().mean()),
        "top1": float((labels == exact.targets).double().mean()),
        "largest_difference": float((int8.logits - exact.logits).abs().max()),
        "images_per_s": round(exact.images_per_s, 1),
    }


def _banks(backbone: Backbone, configs: Sequence[KarstConfig], *, int8: bool = False) -> dict[int, Bank]:
    """Return one bank with one slot per factor, since all adapters of a bank share one factor."""
    return {
        factor: bank_for(backbone, [config for config in configs if config.factor == factor], int8=int8)
        for factor in {config.factor for config in configs}
    }
