"""Section of docs/performance.md on frozen layers: the forms that a machine chose, and int8 beside float32."""

from typing import Any

from .common import markdown_table

MIXED_BARS = {  # times timm's time
    ("vit_base_patch16_224", 2): 1.05,
    ("vit_base_patch16_224", 8): 1.15,
    ("vit_small_patch16_224", 2): 1.20,
    ("vit_tiny_patch16_224", 2): 1.20,
}
SPEED_BARS = {"vit_base_patch16_224": 1.8, "vit_small_patch16_224": 1.5}  # times timm's images per second, with N = 2
HEADS_BAR = 1.01  # times timm's time
KEYS = ("float32", "int8", "same_labels", "same_labels_weights_only")
LOSS_BAR, SAME_BAR = 0.5, 98.5  # percentage points of mean accuracy; percent of labels


def frozen_layers(mixed: dict[str, Any], agreement: dict[str, Any]) -> list[str]:
    """Return the section from the results of `mixed_batch` and `int8_agreement`."""
    rows = []
    for row in mixed["rows"]:
        quick, int8 = row["quick_to_frozen"], row["int8_to_frozen"]
        bar = SPEED_BARS.get(row["backbone"]) if row["kernels"] == 2 else None
        speed = "-" if int8 is None else f"{1 / int8['median']:.2f} ({1 / int8['q3']:.2f}-{1 / int8['q1']:.2f})"
        cells = [row["backbone"], str(row["kernels"]), f"{quick['median']:.2f} ({quick['q1']:.2f}-{quick['q3']:.2f})"]
        cells += [_held(quick["median"] <= HEADS_BAR, f"<= {HEADS_BAR}") if row["backbone"] != "demo" else "", speed]
        cells.append("" if bar is None or int8 is None else _held(1 / int8["median"] >= bar, f">= {bar}"))
        rows.append(cells)
    accuracies = [
        [row["task"], row["method"], str(row["images"]), *(f"{100 * row[key]:.1f}" for key in KEYS)]
        for row in agreement["rows"]
    ]
    means = [
        f"{method}: accuracy {100 * found['float32']:.2f} % in float32 and {100 * found['int8']:.2f} % in int8 "
        f"({_held(100 * found['loss'] <= LOSS_BAR, f'a loss of <= {LOSS_BAR} points')}), "
        f"{100 * found['same_labels']:.2f} % of labels equal "
        f"({_held(100 * found['same_labels'] >= SAME_BAR, f'>= {SAME_BAR} %')}; "
        f"{100 * found['same_labels_weights_only']:.2f} % with weights only)"
        for method, found in agreement["mean"].items()
    ]
    chosen = next(row for row in mixed["rows"] if row["backbone"] == "vit_base_patch16_224")
    return [
        "### Frozen layers, and int8",
        "The run above also timed a batch without adapters (*heads only*), and a bank with the same eight adapters "
        "as `HUB_DTYPE=int8` has it (*int8*, in images per second over timm's float32). A worker chooses the form "
        "of each kind of frozen layer by measuring ([evaluation.md](evaluation.md#int8)); for ViT-B/16 in float32: "
        f"{'; '.join(chosen['frozen_layers'])}.",
        markdown_table(["backbone", "N", "heads only / frozen", "target", "int8 over frozen", "target"], rows),
        "`python -m benchmarks.int8_agreement`: accuracy in percent (mean over classes) of adapters trained in "
        f"float32, on {agreement['backbone']['name']} at {agreement['backbone']['side_px']} pixels, on images that no "
        "training saw. *weights only*: the share of equal labels if weights are in int8 and activations in float32. "
        f"The bank in int8 chose: {'; '.join(agreement['frozen_layers'])}.",
        markdown_table(["task", "adapter", "images", "float32", "int8", "same label", "weights only"], accuracies),
        f"Means over these {len(accuracies) // 2} of the accuracy benchmark's six tasks:\n\n"
        + "\n".join(f"- {text}" for text in means),
    ]


def _held(holds: bool, bar: str) -> str:
    return f"{bar}: {'holds' if holds else '**does not hold**'}"
