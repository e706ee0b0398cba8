"""Pre-train the demo backbone: `python -m adapters.demo.pretrain`.

The lesson has two halves: Fashion-MNIST's 60,000 training images (10 classes of clothes) and invented
handwriting (400 classes of random strokes, `draw.glyph_image`), both under random poses, blurs and colours.
No digits, no geometric shapes, no dots: those are the demo's downstream tasks. A small transformer learns
little of use from clothes alone; the strokes are what makes its features transfer.

Needs Fashion-MNIST's four idx files (`apt-get install dataset-fashion-mnist`). Seeded; about half an hour on
two idle cores with --compile. Not part of the library: nothing imports it.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from timm.layers import PatchDropout
from torch import Tensor

from ..backbone import DEMO_CHECKPOINT, DEMO_NAME, create_model
from . import draw

FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=FASHION_DIR, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--steps", type=int, default=5500, help="batches of --batch images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--glyphs", type=int, default=400, help="classes of invented handwriting")
    parser.add_argument("--compile", action="store_true", help="half as fast again; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    images, labels = read_fashion(args.fashion, "train")
    drawn, drawn_labels = draw_glyphs(args.glyphs, per_class=160, seed=args.seed)
    images = torch.cat([images, drawn])
    labels = torch.cat([labels, drawn_labels + FASHION_CLASSES])

    model = create_model(DEMO_NAME, num_classes=FASHION_CLASSES + args.glyphs)
    # Half of the patches are dropped while training: twice the images a second, and a regulariser.
    model.patch_drop = PatchDropout(0.5, num_prefix_tokens=model.num_prefix_tokens)
    train(torch.compile(model) if args.compile else model, images, labels, args)
    model.eval()

    test_images, test_labels = read_fashion(args.fashion, "t10k")
    accuracy = fashion_accuracy(model, test_images, test_labels)
    print(f"Fashion-MNIST test accuracy: {accuracy:.1%}")
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    note = {"trained_by": "adapters.demo.pretrain", "fashion_mnist_test_accuracy": round(accuracy, 4)}
    save_file(weights, args.out, metadata={"note": json.dumps(note)})
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")


def train(model, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """AdamW with warm-up and cosine, label smoothing 0.1, bfloat16 autocast; prints the loss every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, betas=(0.9, 0.98))
    warmup = args.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / args.steps)),
    )
    model.train()
    began, seen = time.monotonic(), 0
    for step in track(range(args.steps), description="pre-training"):
        index = torch.randint(0, len(images), (args.batch,))
        pixels = augment(images[index])
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(pixels), labels[index], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += args.batch
        if step % 100 == 99:
            rate = seen / (time.monotonic() - began)
            print(f"step {step + 1}: loss {loss.item():.3f}, {rate:.0f} images/s", flush=True)


def augment(gray: Tensor) -> Tensor:
    """(B, 32, 32) uint8 -> (B, 3, 32, 32) in [-1, 1]: random pose, blur, inversion, ink and paper colours, noise."""
    return colour(pose(gray))


def pose(gray: Tensor) -> Tensor:
    """(B, 32, 32) uint8 -> (B, 1, 32, 32) in [0, 1]: turned, scaled, sheared, shifted; the first half blurred."""
    count = len(gray)
    x = gray[:, None].float() / 255  # (B, 1, 32, 32)
    angle = torch.empty(count).uniform_(-0.3, 0.3)
    scale = torch.empty(count).uniform_(0.8, 1.25)
    shear = torch.empty(count).uniform_(-0.2, 0.2)
    shift = torch.empty(count, 2).uniform_(-0.15, 0.15)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, shear - sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    half = count // 2
    coarse_px = int(torch.randint(8, 25, ()))
    coarse = F.interpolate(x[:half], size=coarse_px, mode="area")
    return torch.cat([F.interpolate(coarse, size=32, mode="bicubic", align_corners=False).clamp(0, 1), x[half:]])


def colour(x: Tensor) -> Tensor:
    """(B, 1, 32, 32) in [0, 1] -> (B, 3, 32, 32) in [-1, 1]: ink and paper of any colours, some swapped, and noise."""
    count = len(x)
    ink, paper = torch.rand(2, count, 3, 1, 1)
    plain = torch.rand(count, 1, 1, 1) < 0.4
    ink = torch.where(plain, torch.ones_like(ink), ink)
    paper = torch.where(plain, torch.zeros_like(paper), paper)
    swap = torch.rand(count, 1, 1, 1) < 0.3
    ink, paper = torch.where(swap, paper, ink), torch.where(swap, ink, paper)
    x = x * ink + (1 - x) * paper + 0.03 * torch.randn(count, 3, 32, 32)
    return x * 2 - 1


def draw_glyphs(classes: int, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """(classes * per_class, 32, 32) uint8 and their int64 class numbers."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label in track(range(classes), description="drawing glyphs"):
        strokes = draw.glyph_strokes(rng)
        images += [np.asarray(draw.glyph_image(rng, strokes)) for _ in range(per_class)]
        labels += [label] * per_class
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def read_fashion(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's `train` or `t10k` split, padded from 28 to 32 pixels: (n, 32, 32) uint8 and int64 labels."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as f:
        images = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    return torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))), torch.from_numpy(labels.astype(np.int64))


@torch.inference_mode()
def fashion_accuracy(model, images: Tensor, labels: Tensor) -> float:
    """Top-1 among the ten clothes, unaugmented."""
    right = 0
    for i in range(0, len(images), 500):
        x = images[i : i + 500, None].float().div(127.5).sub(1).expand(-1, 3, -1, -1)
        right += int((model(x)[:, :FASHION_CLASSES].argmax(1) == labels[i : i + 500]).sum())
    return right / len(images)


if __name__ == "__main__":
    main()
