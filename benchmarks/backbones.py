"""Check of which timm models KARST can adapt, and of mixed batches against merged models.

    python -m benchmarks.backbones [NAME ...] [--out docs/backbones.md]

Every model gets random weights, so no network is needed. Each model gets four adapters with random numbers: two with
N = 2, r = 8 and channel re-scaling, one with N = 1, r = 4 and scalar re-scaling, and one with tuned norm layers. The
last one has a rank per stage if the model has stages. The bank takes a batch of four images, each with its own adapter.
Each merged model takes one of these images alone. The check sets layer scales and norms that start at or near zero to
one, because they would hide every difference. With --out the script writes docs/backbones.md.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch

from adapters import Backbone, BackboneError, Bank, KarstConfig, load_backbone
from adapters.backbone import features

from .common import machine, random_adapter

NAMES = (
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224.augreg_in21k",
    "vit_base_patch32_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_dinov3",
    "vit_wee_patch16_reg1_gap_256",
    "vit_medium_patch16_reg4_gap_256",
    "vit_small_patch16_18x2_224",
    "vit_relpos_small_patch16_224",
    "vit_srelpos_small_patch16_224",
    "vit_base_patch16_rope_reg1_gap_256",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "deit3_base_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "eva_large_patch14_196",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224.ms_in22k",
    "swinv2_tiny_window8_256",
    "swin_s3_tiny_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "mobilevit_xs",
    "resnet18",
)
REFUSED = ("resnet18",)
LAYER_SCALES = ("gamma", "gamma_1", "gamma_2", "gamma1", "gamma2", "gamma3")
TOLERANCE = 1e-4  # relative to the largest logit; float32 rounding grows over up to 36 layers with random weights
CLASSES = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="timm names; without: all of the table")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="markdown to write, e.g. docs/backbones.md")
    options = parser.parse_args()
    rows = []
    for name in options.names:
        began = time.monotonic()
        rows.append(measure(name, options.device))
        print(json.dumps(rows[-1] | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
        gc.collect()
    if options.out is not None:
        options.out.write_text(markdown(rows))
    wrong = [row["name"] for row in rows if (row["name"] in REFUSED) != ("refused" in row)]
    wrong += [row["name"] for row in rows if row.get("difference", 0) > TOLERANCE]
    if wrong:
        print("not as it should be:", ", ".join(wrong))
    return 1 if wrong else 0


@torch.inference_mode()
def measure(name: str, device: str = "cpu") -> dict[str, Any]:
    """Return a row: the model's sizes, and the largest difference of mixed and merged logits over the largest logit."""
    torch.manual_seed(0)
    try:
        backbone = load_backbone(name, device=device, pretrained=False)
    except BackboneError as error:
        return {"name": name, "refused": str(error)}
    for path, parameter in backbone.model.named_parameters():
        at_zero = "norm" in path and path.endswith(".weight") and not parameter.any()  # Swin v2's
        if at_zero or path.rpartition(".")[2] in LAYER_SCALES:
            parameter.fill_(1)
    adapters = [
        random_adapter(backbone, config, seed=seed, classes=CLASSES) for seed, config in enumerate(configs(backbone))
    ]
    bank = Bank(backbone, slots=len(adapters), max_rank=8, max_kernels=2)
    slots = [bank.put(adapter) for adapter in adapters]
    pixels = torch.randn(len(slots), *backbone.input_size, device=device)
    mixed = bank.forward(pixels, slots)
    frozen = features(backbone.model, pixels)
    difference, effect = 0.0, float("inf")
    for adapter, image, image_features, logits in zip(adapters, pixels, frozen, mixed, strict=True):
        alone = adapter.merge(backbone)(image[None])[0]
        unadapted = adapter.tensors["head.weight"] @ image_features.cpu() + adapter.tensors["head.bias"]
        if not logits.isfinite().all() or not alone.isfinite().all():
            raise AssertionError(f"{name}: a logit is not finite; the check would show nothing")
        difference = max(difference, float((logits - alone).abs().max() / alone.abs().max()))
        effect = min(effect, float((alone.cpu() - unadapted).abs().max() / alone.abs().max()))
    if effect < 100 * TOLERANCE:
        raise AssertionError(
            f"{name}: the adapters change the logits by {effect:.1e} only; the check would show nothing"
        )
    return {
        "name": name,
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "input": list(backbone.input_size),
        "sites": len(backbone.sites),
        "norms": len(backbone.norms),
        "difference": difference,
    }


def configs(backbone: Backbone) -> list[KarstConfig]:
    """Return the settings of the four adapters."""
    stages = {site.stage for site in backbone.sites}
    ranks = (2, 2, 4, 8) if stages == {0, 1, 2, 3} else None
    return [
        KarstConfig(),
        KarstConfig(),
        KarstConfig(kernels=1, rank=4, rescale="scalar"),
        KarstConfig(norms=True, stage_ranks=ranks),
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the text of docs/backbones.md."""
    where = machine()
    ran = [row for row in rows if "refused" not in row]
    refused = [row for row in rows if "refused" in row]
    lines = [
        "# Backbones",
        "",
        "Generated by `python -m benchmarks.backbones --out docs/backbones.md`; do not edit.",
        "",
        f"Run on {where['date'][:10]} with timm {timm.__version__}, torch {where['torch']}, {where['cpu']}, float32 "
        "and **random weights**. The run shows that KARST reaches the layers, and that a mixed batch of four adapters "
        "computes the logits of the four merged models. It does not measure accuracy. It used no GPU.",
        "",
        "`difference` is the largest difference between a mixed and a merged logit, divided by the largest logit "
        f"(limit: {TOLERANCE:g}).",
        "",
        "| timm name | parameters | input | adapted layers | norm layers | difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in ran:
        side = row["input"][1]
        lines.append(
            f"| `{row['name']}` | {row['parameters'] / 1e6:.1f} M | {side} | {row['sites']} | {row['norms']} "
            f"| {row['difference']:.1e} |"
        )
    lines += ["", "Unsupported models and the error of each:", ""]
    lines += [f"- `{row['name']}`: {row['refused']}" for row in refused]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
