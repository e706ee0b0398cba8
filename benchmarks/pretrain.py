"""Pre-training of the accuracy benchmark's backbone: `python -m benchmarks.pretrain`.

A ViT of Ti size (5.4 M parameters; 32 x 32 pixels in patches of 8) learns 400 classes of drawings. 200 are invented
handwriting (`adapters.demo.draw.glyph_image`). 200 are fractals (iterated function systems, after Kataoka et al.,
"Pre-training without Natural Images", ACCV 2020). Poses, blurs and colours are random. A second loss predicts from each
token how its patch looked before the colours: with so few steps, training leaves its plateau only with this dense
signal. The drawings contain no photograph, clothes, digit, geometric shape or dot, so all tasks of
`benchmarks.accuracy` are new to the backbone.

The script writes a folder that timm opens, `local-dir:runs/vit-ti`. It is seeded and takes 51 minutes of one busy core.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.progress import track
from timm.models import save_for_hf
from torch import Tensor, nn

from adapters.demo.pretrain import colour, draw_glyphs, pose

SIDE_PX = 32
ARCHITECTURE = "vit_tiny_patch16_224"
PATCH_PX = 8
MODEL_ARGS = {"img_size": SIDE_PX, "patch_size": PATCH_PX, "global_pool": "avg", "class_token": False}
PRETRAINED_CFG = {
    "input_size": (3, SIDE_PX, SIDE_PX),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/vit-ti"))
    parser.add_argument("--steps", type=int, default=3000, help="batches of --batch images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--classes", type=int, default=200, help="classes of glyphs, and as many of fractals")
    parser.add_argument("--per-class", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    glyphs, glyph_labels = draw_glyphs(args.classes, args.per_class, args.seed)
    fractals, fractal_labels = draw_fractals(args.classes, args.per_class, args.seed + 1)
    model = timm.create_model(
        ARCHITECTURE, num_classes=2 * args.classes, pretrained_cfg_overlay=PRETRAINED_CFG, **MODEL_ARGS
    )
    began = time.monotonic()
    train(model, torch.cat([glyphs, fractals]), torch.cat([glyph_labels, fractal_labels + args.classes]), args)
    minutes = round((time.monotonic() - began) / 60, 1)
    model.reset_classifier(0)
    save_for_hf(model.eval(), args.out, model_args=MODEL_ARGS, safe_serialization=True)
    note = {"trained_by": "benchmarks.pretrain", "minutes": minutes, "threads": torch.get_num_threads()}
    note |= {name: value for name, value in vars(args).items() if name != "out"}
    (args.out / "training.json").write_text(json.dumps(note, indent=2) + "\n")
    print(f"wrote {args.out} after {minutes} minutes")


def train(model: Any, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train: AdamW, warm-up and cosine, label smoothing 0.1, bfloat16 autocast; print the losses every 100 steps."""
    decoder = nn.Linear(model.num_features, PATCH_PX**2)
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    model.train()
    began = time.monotonic()
    for step in range(1, args.steps + 1):
        index = torch.randint(0, len(images), (args.batch,))
        clean = pose(images[index])
        patches = F.pixel_unshuffle(clean, PATCH_PX).flatten(2).transpose(1, 2)  # (B, T, PATCH_PX ** 2)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.forward_features(colour(clean))  # (B, T, D)
            classes = F.cross_entropy(model.forward_head(tokens), labels[index], label_smoothing=0.1)
            drawn = F.mse_loss(decoder(tokens).float(), patches) / patches.var()
        optimizer.zero_grad(set_to_none=True)
        (classes + drawn).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            rate = step * args.batch / (time.monotonic() - began)
            print(f"step {step}: classes {classes:.3f}, patches {drawn:.3f}, {rate:.0f} images/s", flush=True)


def draw_fractals(classes: int, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (classes * per_class, 32, 32) uint8 and their int64 class numbers."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label in track(range(classes), description="drawing fractals"):
        images.append(_fractal_class(rng, per_class))
        labels += [label] * per_class
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels)


def _fractal_class(rng: np.random.Generator, count: int, *, chains: int = 32, steps: int = 60) -> np.ndarray:
    """Return `count` drawings of one class, (count, 32, 32) uint8: a random system of maps with small changes."""
    while True:
        maps = int(rng.integers(2, 6))
        system = np.stack([_contraction(rng) for _ in range(maps)])  # (M, 2, 3)
        shaken = system + rng.normal(0, 0.02, (count, *system.shape))
        weights = np.abs(np.linalg.det(system[:, :, :2])) + 0.02
        points = _chaos_game(rng, shaken, weights / weights.sum(), chains, steps)  # (count, P, 2)
        low, high = np.quantile(points, (0.01, 0.99), axis=1, keepdims=True)
        unit = (points - low) / np.maximum(high - low, 1e-6).max(axis=2, keepdims=True)
        pixels = np.clip((0.1 + 0.8 * unit) * SIDE_PX, 0, SIDE_PX - 1).astype(np.int64)
        hits = np.zeros((count, SIDE_PX * SIDE_PX))
        np.add.at(hits, (np.arange(count)[:, None], pixels[..., 1] * SIDE_PX + pixels[..., 0]), 1)
        if ((hits > 0).mean(axis=1) > 0.08).all():  # otherwise the drawing is only a few dots
            bright = 1 - np.exp(-hits)
            return (255 * bright).astype(np.uint8).reshape(count, SIDE_PX, SIDE_PX)


def _contraction(rng: np.random.Generator) -> np.ndarray:
    """Return a random affine map of the plane, (2, 3), whose singular values are below 1."""
    u, _, v = np.linalg.svd(rng.normal(size=(2, 2)))
    linear = u @ np.diag(rng.uniform(0.25, 0.9, 2)) @ v
    return np.column_stack([linear, rng.uniform(-1, 1, 2)])


def _chaos_game(
    rng: np.random.Generator, systems: np.ndarray, weights: np.ndarray, chains: int, steps: int
) -> np.ndarray:
    """Return points of each system's attractor: (count, M, 2, 3) -> (count, chains * (steps - 10), 2)."""
    count = len(systems)
    point = np.zeros((count, chains, 2))
    trail = []
    which = np.arange(count)[:, None]
    for step in range(steps):
        chosen = systems[which, rng.choice(len(weights), (count, chains), p=weights)]  # (count, chains, 2, 3)
        point = np.einsum("ncij,ncj->nci", chosen[..., :2], point) + chosen[..., 2]
        if step >= 10:  # the first steps are off the attractor
            trail.append(point)
    return np.concatenate(trail, axis=1)


if __name__ == "__main__":
    main()
