"""Pre-train the demo backbone: `python -m adapters.demo.pretrain`.

The training images are Fashion-MNIST's 60,000 training images (10 classes of clothes) and artificial handwriting
(400 classes of random strokes, `draw.glyph_image`). Both are augmented with random poses, blurs and colours. They
contain no digits, geometric shapes or dots, which are the demo's downstream tasks. The features transfer because of
the strokes: a small transformer learns little of use from clothes alone.

Needs Fashion-MNIST's four idx files (`apt-get install dataset-fashion-mnist`). Seeded. Takes about half an hour on two
idle cores with --compile. The library does not import this script.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn

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
    parser.add_argument("--glyphs", type=int, default=400, help="classes of artificial handwriting")
    parser.add_argument("--compile", action="store_true", help="1.5 times the speed; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    images, labels = read_fashion(args.fashion, "train")
    drawn, drawn_labels = draw_glyphs(args.glyphs, per_class=160, seed=args.seed)
    images = torch.cat([images, drawn])
    labels = torch.cat([labels, drawn_labels + FASHION_CLASSES])

    model = create_model(DEMO_NAME, num_classes=FASHION_CLASSES + args.glyphs)
    # Dropping half of the patches doubles the images per second and regularises.
    model.patch_drop = PatchDropout(0.5, num_prefix_tokens=model.num_prefix_tokens)
    train(cast(nn.Module, torch.compile(model)) if args.compile else model, images, labels, args)
    model.eval()

    test_images, test_labels = read_fashion(args.fashion, "t10k")
    accuracy = fashion_accuracy(model, test_images, test_labels)
    print(f"Fashion-MNIST test accuracy: {accuracy:.1%}")
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    note = {"trained_by": "adapters.demo.pretrain", "fashion_mnist_test_accuracy": round(accuracy, 4)}
    save_file(weights, args.out, metadata={"note": json.dumps(note)})
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")


def train(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train with AdamW, warm-up and cosine, label smoothing 0.1, bfloat16 autocast. Print the loss every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, betas=(0.9, 0.98))
    warmup = args.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / args.steps)),
    )
    model.train()
    start, seen = time.monotonic(), 0
    for step in track(range(args.steps), description="pre-training"):
        index = torch.randint(0, len(images), (args.batch,))
        pixels = augment(images[index])
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(pixels), labels[index], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += args.batch
        if step % 100 == 99:
            rate = seen / (time.monotonic() - start)
            print(f"step {step + 1}: loss {loss.item():.3f}, {rate:.0f} images/s", flush=True)


def augment(gray: Tensor) -> Tensor:
    """Augment with random pose, blur, colours and noise: (B, 32, 32) uint8 -> (B, 3, 32, 32) in [-1, 1]."""
    return colour(pose(gray))


def pose(gray: Tensor) -> Tensor:
    """Rotate, scale, shear and shift; blur the first half: (B, 32, 32) uint8 -> (B, 1, 32, 32) in [0, 1]."""
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
    """Apply random ink and paper colours, and noise: (B, 1, 32, 32) in [0, 1] -> (B, 3, 32, 32) in [-1, 1]."""
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
    """Draw random glyphs: images (classes * per_class, 32, 32) uint8 and their int64 class numbers."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label in track(range(classes), description="drawing glyphs"):
        strokes = draw.glyph_strokes(rng)
        images += [np.asarray(draw.glyph_image(rng, strokes)) for _ in range(per_class)]
        labels += [label] * per_class
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def read_fashion(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read Fashion-MNIST's `train` or `t10k` split, padded from 28 to 32 pixels: (n, 32, 32) uint8, int64 labels."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as f:
        images = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    return torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))), torch.from_numpy(labels.astype(np.int64))


@torch.inference_mode()
def fashion_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in [0, 1] among the ten classes of clothes, without augmentation."""
    correct = 0
    for i in range(0, len(images), 500):
        x = images[i : i + 500, None].float().div(127.5).sub(1).expand(-1, 3, -1, -1)
        correct += int((model(x)[:, :FASHION_CLASSES].argmax(1) == labels[i : i + 500]).sum())
    return correct / len(images)


if __name__ == "__main__":
    main()
